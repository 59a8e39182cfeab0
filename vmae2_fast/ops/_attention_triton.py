"""Flash attention in Triton: tiles per architecture, launches, and what a test compiles ahead of time."""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from . import _attention_kernels as kernels

LOG2_E = math.log2(math.e)


class Tile(NamedTuple):
    """How one kernel runs: rows a program owns, rows of the other side a step, warps, pipeline stages."""

    block: int
    step: int
    warps: int
    stages: int


_INTERPRETER = Tile(32, 64, 1, 1), Tile(64, 32, 1, 1), Tile(32, 32, 1, 1)


def split(head_dim: int) -> tuple[int, int]:
    """Widths (HEAD, TAIL) of the operands a head dim is padded to: 64+16 for 80, 64+32 for 88 and 96, else a power of two."""
    if 64 < head_dim <= 96:
        return 64, 16 if head_dim <= 80 else 32
    return max(16, triton.next_power_of_2(head_dim)), 0


def _launch(kernel: Any, tile: Tile, qkv: Tensor, *arguments: Any, **constants: Any) -> None:
    b, n, _, h, d = qkv.shape
    head, tail = split(d)
    programs = triton.cdiv(n, tile.block) * b * h
    if programs:
        with torch.cuda.device_of(qkv):
            kernel[(programs,)](
                *arguments, D=d, HEAD=head, TAIL=tail, BLOCK=tile.block, STEP=tile.step, **constants,
                num_warps=tile.warps, num_stages=tile.stages,
            )  # fmt: skip


def forward(qkv: Tensor, scale: float, window: int | None) -> tuple[Tensor, Tensor]:
    """(out, lse) of packed qkv, as the op returns them."""
    qkv = qkv.contiguous()
    b, n, _, h, d = qkv.shape
    out = torch.empty((b, n, h, d), dtype=qkv.dtype, device=qkv.device)
    lse = torch.empty((b, h, n), dtype=torch.float32, device=qkv.device)
    tile = _INTERPRETER[0]
    band = window is not None
    _launch(kernels.forward, tile, qkv, qkv, out, lse, n, h, scale * LOG2_E, window or 0, NEGATIVE=scale < 0, BAND=band)
    return out, lse


def backward(grad: Tensor, qkv: Tensor, out: Tensor, lse: Tensor, scale: float, window: int | None) -> Tensor:
    """dqkv, packed as qkv is."""
    grad, qkv, out, lse = grad.contiguous(), qkv.contiguous(), out.contiguous(), lse.contiguous()
    n, h = qkv.shape[1], qkv.shape[3]
    dqkv, delta = torch.empty_like(qkv), torch.empty_like(lse)
    rest = n, h, scale * LOG2_E, window or 0
    band = window is not None
    _launch(kernels.backward_queries, _INTERPRETER[1], qkv, grad, qkv, out, lse, delta, dqkv, *rest, BAND=band)
    _launch(kernels.backward_keys, _INTERPRETER[2], qkv, grad, qkv, lse, delta, dqkv, *rest, BAND=band)
    return dqkv
