"""What all Triton kernels share: checked operands, launches on the right device, casts, and a record of what is launched.

Floating point fusion is off unless a launch asks for it: `x*a + b` rounds twice, as in torch, and has the same bits on every
backend.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import _native

INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")


@triton.jit
def to_float32(x):
    """`x` of any floating dtype as float32, exactly."""
    if INTERPRETED and x.dtype == tl.bfloat16:  # the interpreter's own cast loses subnormal numbers
        return (x.to(tl.uint16, bitcast=True).to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    return x.to(tl.float32)


@triton.jit
def round_to(x, dtype: tl.constexpr):
    """float32 `x` in `dtype`, rounded to nearest even."""
    if INTERPRETED and dtype == tl.bfloat16:  # the interpreter's own cast truncates
        bits = x.to(tl.uint32, bitcast=True)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        return tl.where(x != x, 0x7FC0, rounded).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    return x.to(dtype)


class Launch(NamedTuple):
    """One recorded launch."""

    kernel: Any
    arguments: tuple[Any, ...]
    constants: dict[str, Any]
    warps: int
    stages: int
    fused: bool


_record: list[Launch] | None = None


def launch(
    kernel: Any, programs: int, *arguments: Any, warps: int = 4, stages: int = 1, fused: bool = False, **constants: Any
) -> None:
    """Run `programs` instances of `kernel` on the current stream of the device of its tensors; none is no launch.

    `stages`: of a pipelined loop. `fused`: let the compiler round a multiply-add once.
    """
    if _record is not None:
        _record.append(Launch(kernel, arguments, constants, warps, stages, fused))
    elif programs:
        with torch.cuda.device_of(next(a for a in arguments if isinstance(a, Tensor))):
            kernel[(programs,)](*arguments, **constants, num_warps=warps, num_stages=stages, enable_fp_fusion=fused)


def operand(tensor: Tensor, dtypes: tuple[torch.dtype, ...], name: str) -> Tensor:
    """`tensor` made contiguous. Raises TypeError for a tensor without plain memory or of another dtype."""
    tensor = tensor.contiguous()
    _native.address(tensor, dtypes, name)
    return tensor


def check_ids(index: Tensor, tokens: int, op: str, lowest: int = -1) -> None:
    """Raise IndexError for token ids outside [lowest, tokens), where looking costs no synchronisation."""
    if index.device.type == "cpu" and index.numel():
        low, high = (int(v) for v in index.aminmax())
        if low < lowest or high >= tokens:
            raise IndexError(f"{op}: index holds {low if low < lowest else high}; token ids are 0 to {tokens - 1}")


class Configuration(NamedTuple):
    """What compiles one launch ahead of time, for a device that need not be there."""

    name: str
    kernel: Any
    signature: dict[str, Any]
    """Type of each argument: `*bf16` a pointer (to 16-byte aligned memory), `i32:16` an integer known to be a multiple of
    16, `constexpr` what is in `constexprs`, a tuple of types for a tuple."""
    constexprs: dict[str, Any]
    num_warps: int
    num_stages: int
    options: dict[str, Any]
    archs: tuple[int, ...] = ()
    """The architectures that launch it (90 for compute capability 9.0); all if empty."""


def configurations(
    name: str, call: Callable[..., Any], *arguments: Any, archs: tuple[int, ...] = ()
) -> list[Configuration]:
    """The configurations of all kernels that `call(*arguments)` launches on `archs`. Nothing runs; tensors are on the CPU."""
    with _recorded() as launches:
        call(*arguments)
    kernels = [item.kernel.__name__.strip("_") for item in launches]
    names = [k if kernels.count(k) == 1 else f"{k} {1 + kernels[:i].count(k)}" for i, k in enumerate(kernels)]
    return [_configuration(f"{name}/{n}", item)._replace(archs=archs) for n, item in zip(names, launches)]


@contextlib.contextmanager
def _recorded() -> Iterator[list[Launch]]:
    global _record
    _record = []
    try:
        yield _record
    finally:
        _record = None


def _configuration(name: str, item: Launch) -> Configuration:
    signature: dict[str, Any] = {}
    constexprs = dict(item.constants)
    for parameter, value in zip(item.kernel.params, item.arguments):
        kind = _kind(value, specialise=not parameter.do_not_specialize)
        if kind == "constexpr":
            constexprs[parameter.name] = value
        signature[parameter.name] = kind
    signature |= dict.fromkeys(item.constants, "constexpr")
    options = {"enable_fp_fusion": item.fused}
    return Configuration(name, item.kernel, signature, constexprs, item.warps, item.stages, options)


_POINTERS = {
    torch.uint8: "*u8", torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16",
    torch.int32: "*i32", torch.int64: "*i64",
}  # fmt: skip


def _kind(value: Any, specialise: bool) -> Any:
    """The type Triton's launcher gives an argument."""
    if isinstance(value, Tensor):
        return _POINTERS[value.dtype]
    if isinstance(value, tuple):
        return tuple(_kind(v, specialise) for v in value)
    if isinstance(value, float):
        return "fp32"
    if specialise and value == 1:
        return "constexpr"
    return ("i32" if -(2**31) <= value < 2**31 else "i64") + (":16" if specialise and value % 16 == 0 else "")
