"""Scaled dot-product attention on packed qkv, and the cosine attention of the official code on top of it.

    S = scale * Q K^T        LSE_i = log sum_j exp(S_ij)        P = exp(S - LSE)        out = P V

qkv [B, N, 3, H, D] exactly as the qkv GEMM wrote it, out [B, N, H, D] as the output projection reads it. Saved for backward
in every backend: qkv, out, and LSE [B, H, N] in fp32 (fp64 for fp64 input), natural logarithm. With G the gradient of out:

    dV = P^T G        dS = P * (G V^T - rowsum(G * out))        dQ = scale * dS K        dK = scale * dS^T Q

written into one packed dqkv. With a window w token i attends to the tokens j with |i - j| <= w only (local attention); S is
minus infinity elsewhere.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from .. import backend
from ._half_block import compute_dtype, opaque, statistics_dtype
from ._register import check, define, kernel

MAX_LOG_SCALE = 4.6052  # ln 100: the official clamp of cosine attention's scale

_aten = torch.ops.aten
_flash = _aten._scaled_dot_product_flash_attention
_flash_backward = _aten._scaled_dot_product_flash_attention_backward
_flash_cpu = _aten._scaled_dot_product_flash_attention_for_cpu
_flash_cpu_backward = _aten._scaled_dot_product_flash_attention_for_cpu_backward


def _heads(qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v as views [B, H, N, D] of packed qkv."""
    q, k, v = qkv.transpose(1, 3).unbind(2)
    return q, k, v


def _hidden(n: int, window: int, device: torch.device) -> Tensor:
    """Pairs of tokens [N, N] further apart than the window."""
    token = torch.arange(n, device=device)
    return (token[:, None] - token).abs_() > window


def _reference(qkv: Tensor, scale: float, window: int | None) -> tuple[Tensor, Tensor]:
    q, k, v = _heads(qkv.to(statistics_dtype(qkv.dtype)))
    p = torch.matmul(q * scale, k.mT)
    if window is not None:
        p.masked_fill_(_hidden(qkv.shape[1], window, qkv.device), -torch.inf)
    top = p.amax(-1, keepdim=True)
    p.sub_(top).exp_()
    total = p.sum(-1, keepdim=True)
    out = torch.matmul(p, v).div_(total)
    return out.transpose(1, 2).contiguous().to(qkv.dtype), top.add_(total.log_()).squeeze(-1)


def _reference_backward(grad: Tensor, qkv: Tensor, out: Tensor, lse: Tensor, scale: float, window: int | None) -> Tensor:
    kind = lse.dtype
    q, k, v = _heads(qkv.to(kind))
    grad, out = grad.transpose(1, 2).to(kind), out.transpose(1, 2).to(kind)
    dqkv = torch.empty(qkv.shape, dtype=qkv.dtype, device=qkv.device)
    dq, dk, dv = _heads(dqkv)
    q = q * scale
    p = torch.matmul(q, k.mT).sub_(lse.unsqueeze(-1)).exp_()
    if window is not None:
        p.masked_fill_(_hidden(qkv.shape[1], window, qkv.device), 0)
    dv.copy_(torch.matmul(p.mT, grad))
    ds = torch.matmul(grad, v.mT).sub_((grad * out).sum(-1, keepdim=True)).mul_(p)
    dq.copy_(torch.matmul(ds, k).mul_(scale))
    dk.copy_(torch.matmul(ds.mT, q))
    return dqkv


def _sdpa_mask(n: int, window: int | None, kind: torch.dtype) -> Tensor | None:
    """What ATen's CPU kernel adds to the scores."""
    hidden = None if window is None else _hidden(n, window, torch.device("cpu"))
    return None if hidden is None else torch.zeros((n, n), dtype=kind).masked_fill_(hidden, -torch.inf)


def _sdpa(qkv: Tensor, scale: float, window: int | None) -> tuple[Tensor, Tensor]:
    qkv = qkv.contiguous()  # ATen's CPU kernel reads past a last dimension that is not dense, without a complaint
    if qkv.device.type == "cpu":
        # ATen's half-precision CPU kernel is 3 to 5 times slower than its fp32 one (one Zen 4 core, 16 to 944 tokens).
        q, k, v = _heads(qkv.to(statistics_dtype(qkv.dtype)))
        out, lse = _flash_cpu(q, k, v, attn_mask=_sdpa_mask(qkv.shape[1], window, q.dtype), scale=scale)
    else:
        q, k, v = _heads(qkv)
        out, lse = _flash(q, k, v, scale=scale)[:2]
    return out.transpose(1, 2).to(qkv.dtype).contiguous(), lse.contiguous()


def _sdpa_backward(grad: Tensor, qkv: Tensor, out: Tensor, lse: Tensor, scale: float, window: int | None) -> Tensor:
    grad, qkv, out = grad.contiguous(), qkv.contiguous(), out.contiguous()
    n = qkv.shape[1]
    if qkv.device.type == "cpu":
        kind = lse.dtype
        q, k, v = _heads(qkv.to(kind))
        grad, out = grad.transpose(1, 2).to(kind), out.transpose(1, 2).to(kind)
        mask = _sdpa_mask(n, window, kind)
        grads = _flash_cpu_backward(grad, q, k, v, out, lse, 0.0, False, attn_mask=mask, scale=scale)
    else:
        q, k, v = _heads(qkv)
        unused = torch.empty(2, dtype=torch.uint64, device=qkv.device)  # random state of a dropout that is off
        grads = _flash_backward(
            grad.transpose(1, 2), q, k, v, out.transpose(1, 2), lse, None, None, n, n, 0.0, False, unused, unused, scale=scale
        )
    dqkv = torch.empty(qkv.shape, dtype=qkv.dtype, device=qkv.device)
    for part, value in zip(_heads(dqkv), grads):
        part.copy_(value)
    return dqkv


def why_not_sdpa(
    device: torch.device, dtype: torch.dtype | None = None, head_dim: int | None = None, window: int | None = None
) -> str | None:
    """The reason sdpa cannot run on `device`, or not for this input there; None if it can."""
    if device.type == "cpu":
        return None
    if device.type != "cuda":
        return f"ATen has no flash attention with log-sum-exp for {device.type}"
    if torch.version.hip is None and torch.cuda.is_available() and torch.cuda.get_device_capability(device) < (8, 0):
        return "ATen's flash attention needs compute capability 8.0"
    if dtype not in (None, torch.float16, torch.bfloat16):
        return f"ATen's flash attention on cuda takes float16 and bfloat16, not {str(dtype).removeprefix('torch.')}"
    if head_dim is not None and (head_dim % 8 or head_dim > 256):
        return f"ATen's flash attention on cuda takes head dims that are multiples of 8 up to 256, not {head_dim}"
    if window is not None:
        return "ATen's flash attention with log-sum-exp takes no window on cuda"
    return None


def why_not_triton(
    device: torch.device, dtype: torch.dtype | None = None, head_dim: int | None = None, window: int | None = None
) -> str | None:
    """The reason our Triton kernels cannot run on `device`, or not for this input there; None if they can."""
    if dtype not in (None, torch.float16, torch.bfloat16, torch.float32):
        return f"Triton attention takes float16, bfloat16 and float32, not {str(dtype).removeprefix('torch.')}"
    if head_dim is not None and (head_dim % 8 or not 8 <= head_dim <= 128):
        return f"Triton attention takes head dims that are multiples of 8 up to 128, not {head_dim}"
    if device.type == "cuda" and torch.version.hip is not None:
        return "Triton attention has tiles for NVIDIA GPUs only"
    return backend.why_not_triton(device)


BACKWARD = {
    "reference": _reference_backward,
    "sdpa": _sdpa_backward,
    "triton": kernel("_attention_triton", "backward"),
}
backend.register_op(
    "attention",
    {
        "sdpa": backend.Implementation(_sdpa, why_not_sdpa),
        "triton": backend.Implementation(kernel("_attention_triton", "forward"), why_not_triton),
        "reference": backend.Implementation(_reference),
    },
    {"cpu": ("sdpa", "reference"), "cuda": ("sdpa", "triton", "reference"), "*": ("reference",)},
    because={
        "cpu": "it was measured 1.4 to 3.2 times as fast as the reference (forward and backward, 160 to 2048 tokens, float32 "
        "and bfloat16; torch 2.13, 2 threads, AVX2)",
        "cuda": "no GPU has been measured yet: ATen's flash attention first, ours for what that refuses (windows, float32)",
    },
)


def _choose(qkv: Tensor, window: int | None) -> str:
    return backend.pick("attention", qkv.device, qkv.dtype, qkv.shape[4], window)


def _save(ctx: Any, inputs: tuple[Tensor, float, int | None], output: tuple[Tensor, Tensor]) -> None:
    qkv, ctx.scale, ctx.window = inputs
    out, lse = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(lse)
    ctx.backend = _choose(qkv, ctx.window)
    ctx.save_for_backward(qkv, out, lse)


def _autograd(ctx: Any, grad: Tensor | None, _: None) -> tuple[Tensor | None, None, None]:
    if grad is None:
        return None, None, None
    return _attention_backward(grad, *ctx.saved_tensors, ctx.scale, ctx.window, ctx.backend), None, None


def _fake(qkv: Tensor, scale: float, window: int | None = None) -> tuple[Tensor, Tensor]:
    b, n, _, h, d = qkv.shape
    return qkv.new_empty((b, n, h, d)), qkv.new_empty((b, h, n), dtype=statistics_dtype(qkv.dtype))


_attention = define(
    "attention(Tensor qkv, float scale, int? window=None) -> (Tensor, Tensor)",
    opaque(lambda qkv, scale, window=None: backend.run("attention", _choose(qkv, window), qkv, scale, window)),
    _fake,
    backward=_autograd,
    setup_context=_save,
)
_attention_backward = define(
    "attention_backward(Tensor grad, Tensor qkv, Tensor out, Tensor lse, float scale, int? window, str backend) -> Tensor",
    opaque(lambda *args: BACKWARD[args[-1]](*args[:-1])),
    lambda grad, qkv, *rest: qkv.new_empty(qkv.shape),
)


def _pairs(n: int, window: int | None) -> int:
    """Pairs of a query and a key that take part."""
    return n * n if window is None or window >= n else n * (2 * window + 1) - window * (window + 1)


@register_flop_formula(torch.ops.vmae2.attention)
def _flops(qkv_shape: Any, scale: float, window: int | None = None, **_: Any) -> int:
    b, n, _three, h, d = qkv_shape
    return 2 * 2 * b * h * _pairs(n, window) * d  # Q K^T and P V


@register_flop_formula(torch.ops.vmae2.attention_backward)
def _backward_flops(
    grad: Any, qkv_shape: Any, out: Any, lse: Any, scale: float, window: int | None, *args: Any, **_: Any
) -> int:
    b, n, _three, h, d = qkv_shape
    return 5 * 2 * b * h * _pairs(n, window) * d  # Q K^T again, dV, dP, dQ, dK


def attention(qkv: Tensor, scale: float | None = None, window: int | None = None) -> Tensor:
    """Softmax attention over all tokens, or over those near a token.

    Args:
        qkv: packed queries, keys and values [B, N, 3, H, D]; cast to the autocast dtype if autocast is on.
        scale: factor of the scores, D**-0.5 when None.
        window: tokens on each side a token attends to, beside itself; None for all.

    Returns:
        [B, N, H, D] in qkv's (or the autocast) dtype. Products and softmax accumulate in fp32 at least.

    Raises ValueError on another shape or a negative window, BackendError if no requested backend takes this device, dtype,
    head dim and window.
    """
    check(
        qkv.ndim == 5 and qkv.shape[2] == 3 and qkv.is_floating_point(),
        f"attention: qkv must be a floating-point [B, N, 3, H, D], got {qkv.dtype} {tuple(qkv.shape)}",
    )
    check(window is None or window >= 0, f"attention: window must be None or a number of tokens from 0, got {window}")
    qkv = qkv.to(compute_dtype(qkv.device, qkv.dtype))
    out: Tensor = _attention(qkv, qkv.shape[4] ** -0.5 if scale is None else scale, window)[0]
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
