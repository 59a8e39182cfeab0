"""The block against the textbook formula, and its options."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from tests.models.tiny import classify, clips
from vmae2_fast.models import Block


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
