"""reconstruction_loss and its backward in Triton. See reconstruction.py for the formula and what is kept in between.

One program a loss token. Its pixels are read once, as in gather_patches (16 bytes a load for aligned uint8 clips), and stay
in registers for mean, variance and error; prediction and gradient are read and written 16 bytes at a time in their own
dtype. Sums over the bytes of a patch are integers, so mean and variance carry one rounding each; floating-point clips take
the mean first and the squared deviations from it after. A patch that does not fit in registers is read in tiles of lines,
once more in each pass.

The loss of each token goes to memory, and a second launch adds them in an order that depends on their number only: the sum
has the same bits in every run. Ids outside the grid: on the CPU an IndexError; on a GPU, where looking would stall the
queue, the loss and the gradient of the token are NaN.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import _native
from ._patches_triton import by_channel, clip_strides, corner_of, load_tile, tiles
from ._triton_launch import Configuration, check_ids, configurations, launch, operand, round_to, to_float32
from .patches import clip_shape
from .reconstruction import EPS, _statistics_shape, divided

_EPS = tl.constexpr(EPS)
MOST_VALUES = 4096  # pixels of a tile of a floating-point clip: 32 a thread of 4 warps
SUM_BLOCK = 8192


@triton.jit
def _pixels(
    clip_ptr, corner, first, use, mean, std, channel_stride, frame_stride, line_stride,
    BYTES: tl.constexpr, DEPTH: tl.constexpr, PATCH: tl.constexpr, PIXEL: tl.constexpr, ALIGNED: tl.constexpr,
    LINES: tl.constexpr, WIDTH: tl.constexpr, VALUES: tl.constexpr,
):  # fmt: skip
    """Pixels of the patch's lines first .. first + LINES in order (t, y, x, c), float32 [VALUES], and which are real."""
    run: tl.constexpr = PATCH * PIXEL
    j = tl.arange(0, VALUES)
    line = j // run
    # A single tile ends at a number known when compiling, which keeps loads and stores of the rows wide.
    ends = DEPTH * PATCH * run if DEPTH * PATCH <= LINES else tl.minimum(LINES, DEPTH * PATCH - first) * run
    real = j < ends
    if BYTES:
        tile, begin = load_tile(
            clip_ptr, corner, first, use, frame_stride, line_stride, DEPTH, PATCH, PIXEL, ALIGNED, LINES, WIDTH
        )
        value = tl.gather(tile, tl.minimum(line * WIDTH + begin + j % run, LINES * WIDTH - 1), 0).to(tl.float32)
    else:
        line += first
        channel = j % run % PIXEL
        offset = line // PATCH * frame_stride + line % PATCH * line_stride + j % run // PIXEL
        offset = channel.to(tl.int64) * channel_stride + offset
        value = to_float32(tl.load(clip_ptr + corner + offset, mask=real & use, other=0.0))
        value = value * by_channel(std, channel, PIXEL) + by_channel(mean, channel, PIXEL)
    return value, real


@triton.jit
def _corner(
    row, token, count, height, width, clip_stride, frame_stride, line_stride,
    BYTES: tl.constexpr, DEPTH: tl.constexpr, PATCH: tl.constexpr, PIXEL: tl.constexpr,
):  # fmt: skip
    pixel: tl.constexpr = PIXEL if BYTES else 1
    return corner_of(row, token, count, height, width, clip_stride, frame_stride, line_stride, DEPTH, PATCH, pixel)


@triton.jit
def _loss_kernel(
    pred_ptr, clip_ptr, index_ptr, statistics_ptr, losses_ptr, mean, std, count, tokens, height, width,
    clip_stride, channel_stride, frame_stride, line_stride,
    NORMALIZE: tl.constexpr, BYTES: tl.constexpr, DEPTH: tl.constexpr, PATCH: tl.constexpr, PIXEL: tl.constexpr,
    ALIGNED: tl.constexpr, LINES: tl.constexpr, WIDTH: tl.constexpr, TILES: tl.constexpr, VALUES: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    token = tl.load(index_ptr + row)
    use = (token >= 0) & (token < tokens)
    unread = tl.where(token == -1, 0.0, float("nan"))
    corner = _corner(row, token, count, height, width, clip_stride, frame_stride, line_stride, BYTES, DEPTH, PATCH, PIXEL)
    pixels, real = _pixels(
        clip_ptr, corner, 0, use, mean, std, channel_stride, frame_stride, line_stride,
        BYTES, DEPTH, PATCH, PIXEL, ALIGNED, LINES, WIDTH, VALUES,
    )  # fmt: skip
    j = tl.arange(0, VALUES)
    channel = j % (PATCH * PIXEL) % PIXEL
    n: tl.constexpr = DEPTH * PATCH * PATCH
    # A sum of squares of n bytes may leave int32.
    kind: tl.constexpr = (tl.int32 if n < 2**15 else tl.int64) if BYTES else tl.float32
    statistics_ptr += row.to(tl.int64) * (2 * PIXEL)
    centre = tl.zeros([VALUES], tl.float32)
    factor = tl.full([VALUES], 1 / 255 if BYTES else 1.0, tl.float32)
    for c in tl.static_range(PIXEL):
        middle = 0.0
        scale = 1 / 255 if BYTES else 1.0
        if NORMALIZE:
            chosen = tl.where(real & (channel == c), pixels, 0.0).to(kind)
            total = tl.sum(chosen)
            if BYTES:
                square = tl.sum(chosen * chosen)
            for tile in range(1, TILES):
                more, more_real = _pixels(
                    clip_ptr, corner, tile * LINES, use, mean, std, channel_stride, frame_stride, line_stride,
                    BYTES, DEPTH, PATCH, PIXEL, ALIGNED, LINES, WIDTH, VALUES,
                )  # fmt: skip
                chosen = tl.where(more_real & (channel == c), more, 0.0).to(kind)
                total += tl.sum(chosen)
                if BYTES:
                    square += tl.sum(chosen * chosen)
            middle = tl.div_rn(total.to(tl.float32), n * 1.0)
            if BYTES:
                whole = square.to(tl.int64) * n - total.to(tl.int64) * total.to(tl.int64)
                variance = tl.div_rn(whole.to(tl.float32), n * (n - 1.0))
            else:
                deviation = tl.where(real & (channel == c), pixels - middle, 0.0)
                square = tl.sum(deviation * deviation)
                for tile in range(1, TILES):
                    more, more_real = _pixels(
                        clip_ptr, corner, tile * LINES, use, mean, std, channel_stride, frame_stride, line_stride,
                        BYTES, DEPTH, PATCH, PIXEL, ALIGNED, LINES, WIDTH, VALUES,
                    )  # fmt: skip
                    deviation = tl.where(more_real & (channel == c), more - middle, 0.0)
                    square += tl.sum(deviation * deviation)
                variance = tl.div_rn(square, n - 1.0)
            scale = tl.div_rn(1.0, tl.sqrt_rn(variance) + (_EPS * 255 if BYTES else _EPS))
        centre = tl.where(channel == c, middle, centre)
        factor = tl.where(channel == c, scale, factor)
        tl.store(statistics_ptr + c, tl.where(use, middle, unread))
        tl.store(statistics_ptr + PIXEL + c, tl.where(use, scale, unread))
    pred_ptr += row.to(tl.int64) * (n * PIXEL)
    pred = to_float32(tl.load(pred_ptr + j, mask=real & use, other=0.0))
    error = tl.where(real, pred - (pixels - centre) * factor, 0.0)
    loss = tl.sum(error * error)
    for tile in range(1, TILES):
        more, more_real = _pixels(
            clip_ptr, corner, tile * LINES, use, mean, std, channel_stride, frame_stride, line_stride,
            BYTES, DEPTH, PATCH, PIXEL, ALIGNED, LINES, WIDTH, VALUES,
        )  # fmt: skip
        pred = to_float32(tl.load(pred_ptr + tile * LINES * PATCH * PIXEL + j, mask=more_real & use, other=0.0))
        error = tl.where(more_real, pred - (more - centre) * factor, 0.0)
        loss += tl.sum(error * error)
    tl.store(losses_ptr + row, tl.where(use, tl.div_rn(loss, n * PIXEL * 1.0), unread))


@triton.jit
def _sum_kernel(losses_ptr, index_ptr, sum_ptr, count_ptr, rows, BLOCK: tl.constexpr):
    total = tl.zeros([BLOCK], tl.float32)
    count = tl.zeros([BLOCK], tl.int32)
    for start in range(0, rows, BLOCK):
        row = start + tl.arange(0, BLOCK)
        total += tl.load(losses_ptr + row, mask=row < rows, other=0.0)
        count += (tl.load(index_ptr + row, mask=row < rows, other=-1) >= 0).to(tl.int32)
    tl.store(sum_ptr, tl.sum(total))
    tl.store(count_ptr, tl.sum(count).to(tl.int64))


@triton.jit
def _gradient_kernel(
    upstream_ptr, pred_ptr, clip_ptr, index_ptr, statistics_ptr, grad_ptr, mean, std, count, tokens, height, width,
    clip_stride, channel_stride, frame_stride, line_stride,
    BYTES: tl.constexpr, DEPTH: tl.constexpr, PATCH: tl.constexpr, PIXEL: tl.constexpr,
    ALIGNED: tl.constexpr, LINES: tl.constexpr, WIDTH: tl.constexpr, TILES: tl.constexpr, VALUES: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) // TILES
    first = tl.program_id(0) % TILES * LINES
    token = tl.load(index_ptr + row)
    use = (token >= 0) & (token < tokens)
    corner = _corner(row, token, count, height, width, clip_stride, frame_stride, line_stride, BYTES, DEPTH, PATCH, PIXEL)
    pixels, real = _pixels(
        clip_ptr, corner, first, use, mean, std, channel_stride, frame_stride, line_stride,
        BYTES, DEPTH, PATCH, PIXEL, ALIGNED, LINES, WIDTH, VALUES,
    )  # fmt: skip
    j = tl.arange(0, VALUES)
    channel = j % (PATCH * PIXEL) % PIXEL
    statistics_ptr += row.to(tl.int64) * (2 * PIXEL)
    centre = tl.zeros([VALUES], tl.float32)
    factor = tl.zeros([VALUES], tl.float32)
    for c in tl.static_range(PIXEL):
        centre = tl.where(channel == c, tl.load(statistics_ptr + c), centre)
        factor = tl.where(channel == c, tl.load(statistics_ptr + PIXEL + c), factor)
    offset = row.to(tl.int64) * (DEPTH * PATCH * PATCH * PIXEL) + first * (PATCH * PIXEL) + j
    pred = to_float32(tl.load(pred_ptr + offset, mask=real & use, other=0.0))
    scale = tl.load(upstream_ptr) * tl.div_rn(2.0, DEPTH * PATCH * PATCH * PIXEL * 1.0)
    # Kept statistics of an id outside the grid are NaN, and so is this; those of padding are replaced.
    grad = tl.where(token == -1, 0.0, (pred - (pixels - centre) * factor) * scale)
    tl.store(grad_ptr + offset, round_to(grad, grad_ptr.dtype.element_ty), mask=real)


def _inputs(
    pred: Tensor, clip: Tensor, loss_index: Tensor, patch: int, tubelet: int, mean: Sequence[float], std: Sequence[float]
) -> tuple[tuple[Tensor, ...], tuple[Any, ...], dict[str, Any]]:
    """Checked (pred, clip, index), the arguments and the constants that both kernels take."""
    pred = operand(pred, _native.FLOATS, "reconstruction_loss: pred [B, L, K]")
    clip = operand(clip, (torch.uint8, *_native.FLOATS), "reconstruction_loss: clip")
    loss_index = operand(loss_index, (torch.int32,), "reconstruction_loss: loss_index [B, L]")
    _, t, h, w, c = clip_shape(clip)
    height, width = h // patch, w // patch
    tokens = t // tubelet * height * width
    check_ids(loss_index, tokens, "reconstruction_loss")
    if clip.dtype == torch.uint8:
        clip_stride, *strides = clip_strides(clip)
        strides = [1, *strides]
        constants: dict[str, Any] = {"BYTES": True, **tiles(clip, patch, tubelet)}
    else:
        clip_stride, *strides = clip_strides(clip)
        lines = max(1, min(triton.next_power_of_2(tubelet * patch), MOST_VALUES // triton.next_power_of_2(patch * c)))
        constants = {"BYTES": False, "ALIGNED": False, "LINES": lines, "WIDTH": 1, "TILES": -(-tubelet * patch // lines)}
    values = triton.next_power_of_2(min(constants["LINES"], tubelet * patch) * patch * c)
    constants |= {"DEPTH": tubelet, "PATCH": patch, "PIXEL": c, "VALUES": max(16, values)}
    constants["warps"] = 4 if values <= 4096 else 8
    arguments = tuple(mean), tuple(std), loss_index.shape[1], tokens, height, width, clip_stride, *strides
    return (pred, clip, loss_index), arguments, constants


def loss(
    pred: Tensor,
    clip: Tensor,
    loss_index: Tensor,
    patch: int,
    tubelet: int,
    normalize: bool,
    divisor: int,
    mean: Sequence[float],
    std: Sequence[float],
) -> tuple[Tensor, Tensor, Tensor]:
    """Launches for the forward: (loss, number of loss tokens, statistics [B, L, 2, C])."""
    tensors, arguments, constants = _inputs(pred, clip, loss_index, patch, tubelet, mean, std)
    statistics = pred.new_empty(_statistics_shape(clip, loss_index), dtype=torch.float32)
    losses = pred.new_empty(loss_index.shape, dtype=torch.float32)
    loss_sum, count = pred.new_empty((), dtype=torch.float32), loss_index.new_empty((), dtype=torch.int64)
    launch(_loss_kernel, losses.numel(), *tensors, statistics, losses, *arguments, NORMALIZE=normalize, **constants)
    launch(_sum_kernel, 1, losses, tensors[2], loss_sum, count, losses.numel(), BLOCK=SUM_BLOCK, warps=16)
    return divided(loss_sum, count, divisor), count, statistics


def gradient(
    upstream: Tensor,
    pred: Tensor,
    clip: Tensor,
    loss_index: Tensor,
    statistics: Tensor,
    count: Tensor,
    patch: int,
    tubelet: int,
    divisor: int,
    mean: Sequence[float],
    std: Sequence[float],
) -> Tensor:
    """Launch for the backward: the gradient of `pred`, in its dtype."""
    tensors, arguments, constants = _inputs(pred, clip, loss_index, patch, tubelet, mean, std)
    upstream = operand(divided(upstream, count, divisor), (torch.float32,), "reconstruction_loss_backward: upstream")
    statistics = operand(statistics, (torch.float32,), "reconstruction_loss_backward: statistics")
    grad = torch.empty_like(tensors[0])
    programs = loss_index.numel() * constants["TILES"]
    launch(_gradient_kernel, programs, upstream, *tensors, statistics, grad, *arguments, **constants)
    return grad


def aot_configurations() -> list[Configuration]:
    """The launches of the published models (patch 16 and 14), predictions of every dtype, both kinds of clips."""
    found: list[Configuration] = []

    def add(clip: Tensor, patch: int, dtype: torch.dtype, normalize: bool = True) -> None:
        index = torch.zeros(1, 704, dtype=torch.int32)
        c = clip_shape(clip)[4]
        pred = torch.zeros(1, 704, 2 * patch * patch * c, dtype=dtype)
        kind = "normalised" if normalize else "raw"
        name = f"reconstruction_loss {str(clip.dtype)[6:]} clip, {str(dtype)[6:]} {kind} patch 2x{patch} channels {c}"
        rest = [0.5] * c, [0.25] * c
        found.extend(configurations(name, loss, pred, clip, index, patch, 2, normalize, 1, *rest))
        kept = torch.zeros(1, 704, 2, c), torch.tensor(704)
        found.extend(configurations(name, gradient, torch.zeros(()), pred, clip, index, *kept, patch, 2, 1, *rest))

    bytes_ = torch.zeros(1, 16, 224, 224, 3, dtype=torch.uint8)
    for patch in (16, 14):
        for dtype in (torch.float32, torch.bfloat16):
            add(bytes_, patch, dtype)
    add(bytes_, 16, torch.float16)
    add(bytes_, 14, torch.bfloat16, normalize=False)
    add(torch.zeros(1, 3, 16, 224, 224), 16, torch.bfloat16)
    add(torch.zeros(1, 4, 64, 64, 16, dtype=torch.uint8), 16, torch.bfloat16)
    return list({str(c[2:]) + c.kernel.__name__: c for c in found}.values())
