"""The tables of `resize_crop`: what callers say of clips and windows, checked, becomes the numbers that kernels follow."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .yuv import NOT_YUV, Coefficients

MAX_SIDE = 8192
"""Largest height and width of a window and of the grid it is resized to: sums of any ratio stay within 63 bits."""

CLIP = ("offset", "frames", "height", "width", "frame_stride", "line_stride", *Coefficients._fields)
WINDOW = ("clip", "top", "left", "height", "width", "grid_height", "grid_width", "grid_top", "grid_left", "flip")


class View(NamedTuple):
    """What kernels follow, one row a view."""

    offset: int
    """Of the window's first pixel, or of its luma."""
    frame_stride: int
    line_stride: int
    """Of luma; of chroma it is half of this, rounded up."""
    height: int
    width: int
    """Of the window."""
    grid_height: int
    grid_width: int
    grid_top: int
    grid_left: int
    """First row and column of the grid to compute."""
    flip: int
    u: int
    v: int
    """Offsets of the window's first chroma samples."""
    odd_top: int
    odd_left: int
    """1 where the window begins with the second luma line or column of these."""
    black: int
    y: int
    """0 where frames are not YUV."""
    rv: int
    gu: int
    gv: int
    bu: int
    """See `yuv.Coefficients`."""


COLUMNS = len(View._fields)
"""Numbers a kernel reads for each view."""


class _Clip(NamedTuple):
    """A row of `clips`, and the offsets of its chroma planes."""

    offset: int
    height: int
    width: int
    frame_stride: int
    line_stride: int
    u: int
    v: int
    color: Coefficients


def _clip(i: int, row: list[int], frames: int, channels: int, bytes: int) -> _Clip:
    offset, count, height, width, frame_stride, line_stride = row[:6]
    color, named = Coefficients(*row[6:]), dict(zip(CLIP, row))
    if count != frames or min(height, width) < 1 or min(offset, frame_stride, line_stride) < 0:
        raise ValueError(
            f"resize_crop: clip {i} must have {frames} frames (as out has) of at least one pixel and no negative offset "
            f"or stride, got {named}"
        )
    u = v = 0
    if color == NOT_YUV:
        end = offset + (height - 1) * line_stride + width * channels
    else:
        if channels != 3 or line_stride < width:
            raise ValueError(
                f"resize_crop: clip {i} is YUV 4:2:0, so out must have 3 channels (it has {channels}) and a line at least "
                f"its width: {named}"
            )
        if not (0 <= color.black < 256 and color.y > 0 and max(map(abs, color)) < 1 << 15):
            raise ValueError(f"resize_crop: clip {i} has coefficients that `yuv.coefficients` does not give: {named}")
        chroma_h, chroma_w, chroma_line = (height + 1) // 2, (width + 1) // 2, (line_stride + 1) // 2
        u = offset + height * line_stride
        v = u + chroma_h * chroma_line
        end = v + (chroma_h - 1) * chroma_line + chroma_w
    if end + (count - 1) * frame_stride > bytes:
        raise ValueError(
            f"resize_crop: clip {i} ends at byte {end + (count - 1) * frame_stride} of a buffer of {bytes}: {named} with "
            f"{channels} channels"
        )
    return _Clip(offset, height, width, frame_stride, line_stride, u, v, color)


def resolve(buffer: Tensor, clips: Tensor, windows: Tensor, out: Tensor) -> Tensor:
    """A `View` for each window, as int64 [B, columns]. Every number is checked on the way."""
    frames, height, width, channels = out.shape[1:]
    sources = [_clip(i, row, frames, channels, buffer.numel()) for i, row in enumerate(clips.tolist())]
    table = []
    for v, row in enumerate(windows.tolist()):
        source, top, left, window_h, window_w, grid_h, grid_w, grid_top, grid_left, flip = row
        if not 0 <= source < len(sources):
            raise ValueError(f"resize_crop: window {v} names clip {source} of {len(sources)}")
        clip = sources[source]
        if min(top, left) < 0 or min(window_h, window_w) < 1 or top + window_h > clip.height or left + window_w > clip.width:
            raise ValueError(
                f"resize_crop: window {v}, {window_h} x {window_w} pixels at ({top}, {left}), must hold a pixel and lie "
                f"inside its frames of {clip.height} x {clip.width}"
            )
        if min(grid_top, grid_left) < 0 or grid_top + height > grid_h or grid_left + width > grid_w or flip not in (0, 1):
            raise ValueError(
                f"resize_crop: window {v} cuts {height} x {width} pixels at ({grid_top}, {grid_left}) out of frames scaled to "
                f"{grid_h} x {grid_w}; they must lie inside, and flip ({flip}) be 0 or 1"
            )
        if max(window_h, window_w, grid_h, grid_w) > MAX_SIDE:
            raise ValueError(
                f"resize_crop: window {v} resizes {window_h} x {window_w} pixels to {grid_h} x {grid_w}; no side may exceed "
                f"{MAX_SIDE}"
            )
        chroma = top // 2 * ((clip.line_stride + 1) // 2) + left // 2
        first = clip.offset + top * clip.line_stride + left * (channels if clip.color == NOT_YUV else 1)
        geometry = (window_h, window_w, grid_h, grid_w, grid_top, grid_left, flip)
        parity = (top % 2, left % 2)
        view = View(
            first, clip.frame_stride, clip.line_stride, *geometry, clip.u + chroma, clip.v + chroma, *parity, *clip.color
        )
        table.append(view)
    return torch.tensor(table, dtype=torch.int64).view(-1, COLUMNS)
