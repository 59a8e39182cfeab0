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
from ._resize_table import COLUMNS
from ._triton_launch import Configuration
from .resize import tap_count
from .yuv import SHIFT

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
    COLUMNS: tl.constexpr, CHANNELS: tl.constexpr, WIDE: tl.constexpr, YUV: tl.constexpr, SHIFT: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    image, tile = program // tiles, program % tiles
    row_ptr = table_ptr + image // frames * COLUMNS
    line_stride = tl.load(row_ptr + 2)
    frame_ptr = buffer_ptr + (image % frames).to(tl.int64) * tl.load(row_ptr + 1)
    source_ptr = frame_ptr + tl.load(row_ptr)
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

    if YUV:
        # Coefficients of this element's channel; a call may hold clips of both kinds, told by the luma's being zero.
        u_ptr, v_ptr = frame_ptr + tl.load(row_ptr + 10), frame_ptr + tl.load(row_ptr + 11)
        odd_y, odd_x = tl.load(row_ptr + 12).to(tl.int32), tl.load(row_ptr + 13).to(tl.int32)
        black, luma = tl.load(row_ptr + 14).to(tl.int32), tl.load(row_ptr + 15).to(tl.int32)
        rv, gu = tl.load(row_ptr + 16).to(tl.int32), tl.load(row_ptr + 17).to(tl.int32)
        gv, bu = tl.load(row_ptr + 18).to(tl.int32), tl.load(row_ptr + 19).to(tl.int32)
        by_u = tl.where(channel == 0, 0, tl.where(channel == 1, gu, bu))
        by_v = tl.where(channel == 0, rv, tl.where(channel == 1, gv, 0))
        planar, step = luma != 0, tl.where(luma != 0, 1, CHANNELS)
        start = first_x * step + tl.where(luma != 0, 0, channel)
    else:
        step = CHANNELS
        start = first_x * CHANNELS + channel

    total_x = tl.zeros([BLOCK], tl.int32)
    for k in range(count_x):
        total_x += _weight(first_x + k, grid_w, centre_x, reach_x)
    total_y = tl.zeros([BLOCK], tl.int32)
    sum_y = tl.zeros([BLOCK], tl.int64)
    for j in range(count_y):
        line_ptr = source_ptr + (first_y + j).to(tl.int64) * line_stride + start
        if YUV:
            chroma = ((first_y + j + odd_y) // 2).to(tl.int64) * ((line_stride + 1) // 2)
        sum_x = tl.zeros([BLOCK], tl.int64 if WIDE else tl.int32)
        for k in range(count_x):
            value = tl.load(line_ptr + k * step, mask=inside, other=0).to(tl.int32)
            if YUV:
                place = chroma + (first_x + k + odd_x) // 2
                u = tl.load(u_ptr + place, mask=inside & planar, other=128).to(tl.int32) - 128
                v = tl.load(v_ptr + place, mask=inside & planar, other=128).to(tl.int32) - 128
                converted = (luma * (value - black) + by_u * u + by_v * v + (1 << (SHIFT - 1))) >> SHIFT
                value = tl.where(planar, tl.minimum(tl.maximum(converted, 0), 255), value)
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
    yuv = any(row[15] for row in rows)
    tiles = triton.cdiv(height * width * channels, BLOCK)
    with torch.cuda.device_of(buffer):
        _resize_crop_kernel[(views * frames * tiles,)](
            buffer, table.to(buffer.device, non_blocking=True), out, frames, height, width, tiles,
            COLUMNS=COLUMNS, CHANNELS=channels, WIDE=wide, YUV=yuv, SHIFT=SHIFT, BLOCK=BLOCK, num_warps=WARPS,
            num_stages=1,
        )  # fmt: skip


def aot_configurations() -> list[Configuration]:
    """Every channel count, and of three the wide sums and YUV 4:2:0."""
    sizes = dict.fromkeys(("frames", "height", "width"), "i32:16") | {"tiles": "i32"}
    constants = dict.fromkeys(("COLUMNS", "CHANNELS", "WIDE", "YUV", "SHIFT", "BLOCK"), "constexpr")
    signature = {"buffer_ptr": "*u8", "table_ptr": "*i64", "out_ptr": "*u8", **sizes, **constants}
    found: list[Configuration] = []
    for channels, wide, yuv in (
        (1, False, False), (2, False, False), (3, False, False), (4, False, False), (3, True, False), (3, False, True),
        (3, True, True),
    ):  # fmt: skip
        name = f"resize_crop {channels} channels{' wide' if wide else ''}{' yuv420' if yuv else ''}"
        constexprs = {
            "COLUMNS": COLUMNS, "CHANNELS": channels, "WIDE": wide, "YUV": yuv, "SHIFT": SHIFT, "BLOCK": BLOCK,
        }  # fmt: skip
        found.append(Configuration(name, _resize_crop_kernel, signature, constexprs, WARPS, 1, {}))
    return found
