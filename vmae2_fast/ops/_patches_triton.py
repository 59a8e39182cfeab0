"""gather_patches and scatter_patches in Triton. See patches.py for the contract.

Bytes: the patch's lines of a token are contiguous runs of patch*channels bytes (42 for patch 14, 48 for patch 16). They are
loaded as a tile [lines, width], each line from the 16-byte boundary at or before it, so that one thread loads 16 bytes at a
time whatever the patch, wherever the clip's lines start on such boundaries (width*channels a multiple of 16, as in a
224-pixel RGB clip); elsewhere loads are as wide as the alignment the compiler can prove. The tile goes through shared
memory, out of which each thread takes the bytes of the values it stores: stores are 16 bytes wide in either order.
Floating-point clips are copied value by value between two addresses; the row's side is accessed 16 bytes wide.

Ids outside the grid: on the CPU an IndexError; on a GPU, where looking would stall the queue, gather writes rows of NaN and
scatter leaves the row out. Two rows for one token: on the CPU a ValueError; on a GPU either may win.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import _native
from ._triton_launch import Configuration, check_ids, configurations, launch, operand, round_to, to_float32
from .patches import clip_shape

MOST_BYTES = 8192  # of a tile [lines, width]: 32 values a thread of 8 warps
BLOCK = 512  # values a program of the floating-point kernels copies


@triton.jit
def corner_of(row, token, count, height, width, clip_stride, frame_stride, line_stride, DEPTH, PATCH, PIXEL):
    """Offset of the first pixel of a token's patch: batch row // count, grid position of `token`."""
    t = token // (height * width)
    y = token // width % height
    x = token % width
    inside = t * DEPTH * frame_stride.to(tl.int64) + y * PATCH * line_stride + x * PATCH * PIXEL
    return (row // count).to(tl.int64) * clip_stride + inside


@triton.jit
def load_tile(
    clip_ptr, corner, first, use, frame_stride, line_stride, DEPTH: tl.constexpr, PATCH: tl.constexpr, PIXEL: tl.constexpr,
    ALIGNED: tl.constexpr, LINES: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Bytes of the patch's lines first .. first + LINES, flat [LINES*WIDTH], and where in a line the patch begins."""
    line = first + tl.arange(0, LINES)
    place = tl.arange(0, WIDTH)
    begin = tl.full((), 0, tl.int32)
    start = corner
    end = PATCH * PIXEL
    if ALIGNED:
        begin = (corner % 16).to(tl.int32)
        start = corner // 16 * 16
        # All of a 16-byte piece or nothing: the bound is the same for the whole piece, and lines end on boundaries.
        place_end = (place // 16) * 16
        inside = place_end[None, :] < begin + end
    else:
        inside = place[None, :] < end
    offset = line // PATCH * frame_stride + line % PATCH * line_stride
    inside = inside & (line < DEPTH * PATCH)[:, None] & use
    tile = tl.load(clip_ptr + start + offset[:, None] + place[None, :], mask=inside, other=0)
    return tl.reshape(tile, [LINES * WIDTH]), begin


@triton.jit
def by_channel(values, channel, CHANNELS: tl.constexpr):
    """values[channel] of a tuple, for a block of channels."""
    out = tl.zeros(channel.shape, tl.float32)
    for c in tl.static_range(CHANNELS):
        out = tl.where(channel == c, values[c], out)
    return out


@triton.jit
def _gather_bytes_kernel(
    clip_ptr, index_ptr, rows_ptr, scale, shift, count, tokens, height, width, clip_stride, frame_stride, line_stride,
    PIXEL_ORDER: tl.constexpr, DEPTH: tl.constexpr, PATCH: tl.constexpr, PIXEL: tl.constexpr, ALIGNED: tl.constexpr,
    LINES: tl.constexpr, WIDTH: tl.constexpr, TILES: tl.constexpr, VALUES: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) // TILES
    first = tl.program_id(0) % TILES * LINES
    token = tl.load(index_ptr + row)
    use = (token >= 0) & (token < tokens)
    corner = corner_of(row, token, count, height, width, clip_stride, frame_stride, line_stride, DEPTH, PATCH, PIXEL)
    tile, begin = load_tile(
        clip_ptr, corner, first, use, frame_stride, line_stride, DEPTH, PATCH, PIXEL, ALIGNED, LINES, WIDTH
    )
    unread = tl.where(token == -1, 0.0, float("nan"))
    out_ptr = rows_ptr + row.to(tl.int64) * (DEPTH * PATCH * PATCH * PIXEL)
    run: tl.constexpr = PATCH * PIXEL if PIXEL_ORDER else PATCH
    j = tl.arange(0, VALUES)
    line = j // run
    # A single tile ends at a number known when compiling, which keeps stores wide.
    ends = DEPTH * PATCH * run if TILES == 1 else tl.minimum(LINES, DEPTH * PATCH - first) * run
    if PIXEL_ORDER:
        source = tl.minimum(line * WIDTH + begin + j % run, LINES * WIDTH - 1)
        value = tl.gather(tile, source, 0).to(tl.float32)
        value = value * by_channel(scale, j % run % PIXEL, PIXEL) + by_channel(shift, j % run % PIXEL, PIXEL)
        value = round_to(tl.where(use, value, unread), rows_ptr.dtype.element_ty)
        tl.store(out_ptr + first * run + j, value, mask=j < ends)
    else:
        for c in tl.static_range(PIXEL):
            source = tl.minimum(line * WIDTH + begin + j % run * PIXEL + c, LINES * WIDTH - 1)
            value = tl.gather(tile, source, 0).to(tl.float32) * scale[c] + shift[c]
            value = round_to(tl.where(use, value, unread), rows_ptr.dtype.element_ty)
            tl.store(out_ptr + c * (DEPTH * PATCH * PATCH) + first * run + j, value, mask=j < ends)


@triton.jit
def _channels_first(j, channel_stride, frame_stride, line_stride, DEPTH: tl.constexpr, PATCH: tl.constexpr):
    """Offset in a [C, T, H, W] clip of value j of a patch in order (c, t, y, x)."""
    line = j // PATCH
    return (
        (line // (DEPTH * PATCH)).to(tl.int64) * channel_stride
        + line // PATCH % DEPTH * frame_stride
        + line % PATCH * line_stride
        + j % PATCH
    )


@triton.jit
def _gather_floats_kernel(
    clip_ptr, index_ptr, rows_ptr, count, tokens, height, width, clip_stride, channel_stride, frame_stride, line_stride,
    PIXEL_ORDER: tl.constexpr, DEPTH: tl.constexpr, PATCH: tl.constexpr, PIXEL: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    size: tl.constexpr = DEPTH * PATCH * PATCH
    blocks: tl.constexpr = (size * PIXEL + BLOCK - 1) // BLOCK
    row = tl.program_id(0) // blocks
    j = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    token = tl.load(index_ptr + row)
    use = (token >= 0) & (token < tokens)
    corner = corner_of(row, token, count, height, width, clip_stride, frame_stride, line_stride, DEPTH, PATCH, 1)
    source = j % PIXEL * size + j // PIXEL if PIXEL_ORDER else j
    offset = _channels_first(source, channel_stride, frame_stride, line_stride, DEPTH, PATCH)
    value = to_float32(tl.load(clip_ptr + corner + offset, mask=use & (j < size * PIXEL), other=0.0))
    value = tl.where(use, value, tl.where(token == -1, 0.0, float("nan")))
    tl.store(
        rows_ptr + row.to(tl.int64) * (size * PIXEL) + j, round_to(value, rows_ptr.dtype.element_ty), mask=j < size * PIXEL
    )


@triton.jit
def _scatter_kernel(
    rows_ptr, index_ptr, clip_ptr, count, tokens, height, width, clip_stride, channel_stride, frame_stride, line_stride,
    PIXEL_ORDER: tl.constexpr, DEPTH: tl.constexpr, PATCH: tl.constexpr, PIXEL: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    size: tl.constexpr = DEPTH * PATCH * PATCH
    blocks: tl.constexpr = (size * PIXEL + BLOCK - 1) // BLOCK
    row = tl.program_id(0) // blocks
    j = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    token = tl.load(index_ptr + row)
    use = (token >= 0) & (token < tokens) & (j < size * PIXEL)
    corner = corner_of(row, token, count, height, width, clip_stride, frame_stride, line_stride, DEPTH, PATCH, 1)
    source = j % size * PIXEL + j // size if PIXEL_ORDER else j
    value = tl.load(rows_ptr + row.to(tl.int64) * (size * PIXEL) + source, mask=use, other=0.0)
    tl.store(clip_ptr + corner + _channels_first(j, channel_stride, frame_stride, line_stride, DEPTH, PATCH), value, mask=use)


def tiles(clip: Tensor, patch: int, tubelet: int) -> dict[str, Any]:
    """Constants of `load_tile` for a uint8 clip, and how many tiles of lines a token takes."""
    line_bytes = clip.shape[3] * clip.shape[4]
    aligned = line_bytes % 16 == 0 and clip.data_ptr() % 16 == 0
    needed = patch * clip.shape[4]
    if aligned and needed % 16:
        needed += 15  # the boundary before the patch may be that far away
    width = max(16, triton.next_power_of_2(needed))
    lines = min(triton.next_power_of_2(tubelet * patch), max(1, MOST_BYTES // width))
    return {"ALIGNED": aligned, "LINES": lines, "WIDTH": width, "TILES": -(-tubelet * patch // lines)}


def _warps(values: int, dtype: torch.dtype) -> int:
    """Warps that store `values` 16 bytes a thread, within what keeps registers few and a multiprocessor full."""
    return min(4 if values <= 4096 else 8, max(2, values * dtype.itemsize // (16 * 32)))


def clip_strides(clip: Tensor) -> tuple[int, ...]:
    """(clip, frame, line) strides of a uint8 clip, (clip, channel, frame, line) ones of a floating-point clip."""
    _, t, h, w, c = clip_shape(clip)
    if clip.dtype == torch.uint8:
        return t * h * w * c, h * w * c, w * c
    return c * t * h * w, t * h * w, h * w, w


def gather(
    clip: Tensor,
    index: Tensor,
    patch: int,
    tubelet: int,
    scale: Sequence[float],
    shift: Sequence[float],
    dtype: torch.dtype,
    order: str,
) -> Tensor:
    """Launch for `patches.gather_patches`."""
    clip = operand(clip, (torch.uint8, *_native.FLOATS), "gather_patches: clip")
    index = operand(index, (torch.int32,), "gather_patches: index [B, K]")
    _, t, h, w, c = clip_shape(clip)
    height, width, count = h // patch, w // patch, index.shape[1]
    tokens = t // tubelet * height * width
    check_ids(index, tokens, "gather_patches")
    rows = operand(
        clip.new_empty((*index.shape, c * tubelet * patch * patch), dtype=dtype), _native.FLOATS, "gather_patches: rows"
    )
    geometry: dict[str, Any] = {"PIXEL_ORDER": order == "pixel", "DEPTH": tubelet, "PATCH": patch, "PIXEL": c}
    arguments = count, tokens, height, width, *clip_strides(clip)
    if clip.dtype == torch.uint8:
        constants = tiles(clip, patch, tubelet)
        run = patch * c if order == "pixel" else patch
        values = max(16, triton.next_power_of_2(min(constants["LINES"], tubelet * patch) * run))
        launch(
            _gather_bytes_kernel, index.numel() * constants["TILES"],
            clip, index, rows, tuple(scale), tuple(shift), *arguments, **geometry, **constants, VALUES=values,
            warps=_warps(values, dtype),
        )  # fmt: skip
    else:
        programs = index.numel() * triton.cdiv(rows.shape[2], BLOCK)
        launch(
            _gather_floats_kernel, programs, clip, index, rows, *arguments, **geometry,
            BLOCK=BLOCK, warps=_warps(BLOCK, dtype),
        )  # fmt: skip
    return rows


def scatter(rows: Tensor, index: Tensor, grid: Sequence[int], patch: int, tubelet: int, channels: int, order: str) -> Tensor:
    """Launch for `patches.scatter_patches`."""
    rows = operand(rows, _native.FLOATS, "scatter_patches: rows [B, K, C*tubelet*patch*patch]")
    index = operand(index, (torch.int32,), "scatter_patches: index [B, K]")
    frames, height, width = grid
    check_ids(index, frames * height * width, "scatter_patches")
    _check_distinct(index)
    clip = rows.new_zeros(rows.shape[0], channels, frames * tubelet, height * patch, width * patch)
    launch(
        _scatter_kernel, index.numel() * triton.cdiv(rows.shape[2], BLOCK),
        rows, index, clip, index.shape[1], frames * height * width, height, width, *clip_strides(clip),
        PIXEL_ORDER=order == "pixel", DEPTH=tubelet, PATCH=patch, PIXEL=channels,
        BLOCK=BLOCK, warps=_warps(BLOCK, rows.dtype),
    )  # fmt: skip
    return clip


def _check_distinct(index: Tensor) -> None:
    if index.device.type != "cpu" or index.shape[1] < 2:
        return
    ids = index.sort(1).values
    twice = (ids[:, 1:] == ids[:, :-1]) & (ids[:, 1:] >= 0)
    if bool(twice.any()):
        b, k = (int(v) for v in twice.nonzero()[0])
        raise ValueError(f"scatter_patches: index[{b}] holds token {int(ids[b, k])} twice; indices of a row must be distinct")


def aot_configurations() -> list[Configuration]:
    """The launches of the published models (patch 16 and 14), every dtype, and what the layouts in between need."""
    found: list[Configuration] = []
    rgb = torch.zeros(1, 16, 224, 224, 3, dtype=torch.uint8)
    gathered: list[tuple[Tensor, int, int, torch.dtype, str]] = [
        *((rgb, patch, 2, dtype, "conv") for patch in (16, 14) for dtype in (torch.float32, torch.bfloat16)),
        (rgb, 16, 2, torch.float16, "conv"),
        (rgb, 14, 2, torch.float32, "pixel"),
        (rgb, 16, 2, torch.bfloat16, "pixel"),
        (rgb, 16, 4, torch.bfloat16, "conv"),
        (rgb[:, :, :, :210], 14, 2, torch.bfloat16, "conv"),  # lines that start on any byte
        (torch.zeros(1, 4, 64, 64, 16, dtype=torch.uint8), 16, 1, torch.bfloat16, "conv"),
        (torch.zeros(1, 3, 16, 224, 224), 16, 2, torch.float32, "conv"),
        (torch.zeros(1, 3, 16, 224, 224, dtype=torch.bfloat16), 16, 2, torch.bfloat16, "pixel"),
        (torch.zeros(1, 3, 16, 224, 224, dtype=torch.float16), 14, 2, torch.float16, "conv"),
    ]
    for clip, patch, tubelet, dtype, order in gathered:
        channels, shape = clip_shape(clip)[4], "x".join(map(str, clip.shape))
        index = torch.zeros(1, 208, dtype=torch.int32)
        name = f"gather_patches {str(clip.dtype)[6:]} {shape} -> {str(dtype)[6:]} {order} patch {tubelet}x{patch}"
        arguments = patch, tubelet, [1.0] * channels, [0.0] * channels, dtype, order
        found += configurations(name, gather, clip, index, *arguments)
    scattered = [(16, torch.float32, "pixel"), (14, torch.bfloat16, "pixel"), (16, torch.bfloat16, "conv")]
    for patch, dtype, order in [*scattered, (14, torch.float32, "conv"), (16, torch.float16, "conv")]:
        rows = torch.zeros(1, 208, 6 * patch * patch, dtype=dtype)
        grid = 8, 224 // patch, 224 // patch
        index = torch.arange(208, dtype=torch.int32)[None]
        name = f"scatter_patches {str(dtype)[6:]} {order} patch 2x{patch}"
        found += configurations(name, scatter, rows, index, grid, patch, 2, 3, order)
    return found
