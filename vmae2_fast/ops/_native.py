"""The door to `vmae2_fast._C`: tensors become checked addresses. Only files of `vmae2_fast/ops` call the extension."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .. import backend

# The numbers of `enum class Dtype` in csrc/ops.h.
DTYPE_CODES = {torch.uint8: 0, torch.float32: 1, torch.bfloat16: 2, torch.float16: 3, torch.int32: 4, torch.int64: 5}
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
"""Floating dtypes the native kernels take; float64 is served by the reference implementations."""


def extension() -> Any:
    """The compiled module; ops reach it only after `backend.pick` said that it is there."""
    module = backend.native()
    if module is None:
        raise backend.BackendError("vmae2_fast._C was not built")
    return module


def register(op: str, reference: Callable[..., Any], native: Callable[..., Any]) -> None:
    """Register an op that has a reference for every device and a C++ kernel for the CPU."""
    implementations = {
        "reference": backend.Implementation(reference),
        "native": backend.Implementation(native, backend.why_not_native_cpu),
    }
    backend.register_op(op, implementations, {"cpu": ("native", "reference"), "*": ("reference",)})


def threads() -> int:
    """Threads a native CPU kernel may use: torch's own setting."""
    return torch.get_num_threads()


def code(dtype: torch.dtype) -> int:
    """The extension's number for `dtype`."""
    return DTYPE_CODES[dtype]


def address(tensor: Tensor, dtypes: tuple[torch.dtype, ...], name: str) -> int:
    """Memory address of `tensor` after checking all that C++ cannot see.

    `name` is how the argument reads in an error, for example `"gather_patches: index [B, K]"`.
    Raises TypeError for anything but a dense `torch.Tensor` or `Parameter` (fake tensors, DTensor and other subclasses
    hold no plain memory) or a dtype not in `dtypes`; ValueError for a tensor that is not contiguous.
    """
    if type(tensor) not in (Tensor, torch.nn.Parameter) or tensor.layout != torch.strided:
        raise TypeError(
            f"{name}: native kernels take plain dense tensors, got {type(tensor).__name__} ({tensor.layout}); "
            'pass its local dense tensor, or run the op with use_backend("reference")'
        )
    if tensor.dtype not in dtypes:
        raise TypeError(f"{name}: dtype must be one of {', '.join(map(str, dtypes))}, got {tensor.dtype}")
    if not tensor.is_contiguous():
        raise ValueError(f"{name}: must be contiguous, got shape {tuple(tensor.shape)} with strides {tensor.stride()}")
    if tensor.is_conj() or tensor.is_neg():
        raise ValueError(f"{name}: must not be a lazily conjugated or negated view")
    return tensor.data_ptr()
