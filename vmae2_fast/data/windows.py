"""Sliding windows over a whole video in one pass: every frame is decoded and resized once, whatever the windows share.

The released features for temporal detection are windows of 16 consecutive frames, one every 4 (THUMOS14) or 16 (FineAction);
the released script decodes every window for itself, 16 frames each.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..config import ExtractConfig
from ..ops.resize import resize_crop
from .plan import test_windows
from .sampling import tad_window_starts
from .streaming import stream_video

Prepare = Callable[[Tensor], Tensor]
"""Decoded frames uint8 [N, H, W, 3] -> the frames a model is shown, [N, ...]."""


def window_frames(num_frames: int, frames: int, config: ExtractConfig) -> np.ndarray:
    """Frame ids of every window of `frames` frames, int64 [windows, frames]; ids past the end repeat the last frame.

    Clip level: starts 0, step, ... while a whole window fits (the official rule); a video shorter than a window, where the
    released script fails, has one. Frame level: one behind the other up to the end."""
    span = frames * config.stride
    if config.level == "clip":
        starts = tad_window_starts(max(num_frames, span), config.step or span, span)
    else:
        starts = np.arange(0, num_frames, span)
    return np.minimum(starts[:, None] + config.stride * np.arange(frames), num_frames - 1)


def crop_frames(frames: Tensor, size: int) -> Tensor:
    """uint8 [N, H, W, 3] -> uint8 [N, size, size, 3]: the centre square, as in the centre view of a test."""
    return resize_crop(frames, test_windows(frames.shape[1], frames.shape[2], size, 1), size)[0]


def squash_frames(frames: Tensor, size: int) -> Tensor:
    """uint8 [N, H, W, 3] -> float32 [N, 3, size, size] in [0, 1]: bilinear without antialiasing, the aspect ratio not kept."""
    pixels = frames.permute(0, 3, 1, 2).float() / 255
    if pixels.shape[2:] == (size, size):
        return pixels
    return F.interpolate(pixels, (size, size), mode="bilinear", align_corners=False)


def stream_windows(
    path: str, wanted: np.ndarray, prepare: Prepare, *, batch: int, device: torch.device | str = "cpu"
) -> Iterator[Tensor]:
    """The windows of frame ids `wanted` [windows, T] (ascending) in order, as [<= batch, T, ...] of what `prepare` makes.

    Frames are prepared on `device`, and kept only while a window to come needs them: memory does not grow with the length of
    the video. The video is read to its end. Raises DecodeError naming the file.
    """
    kept: dict[int, Tensor] = {}
    clips: list[Tensor] = []
    count = following = 0
    for chunk in stream_video(path):
        for frame in prepare(torch.from_numpy(chunk).to(device, non_blocking=True)):
            if following < len(wanted) and count >= wanted[following, 0]:
                kept[count] = frame.clone()  # a view would keep the whole chunk alive as long as its last frame is needed
            count += 1
            while following < len(wanted) and wanted[following, -1] < count:
                clips.append(torch.stack([kept[k] for k in wanted[following].tolist()]))
                following += 1
                oldest = wanted[following, 0] if following < len(wanted) else count
                for k in [k for k in kept if k < oldest]:
                    del kept[k]
                if len(clips) == batch:
                    yield torch.stack(clips)
                    clips.clear()
    if clips:
        yield torch.stack(clips)
