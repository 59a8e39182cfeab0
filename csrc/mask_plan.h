// The decoder masks by name, and what a plan must satisfy on every device. See vmae2_fast/ops/masks.py.
#pragma once

#include <stdexcept>

#include "ops.h"

namespace vmae2 {

enum class DecoderKind { running_cell, none, frame, random, tube };

inline DecoderKind decoder_kind(const std::string& name) {
  if (name == "running_cell") return DecoderKind::running_cell;
  if (name == "none") return DecoderKind::none;
  if (name == "frame") return DecoderKind::frame;
  if (name == "random") return DecoderKind::random;
  if (name == "tube") return DecoderKind::tube;
  throw std::invalid_argument("dual_mask: unknown decoder mask " + name);
}

// Items among which the decoder's mask is drawn: frames, tokens or sites. Throws for a plan that no mask has.
inline int64_t decoder_items(const MaskPlan& plan, DecoderKind kind) {
  const int64_t sites = plan.height * plan.width, tokens = plan.frames * sites;
  const int64_t items = kind == DecoderKind::frame ? plan.frames : kind == DecoderKind::random ? tokens : sites;
  if (plan.frames < 1 || plan.height < 1 || plan.width < 1 || tokens > INT32_MAX || plan.visible_sites < 1 ||
      plan.visible_sites > sites || plan.kept < 0 || (kind != DecoderKind::running_cell && plan.kept > items)) {
    throw std::invalid_argument("dual_mask: grid or counts out of range");
  }
  return items;
}

}  // namespace vmae2
