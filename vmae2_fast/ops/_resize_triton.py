"""Triton kernel of `vmae2_fast.ops.resize`: the formula of that file as it stands, in whole numbers.

A program computes BLOCK neighbouring bytes of one frame of one clip, each over all its taps, weights included: neighbours
share their source pixels through the cache, and nothing is kept between rows.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import _native
from ._triton_launch import Configuration
from .resize import tap_count

BLOCK = 512
WARPS = 4


@triton.jit
def _axis(output, source, grid):
    """Of outputs on an axis: the filter's reach, centres and first sources; all in units of 1/(2*grid) source pixels."""
    reach = 2 * tl.maximum(source, grid)
    count = tl.minimum(source, (reach + grid - 1) // grid)
    centre = (2 * output + 1) * source
    low = centre - reach - grid
    # Division truncates, so what is left of the frame is not divided.
    first = tl.where(low < 0, 0, low // (2 * grid) + 1)
    return reach, count, centre, tl.minimum(first, source - count)


@triton.jit
def _weight(source, grid, centre, reach):
    return tl.maximum(reach - tl.abs((2 * source + 1) * grid - centre), 0)


@triton.jit
def _resize_crop_kernel(
    buffer_ptr, table_ptr, out_ptr, frames, height, width, tiles,
    CHANNELS: tl.constexpr, WIDE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    image, tile = program // tiles, program % tiles
    row_ptr = table_ptr + image // frames * 10
    line_stride = tl.load(row_ptr + 2)
    source_ptr = buffer_ptr + tl.load(row_ptr) + (image % frames).to(tl.int64) * tl.load(row_ptr + 1)
    window_h, window_w = tl.load(row_ptr + 3).to(tl.int32), tl.load(row_ptr + 4).to(tl.int32)
    grid_h, grid_w = tl.load(row_ptr + 5).to(tl.int32), tl.load(row_ptr + 6).to(tl.int32)
    grid_top, grid_left = tl.load(row_ptr + 7).to(tl.int32), tl.load(row_ptr + 8).to(tl.int32)
    flip = tl.load(row_ptr + 9) != 0

    size = height * width * CHANNELS
    element = tile * BLOCK + tl.arange(0, BLOCK)
    inside = element < size
    channel, pixel = element % CHANNELS, element // CHANNELS
    y, x = pixel // width, pixel % width
    x = tl.where(flip, width - 1 - x, x)
    reach_y, count_y, centre_y, first_y = _axis(grid_top + y, window_h, grid_h)
    reach_x, count_x, centre_x, first_x = _axis(grid_left + x, window_w, grid_w)

    total_x = tl.zeros([BLOCK], tl.int32)
    for k in range(count_x):
        total_x += _weight(first_x + k, grid_w, centre_x, reach_x)
    total_y = tl.zeros([BLOCK], tl.int32)
    sum_y = tl.zeros([BLOCK], tl.int64)
    for j in range(count_y):
        line_ptr = source_ptr + (first_y + j).to(tl.int64) * line_stride + first_x * CHANNELS + channel
        sum_x = tl.zeros([BLOCK], tl.int64 if WIDE else tl.int32)
        for k in range(count_x):
            value = tl.load(line_ptr + k * CHANNELS, mask=inside, other=0)
            sum_x += _weight(first_x + k, grid_w, centre_x, reach_x) * value.to(sum_x.dtype)
        weight = _weight(first_y + j, grid_h, centre_y, reach_y)
        total_y += weight
        sum_y += weight * sum_x.to(tl.int64)
    total = tl.maximum(total_y.to(tl.int64) * total_x, 1)  # bytes behind the last one may have no taps
    value = (2 * sum_y + total) // (2 * total)
    tl.store(out_ptr + image.to(tl.int64) * size + element, value.to(tl.uint8), mask=inside)


def resize_crop(buffer: Tensor, table: Tensor, out: Tensor, threads: int) -> None:
    """Launch on the current stream of the frames' device; the table travels with it and nothing waits."""
    for tensor, name in ((buffer, "buffer [bytes]"), (out, "out [B, T, H, W, C]")):
        _native.address(tensor, (torch.uint8,), f"resize_crop: {name}")
    views, frames, height, width, channels = out.shape
    # A line's sum reaches 255 times its weights: beyond 32 bits only where thousands of pixels become a few.
    rows = table.tolist()
    wide = any(255 * tap_count(row[4], row[6]) * 2 * max(row[4], row[6]) >= 2**31 for row in rows)
    tiles = triton.cdiv(height * width * channels, BLOCK)
    with torch.cuda.device_of(buffer):
        _resize_crop_kernel[(views * frames * tiles,)](
            buffer, table.to(buffer.device, non_blocking=True), out, frames, height, width, tiles,
            CHANNELS=channels, WIDE=wide, BLOCK=BLOCK, num_warps=WARPS, num_stages=1,
        )  # fmt: skip


def aot_configurations() -> list[Configuration]:
    """Every channel count, and the wide sums for three."""
    sizes = dict.fromkeys(("frames", "height", "width"), "i32:16") | {"tiles": "i32"}
    constants = dict.fromkeys(("CHANNELS", "WIDE", "BLOCK"), "constexpr")
    signature = {"buffer_ptr": "*u8", "table_ptr": "*i64", "out_ptr": "*u8", **sizes, **constants}
    found: list[Configuration] = []
    for channels, wide in ((1, False), (2, False), (3, False), (4, False), (3, True)):
        name = f"resize_crop {channels} channels{' wide' if wide else ''}"
        constexprs = {"CHANNELS": channels, "WIDE": wide, "BLOCK": BLOCK}
        found.append(Configuration(name, _resize_crop_kernel, signature, constexprs, WARPS, 1, {}))
    return found
