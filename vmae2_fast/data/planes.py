"""Frames of a video as its decoder holds them: YUV 4:2:0, half the bytes of RGB and no conversion, for `ops.resize_crop`."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from ..ops.yuv import Yuv420, frame_bytes
from .decode import find_frames, rgb_frames

_MATRICES = {1: "bt709", 2: "bt601", 5: "bt601", 6: "bt601"}
"""FFmpeg's AVColorSpace; 2 says nothing, and is taken for BT.601 as FFmpeg's own conversion does."""
_FULL_RANGE = 2
"""FFmpeg's AVCOL_RANGE_JPEG."""


def decode_yuv420(path: str, ids: np.ndarray) -> Yuv420 | torch.Tensor:
    """`decode_video` without its conversion: frames `ids` (int, any order, repeats allowed) as `Yuv420` [len(ids), bytes].

    Files that hold anything but 8-bit YUV 4:2:0 in BT.601 or BT.709, that are rotated, or that change size or color midway
    give RGB, uint8 [len(ids), H, W, 3]; `resize_crop`, `cut_views` and `cut_test_views` take either. FFmpeg's conversion cuts
    fractions off where `resize_crop` rounds: pixels of the planes made RGB differ from those of `decode_video` by up to 3
    levels, about 1 in the mean (more at edges of colors where the height is odd, for which FFmpeg interpolates chroma).
    Raises DecodeError where a frame is missing or damaged.
    """
    ids = np.asarray(ids, dtype=np.int64)
    wanted, place = np.unique(ids, return_inverse=True)
    found = find_frames(path, wanted)
    first, color = found[0], _color(found[0])
    steady = all((f.width, f.height, _color(f)) == (first.width, first.height, color) for f in found)
    if color is None or not steady or round(first.rotation / 90) % 4:
        frames = torch.from_numpy(rgb_frames(path, found))
    else:
        frames = torch.empty((len(found), frame_bytes(first.height, first.width)), dtype=torch.uint8)
        for frame, row in zip(found, frames.numpy(), strict=True):
            _copy_planes(frame, row)
    if not np.array_equal(wanted, ids):
        frames = frames[torch.from_numpy(place)]
    return frames if color is None or frames.ndim == 4 else Yuv420(frames, first.height, first.width, *color)


def _color(frame: Any) -> tuple[str, str] | None:
    """Matrix and range of a frame in YUV 4:2:0, as `Yuv420` names them; None for all others."""
    matrix = _MATRICES.get(int(frame.colorspace))
    if matrix is None or frame.format.name not in ("yuv420p", "yuvj420p"):
        return None
    full = frame.format.name == "yuvj420p" or int(frame.color_range) == _FULL_RANGE
    return matrix, "full" if full else "limited"


def _copy_planes(frame: Any, row: np.ndarray) -> None:
    """Y, U and V without what the decoder keeps behind the end of lines, one behind the other into `row`, uint8 [bytes]."""
    start = 0
    for i, plane in enumerate(frame.planes):
        height, width = ((side + 1) // 2 if i else side for side in (frame.height, frame.width))
        lines = np.frombuffer(plane, dtype=np.uint8).reshape(-1, plane.line_size)
        row[start : start + height * width].reshape(height, width)[...] = lines[:height, :width]
        start += height * width
