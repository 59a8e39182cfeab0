"""Flash attention in Triton: tiles per architecture, launches, and what a test compiles ahead of time."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from . import _attention_kernels as kernels
from ._triton_launch import Configuration, configurations, launch

SHORT = 256
"""Up to so many tokens the forward takes its small tile: 208 tokens fill four blocks of 64 as well as two of 128, but twice
as many programs share a multiprocessor."""


class Tile(NamedTuple):
    """How one kernel runs: rows a program owns, rows of the other side in a step, warps, pipeline stages."""

    block: int
    step: int
    warps: int
    stages: int


class Tiles(NamedTuple):
    """The tiles of one head dim on one architecture; `short` is the forward's for few tokens."""

    forward: Tile
    short: Tile
    queries: Tile
    keys: Tile


_SMALL, _WIDE, _LARGE = Tile(64, 64, 4, 2), Tile(128, 64, 8, 2), Tile(128, 128, 8, 2)
_NARROW = Tile(64, 32, 4, 2)
_INTERPRETER = Tiles(Tile(32, 64, 1, 1), Tile(32, 64, 1, 1), Tile(64, 32, 1, 1), Tile(32, 32, 1, 1))
_EXACT, _EXACT_NARROW = Tile(32, 32, 8, 2), Tile(32, 16, 8, 2)
# The largest tiles without a spilled register. Architecture -> width of both operands -> tiles.
_HALF = {
    80: {  # mma.sync
        64: Tiles(_WIDE, _SMALL, _WIDE, Tile(128, 32, 8, 2)),
        80: Tiles(_WIDE, _SMALL, _NARROW, Tile(64, 32, 8, 2)),
        96: Tiles(_SMALL, _SMALL, _NARROW, Tile(64, 32, 8, 2)),
        128: Tiles(_WIDE, _WIDE, _NARROW, _NARROW),
    },
    86: {  # mma.sync in 99 KB of shared memory, and with fewer values in registers than 8.0 gets away with
        64: Tiles(_WIDE, _SMALL, _WIDE, Tile(128, 32, 8, 2)),
        80: Tiles(Tile(128, 32, 8, 2), _NARROW, _NARROW, Tile(64, 32, 8, 2)),
        96: Tiles(Tile(128, 32, 8, 2), _NARROW, _NARROW, Tile(64, 16, 8, 2)),
        128: Tiles(_WIDE, _WIDE, Tile(64, 32, 8, 2), Tile(64, 32, 8, 2)),
    },
    90: {  # wgmma
        64: Tiles(_LARGE, _SMALL, _WIDE, _WIDE),
        80: Tiles(_LARGE, _SMALL, _WIDE, _WIDE),
        96: Tiles(_LARGE, _SMALL, _WIDE, _WIDE),
        128: Tiles(_WIDE, _SMALL, _WIDE, Tile(64, 64, 8, 2)),
    },
    100: {  # tcgen05
        64: Tiles(_LARGE, _SMALL, _WIDE, _WIDE),
        80: Tiles(_WIDE, _SMALL, _WIDE, _WIDE),
        96: Tiles(_WIDE, _NARROW, _WIDE, _WIDE),
        128: Tiles(_WIDE, _SMALL, _SMALL, _WIDE),
    },
}
_FLOAT32 = {
    80: Tiles(_EXACT, _EXACT, Tile(16, 32, 4, 2), _EXACT_NARROW),
    86: Tiles(_EXACT, _EXACT, Tile(16, 16, 4, 2), _EXACT_NARROW),
    90: Tiles(_EXACT, _EXACT, Tile(16, 32, 4, 2), _EXACT_NARROW),
    100: Tiles(_EXACT_NARROW, _EXACT_NARROW, Tile(16, 32, 4, 2), _EXACT_NARROW),
}


def operand_widths(head_dim: int, dtype: torch.dtype) -> tuple[int, int]:
    """(HEAD, TAIL) a head dim is padded to: 64+16 for 80, 64+32 for 88 and 96, else a power of two. float32, which has no
    tensor cores, spills registers over an operand of 128 columns: 64+64."""
    if 64 < head_dim <= 96:
        return 64, 16 if head_dim <= 80 else 32
    width = max(16, triton.next_power_of_2(head_dim))
    return (64, 64) if width == 128 and dtype == torch.float32 else (width, 0)


def tiles(arch: int, head_dim: int, dtype: torch.dtype) -> Tiles:
    """The tiles on an architecture, 90 for compute capability 9.0."""
    family = arch if arch in _HALF else 100 if 100 < arch < 120 else 86
    if dtype == torch.float32:
        return _FLOAT32[family]
    return _HALF[family][max(64, sum(operand_widths(head_dim, dtype)))]


def _tiles(qkv: Tensor) -> Tiles:
    if qkv.device.type != "cuda":
        return _INTERPRETER
    major, minor = torch.cuda.get_device_capability(qkv.device)
    return tiles(10 * major + minor, qkv.shape[4], qkv.dtype)


def _launch(
    kernel: Any, tile: Tile, qkv: Tensor, scale: float, window: int | None, lengths: Tensor | None, *tensors: Tensor,
    **constants: Any,
) -> None:  # fmt: skip
    b, n, _, h, d = qkv.shape
    head, tail = operand_widths(d, qkv.dtype)
    launch(
        kernel, triton.cdiv(n, tile.block) * b * h, *tensors, qkv if lengths is None else lengths.contiguous(), n, h, scale,
        0 if window is None else min(window, n), warps=tile.warps, stages=tile.stages, fused=True, D=d, HEAD=head, TAIL=tail,
        BLOCK=tile.block, STEP=tile.step, BAND=window is not None, SHORTER=lengths is not None, **constants,
    )  # fmt: skip


def forward(
    qkv: Tensor, scale: float, window: int | None, lengths: Tensor | None, choice: Tiles | None = None
) -> tuple[Tensor, Tensor]:
    """(out, lse) of packed qkv, as the op returns them. Raises ValueError for a sample too large for 31-bit offsets."""
    b, n, _, h, d = qkv.shape
    if n * 3 * h * d >= 2**31:
        raise ValueError(
            f"attention=triton: one sample of qkv must have fewer than 2**31 elements, got {(n, 3, h, d)}: use fewer tokens, "
            "or attention=reference"
        )
    qkv = qkv.contiguous()
    out = torch.empty((b, n, h, d), dtype=qkv.dtype, device=qkv.device)
    lse = torch.empty((b, h, n), dtype=torch.float32, device=qkv.device)
    choice = choice or _tiles(qkv)
    tile = choice.short if n <= SHORT else choice.forward
    _launch(kernels.forward, tile, qkv, scale, window, lengths, qkv, out, lse, NEGATIVE=scale < 0)
    return out, lse


def backward(
    grad: Tensor, qkv: Tensor, out: Tensor, lse: Tensor, scale: float, window: int | None, lengths: Tensor | None,
    choice: Tiles | None = None,
) -> Tensor:  # fmt: skip
    """dqkv, packed as qkv is; the same bits in every run."""
    grad, qkv, out, lse = grad.contiguous(), qkv.contiguous(), out.contiguous(), lse.contiguous()
    dqkv, delta = torch.empty_like(qkv), torch.empty_like(lse)
    choice = choice or _tiles(qkv)
    # Queries first: that kernel has the rows of grad and out at hand, and leaves delta for the other.
    _launch(kernels.backward_queries, choice.queries, qkv, scale, window, lengths, grad, qkv, out, lse, delta, dqkv)
    _launch(kernels.backward_keys, choice.keys, qkv, scale, window, lengths, grad, qkv, lse, delta, dqkv)
    return dqkv


HEAD_DIMS = (64, 80, 88, 96, 128)
FAMILIES = {80: (80,), 86: (86, 89, 120), 90: (90,), 100: (100,)}
"""Which architectures share the tiles of one."""


def aot_configurations() -> list[Configuration]:
    """Every head dim in bfloat16, for many tokens and few; 88 also with a window and lengths, and in float32. float16 differs
    from bfloat16 in conversions only."""
    found: list[Configuration] = []
    cases = [(d, torch.bfloat16, None) for d in HEAD_DIMS] + [(88, torch.bfloat16, 9), (88, torch.float32, None)]
    for family, archs in FAMILIES.items():
        for d, dtype, window in cases:
            choice = tiles(family, d, dtype)
            name = f"attention {d} {str(dtype)[6:]}{'' if window is None else ' window'} sm_{family}"
            for n in (SHORT, 2048) if choice.short != choice.forward else (2048,):
                qkv = torch.empty(1, n, 3, 1, d, dtype=dtype)
                lengths = None if window is None else torch.empty(1, dtype=torch.int32)
                lse = torch.empty(1, 1, n)
                found += configurations(f"{name} {n} tokens", forward, qkv, 0.1, window, lengths, choice, archs=archs)
            out = qkv[:, :, 0]
            found += configurations(f"{name}", backward, out, qkv, out, lse, 0.1, window, lengths, choice, archs=archs)
    return found
