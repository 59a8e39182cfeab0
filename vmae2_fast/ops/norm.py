"""Residual stream and LayerNorm, alone or with the qkv projection behind it: the first half of a transformer block.

    x_new = x + gamma * drop[b] * branch        gamma [C]: LayerScale; drop [B]: 0 or 1/(1-p), stochastic depth per clip
    h     = (x_new - mean) * rstd * norm_weight + norm_bias             rstd = 1/sqrt(var + eps), biased variance over C
    qkv   = h qkv_weight^T + [q_bias, 0, v_bias]

x [B, N, C] keeps its own dtype (the residual stream), statistics and LayerNorm are fp32 (fp64 for fp64 input), the GEMM runs
in the autocast dtype, or in the weight's when autocast is off. Saved for backward: x_new, mean, rstd, the parameters, and
`branch` only with gamma, whose gradient needs it; h is recomputed.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from .. import backend
from . import _half_block as hb
from ._register import check, define
from ._shadow import cast


def _norm_qkv_forward(
    stream: hb.Stream,
    x: Tensor,
    branch: Tensor | None,
    gamma: Tensor | None,
    drop: Tensor | None,
    norm_weight: Tensor,
    norm_bias: Tensor,
    eps: float,
    qkv_weight: Tensor,
    q_bias: Tensor | None,
    v_bias: Tensor | None,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    returned, h, mean, rstd = stream.forward(x, branch, gamma, drop, norm_weight, norm_bias, eps, dtype)
    b, n, c = x.shape
    bias = None if q_bias is None or v_bias is None else torch.cat((q_bias, torch.zeros_like(q_bias), v_bias))
    return returned, hb.linear(h.view(-1, c), qkv_weight, bias, dtype).view(b, n, 3 * c), mean, rstd


def _norm_qkv_gradients(
    stream: hb.Stream,
    grad_x: Tensor | None,
    grad_qkv: Tensor,
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
    qkv_weight: Tensor,
    q_bias: Tensor | None,
    v_bias: Tensor | None,
) -> tuple[Tensor, ...]:
    c = x.shape[2]
    grad = grad_qkv.reshape(-1, 3 * c)
    if needs[3]:
        h = stream.norm_rows(x, norm_weight, norm_bias, eps, grad.dtype)
        dweight = hb.weight_grad(grad, h, qkv_weight, True)
        del h
    else:
        dweight = x.new_empty(0)
    grad_h = torch.mm(grad, cast(qkv_weight, grad.dtype)).view(x.shape)
    grads = stream.backward(
        grad_x, grad_h, x, mean, rstd, branch, gamma, drop, norm_weight, norm_bias, branch_dtype, needs
    )
    return *grads, dweight, hb.bias_grad(grad[:, :c], q_bias, needs[4]), hb.bias_grad(grad[:, 2 * c :], v_bias, needs[5])


hb.register("residual_norm", lambda stream, *arguments: stream.forward(*arguments))
hb.register("residual_norm_backward", lambda stream, *arguments: stream.backward(*arguments))
hb.register("norm_qkv", _norm_qkv_forward)
hb.register("norm_qkv_backward", _norm_qkv_gradients)


def _fake_residual_norm(
    x: Tensor, branch: Tensor | None, gamma: Any, drop: Any, weight: Any, bias: Any, eps: float, dtype: torch.dtype, _: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    x_new, mean, rstd = hb.fake_stream(x, branch)
    return x_new, x.new_empty(x.shape, dtype=dtype), mean, rstd


def _fake_residual_norm_backward(
    grad_x: Any, grad_h: Any, x: Tensor, mean: Any, rstd: Any, branch: Any, *rest: Any
) -> tuple[Tensor, ...]:
    return hb.fake_stream_backward(x, *rest[:-1])


def _residual_norm_autograd(ctx: Any, grad_x: Tensor | None, grad_h: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    x, *saved = ctx.saved_tensors
    needs = [ctx.needs_input_grad[i] for i in (2, 4, 5)]
    grad_h = torch.zeros_like(x) if grad_h is None else grad_h
    grads = _residual_norm_backward(grad_x, grad_h, x, *saved, ctx.branch_dtype, needs, ctx.backend)
    return *hb.stream_grads(ctx, grads), None, None


def _fake_norm_qkv(
    x: Tensor,
    branch: Tensor | None,
    gamma: Any,
    drop: Any,
    norm_weight: Any,
    norm_bias: Any,
    eps: float,
    qkv_weight: Tensor,
    q_bias: Any,
    v_bias: Any,
    dtype: torch.dtype,
    _: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    x_new, mean, rstd = hb.fake_stream(x, branch)
    return x_new, x.new_empty((*x.shape[:2], qkv_weight.shape[0]), dtype=dtype), mean, rstd


def _fake_norm_qkv_backward(
    grad_x: Any,
    grad_qkv: Any,
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
    *parameters_and_backend: Any,
) -> tuple[Tensor, ...]:
    stream = hb.fake_stream_backward(x, gamma, drop, norm_weight, norm_bias, branch_dtype, needs)
    return *stream, *(hb.fake_grad(t, wanted, x) for t, wanted in zip(parameters_and_backend[:3], needs[3:]))


def _save_norm_qkv(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.eps, ctx.dtype = inputs[6], inputs[10]
    hb.save_stream(ctx, "norm_qkv", inputs, output, *inputs[7:10])


def _norm_qkv_autograd(ctx: Any, grad_x: Tensor | None, grad_qkv: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    x, *saved = ctx.saved_tensors
    stream, parameters = saved[:7], saved[7:]
    wanted = ctx.needs_input_grad
    if grad_qkv is None:
        grad_qkv = x.new_zeros((*x.shape[:2], parameters[0].shape[0]), dtype=ctx.dtype)
    needs = [wanted[i] for i in (2, 4, 5, 7, 8, 9)]
    grads = _norm_qkv_backward(grad_x, grad_qkv, x, *stream, ctx.branch_dtype, needs, ctx.eps, *parameters, ctx.backend)
    weight_grads = [g if need else None for g, need in zip(grads[5:], needs[3:])]
    return *hb.stream_grads(ctx, grads), *weight_grads, None, None


_STREAM_GRADS = "Tensor, Tensor, Tensor, Tensor, Tensor"
_residual_norm = define(
    f"residual_norm({hb.STREAM}, ScalarType dtype, str backend) -> (Tensor, Tensor, Tensor, Tensor)",
    hb.body("residual_norm"),
    _fake_residual_norm,
    backward=_residual_norm_autograd,
    setup_context=lambda ctx, inputs, output: hb.save_stream(ctx, "residual_norm", inputs, output),
)
_residual_norm_backward = define(
    f"residual_norm_backward({hb.STREAM_BACKWARD}, str backend) -> ({_STREAM_GRADS})",
    hb.backward_body("residual_norm_backward"),
    _fake_residual_norm_backward,
)
_norm_qkv = define(
    f"norm_qkv({hb.STREAM}, Tensor qkv_weight, Tensor? q_bias, Tensor? v_bias, ScalarType dtype, str backend) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    hb.body("norm_qkv"),
    _fake_norm_qkv,
    backward=_norm_qkv_autograd,
    setup_context=_save_norm_qkv,
)
_norm_qkv_backward = define(
    f"norm_qkv_backward({hb.STREAM_BACKWARD}, float eps, Tensor qkv_weight, Tensor? q_bias, Tensor? v_bias, str backend) "
    f"-> ({_STREAM_GRADS}, Tensor, Tensor, Tensor)",
    hb.backward_body("norm_qkv_backward"),
    _fake_norm_qkv_backward,
)


@register_flop_formula(torch.ops.vmae2.norm_qkv)
def _norm_qkv_flops(x_shape: Any, *args: Any, **_: Any) -> int:
    b, n, c = x_shape
    return 2 * b * n * c * 3 * c


@register_flop_formula(torch.ops.vmae2.norm_qkv_backward)
def _norm_qkv_backward_flops(grad_x: Any, grad_qkv: Any, x_shape: Any, *args: Any, **_: Any) -> int:
    b, n, c = x_shape
    needs = args[8]
    return 2 * b * n * c * 3 * c * (2 if needs[3] else 1)


def residual_norm(
    x: Tensor, branch: Tensor | None, gamma: Tensor | None, drop: Tensor | None, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """Add a branch to the residual stream and normalise the sum.

    Args:
        x: residual stream [B, N, C], fp32, fp64, bf16 or fp16.
        branch: output of the block before, [B, N, C] in any floating dtype; None leaves x as it is.
        gamma: LayerScale [C] of the branch, or None.
        drop: stochastic depth factors [B] of the branch (0 or 1/(1-p)), no gradient, or None.
        weight, bias: LayerNorm parameters [C].
        eps: added to the variance.

    Returns:
        (x_new [B, N, C] in x's dtype, LayerNorm(x_new) [B, N, C] in the autocast dtype if autocast is on, else in x's).
        x_new is x itself without a branch.

    float64 has the reference only. Raises ValueError on shapes that do not fit.

    Floor: x and branch read, x_new and the norm written, 16 B a value in float32; backward the norm's gradient and x_new read
    and x's gradient written, 12 B; 4 more each for a gradient of x_new, for the branch's own gradient (with gamma or drop) and
    for the branch (with gamma). Some ten FLOPs a value each way: bound by memory.
    """
    hb.check_stream("residual_norm", x, branch, gamma, drop, weight, bias)
    dtype = hb.compute_dtype(x.device, x.dtype)
    name = backend.argument("residual_norm", *hb.details(x, branch, weight, dtype))
    x_new, h, _, _ = _residual_norm(x, branch, gamma, drop, weight, bias, eps, dtype, name)
    return x if branch is None else x_new, h


def norm_qkv(
    x: Tensor,
    branch: Tensor | None,
    gamma: Tensor | None,
    drop: Tensor | None,
    norm_weight: Tensor,
    norm_bias: Tensor,
    eps: float,
    qkv_weight: Tensor,
    q_bias: Tensor | None,
    v_bias: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """`residual_norm`, then the projection to queries, keys and values.

    Args:
        x, branch, gamma, drop, norm_weight, norm_bias, eps: as in `residual_norm`.
        qkv_weight: [3C, C].
        q_bias, v_bias: [C] each, or both None. Keys have no bias: it would not change the softmax.

    Returns:
        (x_new [B, N, C], qkv [B, N, 3C]): qkv in the autocast dtype if autocast is on, else in qkv_weight's;
        `qkv.view(B, N, 3, H, D)` is what `attention` takes.

    Raises ValueError on shapes that do not fit.
    """
    hb.check_stream("norm_qkv", x, branch, gamma, drop, norm_weight, norm_bias)
    c = x.shape[2]
    hb.check_linear("norm_qkv", "qkv", qkv_weight, None, c, 3 * c)
    check((q_bias is None) == (v_bias is None), "norm_qkv: give both q_bias and v_bias, or neither")
    for name, bias in (("q_bias", q_bias), ("v_bias", v_bias)):
        if bias is not None:
            check(bias.shape == (c,), f"norm_qkv: {name} must be [C] = [{c}], got {tuple(bias.shape)}")
    dtype = hb.compute_dtype(x.device, qkv_weight.dtype)
    name = backend.argument("norm_qkv", *hb.details(x, branch, norm_weight, dtype))
    x_new, qkv, _, _ = _norm_qkv(
        x, branch, gamma, drop, norm_weight, norm_bias, eps, qkv_weight, q_bias, v_bias, dtype, name
    )
    return x if branch is None else x_new, qkv
