"""ATen's flash attention as a backend of attention.py: the kernel behind `scaled_dot_product_attention`, which returns the
log-sum-exp that a backward needs.

On the CPU a window is walked in chunks of queries, each beside the keys within its reach, so work and memory grow with N, not
with N squared.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ._attention_reference import by_heads, outside
from ._half_block import statistics_dtype

SMALLEST_CHUNK = 32
"""Queries of a chunk at least: shorter ones leave the matrix products of ATen's kernel too small to be fast."""

_aten = torch.ops.aten
_flash = _aten._scaled_dot_product_flash_attention
_flash_backward = _aten._scaled_dot_product_flash_attention_backward
_flash_cpu = _aten._scaled_dot_product_flash_attention_for_cpu
_flash_cpu_backward = _aten._scaled_dot_product_flash_attention_for_cpu_backward


def forward(qkv: Tensor, scale: float, window: int | None, lengths: Tensor | None) -> tuple[Tensor, Tensor]:
    """(out, lse), see attention.py."""
    qkv = qkv.contiguous()  # ATen's CPU kernel reads past a last dimension that is not dense, without a complaint
    if qkv.device.type != "cpu":
        out, lse = _flash(*by_heads(qkv), scale=scale)[:2]
        return out.transpose(1, 2).contiguous(), lse.contiguous()
    # ATen's half-precision CPU kernel is 3 to 5 times slower than its fp32 one (one Zen 4 core, 16 to 944 tokens).
    band = _Band(qkv, window, lengths)
    q, k, v = by_heads(qkv.to(statistics_dtype(qkv.dtype)))
    out, lse = _flash_cpu(
        band.queries(q), band.keys(k), band.keys(v), attn_mask=band.mask(q.dtype), scale=scale
    )  # fmt: skip
    out, lse = band.joined(out).transpose(1, 2), band.joined(lse.unsqueeze(-1)).squeeze(-1)
    if lengths is not None:
        beyond = outside(qkv, lengths)
        out = out.masked_fill(beyond[:, :, None, None], 0)
        lse = lse.masked_fill(beyond[:, None], torch.inf)
    return out.to(qkv.dtype).contiguous(), lse.contiguous()


def backward(
    grad: Tensor, qkv: Tensor, out: Tensor, lse: Tensor, scale: float, window: int | None, lengths: Tensor | None
) -> Tensor:
    """dqkv, see attention.py."""
    grad, qkv, out = grad.contiguous(), qkv.contiguous(), out.contiguous()
    n = qkv.shape[1]
    dqkv = torch.empty(qkv.shape, dtype=qkv.dtype, device=qkv.device)
    if qkv.device.type != "cpu":
        unused = torch.empty(2, dtype=torch.uint64, device=qkv.device)  # random state of a dropout that is off
        grads = _flash_backward(
            grad.transpose(1, 2), *by_heads(qkv), out.transpose(1, 2), lse, None, None, n, n, 0.0, False, unused, unused,
            scale=scale,
        )  # fmt: skip
    else:
        kind = lse.dtype
        band = _Band(qkv, window, lengths)
        q, k, v = by_heads(qkv.to(kind))
        grad, out = grad.transpose(1, 2).to(kind), out.transpose(1, 2).to(kind)
        # A query that takes no part (padding of the last chunk, or beyond a length) has a log-sum-exp of infinity: p = 0.
        dq, dk, dv = _flash_cpu_backward(
            band.queries(grad), band.queries(q), band.keys(k), band.keys(v), band.queries(out),
            band.queries(lse.unsqueeze(-1), torch.inf).squeeze(-1), 0.0, False, attn_mask=band.mask(kind), scale=scale,
        )  # fmt: skip
        grads = band.joined(dq), band.summed(dk), band.summed(dv)
    for part, value in zip(by_heads(dqkv), grads):
        part.copy_(value)
    return dqkv


class _Band:
    """Heads [B, H, N, D] cut into chunks of queries with the keys around them, for one problem; whole without a window."""

    def __init__(self, qkv: Tensor, window: int | None, lengths: Tensor | None) -> None:
        self.batch, self.n = qkv.shape[0], qkv.shape[1]
        self.lengths = lengths
        chunk = None if window is None else max(2 * window, SMALLEST_CHUNK)
        if window is None or chunk is None or chunk + 2 * window >= self.n:  # nothing would be saved
            self.reach, self.window = None, window
            return
        self.reach, self.window, self.chunk = window, window, chunk
        self.count = -(-self.n // chunk)
        self.tail = self.count * chunk - self.n

    def queries(self, x: Tensor, padding: float = 0.0) -> Tensor:
        """[B * chunks, H, chunk, D]."""
        if self.reach is None:
            return x
        return F.pad(x, (0, 0, 0, self.tail), value=padding).unflatten(2, (self.count, -1)).transpose(1, 2).flatten(0, 1)

    def keys(self, x: Tensor) -> Tensor:
        """[B * chunks, H, chunk + 2 window, D]; neighbours share tokens."""
        if self.reach is None:
            return x
        spans = F.pad(x, (0, 0, self.reach, self.reach + self.tail)).unfold(2, self.chunk + 2 * self.reach, self.chunk)
        return spans.permute(0, 2, 1, 4, 3).flatten(0, 1)

    def joined(self, x: Tensor) -> Tensor:
        """The inverse of `queries`."""
        if self.reach is None:
            return x
        return x.unflatten(0, (self.batch, self.count)).transpose(1, 2).flatten(2, 3)[:, :, : self.n]

    def summed(self, x: Tensor) -> Tensor:
        """The adjoint of `keys`: a token's values from both chunks that saw it are added."""
        if self.reach is None:
            return x
        x = x.unflatten(0, (self.batch, self.count)).transpose(1, 2)
        whole = F.pad(x[..., : self.chunk, :], (0, 0, 0, 0, 0, 1))  # one chunk more, for what the last one sees beyond its end
        whole[:, :, 1:, : 2 * self.reach] += x[..., self.chunk :, :]
        return whole.flatten(2, 3)[:, :, self.reach : self.reach + self.n]

    def mask(self, kind: torch.dtype) -> Tensor | None:
        """What ATen's kernel adds to the scores: minus infinity for pairs that take no part. Every query sees a key, itself
        at least: no sum of exponentials is 0."""
        if self.window is None and self.lengths is None:
            return None
        n = self.n
        if self.reach is None:
            query = torch.arange(n)[:, None]
            key = torch.arange(n)[None]
        else:
            first = torch.arange(self.count)[:, None, None] * self.chunk
            query = first + torch.arange(self.chunk)[:, None]
            key = first + torch.arange(self.chunk + 2 * self.reach) - self.reach
        if self.lengths is None:
            hidden = (key < 0) | (key >= n)
        else:
            hidden = (key < 0) | (key >= self.lengths.clamp(max=n).view(-1, *(1,) * key.ndim))
        if self.window is not None:
            hidden = hidden | ((query - key).abs() > self.window)
        hidden = hidden & (query != key)
        mask = torch.zeros(hidden.shape, dtype=kind).masked_fill_(hidden, -torch.inf)
        if self.reach is not None:  # [chunks, ..] or [B, chunks, ..] -> [B * chunks, 1, chunk, keys]
            mask = mask.expand(self.batch, *mask.shape[-3:]).flatten(0, 1)
        return mask if mask.ndim == 2 else mask.unsqueeze(1)
