"""Residual stream and LayerNorm in Triton, forward and backward. See norm.py.

Forward: a program owns a row; branch, sum, statistics and output are one pass over it. Backward: a program owns a span of
rows, adds up what they give the parameters in float32, and writes one line of partial sums; a sum over the lines follows.
Spans depend on the shape only, so every run has the same bits. Arithmetic is float32, rounded once where something is stored.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import _native
from ._triton_launch import Configuration, configurations, launch, operand, round_to, to_float32

PARTS = 512  # lines of partial sums at most: some for each multiprocessor, few beside the rows of a batch
VALUES = 8  # of a row that a thread holds: 16 bytes of bfloat16


@triton.jit
def _forward_kernel(
    x_ptr, branch_ptr, gamma_ptr, drop_ptr, weight_ptr, bias_ptr, x_new_ptr, h_ptr, mean_ptr, rstd_ptr, tokens, C, eps,
    BRANCH: tl.constexpr, GAMMA: tl.constexpr, DROP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    column = tl.arange(0, BLOCK)
    inside = column < C
    at = row.to(tl.int64) * C + column
    x = to_float32(tl.load(x_ptr + at, mask=inside, other=0.0))
    if BRANCH:
        branch = to_float32(tl.load(branch_ptr + at, mask=inside, other=0.0))
        if DROP:
            scale = to_float32(tl.load(drop_ptr + row // tokens))
            if GAMMA:
                scale = scale * to_float32(tl.load(gamma_ptr + column, mask=inside, other=0.0))
            branch = branch * scale
        elif GAMMA:
            branch = branch * to_float32(tl.load(gamma_ptr + column, mask=inside, other=0.0))
        stored = round_to(x + branch, x_new_ptr.dtype.element_ty)
        tl.store(x_new_ptr + at, stored, mask=inside)
        x = to_float32(stored)  # the norm sees the stream as it goes on
    mean = tl.sum(x, 0) / C
    centred = tl.where(inside, x - mean, 0.0)
    rstd = 1.0 / tl.sqrt(tl.sum(centred * centred, 0) / C + eps)
    weight = to_float32(tl.load(weight_ptr + column, mask=inside, other=0.0))
    bias = to_float32(tl.load(bias_ptr + column, mask=inside, other=0.0))
    tl.store(h_ptr + at, round_to(centred * rstd * weight + bias, h_ptr.dtype.element_ty), mask=inside)
    tl.store(mean_ptr + row, mean)
    tl.store(rstd_ptr + row, rstd)


@triton.jit
def _backward_kernel(
    grad_x_ptr, grad_h_ptr, x_ptr, mean_ptr, rstd_ptr, branch_ptr, gamma_ptr, drop_ptr, weight_ptr,
    dx_ptr, dbranch_ptr, partial_ptr, rows, tokens, span, C,
    GRAD_X: tl.constexpr, GAMMA: tl.constexpr, DROP: tl.constexpr, DGAMMA: tl.constexpr, LINES: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """partial[part] = [dweight, dbias, dgamma] of rows part * span ..; `LINES` of the three are there."""
    part = tl.program_id(0)
    column = tl.arange(0, BLOCK)
    real = column < C
    weight = to_float32(tl.load(weight_ptr + column, mask=real, other=0.0))
    dweight = tl.zeros([BLOCK], tl.float32)
    dbias = tl.zeros([BLOCK], tl.float32)
    dgamma = tl.zeros([BLOCK], tl.float32)
    if GAMMA:
        gamma = to_float32(tl.load(gamma_ptr + column, mask=real, other=0.0))
    for i in range(span):
        row = part * span + i
        there = row < rows
        inside = real & there
        at = row.to(tl.int64) * C + column
        grad = to_float32(tl.load(grad_h_ptr + at, mask=inside, other=0.0))
        mean = tl.load(mean_ptr + row, mask=there, other=0.0)
        rstd = tl.load(rstd_ptr + row, mask=there, other=0.0)
        normed = (to_float32(tl.load(x_ptr + at, mask=inside, other=0.0)) - mean) * rstd
        dweight += grad * normed
        dbias += grad
        grad = grad * weight
        dx = (grad - normed * (tl.sum(grad * normed, 0) / C) - tl.sum(grad, 0) / C) * rstd
        if GRAD_X:
            dx += to_float32(tl.load(grad_x_ptr + at, mask=inside, other=0.0))
        tl.store(dx_ptr + at, round_to(dx, dx_ptr.dtype.element_ty), mask=inside)
        if DROP:
            dx = dx * to_float32(tl.load(drop_ptr + row // tokens, mask=there, other=0.0))
        if DGAMMA:
            dgamma += dx * to_float32(tl.load(branch_ptr + at, mask=inside, other=0.0))
        if GAMMA:
            dx = dx * gamma
        if GAMMA or DROP:
            tl.store(dbranch_ptr + at, round_to(dx, dbranch_ptr.dtype.element_ty), mask=inside)
    line = partial_ptr + part.to(tl.int64) * LINES * C + column
    tl.store(line, dweight, mask=real)
    tl.store(line + C, dbias, mask=real)
    if DGAMMA:
        tl.store(line + 2 * C, dgamma, mask=real)


def _shape(columns: int) -> dict[str, Any]:
    """Block and warps for rows of `columns` values."""
    block = triton.next_power_of_2(columns)
    return {"BLOCK": block, "warps": max(1, min(16, block // (32 * VALUES)))}


def _maybe(tensor: Tensor | None, name: str, instead: Tensor) -> Tensor:
    """`tensor` as an operand; without one, `instead` stands for a pointer that the kernel does not read."""
    return instead if tensor is None else operand(tensor, _native.FLOATS, f"residual_norm: {name}")


def forward(
    x: Tensor,
    branch: Tensor | None,
    gamma: Tensor | None,
    drop: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Launch for the forward: (x_new, empty without a branch; h in `dtype`; mean; rstd)."""
    x = operand(x, _native.FLOATS, "residual_norm: x")
    b, n, c = x.shape
    h = torch.empty(x.shape, dtype=dtype, device=x.device)
    mean, rstd = (torch.empty((b, n, 1), dtype=torch.float32, device=x.device) for _ in range(2))
    x_new = x.new_empty(0 if branch is None else x.shape)
    launch(
        _forward_kernel, b * n, x, _maybe(branch, "branch", x), _maybe(gamma, "gamma", x), _maybe(drop, "drop", x),
        _maybe(weight, "norm weight", x), _maybe(bias, "norm bias", x), h if branch is None else x_new, h, mean, rstd,
        n, c, eps, BRANCH=branch is not None, GAMMA=gamma is not None, DROP=drop is not None, **_shape(c),
    )  # fmt: skip
    return x_new, h, mean, rstd


def backward(
    grad_x: Tensor | None,
    grad_h: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    branch: Tensor | None,
    gamma: Tensor | None,
    drop: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    branch_dtype: torch.dtype | None,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Launch for the backward; arguments and results are those of `_half_block.stream_backward`."""
    x = operand(x, _native.FLOATS, "residual_norm_backward: x")
    grad_h = operand(grad_h, _native.FLOATS, "residual_norm_backward: grad")
    b, n, c = x.shape
    rows = b * n
    span = triton.cdiv(rows, PARTS)
    parts = triton.cdiv(rows, span) if rows else 0
    lines = 3 if needs[0] else 2
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    scaled = gamma is not None or drop is not None
    dbranch = torch.empty(x.shape, dtype=branch_dtype, device=x.device) if scaled else x.new_empty(0)
    partial = torch.empty((parts, lines, c), dtype=torch.float32, device=x.device)
    launch(
        _backward_kernel, parts, _maybe(grad_x, "grad_x", x), grad_h, x, mean, rstd, _maybe(branch, "branch", x),
        _maybe(gamma, "gamma", x), _maybe(drop, "drop", x), _maybe(weight, "norm weight", x), dx,
        dbranch if scaled else dx, partial, rows, n, span, c, GRAD_X=grad_x is not None, GAMMA=gamma is not None,
        DROP=drop is not None, DGAMMA=needs[0], LINES=lines, **_shape(c),
    )  # fmt: skip
    sums = partial.sum(0)
    none = x.new_empty(0)
    dgamma = sums[2].to(gamma.dtype, copy=True) if needs[0] and gamma is not None else none
    dweight = sums[0].to(weight.dtype, copy=True) if needs[1] else x.new_empty(0)
    dbias = sums[1].to(bias.dtype, copy=True) if needs[2] else x.new_empty(0)
    return dx, dbranch, dgamma, dweight, dbias


def aot_configurations() -> list[Configuration]:
    """The launches of ViT-B, ViT-g and their decoders under autocast, and of a bfloat16 stream with all options."""
    found: list[Configuration] = []
    half, full = torch.bfloat16, torch.float32
    launches = [(width, full, False) for width in (384, 512, 768, 1408)] + [(1408, half, False), (1408, half, True)]
    for width, stream, options in launches:
        x, branch = torch.empty(16, 208, width, dtype=stream), torch.empty(16, 208, width, dtype=half)
        parameter, statistics = torch.ones(width), torch.empty(16, 208, 1)
        gamma, drop, scaled = (parameter, torch.ones(16), branch) if options else (None, None, None)
        name = f"{str(stream)[6:]} stream, {width} columns{', LayerScale, drop path' if options else ''}"
        found += configurations(
            f"residual_norm {name}", forward, x, branch, gamma, drop, parameter, parameter, 1e-6, half
        )
        found += configurations(
            f"residual_norm_backward {name}", backward, x, branch, x, statistics, statistics, scaled, gamma, drop, parameter,
            parameter, half, [options, True, True],
        )  # fmt: skip
    return found
