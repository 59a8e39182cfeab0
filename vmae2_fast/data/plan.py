"""What is cut out of a video: a small plan drawn once, and the deterministic code that carries it out.

The frames and windows of a clip are a pure function of (seed, epoch, position, attempt) and, for a window, the view.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from ..ops.resize import Window, resize_crop
from . import sampling
from .sampling import Purpose, counter_rng


class ClipPlan(NamedTuple):
    """Frames and windows of one clip."""

    frames: np.ndarray
    """Frame ids, int64 [T], shared by all views."""
    windows: tuple[Window, ...]
    """One per view."""


@dataclass(frozen=True, kw_only=True)
class Planner:
    """Draws the plans of one loader."""

    frames: int
    size: int
    sampling: str
    crop: str
    flip: bool
    views: int
    seed: int

    def frame_ids(self, num_frames: int, stride: int, epoch: int, position: int, attempt: int = 0) -> np.ndarray:
        """Frame ids int64 [T] for a video of `num_frames`."""
        rng = counter_rng(self.seed, epoch, position, 0, Purpose.FRAMES, attempt)
        if self.sampling == "pretrain":
            return sampling.pretrain_indices(num_frames, self.frames, stride, rng)
        if self.sampling == "dense":
            return sampling.dense_indices(num_frames, self.frames, stride, rng)
        return sampling.segment_indices(num_frames, self.frames, rng)

    def windows(self, height: int, width: int, epoch: int, position: int, attempt: int = 0) -> tuple[Window, ...]:
        """The window of each view for frames of `height` x `width` pixels."""
        return tuple(self._window(height, width, epoch, position, view, attempt) for view in range(self.views))

    def _window(self, height: int, width: int, epoch: int, position: int, view: int, attempt: int) -> Window:
        flip = self.flip and counter_rng(self.seed, epoch, position, view, Purpose.FLIP, attempt).randint(2) == 1
        if self.crop == "center":
            return test_windows(height, width, self.size, 1)[0]._replace(flip=flip)
        rng = counter_rng(self.seed, epoch, position, view, Purpose.CROP, attempt)
        if self.crop == "multi_scale":
            return Window(*sampling.multi_scale_crop(height, width, self.size, rng), flip)
        return Window(*sampling.random_resized_crop(height, width, rng), flip)

    def plan(
        self, num_frames: int, height: int, width: int, stride: int, *, epoch: int, position: int, attempt: int = 0
    ) -> ClipPlan:
        """The whole plan of a clip whose video is known."""
        ids = self.frame_ids(num_frames, stride, epoch, position, attempt)
        return ClipPlan(ids, self.windows(height, width, epoch, position, attempt))


def test_windows(height: int, width: int, size: int, crops: int) -> list[Window]:
    """`crops` windows along the long side after the short side is scaled to `size`; one crop is the centre."""
    scaled = sampling.short_side(height, width, size)
    return [Window(top, left, size, size, scaled=scaled) for top, left in sampling.spatial_views(*scaled, size, crops)]


def cut_test_views(video: torch.Tensor, *, segments: int, size: int, crops: int, threads: int | None = None) -> torch.Tensor:
    """Every test view of the frames of one video: uint8 [segments * T, H, W, C] -> [segments * crops, T, size, size, C].

    Segment-major; `threads` as in `vmae2_fast.ops.resize_crop`.
    """
    height, width = video.shape[1:3]
    windows = test_windows(height, width, size, crops)
    return resize_crop(video.unflatten(0, (segments, -1)), [windows] * segments, size, threads=threads)
