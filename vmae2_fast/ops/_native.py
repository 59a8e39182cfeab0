"""The door to `vmae2_fast._C`: tensors become checked addresses. Only files of `vmae2_fast/ops` call the extension."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import backend

# The numbers of `enum class Dtype` in csrc/ops.h.
DTYPE_CODES = {torch.uint8: 0, torch.float32: 1, torch.bfloat16: 2, torch.float16: 3, torch.int32: 4, torch.int64: 5}
_PLAIN = (Tensor, torch.nn.Parameter)
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
"""Floating dtypes the native kernels take; float64 is served by the reference implementations."""


def extension() -> Any:
    """The compiled module; ops reach it only after `backend.pick` said that it is there."""
    module = backend.native()
    if module is None:
        raise backend.BackendError("vmae2_fast._C was not built")
    return module


def queue(device: torch.device) -> tuple[int, int]:
    """(device number, address of torch's current stream there): where a CUDA kernel is launched. Nothing waits for it."""
    number = torch.cuda.current_device() if device.index is None else device.index
    return number, torch.cuda.current_stream(number).cuda_stream


def in_cuda(device: torch.device) -> bool:
    """Whether tensors on `device` are for the CUDA kernels, not for C++."""
    return device.type == "cuda"


def run(op: str, device: torch.device, *arguments: Any) -> None:
    """Run a native kernel on tensors of `device`: in C++ on torch's number of threads, in CUDA on torch's current stream."""
    if in_cuda(device):
        getattr(extension(), f"{op}_cuda")(*arguments, queue(device))
    else:
        getattr(extension(), op)(*arguments, torch.get_num_threads())


def code(dtype: torch.dtype) -> int:
    """The extension's number for `dtype`. Raises TypeError for one that no native kernel takes."""
    if dtype not in DTYPE_CODES:
        raise TypeError(f"native kernels take no {dtype}")
    return DTYPE_CODES[dtype]


def address(tensor: Tensor, dtypes: tuple[torch.dtype, ...], name: str) -> int:
    """Memory address of `tensor` after checking all that C++ cannot see.

    `name` is how the argument reads in an error, for example `"gather_patches: index [B, K]"`.
    Raises TypeError for anything but a dense `torch.Tensor` or `Parameter` (fake tensors, DTensor and other subclasses
    hold no plain memory) or a dtype not in `dtypes`; ValueError for a tensor that is not contiguous.
    """
    if type(tensor) not in _PLAIN or tensor.layout != torch.strided:
        raise TypeError(
            f"{name}: native kernels take plain dense tensors, got {type(tensor).__name__} ({tensor.layout}); "
            'pass its local dense tensor, or run the op with use_backend("reference")'
        )
    if tensor.dtype not in dtypes:
        raise TypeError(f"{name}: dtype must be one of {', '.join(map(str, dtypes))}, got {tensor.dtype}")
    if not tensor.is_contiguous():
        raise ValueError(f"{name}: must be contiguous, got shape {tuple(tensor.shape)} with strides {tensor.stride()}")
    if tensor.is_neg():
        raise ValueError(f"{name}: must not be a lazily negated view")
    return tensor.data_ptr()


def addresses(tensors: Sequence[Tensor], dtype: torch.dtype, name: str) -> list[int]:
    """`address` of each of many tensors; hundreds in the time of a few."""
    # Each question to all of them at a time: a loop over the tensors costs as much as the smaller kernels.
    plain = {type(t) for t in tensors} <= set(_PLAIN) and {t.dtype for t in tensors} <= {dtype}
    plain = plain and {t.layout for t in tensors} <= {torch.strided}
    if not plain or not all(map(Tensor.is_contiguous, tensors)) or any(map(Tensor.is_neg, tensors)):
        return [address(t, (dtype,), name) for t in tensors]
    return [t.data_ptr() for t in tensors]
