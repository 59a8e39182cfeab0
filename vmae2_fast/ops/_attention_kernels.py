"""The Triton kernels of flash attention; definition, layouts and symbols are those of attention.py.

One program owns a block of query rows (forward, dQ) or of keys (dK/dV) of one head and walks over the other side, so that
every output has one writer: the backward is deterministic, for seven products where atomic additions would need five.

A head dim that is no power of two is split in two operands, HEAD + TAIL columns (88 = 64 + 24 of 32), each loaded and
multiplied on its own: padding 88 to 128 would cost a third more work, registers and shared memory. Without a tail its
second operand stands for nothing and is never used.

`steep` is the scale of the scores in the unit of their exponentials: base 2 saves an operation a score, base e costs float32
(whose products are slow anyway) no bit where a log-sum-exp is subtracted from a score that nearly equals it.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ._triton_launch import INTERPRETED, round_to, to_float32

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def _rounded(x, dtype: tl.constexpr):
    """float32 `x` rounded to `dtype` (to nearest even), as a dot takes it."""
    rounded = round_to(x, dtype)
    if INTERPRETED and dtype == tl.bfloat16:  # the interpreter's dot would multiply their bits as integers
        return to_float32(rounded)
    return rounded


@triton.jit
def _unit(scale, dtype: tl.constexpr):
    return scale if dtype == tl.float32 else scale * LOG2_E


@triton.jit
def _exp(x, dtype: tl.constexpr):
    return tl.exp(x) if dtype == tl.float32 else tl.exp2(x)


@triton.jit
def _load(base, rows, n, stride, FIRST: tl.constexpr, WIDTH: tl.constexpr, D: tl.constexpr, RAGGED: tl.constexpr):
    """[rows, WIDTH] of columns FIRST .. of a matrix [n, D], as a dot takes it; zeros beyond the matrix."""
    columns = FIRST + tl.arange(0, WIDTH)
    pointers = base + rows[:, None] * stride + columns[None, :]
    if RAGGED and FIRST + WIDTH > D:
        x = tl.load(pointers, mask=(rows < n)[:, None] & (columns < D)[None, :], other=0.0)
    elif RAGGED:
        x = tl.load(pointers, mask=(rows < n)[:, None], other=0.0)
    elif FIRST + WIDTH > D:
        x = tl.load(pointers, mask=(columns < D)[None, :], other=0.0)
    else:
        x = tl.load(pointers)
    if INTERPRETED and x.dtype == tl.bfloat16:  # the interpreter's dot would multiply their bits as integers
        x = to_float32(x)
    return x


@triton.jit
def _load2(base, rows, n, stride, D: tl.constexpr, HEAD: tl.constexpr, TAIL: tl.constexpr, RAGGED: tl.constexpr):
    """Both operands of [rows, D]."""
    x0 = _load(base, rows, n, stride, 0, HEAD, D, RAGGED)
    x1 = x0
    if TAIL:
        x1 = _load(base, rows, n, stride, HEAD, TAIL, D, RAGGED)
    return x0, x1


@triton.jit
def _store(base, rows, n, stride, x, FIRST: tl.constexpr, WIDTH: tl.constexpr, D: tl.constexpr):
    columns = FIRST + tl.arange(0, WIDTH)
    mask = (rows < n)[:, None] & (columns < D)[None, :]
    kind: tl.constexpr = base.dtype.element_ty
    tl.store(base + rows[:, None] * stride + columns[None, :], round_to(x, kind), mask=mask)


@triton.jit
def _store2(base, rows, n, stride, x0, x1, D: tl.constexpr, HEAD: tl.constexpr, TAIL: tl.constexpr):
    _store(base, rows, n, stride, x0, 0, HEAD, D)
    if TAIL:
        _store(base, rows, n, stride, x1, HEAD, TAIL, D)


@triton.jit
def _outer(a0, a1, b0, b1, TAIL: tl.constexpr):
    """a b^T over both operands."""
    product = tl.dot(a0, tl.trans(b0), input_precision="ieee")
    if TAIL:
        product = tl.dot(a1, tl.trans(b1), product, input_precision="ieee")
    return product


@triton.jit
def _accumulate(x, b0, b1, sum0, sum1, TAIL: tl.constexpr):
    """sum + x b for both operands."""
    sum0 = tl.dot(x, b0, sum0, input_precision="ieee")
    if TAIL:
        sum1 = tl.dot(x, b1, sum1, input_precision="ieee")
    return sum0, sum1


@triton.jit
def _zeros2(ROWS: tl.constexpr, HEAD: tl.constexpr, TAIL: tl.constexpr):
    x0 = tl.zeros([ROWS, HEAD], tl.float32)
    x1 = x0
    if TAIL:
        x1 = tl.zeros([ROWS, TAIL], tl.float32)
    return x0, x1


@triton.jit
def _place(n, h, D: tl.constexpr, BLOCK: tl.constexpr):
    """(first row of this program's block, row of its (sample, head) in [B, H, N], offset of its head in packed qkv and in
    out). Blocks of one head are neighbours in time: they find their keys and values in the cache."""
    blocks = tl.cdiv(n, BLOCK)
    program = tl.program_id(0)
    pair = program // blocks
    first = (pair // h).to(tl.int64) * n * h  # 64 bits for the samples before; one sample fits 31 (checked by the launcher)
    head = (pair % h) * D
    return (program % blocks) * BLOCK, pair.to(tl.int64) * n, first * (3 * D) + head, first * D + head


@triton.jit
def _live(lengths, n, h, BLOCK: tl.constexpr, SHORTER: tl.constexpr):
    """Tokens of this program's sample that take part."""
    live = n
    if SHORTER:
        live = tl.minimum(tl.load(lengths + tl.program_id(0) // (tl.cdiv(n, BLOCK) * h)).to(tl.int32), n)
    return live


@triton.jit
def _banded(rows, columns, n, window, BAND: tl.constexpr):
    """Which of the pairs of rows and columns [.., ..] take part: columns below n, and within the window."""
    valid = columns < n
    if BAND:
        valid = valid & (columns - rows <= window) & (rows - columns <= window)
    return valid


@triton.jit
def _walk(first, n, window, BLOCK: tl.constexpr, STEP: tl.constexpr, BAND: tl.constexpr):
    """(start, end of the steps that need no mask, end of all) of a walk over what a block of BLOCK rows sees."""
    if BAND:
        start = tl.maximum(first - window, 0) // STEP * STEP
        return start, start, tl.minimum(first + BLOCK + window, n)
    return 0, n // STEP * STEP, n


@triton.jit
def _forward_step(
    at, q0, q1, k_base, v_base, rows, n, stride, steep, window, peak, total, sum0, sum1,
    D: tl.constexpr, HEAD: tl.constexpr, TAIL: tl.constexpr, STEP: tl.constexpr,
    NEGATIVE: tl.constexpr, MASKED: tl.constexpr, BAND: tl.constexpr,
):  # fmt: skip
    kind: tl.constexpr = k_base.dtype.element_ty
    columns = at + tl.arange(0, STEP)
    k0, k1 = _load2(k_base, columns, n, stride, D, HEAD, TAIL, MASKED)
    scores = _outer(q0, q1, k0, k1, TAIL)
    if MASKED:
        valid = _banded(rows[:, None], columns[None, :], n, window, BAND)
        scores = tl.where(valid, scores * steep, float("-inf"))
        higher = tl.maximum(peak, tl.max(scores, 1))
        base = higher
        if BAND:  # nothing of this step, nor of those before, may be within a row's window
            base = tl.where(higher == float("-inf"), 0.0, higher)
        p = _exp(scores - base[:, None], kind)
    else:  # the scale enters the maximum once a row, and the exponent by one fused operation
        higher = tl.maximum(peak, (tl.min(scores, 1) if NEGATIVE else tl.max(scores, 1)) * steep)
        base = higher
        p = _exp(scores * steep - base[:, None], kind)
    shrink = _exp(peak - base, kind)
    total = total * shrink + tl.sum(p, 1)
    sum0 = sum0 * shrink[:, None]
    if TAIL:
        sum1 = sum1 * shrink[:, None]
    v0, v1 = _load2(v_base, columns, n, stride, D, HEAD, TAIL, MASKED)
    sum0, sum1 = _accumulate(_rounded(p, kind), v0, v1, sum0, sum1, TAIL)
    return higher, total, sum0, sum1


@triton.jit(do_not_specialize=["n", "h", "window"])
def forward(
    qkv, out, lse, lengths, n, h, scale, window,
    D: tl.constexpr, HEAD: tl.constexpr, TAIL: tl.constexpr, BLOCK: tl.constexpr, STEP: tl.constexpr,
    NEGATIVE: tl.constexpr, BAND: tl.constexpr, SHORTER: tl.constexpr,
):  # fmt: skip
    """out and lse of BLOCK queries of one head, in steps of STEP keys."""
    first, row, inside, outside = _place(n, h, D, BLOCK)
    kind: tl.constexpr = qkv.dtype.element_ty
    steep = _unit(scale, kind)
    rows, stride = first + tl.arange(0, BLOCK), 3 * h * D
    live = _live(lengths, n, h, BLOCK, SHORTER)
    near = tl.minimum(rows, live - 1)  # a row beyond the end sees what the last one sees, not nothing
    q_base, k_base, v_base = qkv + inside, qkv + inside + h * D, qkv + inside + 2 * h * D
    q0, q1 = _load2(q_base, rows, live, stride, D, HEAD, TAIL, True)
    peak = tl.full([BLOCK], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    sum0, sum1 = _zeros2(BLOCK, HEAD, TAIL)
    start, whole, end = _walk(first, live, window, BLOCK, STEP, BAND)
    if not BAND:
        for at in tl.range(start, whole, STEP):
            peak, total, sum0, sum1 = _forward_step(
                at, q0, q1, k_base, v_base, near, live, stride, steep, window, peak, total, sum0, sum1,
                D, HEAD, TAIL, STEP, NEGATIVE, False, False,
            )  # fmt: skip
    for at in tl.range(whole, end, STEP):
        peak, total, sum0, sum1 = _forward_step(
            at, q0, q1, k_base, v_base, near, live, stride, steep, window, peak, total, sum0, sum1,
            D, HEAD, TAIL, STEP, NEGATIVE, True, BAND,
        )  # fmt: skip
    if SHORTER:
        total = tl.where(rows < live, total, 1.0)
    log = peak + tl.log(total) if kind == tl.float32 else (peak + tl.log2(total)) * LN_2
    part = 1.0 / total
    if SHORTER:
        log = tl.where(rows < live, log, float("inf"))
        part = tl.where(rows < live, part, 0.0)
    tl.store(lse + row + rows, log, mask=rows < n)
    part = part[:, None]
    _store2(out + outside, rows, n, h * D, sum0 * part, sum1 * part, D, HEAD, TAIL)


@triton.jit
def _query_step(
    at, q0, q1, g0, g1, k_base, v_base, rows, n, stride, steep, window, lse, delta, dq0, dq1,
    D: tl.constexpr, HEAD: tl.constexpr, TAIL: tl.constexpr, STEP: tl.constexpr, MASKED: tl.constexpr, BAND: tl.constexpr,
):  # fmt: skip
    columns = at + tl.arange(0, STEP)
    k0, k1 = _load2(k_base, columns, n, stride, D, HEAD, TAIL, MASKED)
    v0, v1 = _load2(v_base, columns, n, stride, D, HEAD, TAIL, MASKED)
    kind: tl.constexpr = k_base.dtype.element_ty
    p = _exp(_outer(q0, q1, k0, k1, TAIL) * steep - lse[:, None], kind)
    if MASKED:
        p = tl.where(_banded(rows[:, None], columns[None, :], n, window, BAND), p, 0.0)
    ds = p * (_outer(g0, g1, v0, v1, TAIL) - delta[:, None])
    return _accumulate(_rounded(ds, kind), k0, k1, dq0, dq1, TAIL)


@triton.jit(do_not_specialize=["n", "h", "window"])
def backward_queries(
    grad, qkv, out, lse, delta, dqkv, lengths, n, h, scale, window,
    D: tl.constexpr, HEAD: tl.constexpr, TAIL: tl.constexpr, BLOCK: tl.constexpr, STEP: tl.constexpr, BAND: tl.constexpr,
    SHORTER: tl.constexpr,
):  # fmt: skip
    """delta = rowsum(grad * out) and dQ of BLOCK queries of one head, in steps of STEP keys."""
    first, row, inside, outside = _place(n, h, D, BLOCK)
    rows, stride = first + tl.arange(0, BLOCK), 3 * h * D
    live = _live(lengths, n, h, BLOCK, SHORTER)
    k_base, v_base = qkv + inside + h * D, qkv + inside + 2 * h * D
    g0, g1 = _load2(grad + outside, rows, live, h * D, D, HEAD, TAIL, True)
    o0, o1 = _load2(out + outside, rows, live, h * D, D, HEAD, TAIL, True)
    rowsum = tl.sum(g0.to(tl.float32) * o0.to(tl.float32), 1)
    if TAIL:
        rowsum += tl.sum(g1.to(tl.float32) * o1.to(tl.float32), 1)
    tl.store(delta + row + rows, rowsum, mask=rows < n)
    q0, q1 = _load2(qkv + inside, rows, live, stride, D, HEAD, TAIL, True)
    steep = _unit(scale, qkv.dtype.element_ty)
    log = _unit(tl.load(lse + row + rows, mask=rows < n, other=float("inf")), qkv.dtype.element_ty)
    dq0, dq1 = _zeros2(BLOCK, HEAD, TAIL)
    start, whole, end = _walk(first, live, window, BLOCK, STEP, BAND)
    if not BAND:
        for at in tl.range(start, whole, STEP):
            dq0, dq1 = _query_step(
                at, q0, q1, g0, g1, k_base, v_base, rows, live, stride, steep, window, log, rowsum, dq0, dq1,
                D, HEAD, TAIL, STEP, False, False,
            )  # fmt: skip
    for at in tl.range(whole, end, STEP):
        dq0, dq1 = _query_step(
            at, q0, q1, g0, g1, k_base, v_base, rows, live, stride, steep, window, log, rowsum, dq0, dq1,
            D, HEAD, TAIL, STEP, True, BAND,
        )  # fmt: skip
    _store2(dqkv + inside, rows, n, stride, dq0 * scale, dq1 * scale, D, HEAD, TAIL)


@triton.jit
def _key_step(
    at, k0, k1, v0, v1, q_base, g_base, lse, delta, columns, n, h, steep, window, dk0, dk1, dv0, dv1,
    D: tl.constexpr, HEAD: tl.constexpr, TAIL: tl.constexpr, STEP: tl.constexpr, MASKED: tl.constexpr, BAND: tl.constexpr,
):  # fmt: skip
    rows = at + tl.arange(0, STEP)
    q0, q1 = _load2(q_base, rows, n, 3 * h * D, D, HEAD, TAIL, MASKED)
    g0, g1 = _load2(g_base, rows, n, h * D, D, HEAD, TAIL, MASKED)
    if MASKED:  # a query beyond the end gives nothing to any key: p is 0 at a log-sum-exp of infinity
        log = tl.load(lse + rows, mask=rows < n, other=float("inf"))
        rowsum = tl.load(delta + rows, mask=rows < n, other=0.0)
    else:
        log, rowsum = tl.load(lse + rows), tl.load(delta + rows)
    kind: tl.constexpr = q_base.dtype.element_ty
    p = _exp(_outer(k0, k1, q0, q1, TAIL) * steep - _unit(log, kind)[None, :], kind)
    if BAND:
        p = tl.where(_banded(rows[None, :], columns[:, None], n, window, True), p, 0.0)
    dv0, dv1 = _accumulate(_rounded(p, kind), g0, g1, dv0, dv1, TAIL)
    ds = p * (_outer(v0, v1, g0, g1, TAIL) - rowsum[None, :])
    dk0, dk1 = _accumulate(_rounded(ds, kind), q0, q1, dk0, dk1, TAIL)
    return dk0, dk1, dv0, dv1


@triton.jit(do_not_specialize=["n", "h", "window"])
def backward_keys(
    grad, qkv, lse, delta, dqkv, lengths, n, h, scale, window,
    D: tl.constexpr, HEAD: tl.constexpr, TAIL: tl.constexpr, BLOCK: tl.constexpr, STEP: tl.constexpr, BAND: tl.constexpr,
    SHORTER: tl.constexpr,
):  # fmt: skip
    """dK and dV of BLOCK keys of one head, in steps of STEP queries. Everything is transposed: [keys, queries]."""
    first, row, inside, outside = _place(n, h, D, BLOCK)
    columns, stride = first + tl.arange(0, BLOCK), 3 * h * D
    live = _live(lengths, n, h, BLOCK, SHORTER)
    k0, k1 = _load2(qkv + inside + h * D, columns, live, stride, D, HEAD, TAIL, True)
    v0, v1 = _load2(qkv + inside + 2 * h * D, columns, live, stride, D, HEAD, TAIL, True)
    steep = _unit(scale, qkv.dtype.element_ty)
    dk0, dk1 = _zeros2(BLOCK, HEAD, TAIL)
    dv0, dv1 = _zeros2(BLOCK, HEAD, TAIL)
    start, whole, end = _walk(first, live, window, BLOCK, STEP, BAND)
    if not BAND:
        for at in tl.range(start, whole, STEP):
            dk0, dk1, dv0, dv1 = _key_step(
                at, k0, k1, v0, v1, qkv + inside, grad + outside, lse + row, delta + row, columns, live, h, steep, window,
                dk0, dk1, dv0, dv1, D, HEAD, TAIL, STEP, False, False,
            )  # fmt: skip
    for at in tl.range(whole, end, STEP):
        dk0, dk1, dv0, dv1 = _key_step(
            at, k0, k1, v0, v1, qkv + inside, grad + outside, lse + row, delta + row, columns, live, h, steep, window,
            dk0, dk1, dv0, dv1, D, HEAD, TAIL, STEP, True, BAND,
        )  # fmt: skip
    if SHORTER:  # a key beyond the length was loaded as zeros, whose probability is none: its sums mean nothing
        inside_length = (columns < live)[:, None]
        dk0, dv0 = tl.where(inside_length, dk0, 0.0), tl.where(inside_length, dv0, 0.0)
        dk1, dv1 = tl.where(inside_length, dk1, 0.0), tl.where(inside_length, dv1, 0.0)
    _store2(dqkv + inside + h * D, columns, n, stride, dk0 * scale, dk1 * scale, D, HEAD, TAIL)
    _store2(dqkv + inside + 2 * h * D, columns, n, stride, dv0, dv1, D, HEAD, TAIL)
