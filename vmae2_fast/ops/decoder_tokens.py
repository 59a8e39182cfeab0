"""The decoder's input sequence: projected encoder tokens, then one mask token for each position to decode.

    out[b, i]     = visible[b, i] + position_table[visible_index[b, i]]           i < V
    out[b, V + j] = mask_token + position_table[decode_index[b, j]]               j < Nd

The backward is slices: dvisible = g[:, :V], dmask_token = the sum of g[:, V:] over clips and tokens. The table has none.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import backend
from ._half_block import statistics_dtype
from ._register import check, define, kernel, register_backends
from .patches import check_index


def _output_dtype(visible: Tensor, mask_token: Tensor) -> torch.dtype:
    return torch.promote_types(visible.dtype, mask_token.dtype)


def _reference(
    visible: Tensor, mask_token: Tensor, position_table: Tensor, visible_index: Tensor, decode_index: Tensor
) -> Tensor:
    b, v, d = visible.shape
    dtype = _output_dtype(visible, mask_token)
    rows = torch.cat((visible_index, decode_index), dim=1).view(-1)
    out = position_table.to(statistics_dtype(dtype)).index_select(0, rows).view(b, v + decode_index.shape[1], d)
    out[:, :v].add_(visible)
    out[:, v:].add_(mask_token)
    return out.to(dtype)


def _column_sum_reference(grad: Tensor, visible_tokens: int) -> Tensor:
    return grad[:, visible_tokens:].sum((0, 1), dtype=statistics_dtype(grad.dtype))[None, None]


register_backends("decoder_tokens", _reference, triton=kernel("_decoder_tokens_triton", "assemble"))
register_backends("decoder_tokens_backward", _column_sum_reference, triton=kernel("_decoder_tokens_triton", "column_sum"))


def _details(visible: Tensor, mask_token: Tensor, position_table: Tensor) -> tuple[Any, ...]:
    return visible.device, visible.dtype, mask_token.dtype, position_table.dtype


def _body(visible: Tensor, mask_token: Tensor, position_table: Tensor, *arguments: Any) -> Tensor:
    *index, name = arguments
    name = name or backend.pick("decoder_tokens", *_details(visible, mask_token, position_table))
    return backend.run("decoder_tokens", name, visible, mask_token, position_table, *index)


def _fake(
    visible: Tensor, mask_token: Tensor, position_table: Tensor, visible_index: Tensor, decode_index: Tensor, _: str
) -> Tensor:
    b, v, d = visible.shape
    return visible.new_empty((b, v + decode_index.shape[1], d), dtype=_output_dtype(visible, mask_token))


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    visible, mask_token, table, _, _, name = inputs
    ctx.visible_tokens, ctx.visible_dtype = visible.shape[1], visible.dtype
    ctx.mask_token_dtype = mask_token.dtype
    ctx.backend = name or backend.pick("decoder_tokens", *_details(visible, mask_token, table))


def _autograd(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    dvisible, dmask = None, None
    if ctx.needs_input_grad[0]:
        dvisible = grad[:, : ctx.visible_tokens].to(ctx.visible_dtype)
    if ctx.needs_input_grad[1]:
        dmask = _column_sum(grad, ctx.visible_tokens, ctx.backend).to(ctx.mask_token_dtype)
    return dvisible, dmask, None, None, None, None


def _column_sum_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.shape, ctx.dtype, ctx.visible_tokens = inputs[0].shape, inputs[0].dtype, inputs[1]


def _column_sum_autograd(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
    b, tokens, d = ctx.shape
    hidden = upstream.to(ctx.dtype).expand(b, tokens - ctx.visible_tokens, d)
    return torch.cat((hidden.new_zeros(b, ctx.visible_tokens, d), hidden), dim=1), None, None


_decoder_tokens = define(
    "decoder_tokens(Tensor visible, Tensor mask_token, Tensor position_table, Tensor visible_index, Tensor decode_index, "
    "str backend) -> Tensor",
    _body,
    _fake,
    backward=_autograd,
    setup_context=_save,
)
_column_sum = define(
    "decoder_tokens_backward(Tensor grad, int visible_tokens, str backend) -> Tensor",
    lambda grad, visible_tokens, name: backend.run("decoder_tokens_backward", name, grad, visible_tokens),
    lambda grad, *_: grad.new_empty((1, 1, grad.shape[2]), dtype=statistics_dtype(grad.dtype)),
    backward=_column_sum_autograd,
    setup_context=_column_sum_setup,
)


def decoder_tokens(
    visible: Tensor, mask_token: Tensor, position_table: Tensor, visible_index: Tensor, decode_index: Tensor
) -> Tensor:
    """Put together the decoder's input (paper section 3.2: visible tokens, then mask tokens, each with its position).

    Args:
        visible: projected encoder tokens [B, V, D].
        mask_token: [1, 1, D].
        position_table: [N, D], constant (no gradient).
        visible_index: [B, V] int32 or int64 token ids of `visible`.
        decode_index: [B, Nd] int32 or int64 token ids to decode.

    Returns:
        [B, V + Nd, D] in the wider dtype of visible and mask_token (fp32 with bf16 tokens and an fp32 parameter).

    Raises ValueError on shapes, dtypes or devices that do not fit, IndexError (on CPU) for ids outside the table.

    Floor: visible tokens and index read, output written once, one FLOP a value; backward one read of the hidden rows, one
    FLOP a value of them. Bound by memory.
    """
    check(
        visible.ndim == 3 and visible.is_floating_point(),
        f"decoder_tokens: visible must be floating point [B, V, D], got {visible.dtype} {tuple(visible.shape)}",
    )
    b, v, d = visible.shape
    check(mask_token.shape == (1, 1, d), f"decoder_tokens: mask_token must be [1, 1, {d}], got {tuple(mask_token.shape)}")
    check(
        position_table.ndim == 2 and position_table.shape[1] == d,
        f"decoder_tokens: position_table must be [N, {d}], got {tuple(position_table.shape)}",
    )
    for name, tensor in (("mask_token", mask_token), ("position_table", position_table)):
        check(tensor.device == visible.device, f"decoder_tokens: {name} is on {tensor.device}, visible on {visible.device}")
        check(tensor.is_floating_point(), f"decoder_tokens: {name} must be floating point, got {tensor.dtype}")
    visible_index = check_index(visible_index, b, visible.device, "decoder_tokens", "visible_index")
    decode_index = check_index(decode_index, b, visible.device, "decoder_tokens", "decode_index")
    check(visible_index.shape[1] == v, f"decoder_tokens: {v} visible tokens but {visible_index.shape[1]} indices")
    backend_name = backend.argument("decoder_tokens", *_details(visible, mask_token, position_table))
    out: Tensor = _decoder_tokens(visible, mask_token, position_table, visible_index, decode_index, backend_name)
    return out
