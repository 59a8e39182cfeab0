"""The specification of attention.py in plain torch, with scores materialised; and the views and masks other backends share."""

from __future__ import annotations

import torch
from torch import Tensor

from ._half_block import statistics_dtype


def by_heads(qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v as views [B, H, N, D] of packed qkv."""
    q, k, v = qkv.transpose(1, 3).unbind(2)
    return q, k, v


def outside(qkv: Tensor, lengths: Tensor) -> Tensor:
    """Tokens [B, N] beyond their sample's length."""
    return torch.arange(qkv.shape[1], device=qkv.device) >= lengths[:, None]


def _hidden(qkv: Tensor, window: int | None, lengths: Tensor | None) -> Tensor | None:
    """Pairs of tokens that take no part, broadcastable to [B, H, N, N]; a query beyond its length is another matter."""
    hidden = None
    if window is not None:
        token = torch.arange(qkv.shape[1], device=qkv.device)
        hidden = (token[:, None] - token).abs_() > window
    if lengths is not None:
        beyond = outside(qkv, lengths)
        keys = beyond[:, None, None] & ~beyond[:, None, :, None]
        hidden = keys if hidden is None else keys | hidden & ~beyond[:, None, :, None]
    return hidden


def forward(qkv: Tensor, scale: float, window: int | None, lengths: Tensor | None) -> tuple[Tensor, Tensor]:
    """(out, lse), see attention.py."""
    q, k, v = by_heads(qkv.to(statistics_dtype(qkv.dtype)))
    p = torch.matmul(q * scale, k.mT)
    hidden = _hidden(qkv, window, lengths)
    if hidden is not None:
        p.masked_fill_(hidden, -torch.inf)
    top = p.amax(-1, keepdim=True)
    p.sub_(top).exp_()
    total = p.sum(-1, keepdim=True)
    out = torch.matmul(p, v).div_(total).transpose(1, 2)
    lse = top.add_(total.log_()).squeeze(-1)
    if lengths is not None:
        beyond = outside(qkv, lengths)
        out = out.masked_fill(beyond[:, :, None, None], 0)
        lse.masked_fill_(beyond[:, None], torch.inf)
    return out.contiguous().to(qkv.dtype), lse


def backward(
    grad: Tensor, qkv: Tensor, out: Tensor, lse: Tensor, scale: float, window: int | None, lengths: Tensor | None
) -> Tensor:
    """dqkv, see attention.py."""
    kind = lse.dtype
    q, k, v = by_heads(qkv.to(kind))
    grad = grad.transpose(1, 2).to(kind)
    dqkv = torch.empty(qkv.shape, dtype=qkv.dtype, device=qkv.device)
    dq, dk, dv = by_heads(dqkv)
    q = q * scale
    p = torch.matmul(q, k.mT).sub_(lse.unsqueeze(-1)).exp_()
    hidden = _hidden(qkv, window, lengths)
    if hidden is not None:
        p.masked_fill_(hidden, 0)
    # A log-sum-exp of hundreds was rounded to a float32: without this its error would be in all probabilities of the row.
    total = p.sum(-1, keepdim=True)
    p.div_(total.masked_fill_(total == 0, 1))
    dv.copy_(torch.matmul(p.mT, grad))
    # rowsum(grad * out) is the same number, rounded otherwise: where one probability is nearly 1 that would be all of ds.
    dp = torch.matmul(grad, v.mT)
    ds = dp.sub_((dp * p).sum(-1, keepdim=True)).mul_(p)
    dq.copy_(torch.matmul(ds, k).mul_(scale))
    dk.copy_(torch.matmul(ds.mT, q))
    return dqkv
