"""What is cut out of a video and done to it: a small plan drawn once, and the deterministic code that carries it out.

Frames are a pure function of (seed, epoch, position, attempt); window, flip, operations and erased rectangle of a view of
these and the view's number: workers, devices, batches and what was decoded before change nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import numpy as np
import torch

from ..config import AugmentConfig
from ..ops.resize import Window, resize_crop
from ..ops.yuv import Yuv420, frame_size
from . import sampling
from .augment import Erasure, draw_erasure, erase_
from .randaugment import Operation, draw_operations, parse_policy, randaugment
from .sampling import Purpose, counter_rng


class ViewPlan(NamedTuple):
    """What makes one view out of decoded frames, in the order it is done."""

    operations: tuple[Operation, ...]
    """RandAugment, on whole frames."""
    window: Window
    """Crop, resize and flip."""
    erasure: Erasure | None
    """In pixels of the finished clip."""


class ClipPlan(NamedTuple):
    """Frames and views of one clip."""

    frames: np.ndarray
    """Frame ids, int64 [T], shared by all views."""
    views: tuple[ViewPlan, ...]


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
    augment: AugmentConfig = field(default_factory=AugmentConfig)

    def __post_init__(self) -> None:
        if self.augment.randaugment is not None:
            parse_policy(self.augment.randaugment)  # a policy nobody can read is an error before anything is decoded

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

    def view_plans(self, height: int, width: int, epoch: int, position: int, attempt: int = 0) -> tuple[ViewPlan, ...]:
        """The plan of each view for frames of `height` x `width` pixels."""
        windows = self.windows(height, width, epoch, position, attempt)
        return tuple(self._view(window, epoch, position, view, attempt) for view, window in enumerate(windows))

    def _view(self, window: Window, epoch: int, position: int, view: int, attempt: int) -> ViewPlan:
        operations: tuple[Operation, ...] = ()
        if self.augment.randaugment is not None:
            rng = counter_rng(self.seed, epoch, position, view, Purpose.AUGMENT, attempt)
            operations = draw_operations(parse_policy(self.augment.randaugment), rng)
        erasure = None
        if self.augment.erase > 0:
            rng = counter_rng(self.seed, epoch, position, view, Purpose.ERASE, attempt)
            erasure = draw_erasure(self.augment.erase, self.size, rng)
        return ViewPlan(operations, window, erasure)

    def plan(
        self, num_frames: int, height: int, width: int, stride: int, *, epoch: int, position: int, attempt: int = 0
    ) -> ClipPlan:
        """The whole plan of a clip whose video is known."""
        ids = self.frame_ids(num_frames, stride, epoch, position, attempt)
        return ClipPlan(ids, self.view_plans(height, width, epoch, position, attempt))


def cut_views(
    video: torch.Tensor | Yuv420,
    plans: Sequence[ViewPlan],
    size: int,
    *,
    out: torch.Tensor | None = None,
    threads: int | None = None,
) -> torch.Tensor:
    """Every view of the frames of one clip, on the frames' device: uint8 [T, H, W, C] -> [V, T, size, size, C].

    Frames in YUV 4:2:0 become RGB where they are read, and whole only for plans that augment whole frames.
    out: uint8 of that shape, written in place of a new tensor; `threads` as in `vmae2_fast.ops.resize_crop`.
    """
    if isinstance(video, Yuv420):
        pixels, channels = video.planes, 3
        if any(plan.operations for plan in plans):
            side = frame_size(video)
            video = resize_crop(video, [Window(0, 0, *side)], side, threads=threads)[0]
    else:
        pixels, channels = video, video.shape[-1]
    if out is None:
        out = pixels.new_empty((len(plans), pixels.shape[0], size, size, channels))
    if isinstance(video, torch.Tensor) and any(plan.operations for plan in plans):
        for plan, view in zip(plans, out.split(1), strict=True):  # one at a time: whole frames of all views are large
            frames = randaugment(video[None], [plan.operations])[0] if plan.operations else video
            resize_crop(frames, [plan.window], size, out=view, threads=threads)
    else:
        resize_crop(video, [plan.window for plan in plans], size, out=out, threads=threads)
    if any(plan.erasure for plan in plans):
        erase_(out, [plan.erasure for plan in plans])
    return out


def test_windows(height: int, width: int, size: int, crops: int) -> list[Window]:
    """`crops` windows along the long side after the short side is scaled to `size`; one crop is the centre."""
    scaled = sampling.short_side(height, width, size)
    return [Window(top, left, size, size, scaled=scaled) for top, left in sampling.spatial_views(*scaled, size, crops)]


def cut_test_views(
    video: torch.Tensor | Yuv420,
    *,
    segments: int,
    size: int,
    crops: int,
    out: torch.Tensor | None = None,
    threads: int | None = None,
) -> torch.Tensor:
    """Every test view of the frames of one video: uint8 [segments * T, H, W, C] -> [segments * crops, T, size, size, C].

    Segment-major; frames may be in YUV 4:2:0; `out` and `threads` as in `cut_views`.
    """
    clips: torch.Tensor | Yuv420
    if isinstance(video, Yuv420):
        clips = replace(video, planes=video.planes.unflatten(0, (segments, -1)))
    else:
        clips = video.unflatten(0, (segments, -1))
    windows = test_windows(*frame_size(video), size, crops)
    return resize_crop(clips, [windows] * segments, size, out=out, threads=threads)
