"""decoder_tokens against the concatenation it replaces."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.ops.half_block import saved_bytes
from tests.support import assert_within_budget, awkward, backends, compiles, expanded, opcheck, random_index
from vmae2_fast import backend
from vmae2_fast.ops.decoder_tokens import decoder_tokens

BACKENDS = backends("decoder_tokens")
SHAPES = [(2, 1, 1, 4, 8), (3, 5, 7, 63, 33), (1, 6, 12, 20, 16), (2, 4, 0, 9, 8)]


def _plain(visible: Tensor, mask_token: Tensor, table: Tensor, visible_index: Tensor, decode_index: Tensor) -> Tensor:
    """The official forward: table cast to the tokens' dtype, two sums, one concatenation."""
    table = table.to(visible.dtype)
    return torch.cat((visible + table[visible_index.long()], mask_token + table[decode_index.long()]), dim=1)


def _case(b, v, nd, n, d, dtype=torch.float32) -> tuple[Tensor, ...]:
    index = random_index(b, v, n), random_index(b, nd, n, seed=1)
    return torch.randn(b, v, d).to(dtype).requires_grad_(), torch.randn(1, 1, d).requires_grad_(), torch.randn(n, d), *index


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", BACKENDS)
def test_matches_plain_torch(name, dtype, shape):
    """bf16: what autocast gives, bf16 tokens beside an fp32 parameter."""
    check_against_plain_torch(name, _case(*shape, dtype=dtype))


def check_against_plain_torch(name, ours):
    same = [t.detach().clone().requires_grad_(t.requires_grad) for t in ours]
    truth = [t.detach().double().requires_grad_() for t in ours[:2]] + [ours[2].double(), *ours[3:]]
    with backend.use_backend(name):
        a = decoder_tokens(*ours)
    s, t = _plain(*same), _plain(*truth)
    assert a.dtype == torch.float32
    assert_within_budget(a, s, t)
    upstream = torch.randn_like(a)
    for out in (a, s, t):
        out.backward(upstream.to(out.dtype))
    for what, i in (("visible", 0), ("mask_token", 1)):
        assert_within_budget(ours[i].grad, same[i].grad, truth[i].grad, f"gradient of {what}")


@pytest.mark.parametrize("name", BACKENDS)
def test_fp32_equals_plain_torch_bitwise(name):
    case = _case(*SHAPES[1])
    with backend.use_backend(name):
        assert torch.equal(decoder_tokens(*case), _plain(*case))


@pytest.mark.parametrize("table_dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", BACKENDS)
def test_all_in_half_precision(name, dtype, table_dtype):
    """Bit-equal: one sum in float32, rounded once."""
    visible, mask_token, table, *index = _case(2, 3, 4, 9, 8, dtype)
    case = visible, mask_token.detach().to(dtype).requires_grad_(), table.to(table_dtype), *index
    with backend.use_backend(name):
        out = decoder_tokens(*case)
    assert out.dtype == dtype
    with backend.use_backend("reference"):
        assert torch.equal(out, decoder_tokens(*case))


@pytest.mark.parametrize("name", BACKENDS)
def test_many_rows_are_summed_in_spans(name):
    case = _case(2, 3, 150, 200, 40)
    check_against_plain_torch(name, case)


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("bad", [-1, 9, 2**31 - 1])
def test_ids_outside_the_table_raise(name, bad):
    visible, mask_token, table, visible_index, decode_index = _case(2, 3, 4, 9, 8)
    decode_index[1, 2] = bad
    with backend.use_backend(name), pytest.raises(IndexError):
        decoder_tokens(visible, mask_token, table, visible_index, decode_index)


@pytest.mark.parametrize("name", BACKENDS)
def test_empty_batch(name):
    visible, mask_token, table, *index = _case(2, 3, 4, 9, 8)
    with backend.use_backend(name):
        out = decoder_tokens(visible[:0], mask_token, table, *(i[:0] for i in index))
        assert out.shape == (0, 7, 8)
        assert not torch.autograd.grad(out.sum(), mask_token)[0].any()


def test_backward_runs_what_forward_ran(monkeypatch):
    ran, run = [], backend.run
    monkeypatch.setattr(backend, "run", lambda op, name, *rest: ran.append((op, name)) or run(op, name, *rest))
    for name in BACKENDS:
        with backend.use_backend(name):
            out = decoder_tokens(*_case(2, 3, 4, 9, 8))
        with backend.use_backend("reference"):
            out.sum().backward()
    assert ran == [(op, name) for name in BACKENDS for op in ("decoder_tokens", "decoder_tokens_backward")]


def test_double_backward_through_the_mask_token():
    visible, mask_token, table, *index = _case(2, 2, 3, 5, 4)
    arguments = [visible.detach().double().requires_grad_(), mask_token.detach().double().requires_grad_()]
    assert torch.autograd.gradgradcheck(lambda v, m: decoder_tokens(v, m, table, *index).square(), arguments)


def test_int64_indices_give_the_same():
    visible, mask_token, table, visible_index, decode_index = _case(*SHAPES[1])
    a = decoder_tokens(visible, mask_token, table, visible_index, decode_index)
    assert torch.equal(a, decoder_tokens(visible, mask_token, table, visible_index.long(), decode_index.long()))


@pytest.mark.parametrize("layout", ["strided", "transposed", "unaligned", "expanded"])
@pytest.mark.parametrize("name", BACKENDS)
def test_memory_layouts(name, layout):
    visible, mask_token, table, *index = _case(2, 3, 4, 9, 8)
    source = visible.detach()
    twisted = (expanded(source) if layout == "expanded" else dict(awkward(source))[layout]).requires_grad_()
    straight = twisted.detach().contiguous().requires_grad_()
    table_twisted = dict(awkward(table))["strided"]
    with backend.use_backend(name):
        a, b = decoder_tokens(straight, mask_token, table, *index), decoder_tokens(twisted, mask_token, table_twisted, *index)
    assert torch.equal(a, b)
    for p, q in zip(torch.autograd.grad(a.sum(), [straight, mask_token]), torch.autograd.grad(b.sum(), [twisted, mask_token])):
        assert torch.equal(p, q)


def test_saves_nothing():
    case = _case(2, 3, 4, 9, 8)
    named, others = saved_bytes(lambda: decoder_tokens(*case), dict(enumerate(case)))
    assert (named, others) == (set(), [])


@pytest.mark.parametrize("name", BACKENDS)
def test_opcheck(name):
    with backend.use_backend(name):
        opcheck(torch.ops.vmae2.decoder_tokens.default, (*_case(2, 3, 4, 9, 8), ""))
        opcheck(torch.ops.vmae2.decoder_tokens.default, (*_case(2, 3, 4, 9, 8, torch.bfloat16), ""))
        opcheck(torch.ops.vmae2.decoder_tokens_backward.default, (torch.randn(2, 7, 8, requires_grad=True), 3, name))


def test_gradcheck():
    visible, mask_token, table, *index = _case(2, 2, 3, 5, 4)
    arguments = [visible.detach().double().requires_grad_(), mask_token.detach().double().requires_grad_()]
    assert torch.autograd.gradcheck(lambda v, m: decoder_tokens(v, m, table, *index), arguments)


def test_compiles_as_one_graph():
    eager = _case(2, 3, 4, 9, 8)
    traced = [t.detach().clone().requires_grad_(t.requires_grad) for t in eager]
    a, b = decoder_tokens(*eager), compiles(decoder_tokens, *traced)
    assert torch.equal(a, b)
    a.square().sum().backward()
    b.square().sum().backward()
    assert torch.equal(eager[0].grad, traced[0].grad)
    torch.testing.assert_close(eager[1].grad, traced[1].grad)


def test_unknown_backend():
    with (
        pytest.raises(backend.BackendError, match="decoder_tokens has no backend 'sdpa'"),
        backend.use_backend("decoder_tokens=sdpa"),
    ):
        pass


@pytest.mark.parametrize(
    ("position", "value", "message"),
    [
        (0, torch.zeros(3, 8), r"visible must be floating point \[B, V, D\], got torch.float32 \(3, 8\)"),
        (1, torch.zeros(8), r"mask_token must be \[1, 1, 8\], got \(8,\)"),
        (2, torch.zeros(9, 7), r"position_table must be \[N, 8\], got \(9, 7\)"),
        (3, torch.zeros(2, 4, dtype=torch.int32), "3 visible tokens but 4 indices"),
        (4, torch.zeros(3, 4, dtype=torch.int32), r"decode_index must be int32 \[B, K\] with B = 2, got torch.int32 \(3, 4\)"),
        (4, torch.zeros(2, 4, dtype=torch.bool), r"decode_index must be int32 \[B, K\] with B = 2, got torch.bool"),
    ],
)
def test_bad_input(position, value, message):
    case = list(_case(2, 3, 4, 9, 8))
    case[position] = value
    with pytest.raises(ValueError, match=f"decoder_tokens: {message}"):
        decoder_tokens(*case)


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [*SHAPES, (2, 208, 1024, 2048, 512), (2, 160, 784, 1568, 384)], ids=str)
@pytest.mark.parametrize("name", backends("decoder_tokens", "cuda"))
def test_cuda_has_the_cpu_bits(name, shape, dtype):
    host = _case(*shape, dtype=dtype)
    case = [t.detach().cuda().requires_grad_(t.requires_grad) for t in host]
    with backend.use_backend(name):
        out = decoder_tokens(*case)
    expected = decoder_tokens(*host)
    assert torch.equal(out.cpu(), expected)
    exact = [t.detach().double().requires_grad_() for t in host[:2]] + [host[2].double(), *host[3:]]
    upstream = torch.randn_like(expected)
    out.backward(upstream.cuda())
    expected.backward(upstream)
    decoder_tokens(*exact).backward(upstream.double())
    for i in (0, 1):
        assert_within_budget(case[i].grad.cpu(), host[i].grad, exact[i].grad)
