"""decoder_tokens in Triton: one launch forward, a column sum in two launches backward. See decoder_tokens.py.

Forward: a program writes a tile [rows, columns] of the sequence; the row's id picks the position, its place in the sequence
the visible token or the mask token. Arithmetic is float32, rounded once. Backward: programs sum spans of rows in float32,
a last launch sums the spans; the order depends on the shape only, so every run has the same bits.

Ids outside the table: on the CPU an IndexError; on a GPU, where looking would stall the queue, rows of NaN.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import _native
from ._triton_launch import Configuration, check_ids, configurations, launch, operand, round_to, to_float32
from .decoder_tokens import _output_dtype

ROWS, COLUMNS = 16, 128  # of a tile: 16 values a thread of 4 warps
LAST_ROWS, LAST_COLUMNS = 64, 32  # of the last launch, which has few columns to spread over programs
SPAN = 128  # rows a program sums


@triton.jit
def _assemble_kernel(
    visible_ptr, mask_ptr, table_ptr, visible_index_ptr, decode_index_ptr, out_ptr,
    rows, tokens, visible_tokens, table_rows, D,
    BLOCKS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) // BLOCKS * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(0) % BLOCKS * COLUMNS + tl.arange(0, COLUMNS)
    sample = row // tokens
    place = row % tokens
    seen = (place < visible_tokens) & (row < rows)
    hidden = (place >= visible_tokens) & (row < rows)
    visible_row = sample * visible_tokens + place
    decode_row = sample * (tokens - visible_tokens) + place - visible_tokens
    token = tl.where(
        seen,
        tl.load(visible_index_ptr + visible_row, mask=seen, other=0),
        tl.load(decode_index_ptr + decode_row, mask=hidden, other=0),
    )
    inside = (token >= 0) & (token < table_rows)
    wide = (column < D)[None, :]
    position = to_float32(
        tl.load(table_ptr + token.to(tl.int64)[:, None] * D + column[None, :], mask=inside[:, None] & wide, other=0.0)
    )
    visible = to_float32(
        tl.load(visible_ptr + visible_row.to(tl.int64)[:, None] * D + column[None, :], mask=seen[:, None] & wide, other=0.0)
    )
    mask_token = to_float32(tl.load(mask_ptr + column, mask=column < D, other=0.0))
    value = position + tl.where(seen[:, None], visible, mask_token[None, :])
    value = tl.where(inside[:, None], value, float("nan"))
    out = out_ptr + row.to(tl.int64)[:, None] * D + column[None, :]
    tl.store(out, round_to(value, out_ptr.dtype.element_ty), mask=(row < rows)[:, None] & wide)


@triton.jit
def _column_sum_kernel(
    in_ptr, out_ptr, rows, tokens, skipped, span, D,
    BLOCKS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """out[part] = sum of rows part*span .. of [B, tokens, D] without the first `skipped` tokens of each sample."""
    part = tl.program_id(0) // BLOCKS
    column = tl.program_id(0) % BLOCKS * COLUMNS + tl.arange(0, COLUMNS)
    kept = tokens - skipped
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    for start in range(0, span, ROWS):
        row = part * span + start + tl.arange(0, ROWS)
        source = row // kept * tokens + skipped + row % kept
        real = (row < rows)[:, None] & (start + tl.arange(0, ROWS) < span)[:, None] & (column < D)[None, :]
        total += to_float32(tl.load(in_ptr + source.to(tl.int64)[:, None] * D + column[None, :], mask=real, other=0.0))
    tl.store(out_ptr + part.to(tl.int64) * D + column, tl.sum(total, 0), mask=column < D)


def assemble(
    visible: Tensor, mask_token: Tensor, position_table: Tensor, visible_index: Tensor, decode_index: Tensor
) -> Tensor:
    """Launch for the forward."""
    visible = operand(visible, _native.FLOATS, "decoder_tokens: visible")
    mask_token = operand(mask_token, _native.FLOATS, "decoder_tokens: mask_token")
    table = operand(position_table, _native.FLOATS, "decoder_tokens: position_table")
    indices = [operand(i, (torch.int32,), "decoder_tokens: index") for i in (visible_index, decode_index)]
    for index in indices:
        check_ids(index, table.shape[0], "decoder_tokens", lowest=0)
    b, v, d = visible.shape
    tokens, blocks = v + decode_index.shape[1], triton.cdiv(d, COLUMNS)
    out = visible.new_empty((b, tokens, d), dtype=_output_dtype(visible, mask_token))
    programs = triton.cdiv(b * tokens, ROWS) * blocks
    launch(
        _assemble_kernel, programs, visible, mask_token, table, *indices, out, b * tokens, tokens, v, table.shape[0], d,
        BLOCKS=blocks, ROWS=ROWS, COLUMNS=COLUMNS,
    )  # fmt: skip
    return out


def column_sum(grad: Tensor, skipped: int) -> Tensor:
    """Launches for the backward: the sum over [B, skipped:] of `grad` [B, N, D], float32 [1, 1, D]."""
    grad = operand(grad, _native.FLOATS, "decoder_tokens_backward: grad")
    b, tokens, d = grad.shape
    rows = b * (tokens - skipped)
    out = grad.new_zeros((1, 1, d), dtype=torch.float32)
    parts, blocks = triton.cdiv(rows, SPAN), triton.cdiv(d, COLUMNS)
    partial = grad.new_empty((parts, d), dtype=torch.float32)
    launch(
        _column_sum_kernel, parts * blocks, grad, partial, rows, tokens, skipped, SPAN, d,
        BLOCKS=blocks, ROWS=ROWS, COLUMNS=COLUMNS,
    )  # fmt: skip
    blocks = triton.cdiv(d, LAST_COLUMNS)
    launch(
        _column_sum_kernel, blocks if parts else 0, partial, out, parts, parts, 0, parts, d,
        BLOCKS=blocks, ROWS=LAST_ROWS, COLUMNS=LAST_COLUMNS,
    )  # fmt: skip
    return out


def aot_configurations() -> list[Configuration]:
    """The launches of the published models: decoders of 384 and 512 columns, in the dtypes autocast gives and in bfloat16."""
    found: list[Configuration] = []
    index = torch.zeros(1, 208, dtype=torch.int32), torch.zeros(1, 1024, dtype=torch.int32)
    half, full = torch.bfloat16, torch.float32
    for width, tokens, mask in ((384, full, full), (512, half, full), (512, half, half)):
        name = f"decoder_tokens {str(tokens)[6:]} tokens, {str(mask)[6:]} mask token, {width} columns"
        operands = torch.zeros(1, 208, width, dtype=tokens), torch.zeros(1, 1, width, dtype=mask), torch.zeros(2048, width)
        found += configurations(name, assemble, *operands, *index)
    for dtype in (full, half):
        name = f"decoder_tokens_backward {str(dtype)[6:]}, 512 columns"
        found += configurations(name, column_sum, torch.zeros(1, 1232, 512, dtype=dtype), 208)
    return found
