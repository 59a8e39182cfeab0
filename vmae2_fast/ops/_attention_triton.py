"""Flash attention in Triton: tiles per architecture, launches, and what a test compiles ahead of time."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from . import _attention_kernels as kernels

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
_FLOAT32 = Tiles(Tile(32, 32, 8, 2), Tile(32, 32, 8, 2), Tile(16, 32, 4, 2), Tile(32, 16, 8, 2))
_INTERPRETER = Tiles(Tile(32, 64, 1, 1), Tile(32, 64, 1, 1), Tile(64, 32, 1, 1), Tile(32, 32, 1, 1))
# The largest tiles without a spilled register. Architecture -> width of both operands -> tiles.
_HALF = {
    80: {  # mma.sync: 64 KB of shared memory at most, so that 8.6, 8.9 and 12.0 with their 99 KB share them
        64: Tiles(_WIDE, _SMALL, _WIDE, Tile(128, 32, 8, 2)),
        80: Tiles(_WIDE, _SMALL, _NARROW, Tile(64, 32, 8, 2)),
        96: Tiles(_SMALL, _SMALL, _NARROW, Tile(64, 32, 8, 2)),
        128: Tiles(_WIDE, _WIDE, _NARROW, _NARROW),
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
        96: Tiles(_WIDE, _SMALL, _WIDE, _WIDE),
        128: Tiles(_WIDE, _SMALL, _SMALL, _WIDE),
    },
}


def operand_widths(head_dim: int, dtype: torch.dtype) -> tuple[int, int]:
    """(HEAD, TAIL) a head dim is padded to: 64+16 for 80, 64+32 for 88 and 96, else a power of two. float32, which has no
    tensor cores, spills registers over an operand of 128 columns: 64+64."""
    if 64 < head_dim <= 96:
        return 64, 16 if head_dim <= 80 else 32
    width = max(16, triton.next_power_of_2(head_dim))
    return (64, 64) if width == 128 and dtype == torch.float32 else (width, 0)


def tiles(arch: int, head_dim: int, dtype: torch.dtype) -> Tiles:
    """The tiles for compute capability `arch` // 10 . `arch` % 10."""
    if dtype == torch.float32:
        return _FLOAT32
    family = 90 if arch == 90 else 100 if 100 <= arch < 120 else 80
    return _HALF[family][max(64, sum(operand_widths(head_dim, dtype)))]


def _tiles(qkv: Tensor) -> Tiles:
    if qkv.device.type != "cuda":
        return _INTERPRETER
    major, minor = torch.cuda.get_device_capability(qkv.device)
    return tiles(10 * major + minor, qkv.shape[4], qkv.dtype)


def _constants(head_dim: int, dtype: torch.dtype, tile: Tile, band: bool) -> dict[str, Any]:
    head, tail = operand_widths(head_dim, dtype)
    return {"D": head_dim, "HEAD": head, "TAIL": tail, "BLOCK": tile.block, "STEP": tile.step, "BAND": band}


def _launch(kernel: Any, tile: Tile, qkv: Tensor, window: int | None, *arguments: Any, **constants: Any) -> None:
    b, n, _, h, d = qkv.shape
    programs = triton.cdiv(n, tile.block) * b * h
    if not programs:
        return
    constants |= _constants(d, qkv.dtype, tile, window is not None)
    with torch.cuda.device_of(qkv):
        kernel[(programs,)](
            *arguments, 0 if window is None else min(window, n), **constants, num_warps=tile.warps, num_stages=tile.stages
        )


def forward(qkv: Tensor, scale: float, window: int | None) -> tuple[Tensor, Tensor]:
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
    choice = _tiles(qkv)
    tile = choice.short if n <= SHORT else choice.forward
    _launch(kernels.forward, tile, qkv, window, qkv, out, lse, n, h, scale, NEGATIVE=scale < 0)
    return out, lse


def backward(grad: Tensor, qkv: Tensor, out: Tensor, lse: Tensor, scale: float, window: int | None) -> Tensor:
    """dqkv, packed as qkv is; the same bits in every run."""
    grad, qkv, out, lse = grad.contiguous(), qkv.contiguous(), out.contiguous(), lse.contiguous()
    n, h = qkv.shape[1], qkv.shape[3]
    dqkv, delta = torch.empty_like(qkv), torch.empty_like(lse)
    choice = _tiles(qkv)
    # Queries first: that kernel has the rows of grad and out at hand, and leaves delta for the other.
    _launch(kernels.backward_queries, choice.queries, qkv, window, grad, qkv, out, lse, delta, dqkv, n, h, scale)
    _launch(kernels.backward_keys, choice.keys, qkv, window, grad, qkv, lse, delta, dqkv, n, h, scale)
    return dqkv


HEAD_DIMS = (64, 80, 88, 96, 128)
_TYPES = {"n": "i32", "h": "i32", "window": "i32", "scale": "fp32", "lse": "*fp32", "delta": "*fp32"}


def aot_configurations(arch: int) -> list[tuple[str, Any, dict[str, str], dict[str, Any], int, int]]:
    """What the launches above compile on `arch` (90 for 9.0): (name, kernel, signature, constexprs, num_warps, num_stages).

    Every head dim in bfloat16; 88 also with a window, and in float32. Pointers are aligned to 16 bytes, no integer is
    specialised. float16 differs from bfloat16 in conversions only.
    """
    cases = [(d, torch.bfloat16, False) for d in HEAD_DIMS]
    cases += [(88, torch.bfloat16, True), (88, torch.float32, False)]
    found = []
    for d, dtype, band in cases:
        choice = tiles(arch, d, dtype)
        launches = {
            "forward": (kernels.forward, choice.forward),
            "forward_short": (kernels.forward, choice.short),
            "backward_queries": (kernels.backward_queries, choice.queries),
            "backward_keys": (kernels.backward_keys, choice.keys),
        }
        if choice.short == choice.forward:
            del launches["forward_short"]
        pointer, words = ("*fp32", "float32") if dtype == torch.float32 else ("*bf16", "bfloat16")
        for kernel_name, (kernel, tile) in launches.items():
            constants = _constants(d, dtype, tile, band)
            if kernel is kernels.forward:
                constants["NEGATIVE"] = False
            signature = {p: "constexpr" if p in constants else _TYPES.get(p, pointer) for p in kernel.arg_names}
            name = f"attention/{kernel_name}/{d}/{words}{'/window' if band else ''}"
            found.append((name, kernel, signature, constants, tile.warps, tile.stages))
    return found
