"""Windows of decoded frames, flipped and resized to the size of a clip: one pass from uint8 frames to uint8 clips.

The filter is the antialiased bilinear one of `F.interpolate(mode="bilinear", antialias=True, align_corners=False)` on the
window alone. Along an axis of n pixels resized to a grid of m, with M = max(n, m), everything is a whole number:

    weight(i, j) = max(0, 2M - |(2j + 1) m - (2i + 1) n|)                     output i, source j, 0 <= j < n
    out(y, x)    = sum_jk weight(y, j) weight(x, k) source(j, k) / (sum_j weight(y, j) sum_k weight(x, k))

and the quotient is rounded to the nearest integer, halves up. Every backend computes these integers exactly: clips are the
same bits on every device, for any number of threads and whatever else is in the call. The floor is the bytes of the windows
read once and of the clips written once.

Frames are RGB (or any other 1 to 4 channels), or YUV 4:2:0 planes as decoders give them (`yuv.Yuv420`). Of these, pixels the
filter reads are made RGB on the way, rounded to whole levels as `yuv` says: the clip of the RGB frames, without the frames.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Sequence
from typing import NamedTuple, SupportsIndex, cast

import torch
from torch import Tensor

from .. import backend
from . import _native
from ._register import check, check_tensor, define, kernel, register_backends
from ._resize_table import CLIP, WINDOW, View, resolve
from .yuv import NOT_YUV, Coefficients, Yuv420, coefficients, frame_bytes, rgb_reference


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


def _window_pixels(buffer: Tensor, view: View, frames: int, channels: int) -> list[Tensor]:
    """Each frame's pixels of a window, int64 [H, W, C]."""

    def plane(offset: int, height: int, width: int, line: int, channels: int = 1) -> Tensor:
        start = buffer.storage_offset() + offset
        return buffer.as_strided((frames, height, width, channels), (view.frame_stride, line, channels, 1), start)

    video = plane(view.offset, view.height, view.width, view.line_stride, channels if view.y == 0 else 1)
    if view.y == 0:
        return [frame.long() for frame in video]
    rows = torch.arange(view.odd_top, view.odd_top + view.height, device=buffer.device) // 2
    columns = torch.arange(view.odd_left, view.odd_left + view.width, device=buffer.device) // 2
    sides = (view.odd_top + view.height + 1) // 2, (view.odd_left + view.width + 1) // 2, (view.line_stride + 1) // 2
    u, v = (plane(offset, *sides)[:, rows][:, :, columns] for offset in (view.u, view.v))
    color = Coefficients(*view[-len(NOT_YUV) :])
    return [rgb_reference(y[..., 0], u[..., 0], v[..., 0], color) for y, u, v in zip(video, u, v, strict=True)]


def resize_crop_reference(buffer: Tensor, table: Tensor, out: Tensor, threads: int) -> None:
    """The specification: the formula above, frame by frame, rows first."""
    frames, height, width, channels = out.shape[1:]
    for clip, row in zip(out, table.tolist(), strict=True):
        view = View(*row)
        y_taps = _taps(view.height, view.grid_height, view.grid_top, height, False)
        x_taps = _taps(view.width, view.grid_width, view.grid_left, width, bool(view.flip))
        y_first, y_weight = (t.to(buffer.device) for t in y_taps)
        x_first, x_weight = (t.to(buffer.device) for t in x_taps)
        total = y_weight.sum(1)[:, None, None] * x_weight.sum(1)[:, None]
        for image, frame in zip(clip, _window_pixels(buffer, view, frames, channels), strict=True):
            sums = _filter(_filter(frame, 0, y_first, y_weight), 1, x_first, x_weight)
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


register_backends(
    "resize_crop", resize_crop_reference, native=_resize_native, triton=kernel("_resize_triton", "resize_crop"),
    why_not_native=backend.why_not_cpp_kernel,
)  # fmt: skip


def _body(buffer: Tensor, clips: Tensor, windows: Tensor, out: Tensor, threads: int) -> None:
    table = resolve(buffer, clips, windows, out)
    if out.numel():
        if not out.is_meta:
            ours, theirs = out.data_ptr(), buffer.data_ptr()  # contiguous bytes both
            check(
                ours + out.numel() <= theirs or theirs + buffer.numel() <= ours,
                "resize_crop: out shares memory with the frames, which it would overwrite while they are read",
            )
        backend.run("resize_crop", backend.pick("resize_crop", buffer.device), buffer, table, out, threads)


_resize_crop = define(
    "resize_crop(Tensor buffer, Tensor clips, Tensor windows, Tensor(a!) out, int threads) -> ()",
    _body,
    lambda *_: None,
)


def resize_crop_packed(buffer: Tensor, clips: Tensor, windows: Tensor, out: Tensor, *, threads: int | None = None) -> Tensor:
    """`resize_crop` for clips of different sizes in one buffer: fills and returns `out`, uint8 [B, T, H, W, C].

    Args:
        buffer: uint8 [bytes], contiguous; frames lie in it channels-last, C bytes a pixel, or as YUV 4:2:0 planes: luma lines,
            behind the last of them those of U, then of V, these with half the stride, rounded up.
        clips: int64 [N, 12] on the CPU: offset of the first byte, frames (T), height and width in pixels, strides of frames
            and of (luma) lines in bytes, and `yuv.coefficients` of its matrix and range, or `yuv.NOT_YUV`.
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
    for name, table, columns in (("clips", clips, len(CLIP)), ("windows", windows, len(WINDOW))):
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
    check(threads is None or 1 <= threads < 2**31, f"resize_crop: threads must be positive and below 2**31, got {threads}")
    _resize_crop(buffer, clips, windows, out, threads or 0)
    return out


def _whole(values: Sequence[SupportsIndex], message: str) -> list[int]:
    """`values` as integers, of NumPy's and others'. Raises ValueError for a fraction, where int() would cut it off."""
    try:
        return [operator.index(value) for value in values]
    except TypeError:
        raise ValueError(message) from None


def _window_row(clip: int, window: Window, frame: tuple[int, int], size: tuple[int, int]) -> list[int]:
    """`window` as a row of the `windows` of `resize_crop_packed`."""
    if not isinstance(window, Window):
        raise ValueError(
            "resize_crop: windows must be a sequence of Window for frames [T, H, W, C], and of several clips one such "
            f"sequence for each, got {window!r}"
        )
    message = f"resize_crop: a window is whole numbers of pixels, flipped or not, got {window}"
    check(window.flip in (0, 1), message)
    top, left, height, width, *scaled = _whole((*window[:4], *(window.scaled or ())), message)
    if not scaled:
        return [clip, top, left, height, width, *size, 0, 0, window.flip]
    check(
        (height, width) == size,
        f"resize_crop: a window of scaled frames must be as large as the clip, {size[0]} x {size[1]}, got {window}",
    )
    return [clip, 0, 0, *frame, *scaled, top, left, window.flip]


class _Layout(NamedTuple):
    """Clips in one buffer, one behind the other."""

    buffer: Tensor
    frames: int
    channels: int
    sides: list[tuple[int, int]]
    """Height and width of each."""
    colors: list[Coefficients]


def _stacked(frames: Tensor | Yuv420) -> tuple[_Layout, bool]:
    """The clips of one tensor, and whether there is a dimension for them."""
    if isinstance(frames, Yuv420):
        planes, side = frames.planes, (frames.height, frames.width)
        several, channels, color = planes.ndim == 3, 3, coefficients(frames.matrix, frames.value_range)
    else:
        check_tensor(frames, "resize_crop", "frames")
        check(
            frames.ndim in (4, 5) and frames.dtype == torch.uint8,
            f"resize_crop: frames must be uint8 [T, H, W, C] or [N, T, H, W, C], got {frames.dtype} {tuple(frames.shape)}",
        )
        planes, side, several = frames, (frames.shape[-3], frames.shape[-2]), frames.ndim == 5
        channels, color = frames.shape[-1], NOT_YUV
    count = planes.shape[0] if several else 1
    buffer = planes.reshape(-1).contiguous()
    return _Layout(buffer, planes.shape[int(several)], channels, [side] * count, [color] * count), several


def _side_by_side(clips: Sequence[Tensor | Yuv420]) -> _Layout:
    """Clips of any sizes and formats, copied into one buffer."""
    check(len(clips) > 0, "resize_crop: the sequence of clips is empty")
    layouts: list[_Layout] = []
    for clip in clips:
        layout, several = _stacked(clip)
        first = layouts[0] if layouts else layout
        if several or (layout.frames, layout.channels, layout.buffer.device) != (
            first.frames, first.channels, first.buffer.device,
        ):  # fmt: skip
            raise ValueError(
                "resize_crop: frames must be uint8 [T, H, W, C] or YUV 4:2:0 [T, bytes], with one T, C and device for all "
                f"clips, got T={layout.frames}, C={layout.channels} on {layout.buffer.device}"
                f"{', and several clips in one' if several else ''} beside T={first.frames}, C={first.channels} on "
                f"{first.buffer.device}"
            )
        layouts.append(layout)
    buffer = torch.cat([layout.buffer for layout in layouts])
    sides, colors = [layout.sides[0] for layout in layouts], [layout.colors[0] for layout in layouts]
    return _Layout(buffer, layouts[0].frames, layouts[0].channels, sides, colors)


def resize_crop(
    frames: Tensor | Yuv420 | Sequence[Tensor | Yuv420],
    windows: Sequence[Window] | Sequence[Sequence[Window]],
    size: int | tuple[int, int],
    *,
    out: Tensor | None = None,
    threads: int | None = None,
) -> Tensor:
    """Cut windows out of decoded frames and resize them, antialiased bilinear: contiguous uint8 [B, T, size, size, C].

    Args:
        frames: uint8 [T, H, W, C] of one clip or a `Yuv420` of it (C is 3 then: RGB), with one `Window` for each view; or the
            clips of a batch, [N, T, H, W, C] or a `Yuv420` of N clips or a sequence of single clips of any heights, widths and
            formats, with a sequence of windows for each clip. Rows of the result are clip-major. A sequence is first copied
            into one buffer (`resize_crop_packed` takes such a buffer), and so are frames that are not contiguous.
        windows: see `Window`. Identity sizes copy pixels exactly.
        size: height and width of the result in pixels, one number for both.
        out: where to write the result; must not share memory with `frames`.
        threads: CPU threads of this call; None: torch's. Callers that run several calls side by side say 1.

    Raises ValueError for a window outside its frame, sides above 8192, numbers that are not whole, an `out` that overlaps the
    frames, or shapes that do not fit; TypeError for frames that are no tensor.
    """
    message = f"resize_crop: size must be a whole number of pixels, or two for height and width, got {size!r}"
    sides_out = _whole(size if isinstance(size, Sequence) else (size, size), message)
    check(len(sides_out) == 2, message)
    height, width = sides_out
    nested: object = windows
    if isinstance(frames, (Tensor, Yuv420)):
        layout, several = _stacked(frames)
        nested = windows if several else [windows]
    else:
        layout = _side_by_side(frames)
    buffer, t, channels, sides, colors = layout
    views = cast("Sequence[Sequence[Window]]", nested)
    check(len(sides) == len(views), f"resize_crop: {len(sides)} clips, but windows for {len(views)}")
    clip_rows, window_rows, offset = [], [], 0
    for i, (frame, color, own) in enumerate(zip(sides, colors, views, strict=True)):
        line, whole = (frame[1] * channels, frame[0] * frame[1] * channels) if color == NOT_YUV else (
            frame[1], frame_bytes(*frame),
        )  # fmt: skip
        clip_rows.append([offset, t, *frame, whole, line, *color])
        window_rows += [_window_row(i, window, frame, (height, width)) for window in own]
        offset += t * whole
    shape = (len(window_rows), t, height, width, channels)
    if out is None:
        out = buffer.new_empty(shape)
    check(out.shape == shape, f"resize_crop: out must be {shape}, got {tuple(out.shape)}")
    clips = torch.tensor(clip_rows, dtype=torch.int64).view(-1, len(CLIP))
    table = torch.tensor(window_rows, dtype=torch.int64).view(-1, len(WINDOW))
    return resize_crop_packed(buffer, clips, table, out, threads=threads)
