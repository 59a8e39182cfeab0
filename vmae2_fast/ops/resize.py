"""Windows of decoded frames, flipped and resized to the size of a clip: one pass from uint8 frames to uint8 clips.

The filter is the antialiased bilinear one of `F.interpolate(mode="bilinear", antialias=True, align_corners=False)` on the
window alone. Along an axis of n pixels resized to a grid of m, with M = max(n, m), everything is a whole number:

    weight(i, j) = max(0, 2M - |(2j + 1) m - (2i + 1) n|)                     output i, source j, 0 <= j < n
    out(y, x)    = sum_jk weight(y, j) weight(x, k) source(j, k) / (sum_j weight(y, j) sum_k weight(x, k))

and the quotient is rounded to the nearest integer, halves up. Every backend computes these integers exactly: clips are the
same bits on every device, for any number of threads and whatever else is in the call. The floor is the bytes of the windows
read once and of the clips written once.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple, cast

import torch
from torch import Tensor

from .. import backend
from . import _native
from ._register import check, define, kernel

MAX_SIDE = 8192
"""Largest height and width of a window and of the grid it is resized to: sums of any ratio stay within 63 bits."""


class Window(NamedTuple):
    """One view of decoded frames: [top:top+height, left:left+width] of them, resized to the clip's size."""

    top: int
    left: int
    height: int
    width: int
    flip: bool = False
    """Mirrored left to right."""
    scaled: tuple[int, int] | None = None
    """The whole frame is resized to this height and width and the window, as large as the clip, cut out of that (validation
    and test). Only the pixels of the window are computed."""


def tap_count(source: int, grid: int) -> int:
    """Taps an output: the number of sources that can have a weight."""
    return min(source, -(-2 * max(source, grid) // grid))


@functools.lru_cache(maxsize=256)
def _taps(source: int, grid: int, start: int, size: int, flip: bool) -> tuple[Tensor, Tensor]:
    """First source of each output [size] and its weights [size, taps] (int64), for outputs [start, start + size)."""
    output = torch.arange(start, start + size)
    if flip:
        output = output.flip(0)
    reach, count = 2 * max(source, grid), tap_count(source, grid)
    centre = (2 * output + 1) * source
    first = ((centre - reach - grid).div(2 * grid, rounding_mode="floor") + 1).clamp(0, source - count)
    distance = (2 * (first[:, None] + torch.arange(count)) + 1) * grid - centre[:, None]
    return first, (reach - distance.abs()).clamp(min=0)


def _filter(pixels: Tensor, dim: int, first: Tensor, weight: Tensor) -> Tensor:
    """sum_k weight[i, k] * pixels[first[i] + k] along `dim` (0 or 1) of int64 [H, W, C]."""
    shape = [-1 if d == dim else 1 for d in range(3)]
    total = pixels.new_zeros([len(first) if d == dim else n for d, n in enumerate(pixels.shape)])
    for k in range(weight.shape[1]):
        total.addcmul_(pixels.index_select(dim, first + k), weight[:, k].view(shape))
    return total


def resize_crop_reference(buffer: Tensor, table: Tensor, out: Tensor, threads: int) -> None:
    """The specification: the formula above, frame by frame, rows first."""
    frames, height, width, channels = out.shape[1:]
    for clip, row in zip(out, table.tolist(), strict=True):
        offset, frame_stride, line_stride, window_h, window_w, grid_h, grid_w, grid_top, grid_left, flip = row
        video = buffer.as_strided(
            (frames, window_h, window_w, channels),
            (frame_stride, line_stride, channels, 1),
            buffer.storage_offset() + offset,
        )
        y_first, y_weight = (t.to(buffer.device) for t in _taps(window_h, grid_h, grid_top, height, False))
        x_first, x_weight = (t.to(buffer.device) for t in _taps(window_w, grid_w, grid_left, width, bool(flip)))
        total = y_weight.sum(1)[:, None, None] * x_weight.sum(1)[:, None]
        for image, frame in zip(clip, video, strict=True):
            sums = _filter(_filter(frame.long(), 0, y_first, y_weight), 1, x_first, x_weight)
            image.copy_((2 * sums + total).div_(2 * total, rounding_mode="floor"))


def _resize_native(buffer: Tensor, table: Tensor, out: Tensor, threads: int) -> None:
    _native.extension().resize_crop(
        _native.address(buffer, (torch.uint8,), "resize_crop: buffer [bytes]"),
        buffer.numel(),
        _native.address(table, (torch.int64,), "resize_crop: table"),
        *out.shape,
        _native.address(out, (torch.uint8,), "resize_crop: out [B, T, H, W, C]"),
        threads or torch.get_num_threads(),
    )


def _why_not_native(device: torch.device) -> str | None:
    return backend.why_not_native(device) or ("the C++ kernel runs on the cpu" if device.type != "cpu" else None)


backend.register_op(
    "resize_crop",
    {
        "reference": backend.Implementation(resize_crop_reference),
        "native": backend.Implementation(_resize_native, _why_not_native),
        "triton": backend.Implementation(kernel("_resize_triton", "resize_crop"), backend.why_not_triton),
    },
    {"cpu": ("native", "reference"), "cuda": ("triton", "reference"), "*": ("reference",)},
)

_CLIP = ("offset", "frames", "height", "width", "frame_stride", "line_stride")
_WINDOW = ("clip", "top", "left", "height", "width", "grid_height", "grid_width", "grid_top", "grid_left", "flip")


def _resolve(buffer: Tensor, clips: Tensor, windows: Tensor, out: Tensor) -> Tensor:
    """What kernels follow, one row a view: offset of the window's first pixel, frame stride, line stride, height and width of
    the window and of its grid, first row and column of the grid to compute, flip. Every number is checked on the way."""
    frames, height, width, channels = out.shape[1:]
    sources = clips.tolist()
    for i, row in enumerate(sources):
        offset, count, clip_h, clip_w, frame_stride, line_stride = row
        if count != frames or min(clip_h, clip_w) < 1 or min(offset, frame_stride, line_stride) < 0:
            raise ValueError(
                f"resize_crop: clip {i} must have {frames} frames (as out has) of at least one pixel and no negative offset "
                f"or stride, got {dict(zip(_CLIP, row))}"
            )
        end = offset + (count - 1) * frame_stride + (clip_h - 1) * line_stride + clip_w * channels
        if end > buffer.numel():
            raise ValueError(
                f"resize_crop: clip {i} ends at byte {end} of a buffer of {buffer.numel()}: {dict(zip(_CLIP, row))} with "
                f"{channels} channels"
            )
    table = []
    for v, row in enumerate(windows.tolist()):
        source, top, left, window_h, window_w, grid_h, grid_w, grid_top, grid_left, flip = row
        if not 0 <= source < len(sources):
            raise ValueError(f"resize_crop: window {v} names clip {source} of {len(sources)}")
        offset, _, clip_h, clip_w, frame_stride, line_stride = sources[source]
        if min(top, left) < 0 or min(window_h, window_w) < 1 or top + window_h > clip_h or left + window_w > clip_w:
            raise ValueError(
                f"resize_crop: window {v}, {window_h} x {window_w} pixels at ({top}, {left}), must hold a pixel and lie "
                f"inside its frames of {clip_h} x {clip_w}"
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
        offset += top * line_stride + left * channels
        table.append([offset, frame_stride, line_stride, window_h, window_w, grid_h, grid_w, grid_top, grid_left, flip])
    return torch.tensor(table, dtype=torch.int64)


def _body(buffer: Tensor, clips: Tensor, windows: Tensor, out: Tensor, threads: int) -> None:
    table = _resolve(buffer, clips, windows, out)
    if out.numel():
        backend.run("resize_crop", backend.pick("resize_crop", buffer.device), buffer, table, out, threads)


_resize_crop = define(
    "resize_crop(Tensor buffer, Tensor clips, Tensor windows, Tensor(a!) out, int threads) -> ()",
    _body,
    lambda *_: None,
)


def resize_crop_packed(buffer: Tensor, clips: Tensor, windows: Tensor, out: Tensor, *, threads: int | None = None) -> Tensor:
    """`resize_crop` for clips of different sizes in one buffer: fills and returns `out`, uint8 [B, T, H, W, C].

    Args:
        buffer: uint8 [bytes], contiguous; frames lie in it channels-last, C bytes a pixel.
        clips: int64 [N, 6] on the CPU: offset of the first byte, frames (T), height and width in pixels, strides of frames and
            of lines in bytes.
        windows: int64 [B, 10] on the CPU, one row a view: the row of `clips` it is cut from; top, left, height and width of
            its source window; height and width of the grid that window is resized to; the grid's first row and column to
            compute (H x W of it are); flip, 0 or 1.
        out: contiguous, on the device of `buffer`; T, H, W and C (1 to 4) are taken from it.
        threads: as in `resize_crop`.

    The tables stay on the CPU because their numbers are checked before a kernel follows them. Raises ValueError for shapes,
    dtypes or numbers that do not fit, naming the row.
    """
    check(
        buffer.dtype == torch.uint8 and buffer.ndim == 1 and buffer.is_contiguous(),
        f"resize_crop: buffer must be contiguous uint8 [bytes], got {buffer.dtype} {tuple(buffer.shape)}",
    )
    for name, table, columns in (("clips", clips, len(_CLIP)), ("windows", windows, len(_WINDOW))):
        check(
            table.dtype == torch.int64 and table.ndim == 2 and table.shape[1] == columns and table.device.type == "cpu",
            f"resize_crop: {name} must be int64 [rows, {columns}] on the cpu, got {table.dtype} {tuple(table.shape)} on "
            f"{table.device}",
        )
    check(
        out.dtype == torch.uint8 and out.ndim == 5 and out.shape[0] == windows.shape[0] and out.is_contiguous(),
        f"resize_crop: out must be contiguous uint8 [{windows.shape[0]}, T, H, W, C], got {out.dtype} {tuple(out.shape)}",
    )
    check(out.device == buffer.device, f"resize_crop: out is on {out.device}, the frames on {buffer.device}")
    check(1 <= out.shape[4] <= 4, f"resize_crop: frames must have 1 to 4 channels, got {out.shape[4]}")
    check(min(out.shape[2:4]) >= 1, f"resize_crop: clips must have at least one pixel, got {tuple(out.shape)}")
    check(threads is None or threads >= 1, f"resize_crop: threads must be positive, got {threads}")
    _resize_crop(buffer, clips, windows, out, threads or 0)
    return out


def _window_row(clip: int, window: Window, frame: tuple[int, int], size: tuple[int, int]) -> list[int]:
    """`window` as a row of the `windows` of `resize_crop_packed`."""
    if not isinstance(window, Window):
        raise ValueError(
            "resize_crop: windows must be a sequence of Window for frames [T, H, W, C], and of several clips one such "
            f"sequence for each, got {window!r}"
        )
    if window.scaled is None:
        return [clip, *window[:4], *size, 0, 0, window.flip]
    check(
        (window.height, window.width) == size,
        f"resize_crop: a window of scaled frames must be as large as the clip, {size[0]} x {size[1]}, got {window}",
    )
    return [clip, 0, 0, *frame, *window.scaled, window.top, window.left, window.flip]


def _side_by_side(clips: Sequence[Tensor]) -> tuple[int, int, Tensor]:
    """Frames and channels of all clips, and the clips in one buffer."""
    check(len(clips) > 0, "resize_crop: the sequence of clips is empty")
    first = clips[0]
    for clip in clips:
        same = clip.device == first.device and clip.ndim == first.ndim == 4
        if not same or clip.dtype != torch.uint8 or clip.shape[::3] != first.shape[::3]:
            raise ValueError(
                "resize_crop: frames must be uint8 [T, H, W, C], with one T, C and device for all clips, got "
                f"{clip.dtype} {tuple(clip.shape)} on {clip.device} beside {tuple(first.shape)} on {first.device}"
            )
    return first.shape[0], first.shape[3], torch.cat([clip.reshape(-1) for clip in clips])


def resize_crop(
    frames: Tensor | Sequence[Tensor],
    windows: Sequence[Window] | Sequence[Sequence[Window]],
    size: int | tuple[int, int],
    *,
    out: Tensor | None = None,
    threads: int | None = None,
) -> Tensor:
    """Cut windows out of decoded frames and resize them, antialiased bilinear: contiguous uint8 [B, T, size, size, C].

    Args:
        frames: uint8 [T, H, W, C] of one clip, with one `Window` for each view; or the clips of a batch, [N, T, H, W, C] or a
            sequence of [T, H, W, C] of any heights and widths, with a sequence of windows for each clip. Rows of the result
            are clip-major. A sequence is first copied into one buffer (`resize_crop_packed` takes such a buffer), and so are
            frames that are not contiguous.
        windows: see `Window`. Identity sizes copy pixels exactly.
        size: height and width of the result in pixels, one number for both.
        out: where to write the result; must not share memory with `frames`.
        threads: CPU threads of this call; None: torch's. Callers that run several calls side by side say 1.

    Raises ValueError for a window outside its frame, sides above `MAX_SIDE`, or shapes that do not fit.
    """
    height, width = (size, size) if isinstance(size, int) else size
    sides: list[tuple[int, int]]
    if isinstance(frames, Tensor):
        check(
            frames.ndim in (4, 5) and frames.dtype == torch.uint8,
            f"resize_crop: frames must be uint8 [T, H, W, C] or [N, T, H, W, C], got {frames.dtype} {tuple(frames.shape)}",
        )
        t, h, w, c = frames.shape[-4:]
        sides, buffer = [(h, w)] * (frames.shape[0] if frames.ndim == 5 else 1), frames.reshape(-1)
        nested = windows if frames.ndim == 5 else [windows]
    else:
        t, c, buffer = _side_by_side(frames)
        sides, nested = [(clip.shape[1], clip.shape[2]) for clip in frames], windows
    views = cast("Sequence[Sequence[Window]]", nested)
    check(len(sides) == len(views), f"resize_crop: {len(sides)} clips, but windows for {len(views)}")
    clip_rows, window_rows, offset = [], [], 0
    for i, (frame, own) in enumerate(zip(sides, views, strict=True)):
        line = frame[1] * c
        clip_rows.append([offset, t, *frame, frame[0] * line, line])
        window_rows += [_window_row(i, window, frame, (height, width)) for window in own]
        offset += t * frame[0] * line
    shape = (len(window_rows), t, height, width, c)
    if out is None:
        out = buffer.new_empty(shape)
    check(out.shape == shape, f"resize_crop: out must be {shape}, got {tuple(out.shape)}")
    clips = torch.tensor(clip_rows, dtype=torch.int64).view(-1, len(_CLIP))
    table = torch.tensor(window_rows, dtype=torch.int64).view(-1, len(_WINDOW))
    return resize_crop_packed(buffer, clips, table, out, threads=threads)
