"""Matrix product with a layer's weight that keeps nothing but its input: y = x weight^T + bias.

Under autocast torch keeps a bfloat16 copy of every weight from forward to backward. Here the parameter itself is saved and
cast again in the backward, which costs one pass over the weight, or none where the optimiser has left a copy (`_shadow.py`).
The GEMM is the library's.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from . import _half_block as hb
from ._register import check, define
from ._shadow import cast


def _forward(x: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    return hb.linear(x.reshape(-1, x.shape[-1]), weight, bias, dtype).view(*x.shape[:-1], weight.shape[0])


def _gradients(
    grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, needs: list[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    rows = grad.reshape(-1, weight.shape[0])
    dx = torch.mm(rows, cast(weight, rows.dtype)).to(x.dtype).view(x.shape) if needs[0] else x.new_empty(0)
    dweight = hb.weight_grad(rows, x.reshape(-1, x.shape[-1]), weight, needs[1])
    return dx, dweight, hb.bias_grad(rows, bias, needs[2])


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:3])


def _autograd(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    needs = list(ctx.needs_input_grad[:3])
    grads = _linear_backward(grad, *ctx.saved_tensors, needs)
    return *(g if need else None for g, need in zip(grads, needs)), None


_linear = define(
    "linear(Tensor x, Tensor weight, Tensor? bias, ScalarType dtype) -> Tensor",
    hb.opaque(_forward),
    lambda x, weight, bias, dtype: x.new_empty((*x.shape[:-1], weight.shape[0]), dtype=dtype),
    backward=_autograd,
    setup_context=_save,
)
_linear_backward = define(
    "linear_backward(Tensor grad, Tensor x, Tensor weight, Tensor? bias, bool[] needs) -> (Tensor, Tensor, Tensor)",
    hb.opaque(_gradients),
    lambda grad, x, weight, bias, needs: tuple(hb.fake_grad(t, n, x) for t, n in zip((x, weight, bias), needs)),
)


@register_flop_formula(torch.ops.vmae2.linear)
def _flops(x_shape: Any, weight_shape: Any, *_: Any, **__: Any) -> int:
    return 2 * math.prod(x_shape) * weight_shape[0]


@register_flop_formula(torch.ops.vmae2.linear_backward)
def _backward_flops(grad_shape: Any, x_shape: Any, weight_shape: Any, bias: Any, needs: Any, **_: Any) -> int:
    return 2 * math.prod(x_shape) * weight_shape[0] * sum(needs[:2])


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`torch.nn.functional.linear`, saving the parameter instead of a cast copy of it.

    Args:
        x: [..., C], floating point.
        weight: [O, C].
        bias: [O] or None.

    Returns:
        [..., O] in the autocast dtype if autocast is on (fp64 is left alone), else in weight's dtype.

    Raises ValueError on shapes that do not fit.
    """
    check(x.ndim >= 1 and x.is_floating_point(), f"linear: x must be floating-point [..., C], got {x.dtype} {tuple(x.shape)}")
    hb.check_linear("linear", "the", weight, bias, x.shape[-1])
    out: Tensor = _linear(x, weight, bias, hb.compute_dtype(x.device, weight.dtype))
    return out
