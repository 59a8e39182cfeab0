"""Sliding windows over an untrimmed video in one pass: every frame is decoded and resized once, whatever the windows share.

So are the released features for temporal detection: windows of 16 consecutive frames, one every 4 (THUMOS14) or 16
(FineAction), each frame stretched to the model's square by plain bilinear interpolation and divided by 255. The released
script decodes every window for itself, 16 frames each.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..ops.patches import IMAGENET_MEAN, IMAGENET_STD
from .probing import probe
from .sampling import tad_window_starts
from .streaming import stream_video

Normalize = Literal["none", "imagenet"]
"""Pixels in [0, 1] as the released features were taken, or by ImageNet's mean and deviation as the models were trained."""


def window_starts(num_frames: int, frames: int, step: int) -> np.ndarray:
    """First frames of the windows, int64; a video shorter than a window has one, which repeats its last frame."""
    return tad_window_starts(max(num_frames, frames), step, frames)


def resize_frames(frames: Tensor, size: int, normalize: Normalize) -> Tensor:
    """uint8 [N, H, W, 3] as float32 [N, 3, size, size]: bilinear without antialiasing, the aspect ratio not kept."""
    pixels = frames.permute(0, 3, 1, 2).float() / 255
    if pixels.shape[2:] != (size, size):
        pixels = F.interpolate(pixels, (size, size), mode="bilinear", align_corners=False)
    if normalize == "imagenet":
        mean, std = (pixels.new_tensor(v)[:, None, None] for v in (IMAGENET_MEAN, IMAGENET_STD))
        pixels = (pixels - mean) / std
    return pixels


def stream_windows(
    path: str, *, frames: int, step: int, size: int, batch: int, normalize: Normalize, device: torch.device | str = "cpu"
) -> Iterator[Tensor]:
    """The windows of a video in order, float32 [<= batch, 3, frames, size, size] on `device`.

    Frames are resized on `device`, and kept only while a window to come needs them: memory does not grow with the length of
    the video. Raises DecodeError naming the file.
    """
    starts = deque(window_starts(probe(path).num_frames, frames, step).tolist())
    kept: deque[Tensor] = deque()  # frames first, first + 1, ...
    first = count = 0
    clips: list[Tensor] = []

    def take() -> None:
        clips.append(torch.stack([kept[starts[0] - first + i] for i in range(frames)], dim=1))
        starts.popleft()

    for chunk in stream_video(path):
        pixels = resize_frames(torch.from_numpy(chunk).to(device, non_blocking=True), size, normalize)
        for frame in pixels.unbind():
            if starts and count >= starts[0]:
                # a view would keep the whole chunk alive as long as its last frame is needed
                kept.append(frame.clone())
            else:
                first = count + 1
            count += 1
            if starts and count == starts[0] + frames:
                take()
                while kept and (not starts or first < starts[0]):
                    kept.popleft()
                    first += 1
                if len(clips) == batch:
                    yield torch.stack(clips)
                    clips.clear()
    if starts and kept:  # shorter than a window
        kept.extend([kept[-1]] * (frames - len(kept)))
        take()
    if clips:
        yield torch.stack(clips)
