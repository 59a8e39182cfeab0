// Dual masks: see vmae2_fast/ops/masks.py for the definition of every bit.
//
// The tube hides the same sites of every frame, and apart from "random" few different frames occur: one in most decoder masks,
// four phases of the running cell. A sample's lists are those of a frame, drawn once, shifted frame by frame.
#include <algorithm>
#include <cstring>

#include "../mask_plan.h"
#include "isa.h"
#include "pages.h"
#include "parallel.h"

namespace vmae2 {
namespace {

constexpr uint32_t kEncoder = 1, kDecoder = 2;

struct Stream {
  uint64_t seed, position, view;
};

using Kind = DecoderKind;

struct Job {
  const MaskPlan& plan;
  Kind kind;
  int64_t sites;
  const int64_t *position, *view;
  int32_t *visible_index, *decode_index, *loss_index, *loss_slot;
};

// Sites of a frame that the decoder reconstructs, and those of them that count, with their places among the first.
struct FrameList {
  std::vector<int32_t> decode, loss_site, loss_slot;
  int64_t decoded = 0, losses = 0;
};

// Scratch of one worker.
struct Work {
  std::vector<uint32_t> words;
  std::vector<uint64_t> ties;
  std::vector<uint8_t> visible, kept;
  std::vector<int32_t> visible_sites;
  std::vector<FrameList> lists;
  int64_t phase = 0;

  Work(const Job& job, int64_t items) {
    const auto most = static_cast<size_t>(std::max(job.sites, items)), sites = static_cast<size_t>(job.sites);
    words.resize((most + 63) / 64 * 64);
    ties.reserve(most);
    visible.resize(sites);
    kept.resize(most);
    visible_sites.resize(sites + 1);
    lists.resize(job.kind == Kind::running_cell ? 4 : job.kind == Kind::random ? static_cast<size_t>(job.plan.frames) : 1);
    for (FrameList& list : lists) {
      // One more: the place after the last is written too, before it is known whether it counts.
      for (auto* ids : {&list.decode, &list.loss_site, &list.loss_slot}) ids->resize(sites + 1);
    }
    if (job.kind == Kind::running_cell) {
      for (int64_t turn = 0; turn < 4; ++turn) {
        FrameList& list = lists[static_cast<size_t>(turn)];
        for (int64_t site = 0; site < job.sites; ++site) {
          const int64_t y = site / job.plan.width, x = site % job.plan.width;
          if ((2 * (y % 2) + x % 2 + turn + 1) % 4 < job.plan.kept) continue;
          list.decode[static_cast<size_t>(list.decoded++)] = static_cast<int32_t>(site);
        }
      }
    }
    if (job.kind == Kind::frame) {
      lists[0].decoded = job.sites;
      for (size_t site = 0; site < sites; ++site) lists[0].decode[site] = static_cast<int32_t>(site);
    }
  }
};

}  // namespace
}  // namespace vmae2

#define VMAE2_KERNELS "masks_kernels.h"
#include "each_isa.h"

namespace vmae2 {

void dual_mask(const int64_t* position, const int64_t* view, int64_t batch, const MaskPlan& plan, int32_t* visible_index,
               int32_t* decode_index, int32_t* loss_index, int32_t* loss_slot, int threads) {
  const Kind kind = decoder_kind(plan.decoder);
  const int64_t items = decoder_items(plan, kind), sites = plan.height * plan.width, tokens = plan.frames * sites;
  const Job job{plan, kind, sites, position, view, visible_index, decode_index, loss_index, loss_slot};
  // Allocated before threads start, where a failure can still be reported.
  std::vector<Work> work(static_cast<size_t>(std::max(1, threads)), Work(job, items));
  expect_writes(decode_index, 4 * batch * plan.decoded);
  expect_writes(loss_index, 4 * batch * plan.loss);
  expect_writes(loss_slot, 4 * batch * plan.loss);
  const auto kernel = VMAE2_PICK(draw_samples);
  // Drawing and ordering an item costs about as much as eight elements of a copy.
  parallel_slices(batch, (sites + items) * 8 + tokens * 2, threads, [&](int64_t begin, int64_t end, int64_t worker) {
    kernel(job, work[static_cast<size_t>(worker)], begin, end);
  });
}

}  // namespace vmae2
