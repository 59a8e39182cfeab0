"""roi_align_max in Triton. See roi_align.py for the contract.

Forward: a program takes BLOCK channels of one box through all its bins and keeps the largest in registers; neighbouring bins
read the same cells out of the cache. Backward: a program takes BLOCK channels of one cell of the features and sums what the
boxes of its clip send there, in their order. No atomics: the same bits every time, and the gradient is written once.

A box of another clip number than the batch has gives NaN forward and no gradient. Sample counts are cut at 4096 a bin, which
only boxes of thousands of cells reach.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import _native
from ._triton_launch import Configuration, configurations, launch, operand, round_to, to_float32
from .roi_align import images_of

BLOCK = 128
WARPS = 4


@triton.jit
def _span(low, high, scale, BINS: tl.constexpr, SAMPLING: tl.constexpr, ALIGNED: tl.constexpr):
    """(start, width of a bin, samples of a bin) of a box along one axis, in cells."""
    offset = 0.5 if ALIGNED else 0.0
    start = low * scale - offset
    extent = high * scale - offset - start
    if not ALIGNED:
        extent = tl.maximum(extent, 1.0)
    width = tl.div_rn(extent, extent * 0 + BINS)
    count = tl.minimum(tl.maximum(tl.ceil(width), 0.0), 4096.0).to(tl.int32)
    if SAMPLING > 0:
        count = count * 0 + SAMPLING
    return start, width, count


@triton.jit
def _place(start, width, count, number, i, length):
    """(where sample i of bin `number` lies, clamped to the cells; 1 if it counts, else 0)."""
    total = tl.maximum(count, 1).to(tl.float32)
    place = start + number * width + tl.div_rn((i + 0.5) * width, total)
    used = (place >= -1.0) & (place <= length)
    return tl.minimum(tl.maximum(place, 0.0), length - 1.0), used.to(tl.float32)


@triton.jit
def _roi_max_kernel(
    features_ptr, boxes_ptr, pooled_ptr, where_ptr, batch, height, width, channels, scale,
    BINS: tl.constexpr, SAMPLING: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(channels, BLOCK)
    box = tl.program_id(0) // blocks
    c = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    inside = c < channels
    image = tl.load(boxes_ptr + 5 * box).to(tl.int32)
    known = (image >= 0) & (image < batch)
    corner = boxes_ptr + 5 * box + 1
    x0, bin_x, count_x = _span(tl.load(corner), tl.load(corner + 2), scale, BINS, SAMPLING, ALIGNED)
    y0, bin_y, count_y = _span(tl.load(corner + 1), tl.load(corner + 3), scale, BINS, SAMPLING, ALIGNED)
    base = features_ptr + image.to(tl.int64) * height * width * channels + c
    mask = inside & known
    best = tl.full([BLOCK], float("-inf"), tl.float32)
    where = tl.zeros([BLOCK], tl.int32)
    samples = tl.maximum(count_y * count_x, 1).to(tl.float32)
    for number in range(BINS * BINS):
        total = tl.zeros([BLOCK], tl.float32)
        for i in range(count_y):
            y, use_y = _place(y0, bin_y, count_y, number // BINS, i, height)
            top = tl.floor(y).to(tl.int32)
            down = y - top.to(tl.float32)
            upper = base + top * width * channels
            lower = base + tl.minimum(top + 1, height - 1) * width * channels
            for j in range(count_x):
                x, use_x = _place(x0, bin_x, count_x, number % BINS, j, width)
                left = tl.floor(x).to(tl.int32)
                along = x - left.to(tl.float32)
                near, far = left * channels, tl.minimum(left + 1, width - 1) * channels
                a = to_float32(tl.load(upper + near, mask=mask, other=0.0)) * (1.0 - along)
                a += to_float32(tl.load(upper + far, mask=mask, other=0.0)) * along
                b = to_float32(tl.load(lower + near, mask=mask, other=0.0)) * (1.0 - along)
                b += to_float32(tl.load(lower + far, mask=mask, other=0.0)) * along
                total += (a * (1.0 - down) + b * down) * (use_y * use_x)
        value = total / samples
        take = (value > best) | ((value != value) & (best == best)) | (number == 0)
        best = tl.where(take, value, best)
        where = tl.where(take, number, where)
    best = tl.where(known, best, float("nan"))
    offset = box.to(tl.int64) * channels + c
    tl.store(pooled_ptr + offset, round_to(best, pooled_ptr.dtype.element_ty), mask=inside)
    tl.store(where_ptr + offset, where.to(tl.uint8), mask=inside)


@triton.jit
def _tent(start, width, count, number, cell, length):
    """Weight of a cell in each of the bins `number` [BLOCK]."""
    total = tl.zeros(number.shape, tl.float32)
    for i in range(count):
        place, used = _place(start, width, count, number, i, length)
        total += tl.maximum(1.0 - tl.abs(place - cell), 0.0) * used
    return total / tl.maximum(count, 1).to(tl.float32)


@triton.jit
def _roi_max_backward_kernel(
    grad_ptr, boxes_ptr, where_ptr, out_ptr, boxes, height, width, channels, scale,
    BINS: tl.constexpr, SAMPLING: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(channels, BLOCK)
    cell = tl.program_id(0) // blocks
    c = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    inside = c < channels
    image, row, column = cell // (height * width), cell // width % height, cell % width
    total = tl.zeros([BLOCK], tl.float32)
    for box in range(boxes):
        if tl.load(boxes_ptr + 5 * box).to(tl.int32) == image:
            corner = boxes_ptr + 5 * box + 1
            x0, bin_x, count_x = _span(tl.load(corner), tl.load(corner + 2), scale, BINS, SAMPLING, ALIGNED)
            y0, bin_y, count_y = _span(tl.load(corner + 1), tl.load(corner + 3), scale, BINS, SAMPLING, ALIGNED)
            at = box * channels + c
            number = tl.load(where_ptr + at, mask=inside, other=0).to(tl.int32)
            share = to_float32(tl.load(grad_ptr + at, mask=inside, other=0.0))
            share *= _tent(y0, bin_y, count_y, number // BINS, row, height)
            total += share * _tent(x0, bin_x, count_x, number % BINS, column, width)
    tl.store(out_ptr + cell.to(tl.int64) * channels + c, round_to(total, out_ptr.dtype.element_ty), mask=inside)


def forward(
    features: Tensor, boxes: Tensor, size: int, scale: float, sampling: int, aligned: bool
) -> tuple[Tensor, Tensor]:
    """Launch for `roi_align.roi_align_max`."""
    features = operand(features, _native.FLOATS, "roi_align_max: features [B, H, W, C]")
    boxes = operand(boxes, (torch.float32,), "roi_align_max: boxes [n, 5]")
    batch, height, width, channels = features.shape
    images_of(boxes, batch)
    pooled = features.new_empty(len(boxes), channels)
    where = torch.empty_like(pooled, dtype=torch.uint8)
    launch(
        _roi_max_kernel, len(boxes) * triton.cdiv(channels, BLOCK),
        features, boxes, pooled, where, batch, height, width, channels, float(scale),
        BINS=size, SAMPLING=sampling, ALIGNED=aligned, BLOCK=BLOCK, warps=WARPS,
    )  # fmt: skip
    return pooled, where


def backward(
    grad: Tensor, boxes: Tensor, where: Tensor, batch: int, height: int, width: int, size: int, scale: float, sampling: int,
    aligned: bool,
) -> Tensor:  # fmt: skip
    """Launch for the gradient of `roi_align.roi_align_max`."""
    grad = operand(grad, _native.FLOATS, "roi_align_max: grad [n, C]")
    boxes = operand(boxes, (torch.float32,), "roi_align_max: boxes [n, 5]")
    channels = grad.shape[1]
    out = grad.new_empty(batch, height, width, channels)
    launch(
        _roi_max_backward_kernel, batch * height * width * triton.cdiv(channels, BLOCK),
        grad, boxes, where, out, len(boxes), height, width, channels, float(scale),
        BINS=size, SAMPLING=sampling, ALIGNED=aligned, BLOCK=BLOCK, warps=WARPS,
    )  # fmt: skip
    return out


def aot_configurations() -> list[Configuration]:
    """The heads of the published detectors: 7 x 7 bins at patch 16 and 14, and mmaction2's 8 x 8 aligned ones."""
    found: list[Configuration] = []
    for channels, patch, size, aligned in ((768, 16, 7, False), (1408, 14, 7, False), (1024, 16, 8, True)):
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            features, boxes = torch.zeros(2, 256 // patch, 448 // patch, channels, dtype=dtype), torch.zeros(8, 5)
            grad, where = features.new_zeros(8, channels), torch.zeros(8, channels, dtype=torch.uint8)
            name = f"{str(dtype)[6:]} {channels} channels {size}x{size}{' aligned' if aligned else ''}"
            geometry = size, 1 / patch, 0, aligned
            found += configurations(f"roi_align_max {name}", forward, features, boxes, *geometry)
            found += configurations(
                f"roi_align_max_backward {name}", backward, grad, boxes, where, *features.shape[:3], *geometry
            )
    return found
