"""Scaled dot-product attention on packed qkv, and the cosine attention of the official code on top of it.

    S = scale * Q K^T        LSE_i = log sum_j exp(S_ij)        P = exp(S - LSE)        out = P V

qkv [B, N, 3, H, D] exactly as the qkv GEMM wrote it, out [B, N, H, D] as the output projection reads it. Saved for backward
in every backend: qkv, out, and LSE [B, H, N] in fp32 (fp64 for fp64 input), natural logarithm. With G the gradient of out:

    dV = P^T G        dS = P * (G V^T - rowsum(G * out))        dQ = scale * dS K        dK = scale * dS^T Q

written into one packed dqkv. With a window w token i attends to the tokens j with |i - j| <= w only (local attention); S is
minus infinity elsewhere. With lengths L token i of sample b attends to the tokens j < L_b; for i >= L_b out is 0 and LSE is
plus infinity, which makes P 0 in the backward.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from .. import backend
from . import _attention_backends
from ._attention_table import length_range
from ._half_block import compute_dtype, opaque, statistics_dtype
from ._register import check, define

MAX_LOG_SCALE = 4.6052  # ln 100: the official clamp of cosine attention's scale


_attention_backends.register()


def _details(qkv: Tensor, window: int | None, lengths: Tensor | None, direction: str) -> tuple[Any, ...]:
    """What `backend.pick` is told of an input."""
    # A choice is a constant of a compiled program: index() ties the program to the number, a range of lengths only to that.
    head_dim, reach = operator.index(qkv.shape[4]), None if window is None else operator.index(window)
    return qkv.device, qkv.dtype, head_dim, reach, lengths is not None, length_range(qkv.shape[1]), direction


def _body(
    qkv: Tensor, scale: float, window: int | None, lengths: Tensor | None, name: str, _: str
) -> tuple[Tensor, Tensor]:
    name = name or backend.pick("attention", *_details(qkv, window, lengths, "forward"))
    out: tuple[Tensor, Tensor] = backend.run("attention", name, qkv, scale, window, lengths)
    return out


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    qkv, ctx.scale, ctx.window, lengths, _, name = inputs
    out, lse = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(lse)
    ctx.backend = name or backend.pick("attention", *_details(qkv, ctx.window, lengths, "backward"))
    ctx.save_for_backward(qkv, out, lse, lengths)


def _autograd(ctx: Any, grad: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 6
    qkv, out, lse, lengths = ctx.saved_tensors
    return _attention_backward(grad, qkv, out, lse, ctx.scale, ctx.window, lengths, ctx.backend), *(None,) * 5


def _fake(qkv: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    b, n, _three, h, d = qkv.shape
    return qkv.new_empty((b, n, h, d)), qkv.new_empty((b, h, n), dtype=statistics_dtype(qkv.dtype))


_attention = define(
    "attention(Tensor qkv, float scale, int? window, Tensor? lengths, str backend, str backward_backend) -> (Tensor, Tensor)",
    opaque(_body),
    _fake,
    backward=_autograd,
    setup_context=_save,
)
_attention_backward = define(
    "attention_backward(Tensor grad, Tensor qkv, Tensor out, Tensor lse, float scale, int? window, Tensor? lengths, "
    "str backend) -> Tensor",
    opaque(lambda *args: backend.run("attention_backward", args[-1], *args[:-1])),
    lambda grad, qkv, *rest: qkv.new_empty(qkv.shape),
)


def _pairs(n: int, window: int | None) -> int:
    """Pairs of a query and a key that take part, where every token does: lengths are data."""
    return n * n if window is None or window >= n else n * (2 * window + 1) - window * (window + 1)


@register_flop_formula(torch.ops.vmae2.attention)
def _flops(qkv_shape: Any, scale: float, window: int | None, *args: Any, **_: Any) -> int:
    b, n, _three, h, d = qkv_shape
    return 2 * 2 * b * h * _pairs(n, window) * d  # Q K^T and P V


@register_flop_formula(torch.ops.vmae2.attention_backward)
def _backward_flops(
    grad: Any, qkv_shape: Any, out: Any, lse: Any, scale: float, window: int | None, *args: Any, **_: Any
) -> int:
    b, n, _three, h, d = qkv_shape
    return 5 * 2 * b * h * _pairs(n, window) * d  # Q K^T again, dV, dP, dQ, dK


def attention(
    qkv: Tensor, scale: float | None = None, window: int | None = None, lengths: Tensor | None = None
) -> Tensor:
    """Softmax attention over all tokens, or over those near a token, of sequences of one or of several lengths.

    Args:
        qkv: packed queries, keys and values [B, N, 3, H, D]; cast to the autocast dtype if autocast is on.
        scale: factor of the scores, D**-0.5 when None.
        window: tokens on each side a token attends to, beside itself; None for all.
        lengths: int32 or int64 [B], how many tokens of each sample take part, from the first on (more than N means N); None
            for all. The others are padding: nobody attends to them, their rows of the result are 0, they get no gradient.

    Returns:
        [B, N, H, D] in qkv's (or the autocast) dtype. Products and softmax accumulate in fp32 at least.

    Raises ValueError on another shape or a negative window, BackendError if no requested backend takes this device, dtype,
    head dim, window and lengths.
    """
    check(
        qkv.ndim == 5 and qkv.shape[2] == 3 and qkv.is_floating_point(),
        f"attention: qkv must be a floating-point [B, N, 3, H, D], got {qkv.dtype} {tuple(qkv.shape)}",
    )
    check(window is None or window >= 0, f"attention: window must be None or a number of tokens from 0, got {window}")
    if lengths is not None:
        ok = lengths.shape == qkv.shape[:1] and lengths.dtype in (torch.int32, torch.int64) and lengths.device == qkv.device
        check(
            ok,
            f"attention: lengths must be int32 or int64 [B] = [{qkv.shape[0]}] on {qkv.device}, "
            f"got {lengths.dtype} {tuple(lengths.shape)} on {lengths.device}",
        )
    qkv = qkv.to(compute_dtype(qkv.device, qkv.dtype))
    names = (backend.argument("attention", *_details(qkv, window, lengths, which)) for which in ("forward", "backward"))
    out: Tensor = _attention(qkv, qkv.shape[4] ** -0.5 if scale is None else scale, window, lengths, *names)[0]
    return out


def cosine_attention(qkv: Tensor, log_scale: Tensor) -> Tensor:
    """Attention of unit-length queries and keys with a learned scale per head (official `CosAttention`).

    Args:
        qkv: [B, N, 3, H, D], biases already added.
        log_scale: [H, 1, 1]; the scores are cosines times exp(min(log_scale, 4.6052)).

    Returns:
        [B, N, H, D] in qkv's (or the autocast) dtype. Lengths and scale are computed in fp32 at least.

    Raises ValueError on shapes that do not fit.
    """
    check(
        qkv.ndim == 5 and qkv.shape[2] == 3 and qkv.is_floating_point(),
        f"cosine_attention: qkv must be a floating-point [B, N, 3, H, D], got {qkv.dtype} {tuple(qkv.shape)}",
    )
    h = qkv.shape[3]
    check(
        log_scale.shape == (h, 1, 1),
        f"cosine_attention: log_scale must be [H, 1, 1] = [{h}, 1, 1], got {tuple(log_scale.shape)}",
    )
    dtype = compute_dtype(qkv.device, qkv.dtype)
    q, k, v = qkv.to(statistics_dtype(qkv.dtype)).unbind(2)
    factor = torch.clamp(log_scale, max=MAX_LOG_SCALE).exp().squeeze(-1)
    packed = torch.stack((F.normalize(q, dim=-1) * factor, F.normalize(k, dim=-1), v), dim=2)
    return attention(packed.to(dtype), scale=1.0)
