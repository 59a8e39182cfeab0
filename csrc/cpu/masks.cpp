// Dual masks: see vmae2_fast/ops/masks.py for the definition of every bit.
#include <algorithm>
#include <array>

#include "../mask_plan.h"
#include "parallel.h"

namespace vmae2 {
namespace {

constexpr uint32_t kEncoder = 1, kDecoder = 2;

// Philox 4x32-10 (Salmon, Moraes, Dror, Shaw: Parallel random numbers, as easy as 1, 2, 3; SC 2011).
std::array<uint32_t, 4> philox(std::array<uint32_t, 4> c, uint32_t k0, uint32_t k1) {
  for (int round = 0; round < 10; ++round) {
    const uint64_t p0 = uint64_t{0xD2511F53u} * c[0], p1 = uint64_t{0xCD9E8D57u} * c[2];
    c = {static_cast<uint32_t>(p1 >> 32) ^ c[1] ^ k0, static_cast<uint32_t>(p1), static_cast<uint32_t>(p0 >> 32) ^ c[3] ^ k1,
         static_cast<uint32_t>(p0)};
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return c;
}

struct Stream {
  uint64_t seed, position, view;

  std::array<uint32_t, 4> lane(uint32_t purpose, uint32_t lane) const {
    return philox({static_cast<uint32_t>(position), static_cast<uint32_t>(position >> 32), static_cast<uint32_t>(view), lane},
                  static_cast<uint32_t>(seed), purpose ^ static_cast<uint32_t>(seed >> 32));
  }

  // keep[i] = 1 for the `count` items with the smallest (word, i).
  void smallest(uint32_t purpose, int64_t items, int64_t count, std::vector<uint64_t>& keys, std::vector<uint8_t>& keep) const {
    keys.resize(static_cast<size_t>(items));
    for (int64_t i = 0; i < items; i += 4) {
      const auto words = lane(purpose, static_cast<uint32_t>(i / 4));
      for (int64_t j = i; j < std::min(i + 4, items); ++j) {
        keys[static_cast<size_t>(j)] = uint64_t{words[static_cast<size_t>(j - i)]} << 32 | static_cast<uint64_t>(j);
      }
    }
    if (count < items) std::nth_element(keys.begin(), keys.begin() + count, keys.end());
    keep.assign(static_cast<size_t>(items), 0);
    for (int64_t i = 0; i < count; ++i) keep[static_cast<size_t>(keys[static_cast<size_t>(i)] & 0xffffffffu)] = 1;
  }
};

}  // namespace

void dual_mask(const int64_t* position, const int64_t* view, int64_t batch, const MaskPlan& plan, int32_t* visible_index,
               int32_t* decode_index, int32_t* loss_index, int32_t* loss_slot, int threads) {
  using Kind = DecoderKind;
  const Kind kind = decoder_kind(plan.decoder);
  const int64_t sites = plan.height * plan.width, tokens = plan.frames * sites;
  const int64_t items = decoder_items(plan, kind);
  const int64_t visible_count = plan.frames * plan.visible_sites;
  // Philox costs about as much as 16 elements of a copy; a selection visits each key a few times.
  parallel_for(batch, (sites + items) * 32 + tokens * 4, threads, [&](int64_t begin, int64_t end) {
    std::vector<uint64_t> keys;
    std::vector<uint8_t> visible, kept;
    for (int64_t b = begin; b < end; ++b) {
      const Stream stream{plan.seed, static_cast<uint64_t>(position[b]), static_cast<uint64_t>(view[b])};
      stream.smallest(kEncoder, sites, plan.visible_sites, keys, visible);
      int64_t phase = 0;
      if (kind == Kind::running_cell) {
        phase = stream.lane(kDecoder, 0)[0] & 3u;
      } else if (kind != Kind::none) {
        stream.smallest(kDecoder, items, plan.kept, keys, kept);
      }
      const auto decoded = [&](int64_t t, int64_t y, int64_t x, int64_t site) -> bool {
        switch (kind) {
          case Kind::running_cell: return (2 * (y % 2) + x % 2 + phase + 1 + t) % 4 >= plan.kept;
          case Kind::none: return !visible[static_cast<size_t>(site)];
          case Kind::frame: return kept[static_cast<size_t>(t)];
          case Kind::random: return kept[static_cast<size_t>(t * sites + site)];
          case Kind::tube: return kept[static_cast<size_t>(site)];
        }
        return false;
      };
      int32_t* seen = visible_index + b * visible_count;
      int32_t* decode = decode_index + b * plan.decoded;
      int32_t* loss = loss_index + b * plan.loss;
      int32_t* slot = loss_slot + b * plan.loss;
      int64_t decoded_so_far = 0, loss_so_far = 0;
      for (int64_t t = 0; t < plan.frames; ++t) {
        for (int64_t site = 0; site < sites; ++site) {
          const auto token = static_cast<int32_t>(t * sites + site);
          const bool sees = visible[static_cast<size_t>(site)];
          if (sees) *seen++ = token;
          // The bounds hold by the plan's arithmetic; they keep a wrong plan from writing past the lists.
          if (!decoded(t, site / plan.width, site % plan.width, site) || decoded_so_far == plan.decoded) continue;
          if (!sees && loss_so_far < plan.loss) {
            loss[loss_so_far] = token;
            slot[loss_so_far++] = static_cast<int32_t>(decoded_so_far);
          }
          decode[decoded_so_far++] = token;
        }
      }
      std::fill(decode + decoded_so_far, decode + plan.decoded, -1);
      std::fill(loss + loss_so_far, loss + plan.loss, -1);
      std::fill(slot + loss_so_far, slot + plan.loss, 0);
    }
  });
}

}  // namespace vmae2
