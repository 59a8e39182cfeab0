"""Residual stream, LayerNorm and MLP: the second half of a transformer block.

    x_new = x + gamma * drop[b] * branch
    u     = LayerNorm(x_new) fc1_weight^T + fc1_bias          [B, N, F]
    out   = GELU(u) fc2_weight^T + fc2_bias                   GELU(u) = u * (1 + erf(u/sqrt 2)) / 2

Dtypes and what is saved are those of `norm_qkv`, and the pre-activation u; LayerNorm and GELU outputs are recomputed.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from .. import backend
from . import _half_block as hb
from ._register import define
from ._shadow import cast


def _norm_mlp_forward(
    stream: hb.Stream,
    x: Tensor,
    branch: Tensor | None,
    gamma: Tensor | None,
    drop: Tensor | None,
    norm_weight: Tensor,
    norm_bias: Tensor,
    eps: float,
    fc1_weight: Tensor,
    fc1_bias: Tensor | None,
    fc2_weight: Tensor,
    fc2_bias: Tensor | None,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    returned, h, mean, rstd = stream.forward(x, branch, gamma, drop, norm_weight, norm_bias, eps, dtype)
    b, n, c = x.shape
    u = hb.linear(h.view(-1, c), fc1_weight, fc1_bias, dtype)
    del h
    out = hb.linear(torch.nn.functional.gelu(u), fc2_weight, fc2_bias, dtype)
    return returned, out.view(b, n, out.shape[1]), mean, rstd, u.view(b, n, u.shape[1])


def _norm_mlp_gradients(
    stream: hb.Stream,
    grad_x: Tensor | None,
    grad_out: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    branch: Tensor | None,
    gamma: Tensor | None,
    drop: Tensor | None,
    norm_weight: Tensor,
    norm_bias: Tensor,
    branch_dtype: torch.dtype | None,
    needs: list[bool],
    eps: float,
    fc1_weight: Tensor,
    fc1_bias: Tensor | None,
    fc2_weight: Tensor,
    fc2_bias: Tensor | None,
    pre_activation: Tensor,
) -> tuple[Tensor, ...]:
    grad = grad_out.reshape(-1, fc2_weight.shape[0])
    u = pre_activation.reshape(-1, fc2_weight.shape[1])
    dfc2 = hb.weight_grad(grad, torch.nn.functional.gelu(u), fc2_weight, True) if needs[5] else x.new_empty(0)
    dfc2_bias = hb.bias_grad(grad, fc2_bias, needs[6])
    du = torch.ops.aten.gelu_backward.default(torch.mm(grad, cast(fc2_weight, grad.dtype)), u)
    if needs[3]:
        dfc1 = hb.weight_grad(du, stream.norm_rows(x, norm_weight, norm_bias, eps, du.dtype), fc1_weight, True)
    else:
        dfc1 = x.new_empty(0)
    dfc1_bias = hb.bias_grad(du, fc1_bias, needs[4])
    grad_h = torch.mm(du, cast(fc1_weight, du.dtype)).view(x.shape)
    del du
    grads = stream.backward(
        grad_x, grad_h, x, mean, rstd, branch, gamma, drop, norm_weight, norm_bias, branch_dtype, needs
    )
    return *grads, dfc1, dfc1_bias, dfc2, dfc2_bias


hb.register("norm_mlp", _norm_mlp_forward)
hb.register("norm_mlp_backward", _norm_mlp_gradients)


def _fake_norm_mlp(
    x: Tensor,
    branch: Tensor | None,
    gamma: Any,
    drop: Any,
    norm_weight: Any,
    norm_bias: Any,
    eps: float,
    fc1_weight: Tensor,
    fc1_bias: Any,
    fc2_weight: Tensor,
    fc2_bias: Any,
    dtype: torch.dtype,
    _: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    x_new, mean, rstd = hb.fake_stream(x, branch)
    b, n, _c = x.shape
    out = x.new_empty((b, n, fc2_weight.shape[0]), dtype=dtype)
    return x_new, out, mean, rstd, x.new_empty((b, n, fc1_weight.shape[0]), dtype=dtype)


def _fake_norm_mlp_backward(
    grad_x: Any,
    grad_out: Any,
    x: Tensor,
    mean: Any,
    rstd: Any,
    branch: Any,
    gamma: Any,
    drop: Any,
    norm_weight: Tensor,
    norm_bias: Tensor,
    branch_dtype: torch.dtype | None,
    needs: list[bool],
    eps: float,
    *rest: Any,
) -> tuple[Tensor, ...]:
    stream = hb.fake_stream_backward(x, gamma, drop, norm_weight, norm_bias, branch_dtype, needs)
    return *stream, *(hb.fake_grad(t, wanted, x) for t, wanted in zip(rest[:4], needs[3:]))


def _save_norm_mlp(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.eps = inputs[6]
    hb.save_stream(ctx, "norm_mlp", inputs, output, *inputs[7:11], output[4])


def _norm_mlp_autograd(ctx: Any, grad_x: Tensor | None, grad_out: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    x, *saved = ctx.saved_tensors
    stream, rest = saved[:7], saved[7:]
    wanted = ctx.needs_input_grad
    if grad_out is None:
        grad_out = x.new_zeros((*x.shape[:2], rest[2].shape[0]), dtype=rest[4].dtype)
    needs = [wanted[i] for i in (2, 4, 5, 7, 8, 9, 10)]
    grads = _norm_mlp_backward(grad_x, grad_out, x, *stream, ctx.branch_dtype, needs, ctx.eps, *rest, ctx.backend)
    weight_grads = [g if need else None for g, need in zip(grads[5:], needs[3:])]
    return *hb.stream_grads(ctx, grads), *weight_grads, None, None


_WEIGHTS = "Tensor fc1_weight, Tensor? fc1_bias, Tensor fc2_weight, Tensor? fc2_bias"
_norm_mlp = define(
    f"norm_mlp({hb.STREAM}, {_WEIGHTS}, ScalarType dtype, str backend) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    hb.body("norm_mlp"),
    _fake_norm_mlp,
    backward=_norm_mlp_autograd,
    setup_context=_save_norm_mlp,
)
_norm_mlp_backward = define(
    f"norm_mlp_backward({hb.STREAM_BACKWARD}, float eps, {_WEIGHTS}, Tensor pre_activation, str backend) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    hb.backward_body("norm_mlp_backward"),
    _fake_norm_mlp_backward,
)


def _gemm_flops(x_shape: Any, fc1_shape: Any, fc2_shape: Any) -> tuple[int, int]:
    rows = x_shape[0] * x_shape[1]
    return 2 * rows * fc1_shape[0] * fc1_shape[1], 2 * rows * fc2_shape[0] * fc2_shape[1]


@register_flop_formula(torch.ops.vmae2.norm_mlp)
def _norm_mlp_flops(x_shape: Any, *args: Any, **_: Any) -> int:
    return sum(_gemm_flops(x_shape, args[6], args[8]))


@register_flop_formula(torch.ops.vmae2.norm_mlp_backward)
def _norm_mlp_backward_flops(grad_x: Any, grad_out: Any, x_shape: Any, *args: Any, **_: Any) -> int:
    needs, fc1, fc2 = args[8], args[10], args[12]
    first, second = _gemm_flops(x_shape, fc1, fc2)
    return first * (1 + needs[3]) + second * (1 + needs[5])


def norm_mlp(
    x: Tensor,
    branch: Tensor | None,
    gamma: Tensor | None,
    drop: Tensor | None,
    norm_weight: Tensor,
    norm_bias: Tensor,
    eps: float,
    fc1_weight: Tensor,
    fc1_bias: Tensor | None,
    fc2_weight: Tensor,
    fc2_bias: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Add a branch to the residual stream, then LayerNorm, fc1, GELU (erf) and fc2.

    Args:
        x, branch, gamma, drop, norm_weight, norm_bias, eps: as in `vmae2_fast.ops.norm.residual_norm`.
        fc1_weight, fc1_bias: [F, C] and [F] or None.
        fc2_weight, fc2_bias: [O, F] and [O] or None.

    Returns:
        (x_new [B, N, C] in x's dtype, out [B, N, O] in the autocast dtype if autocast is on, else in fc1_weight's).
        `out` is not yet added to the stream: it is the branch of the next half-block. x_new is x without a branch.

    Raises ValueError on shapes that do not fit.
    """
    hb.check_stream("norm_mlp", x, branch, gamma, drop, norm_weight, norm_bias)
    hb.check_linear("norm_mlp", "fc1", fc1_weight, fc1_bias, x.shape[2])
    hb.check_linear("norm_mlp", "fc2", fc2_weight, fc2_bias, fc1_weight.shape[0])
    dtype = hb.compute_dtype(x.device, fc1_weight.dtype)
    x_new, out, _, _, _ = _norm_mlp(
        x, branch, gamma, drop, norm_weight, norm_bias, eps, fc1_weight, fc1_bias, fc2_weight, fc2_bias, dtype,
        backend.argument("norm_mlp", *hb.details(x, branch, norm_weight, dtype)),
    )  # fmt: skip
    return x if branch is None else x_new, out
