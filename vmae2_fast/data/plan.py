"""What is cut out of a video: a small plan drawn once, and the deterministic code that carries it out.

The frames and windows of a clip are a pure function of (seed, epoch, position, attempt) and, for a window, the view.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from . import sampling
from .sampling import Purpose, counter_rng


class Window(NamedTuple):
    """One view of decoded frames: [top:top+height, left:left+width] of them, brought to the clip's size."""

    top: int
    left: int
    height: int
    width: int
    flip: bool = False
    """Mirrored left to right."""
    scaled: tuple[int, int] | None = None
    """Frames are brought to this height and width before the window is cut (validation and test)."""


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


def cut(video: torch.Tensor, window: Window, size: int) -> torch.Tensor:
    """Carry out a window: uint8 [T, H, W, C] -> contiguous uint8 [T, size, size, C], antialiased bilinear."""
    if window.scaled is not None:
        video = _resize(video, window.scaled)
    clip = video[:, window.top:window.top + window.height, window.left:window.left + window.width]
    clip = _resize(clip, (size, size))
    return (clip.flip(2) if window.flip else clip).contiguous()


def _resize(video: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    if tuple(video.shape[1:3]) == size:
        return video
    # channels-last memory is what torch's uint8 kernel wants and what a THWC clip is: no copy on either side
    out = F.interpolate(video.permute(0, 3, 1, 2), size=size, mode="bilinear", antialias=True, align_corners=False)
    return out.permute(0, 2, 3, 1)
