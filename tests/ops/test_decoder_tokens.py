"""decoder_tokens against the concatenation it replaces."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.ops.half_block import saved_bytes
from tests.support import assert_within_budget, awkward, compiles, expanded, opcheck, random_index
from vmae2_fast import backend
from vmae2_fast.ops.decoder_tokens import decoder_tokens

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
def test_matches_plain_torch(dtype, shape):
    """bf16: what autocast gives, bf16 tokens beside an fp32 parameter."""
    ours = _case(*shape, dtype=dtype)
    same = [t.detach().clone().requires_grad_(t.requires_grad) for t in ours]
    truth = [t.detach().double().requires_grad_() for t in ours[:2]] + [ours[2].double(), *ours[3:]]
    a, s, t = decoder_tokens(*ours), _plain(*same), _plain(*truth)
    assert a.dtype == torch.float32
    assert_within_budget(a, s, t)
    upstream = torch.randn_like(a)
    for out in (a, s, t):
        out.backward(upstream.to(out.dtype))
    for name, i in (("visible", 0), ("mask_token", 1)):
        assert_within_budget(ours[i].grad, same[i].grad, truth[i].grad, f"gradient of {name}")


def test_fp32_equals_plain_torch_bitwise():
    case = _case(*SHAPES[1])
    assert torch.equal(decoder_tokens(*case), _plain(*case))


def test_all_in_bf16():
    visible, mask_token, *rest = _case(2, 3, 4, 9, 8, torch.bfloat16)
    out = decoder_tokens(visible, mask_token.detach().bfloat16().requires_grad_(), *rest)
    assert out.dtype == torch.bfloat16


def test_int64_indices_give_the_same():
    visible, mask_token, table, visible_index, decode_index = _case(*SHAPES[1])
    a = decoder_tokens(visible, mask_token, table, visible_index, decode_index)
    assert torch.equal(a, decoder_tokens(visible, mask_token, table, visible_index.long(), decode_index.long()))


@pytest.mark.parametrize("layout", ["strided", "transposed", "unaligned", "expanded"])
def test_memory_layouts(layout):
    visible, mask_token, table, *index = _case(2, 3, 4, 9, 8)
    source = visible.detach()
    twisted = (expanded(source) if layout == "expanded" else dict(awkward(source))[layout]).requires_grad_()
    straight = twisted.detach().contiguous().requires_grad_()
    table_twisted = dict(awkward(table))["strided"]
    a, b = decoder_tokens(straight, mask_token, table, *index), decoder_tokens(twisted, mask_token, table_twisted, *index)
    assert torch.equal(a, b)
    for p, q in zip(torch.autograd.grad(a.sum(), [straight, mask_token]), torch.autograd.grad(b.sum(), [twisted, mask_token])):
        assert torch.equal(p, q)


def test_saves_nothing():
    case = _case(2, 3, 4, 9, 8)
    named, others = saved_bytes(lambda: decoder_tokens(*case), dict(enumerate(case)))
    assert (named, others) == (set(), [])


def test_opcheck():
    opcheck(torch.ops.vmae2.decoder_tokens.default, _case(2, 3, 4, 9, 8))
    opcheck(torch.ops.vmae2.decoder_tokens.default, _case(2, 3, 4, 9, 8, torch.bfloat16))


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
