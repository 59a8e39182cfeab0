"""The block against the textbook formula, and its options."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from tests.models.tiny import classify, clips
from vmae2_fast.models import Block
from vmae2_fast.models.vit import Pending, add
from vmae2_fast.train.ledger import saved_bytes


def plain(block: Block, x: Tensor) -> Tensor:
    """A pre-norm block in plain torch."""
    attn, (b, n, c) = block.attn, x.shape
    h = F.layer_norm(x, (c,), block.norm1.weight, block.norm1.bias, block.norm1.eps)
    bias = None if attn.q_bias is None else torch.cat([attn.q_bias, torch.zeros_like(attn.q_bias), attn.v_bias])
    q, k, v = F.linear(h, attn.qkv.weight, bias).reshape(b, n, 3, attn.heads, -1).permute(2, 0, 3, 1, 4)
    if block.attn.cosine:
        scores = F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).transpose(-2, -1) * attn.scale.clamp(max=4.6052).exp()
    else:
        scores = q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5
    mixed = attn.proj((scores.softmax(-1) @ v).transpose(1, 2).reshape(b, n, c))
    x = x + (mixed if block.gamma_1 is None else block.gamma_1 * mixed)
    h = F.layer_norm(x, (c,), block.norm2.weight, block.norm2.bias, block.norm2.eps)
    out = block.mlp.fc2(F.gelu(block.mlp.fc1(h)))
    return x + (out if block.gamma_2 is None else block.gamma_2 * out)


OPTIONS = [
    {},
    {"qkv_bias": False},
    {"layer_scale": 0.1},
    {"cosine_attention": True},
    {"mlp_hidden": 19},
    {"activation_checkpoint": "mlp", "layer_scale": 0.1},
    {"activation_checkpoint": "block", "layer_scale": 0.1},
]


def perturbed(**options) -> Block:
    block = Block(16, 2, **options)
    with torch.no_grad():
        for p in block.parameters():
            p.add_(torch.randn_like(p) * 0.1)
    return block


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_block_and_gradients_equal_the_formula(options):
    block, x = perturbed(**options).double(), torch.randn(2, 7, 16).double().requires_grad_()
    inputs = [x, *block.parameters()]
    runs = [[out, *torch.autograd.grad(out.square().sum(), inputs)] for out in (block(x), plain(block, x))]
    for name, ours, expected in zip(["out", "x", *(name for name, _ in block.named_parameters())], *runs):
        torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-11, msg=lambda text, name=name: f"{name}: {text}")


def test_two_blocks_with_the_branch_handed_on_equal_two_closed_blocks():
    first, second, x = perturbed(layer_scale=0.1).double(), perturbed().double(), torch.randn(2, 7, 16).double()
    stream, pending = first(x, defer=True)
    torch.testing.assert_close(second(stream, pending), second(first(x)), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("rows", [slice(3, None), torch.tensor([[0, 5], [2, 6]])], ids=["slice", "index"])
def test_rows_behind_the_attention_are_those_of_the_whole(rows):
    block, x = perturbed().double(), torch.randn(2, 7, 16).double()
    whole = block(x)
    expected = whole[:, rows] if isinstance(rows, slice) else torch.stack([whole[b, rows[b]] for b in range(2)])
    torch.testing.assert_close(block(x, rows=rows), expected, rtol=1e-12, atol=1e-12)


def test_drop_path_drops_whole_branches_of_samples_while_training_only():
    block, x = perturbed(drop_path=0.5), torch.randn(64, 3, 16)
    whole, again = block.eval()(x), block(x)
    assert torch.equal(whole, again)
    out = block.train()(x)
    both_dropped = (out == x).flatten(1).all(1)
    assert 4 <= both_dropped.sum() <= 32  # a quarter of 64 in the mean; 6 standard deviations
    torch.manual_seed(5)
    once = block(x)
    torch.manual_seed(5)
    assert torch.equal(once, block(x))


def test_drop_path_keeps_the_mean_of_a_branch():
    block = Block(16, 2, drop_path=0.25).train()
    torch.nn.init.zeros_(block.mlp.fc2.weight)
    x = torch.randn(1, 3, 16).expand(4096, -1, -1)
    mean, whole = (block(x) - x).mean(0), (block.eval()(x) - x)[0]
    assert (mean - whole).norm() <= 0.1 * whole.norm()


KEPT = {
    "some": ([0, 2], [1]),
    "none of one": ([], [0, 1, 2]),
    "none": ([], []),
    "all": ([0, 1, 2], [0, 1, 2]),
}


@pytest.mark.parametrize("rows", [None, slice(2, None), torch.tensor([[0, 5], [2, 6], [1, 3]])], ids=["all", "slice", "index"])
@pytest.mark.parametrize("kept", KEPT.values(), ids=KEPT)
@pytest.mark.parametrize("policy", ["none", "mlp", "block"])
def test_skipping_dropped_samples_equals_multiplying_them_by_zero(policy, kept, rows):
    options = {"layer_scale": 0.3, "drop_path": 0.25, "activation_checkpoint": policy}
    block = perturbed(skip_dropped=True, **options).double().train()
    plain_block = perturbed(**options).double()
    plain_block.load_state_dict(block.state_dict())
    x, before = torch.randn(3, 7, 16).double().requires_grad_(), torch.randn(3, 7, 16).double()
    pending = Pending(before, None, None)
    ours, left = block(x, pending, defer=True, rows=rows, kept=[torch.tensor(samples, dtype=torch.long) for samples in kept])
    scales = torch.zeros(2, 3, dtype=torch.float64)
    for scale, samples in zip(scales, kept):
        scale[list(samples)] = 1 / 0.75
    expected, expected_left = plain_block._run(x, *pending, scales, rows)
    ours, expected = add(ours, left), add(expected, expected_left)
    torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-11)
    upstream = torch.randn_like(ours)
    first = torch.autograd.grad(ours, [x, *block.parameters()], upstream)
    second = torch.autograd.grad(expected, [x, *plain_block.parameters()], upstream)
    for a, b in zip(first, second):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


def test_skipping_saves_work_and_memory_and_repeats():
    block, x = perturbed(drop_path=0.5, skip_dropped=True).train(), torch.randn(8, 5, 16)
    figures = []
    for samples in (range(8), range(2)):
        kept = [torch.tensor(list(samples))] * 2
        with FlopCounterMode(display=False) as counter:
            figures.append([saved_bytes(lambda kept=kept: block(x, kept=kept), block)])
        figures[-1].append(counter.get_total_flops())
    assert figures[1][1] * 4 == figures[0][1]
    assert figures[1][0] < 0.35 * figures[0][0]
    torch.manual_seed(5)
    once = block(x)
    torch.manual_seed(5)
    assert torch.equal(once, block(x))
    assert torch.equal(block.eval()(x), perturbed_copy(block)(x))


def perturbed_copy(block: Block) -> Block:
    plain_block = Block(16, 2)
    plain_block.load_state_dict(block.state_dict())
    return plain_block


def test_a_model_skips_what_its_draws_say():
    model = classify(drop_path=0.5, drop_path_skip=True, depth=4).train()
    position, view = torch.arange(6), torch.zeros(6, dtype=torch.int64)
    kept = model.draw_kept(position, view, seed=3)
    assert len(kept) == 8
    assert [len(k) for k in kept[:2]] == [6, 6]  # the first block drops nothing
    video = clips(6)
    assert torch.equal(model(video, kept), model(video, model.draw_kept(position, view, seed=3)))
    assert not torch.equal(model(video, kept), model(video, model.draw_kept(position, view, seed=4)))


def test_checkpoint_policies_store_less_and_change_nothing():
    video, stored, results = clips(), {}, {}
    for policy in ("none", "mlp", "block"):
        torch.manual_seed(3)
        model = classify(activation_checkpoint=policy, drop_path=0.3, width=64, depth=4).train()
        total, parameters = 0, {p.data_ptr() for p in model.parameters()}

        def pack(tensor: Tensor) -> Tensor:
            nonlocal total
            if tensor.data_ptr() not in parameters:  # noqa: B023
                total += tensor.nbytes
            return tensor

        torch.manual_seed(4)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = model(video).logsumexp(1).sum()
        stored[policy] = total
        loss.backward()
        results[policy] = [loss.detach(), *(p.grad for p in model.parameters())]
    assert stored["block"] < stored["mlp"] < stored["none"]
    for policy in ("mlp", "block"):
        assert all(torch.equal(a, b) for a, b in zip(results["none"], results[policy]))


def test_residual_stream_in_bfloat16():
    torch.manual_seed(1)
    exact, rounded = classify(), classify(residual_dtype="bfloat16")
    rounded.load_state_dict(exact.state_dict())
    video = clips()
    assert rounded.tokens(video).dtype == torch.bfloat16
    with torch.autocast("cpu", torch.bfloat16):
        assert exact.tokens(video).dtype == torch.float32
    difference = (rounded.tokens(video).float() - exact.tokens(video)).norm() / exact.tokens(video).norm()
    assert 0 < difference < 0.02
