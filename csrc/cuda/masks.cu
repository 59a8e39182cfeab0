// Dual masks on the GPU, a block a sample: see vmae2_fast/ops/masks.py for the definition of every bit.
//
// No word of a draw is kept: Philox is computed again wherever a word is wanted (some hundred instructions for four), so
// any number of tokens fits a block and memory sees the index lists only. position and view are read by the kernel, so a
// replayed CUDA graph draws fresh masks after they were refilled.
#include "../mask_plan.h"
#include "launch.cuh"

namespace vmae2 {
namespace cuda {
namespace {

using Kind = DecoderKind;

constexpr uint32_t kEncoder = 1, kDecoder = 2;
constexpr int kThreads = 256, kWarps = kThreads / kWarp;
constexpr int kBins = 256;       // a selection looks at 8 bits at a time
constexpr int kLane = 4;         // words of one Philox counter, tokens a thread takes at a time

struct Lane {
  uint32_t words[kLane];
};

// One sample's stream of one purpose.
struct Stream {
  uint32_t position_low, position_high, view, key0, key1;

  __device__ Stream(uint64_t seed, uint32_t purpose, int64_t position, int64_t view_)
      : position_low(static_cast<uint32_t>(position)), position_high(static_cast<uint32_t>(static_cast<uint64_t>(position) >> 32)),
        view(static_cast<uint32_t>(view_)), key0(static_cast<uint32_t>(seed)),
        key1(purpose ^ static_cast<uint32_t>(seed >> 32)) {}

  // Philox 4x32-10 (Salmon, Moraes, Dror, Shaw: Parallel random numbers, as easy as 1, 2, 3; SC 2011).
  __device__ Lane lane(uint32_t number) const {
    uint32_t c0 = position_low, c1 = position_high, c2 = view, c3 = number, k0 = key0, k1 = key1;
#pragma unroll
    for (int round = 0; round < 10; ++round) {
      const uint64_t p0 = uint64_t{0xD2511F53u} * c0, p1 = uint64_t{0xCD9E8D57u} * c2;
      c0 = static_cast<uint32_t>(p1 >> 32) ^ c1 ^ k0;
      c1 = static_cast<uint32_t>(p1);
      c2 = static_cast<uint32_t>(p0 >> 32) ^ c3 ^ k1;
      c3 = static_cast<uint32_t>(p0);
      k0 += 0x9E3779B9u;
      k1 += 0xBB67AE85u;
    }
    return {{c0, c1, c2, c3}};
  }
};

struct Shared {
  int bins[kBins];
  int totals[kWarps];
  int digit, wanted, found;
};

// Which of a draw's items are kept: the key (word, item) is at most the last kept item's.
struct Threshold {
  uint32_t word, item;
  bool none;

  __device__ bool keeps(uint32_t its_word, uint32_t its_item) const {
    return !none && (its_word < word || (its_word == word && its_item <= item));
  }
};

__device__ int inclusive_scan(int value) {
  const int lane = threadIdx.x % kWarp;
#pragma unroll
  for (int step = 1; step < kWarp; step *= 2) {
    const int below = __shfl_up_sync(kAllLanes, value, step);
    if (lane >= step) value += below;
  }
  return value;
}

// The bin that holds the `wanted`-th smallest key, how many keys before it, how many in it; by the first warp.
__device__ void find_bin(Shared& shared) {
  constexpr int share = kBins / kWarp;
  const int lane = threadIdx.x;
  int own = 0;
#pragma unroll
  for (int i = 0; i < share; ++i) own += shared.bins[lane * share + i];
  int before = inclusive_scan(own) - own;
  const int wanted = shared.wanted;
  __syncwarp();
  if (before < wanted && wanted <= before + own) {
    int i = lane * share;
    while (before + shared.bins[i] < wanted) before += shared.bins[i++];
    shared.digit = i;
    shared.wanted = wanted - before;
    shared.found = shared.bins[i];
  }
}

// The `count` smallest (word, item) of a draw, by radix selection from the top: 8 bits of the word, then of the item, until
// all keys in the bin are wanted. Without equal words, which are rare, the four digits of the word are enough.
__device__ Threshold smallest(Shared& shared, const Stream& stream, uint32_t items, uint32_t count) {
  if (count == 0 || count >= items) return {0xffffffffu, 0xffffffffu, count == 0};
  uint32_t word = 0, last = 0;  // found so far of the last kept key
  __syncthreads();  // all have read what an earlier selection found
  if (threadIdx.x == 0) shared.wanted = static_cast<int>(count);
  for (int step = 0; step < 8; ++step) {
    const bool of_word = step < 4;
    const int bit = 24 - 8 * (step % 4);
    uint32_t found = of_word ? word : last;
    __syncthreads();
    shared.bins[threadIdx.x] = 0;
    __syncthreads();
    for (uint32_t number = threadIdx.x; number < (items + kLane - 1) / kLane; number += kThreads) {
      const Lane lane = stream.lane(number);
#pragma unroll
      for (uint32_t j = 0; j < kLane; ++j) {
        const uint32_t item = number * kLane + j, key = of_word ? lane.words[j] : item;
        const bool same = (of_word || lane.words[j] == word) && (bit == 24 || (key ^ found) >> (bit + 8) == 0);
        if (item < items && same) atomicAdd(&shared.bins[key >> bit & (kBins - 1)], 1);
      }
    }
    __syncthreads();
    if (threadIdx.x < kWarp) find_bin(shared);
    __syncthreads();
    found |= static_cast<uint32_t>(shared.digit) << bit;
    // If the rest of the bin is kept, the key's lower digits are all ones.
    const bool ends = shared.wanted == shared.found;
    if (ends) found |= (1u << bit) - 1;
    if (of_word) {
      word = found;
      if (ends) last = 0xffffffffu;
    } else {
      last = found;
    }
    if (ends) break;
  }
  return {word, last, false};
}

// The words of a draw for items in rising order: neighbours share a Philox lane.
struct Reader {
  const Stream& stream;
  const Threshold& threshold;
  uint32_t number = 0xffffffffu;
  Lane lane{};

  __device__ bool keeps(uint32_t item) {
    if (item / kLane != number) {
      number = item / kLane;
      lane = stream.lane(number);
    }
    const uint32_t j = item % kLane;
    const uint32_t word = j == 0 ? lane.words[0] : j == 1 ? lane.words[1] : j == 2 ? lane.words[2] : lane.words[3];
    return threshold.keeps(word, item);
  }
};

struct Sizes {
  int32_t frames, height, width;
  int32_t visible_sites, kept, items;  // as in MaskPlan; items among which the decoder draws
  int32_t visible, decoded, loss;      // lengths of the lists
};

__global__ void __launch_bounds__(kThreads)
    draw(const int64_t* __restrict__ position, const int64_t* __restrict__ view, uint64_t seed, Kind kind,
         const __grid_constant__ Sizes size, int32_t* __restrict__ visible_index, int32_t* __restrict__ decode_index,
         int32_t* __restrict__ loss_index, int32_t* __restrict__ loss_slot) {
  auto& shared = *reinterpret_cast<Shared*>(shared_memory());
  const int64_t b = blockIdx.x;
  const int sites = size.height * size.width, tokens = size.frames * sites;
  const Stream encoder(seed, kEncoder, position[b], view[b]), decoder(seed, kDecoder, position[b], view[b]);
  const Threshold seen = smallest(shared, encoder, sites, size.visible_sites);
  const bool draws = kind == Kind::frame || kind == Kind::random || kind == Kind::tube;
  const Threshold kept = draws ? smallest(shared, decoder, size.items, size.kept) : Threshold{0, 0, true};
  const int phase = kind == Kind::running_cell ? static_cast<int>(decoder.lane(0).words[0] & 3u) : 0;
  int32_t* visible = visible_index + b * size.visible;
  int32_t* decode = decode_index + b * size.decoded;
  int32_t* loss = loss_index + b * size.loss;
  int32_t* slot = loss_slot + b * size.loss;

  Reader encoder_words{encoder, seen}, decoder_words{decoder, kept};
  int listed_visible = 0, listed_decoded = 0, listed_loss = 0;  // by the tokens before this round
  for (int64_t base = 0; base < tokens; base += kThreads * kLane) {
    // Three counts, of at most kWarp * kLane tokens in a warp, share one word: 8 bits each.
    static_assert(kWarp * kLane < 256);
    unsigned flags = 0;
    int own = 0;
#pragma unroll
    for (int j = 0; j < kLane; ++j) {
      const int64_t token = base + threadIdx.x * kLane + j;
      if (token >= tokens) break;
      const int t = static_cast<int>(token) / sites, site = static_cast<int>(token) % sites;
      const bool sees = encoder_words.keeps(site);
      bool decodes = !sees;
      if (kind == Kind::running_cell) {
        const int y = site / size.width, x = site % size.width;
        decodes = (2 * (y % 2) + x % 2 + phase + 1 + t) % 4 >= size.kept;
      } else if (draws) {
        decodes = decoder_words.keeps(kind == Kind::frame ? t : kind == Kind::random ? static_cast<int>(token) : site);
      }
      flags |= (sees | decodes << 1) << (2 * j);
      own += sees + (decodes << 8) + ((decodes && !sees) << 16);
    }
    const int through = inclusive_scan(own);
    __syncthreads();
    if (threadIdx.x % kWarp == kWarp - 1) shared.totals[threadIdx.x / kWarp] = through;
    __syncthreads();
    int v = listed_visible + (through - own) % 256, d = listed_decoded + (through - own) / 256 % 256,
        l = listed_loss + (through - own) / 65536;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) {
      const int total = shared.totals[w], before = w < static_cast<int>(threadIdx.x) / kWarp ? total : 0;
      v += before % 256, d += before / 256 % 256, l += before / 65536;
      listed_visible += total % 256, listed_decoded += total / 256 % 256, listed_loss += total / 65536;
    }
#pragma unroll
    for (int j = 0; j < kLane; ++j) {
      const auto token = static_cast<int32_t>(base + threadIdx.x * kLane + j);
      const bool sees = flags >> (2 * j) & 1, decodes = flags >> (2 * j + 1) & 1;
      // The bounds hold by the plan's arithmetic; they keep a wrong plan from writing past the lists.
      if (sees && v < size.visible) visible[v++] = token;
      if (!decodes || d >= size.decoded) continue;
      if (!sees && l < size.loss) {
        loss[l] = token;
        slot[l++] = d;
      }
      decode[d++] = token;
    }
  }
  for (int i = listed_decoded + threadIdx.x; i < size.decoded; i += kThreads) decode[i] = -1;
  for (int i = listed_loss + threadIdx.x; i < size.loss; i += kThreads) {
    loss[i] = -1;
    slot[i] = 0;
  }
}

}  // namespace
}  // namespace cuda

void dual_mask(const int64_t* position, const int64_t* view, int64_t batch, const MaskPlan& plan, int32_t* visible_index,
               int32_t* decode_index, int32_t* loss_index, int32_t* loss_slot, const Queue& queue) {
  using namespace cuda;
  const Kind kind = decoder_kind(plan.decoder);
  const int64_t items = decoder_items(plan, kind);
  if (plan.decoded < 0 || plan.decoded > INT32_MAX || plan.loss < 0 || plan.loss > INT32_MAX) {
    throw std::invalid_argument("dual_mask: lengths of the lists out of range");
  }
  const auto narrow = [](int64_t value) { return static_cast<int32_t>(value); };
  const Sizes size{narrow(plan.frames), narrow(plan.height), narrow(plan.width), narrow(plan.visible_sites),
                   narrow(plan.kept), narrow(items), narrow(plan.frames * plan.visible_sites), narrow(plan.decoded),
                   narrow(plan.loss)};
  launch("dual_mask", queue, draw, batch, kThreads, sizeof(Shared), position, view, plan.seed, kind, size, visible_index,
         decode_index, loss_index, loss_slot);
}

}  // namespace vmae2
