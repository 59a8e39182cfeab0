"""Launchers of the C++ kernels behind `residual_norm` and the half-blocks. See norm.py and csrc/cpu/norm.cpp."""

from __future__ import annotations

import torch
from torch import Tensor

from . import _native


def _address(
    tensor: Tensor | None, name: str, shape: torch.Size | tuple[int, ...], dtypes: tuple[torch.dtype, ...] = _native.FLOATS
) -> int:
    """0 for none. The shape is looked at again: a registered op can be called past the public function."""
    if tensor is None:
        return 0
    if tensor.shape != shape:
        raise ValueError(f"residual_norm: {name} must be {list(shape)}, got {list(tensor.shape)}")
    return _native.address(tensor, dtypes, f"residual_norm: {name}")


def _made(tensor: Tensor | None) -> int:
    """The address of a result made here, 0 for none."""
    return 0 if tensor is None else tensor.data_ptr()


def _floats(tensor: Tensor | None) -> Tensor | None:
    """A parameter, small beside the rows, as the kernels read it."""
    return None if tensor is None else tensor.to(torch.float32).contiguous()


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
    """Arguments and results are those of `_half_block.stream_forward`."""
    x = x.contiguous()
    branch = None if branch is None else branch.contiguous()
    gammas, drops, weights, biases = (_floats(t) for t in (gamma, drop, weight, bias))
    shape, device = x.shape, x.device
    row = shape[2:]
    x_new = x.new_empty(0) if branch is None else torch.empty_like(x)
    h = torch.empty_like(x, dtype=dtype)
    mean, rstd = (torch.empty((*shape[:2], 1), dtype=torch.float32, device=device) for _ in range(2))
    _native.run(
        "residual_norm", device, *shape,
        _address(x, "x", shape), _native.code(x.dtype),
        _address(branch, "branch", shape), _native.code((x if branch is None else branch).dtype),
        _address(gammas, "gamma", row), _address(drops, "drop", shape[:1]),
        _address(weights, "norm weight", row), _address(biases, "norm bias", row), eps,
        _made(None if branch is None else x_new), _made(h), _native.code(dtype), _made(mean), _made(rstd),
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
    """Arguments and results are those of `_half_block.stream_backward`."""
    x, grad_h = x.contiguous(), grad_h.contiguous()
    grad_x = None if grad_x is None else grad_x.to(x.dtype).contiguous()
    branch = branch.contiguous() if needs[0] and branch is not None else None
    gammas, drops, weights = (_floats(t) for t in (gamma, drop, weight))
    shape, device = x.shape, x.device
    row, rows = shape[2:], (*shape[:2], 1)
    if needs[0] and branch is None:
        raise ValueError("residual_norm: the gradient of gamma takes the branch, but branch is None")
    dx = torch.empty_like(x)
    scaled = gamma is not None or drop is not None
    dbranch = torch.empty_like(x, dtype=branch_dtype) if scaled else None
    sums = [torch.empty(shape[2], dtype=torch.float32, device=device) if wanted else None for wanted in needs[:3]]
    _native.run(
        "residual_norm_backward", device, *shape,
        _address(x, "x", shape), _native.code(x.dtype),
        _address(branch, "branch", shape), _native.code(branch_dtype or x.dtype),
        _address(gammas, "gamma", row), _address(drops, "drop", shape[:1]), _address(weights, "norm weight", row),
        _address(grad_x, "grad_x", shape), _address(grad_h, "grad", shape), _native.code(grad_h.dtype),
        _address(mean, "mean", rows, (torch.float32,)), _address(rstd, "rstd", rows, (torch.float32,)),
        _made(dx), _made(dbranch), *map(_made, sums),
    )  # fmt: skip
    dgamma, dweight, dbias = (
        x.new_empty(0) if total is None or like is None else total.to(like.dtype)
        for total, like in zip(sums, (gamma, weight, bias))
    )
    return dx, x.new_empty(0) if dbranch is None else dbranch, dgamma, dweight, dbias
