"""Products in float8: in every block, as plain torch rounds them, through whole runs; and what is said where they cannot be.

On a CPU torchao emulates them: operands are rounded to float8 and multiplied in float32.
"""

from __future__ import annotations

import dataclasses
import functools
import sys
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests import tiny_runs as tiny
from tests.drills.judge import same_bits
from tests.support import assert_within_budget
from tests.train.test_ledger import measured
from vmae2_fast.config import ModelConfig, TrainConfig
from vmae2_fast.models import Block, build_model, load_weights
from vmae2_fast.models.actionformer import ActionFormer
from vmae2_fast.train import float8, loop, train
from vmae2_fast.train.float8 import check_float8, use_float8
from vmae2_fast.train.ledger import ledger
from vmae2_fast.train.optim import Optimizer


def _rounded(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x in a float8 dtype with one scale for all of it, and back."""
    scale = torch.finfo(dtype).max / x.abs().max().double()
    return ((x.double() * scale).float().to(dtype).float() / scale.float()).to(x.dtype)


class _Product(torch.autograd.Function):
    """x weight^T of operands in e4m3; both gradients with the incoming one in e5m2."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        rounded = [_rounded(t, torch.float8_e4m3fn) for t in (x, weight)]
        ctx.save_for_backward(*rounded)
        return F.linear(*rounded)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        grad = _rounded(grad, torch.float8_e5m2)
        return grad @ weight, grad.flatten(0, -2).t() @ x.flatten(0, -2)


def _plain(block: Block, x: Tensor, product: Any) -> Tensor:
    """A block in plain torch on the parameters of `block`."""
    attn, mlp = block.attn, block.mlp
    bias = torch.cat((attn.q_bias, torch.zeros_like(attn.q_bias), attn.v_bias))
    qkv = product(F.layer_norm(x, x.shape[-1:], block.norm1.weight, block.norm1.bias, block.norm1.eps), attn.qkv.weight) + bias
    q, k, v = qkv.unflatten(2, (3, attn.heads, -1)).permute(2, 0, 3, 1, 4)
    mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
    x = x + product(mixed, attn.proj.weight) + attn.proj.bias
    h = F.layer_norm(x, x.shape[-1:], block.norm2.weight, block.norm2.bias, block.norm2.eps)
    return x + product(F.gelu(product(h, mlp.fc1.weight) + mlp.fc1.bias), mlp.fc2.weight) + mlp.fc2.bias


@pytest.mark.parametrize("policy", ["none", "mlp", "block"])
def test_a_block_is_as_near_the_truth_as_plain_torch_in_float8(policy: Any) -> None:
    pytest.importorskip("torchao.float8")
    torch.manual_seed(0)
    ours, plain, truth = (Block(32, 2, activation_checkpoint=policy) for _ in range(3))
    with torch.no_grad():
        for p in ours.parameters():
            p.add_(0.1 * torch.randn_like(p))
    plain.load_state_dict(ours.state_dict())
    truth.load_state_dict(ours.state_dict())
    truth.double()
    use_float8(ours, emulate=True)
    x, direction = torch.randn(3, 10, 32), torch.randn(3, 10, 32)  # 30 rows: no multiple of 16
    results = []
    runs = (ours, lambda x: _plain(plain, x, _Product.apply), lambda x: _plain(truth, x, F.linear))
    for block, run in zip((ours, plain, truth), runs):
        dtype = block.norm1.weight.dtype
        given = x.to(dtype, copy=True).requires_grad_()
        out = run(given)
        out.backward(direction.to(dtype))
        results.append({"out": out, "x": given.grad, **{n: p.grad for n, p in block.named_parameters()}})
    for name in results[0]:
        assert_within_budget(*(result[name] for result in results), what=name)
    exact = Block(32, 2)
    exact.load_state_dict(ours.state_dict())
    assert not torch.equal(exact(x), results[0]["out"])


@pytest.mark.parametrize("options", [
    {}, {"residual_dtype": "bfloat16"}, {"layer_scale": 0.1, "drop_path": 0.2}, {"activation_checkpoint": "mlp"},
    {"activation_checkpoint": "block"}, {"decoder_fp32": True},
], ids=str)  # fmt: skip
def test_the_ledger_counts_what_is_kept(monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]) -> None:
    pytest.importorskip("torchao.float8")

    def converted(config: ModelConfig) -> nn.Module:
        model = build_model(config)
        use_float8(model, emulate=True)
        return model

    monkeypatch.setattr("tests.train.test_ledger.build_model", converted)
    config = ModelConfig(
        name="pretrain_videomae_base_patch16_224", frames=8, size=32, patch=8, width=32, depth=2, heads=2, decoder_width=32,
        decoder_depth=2, decoder_heads=2, **options,
    )  # fmt: skip
    kept = measured(config, 3, bf16=True)
    assert kept == 3 * ledger(config, float8=True)["activation_bytes"]["total"]
    assert (kept > 3 * ledger(config)["activation_bytes"]["total"]) == ("block" not in options.values())


@pytest.fixture
def emulated(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("torchao.float8")
    monkeypatch.setattr(loop, "check_float8", lambda device: None)
    monkeypatch.setattr(loop, "use_float8", functools.partial(use_float8, emulate=True))


def _config(clips: Any, out: Any, **changes: Any) -> Any:
    return tiny.with_train(tiny.pretrain_config(clips, out), precision="bfloat16", float8=True, **changes)


def test_a_run_learns_goes_on_bitwise_and_hands_on_usual_weights(clips, tmp_path, monkeypatch, emulated) -> None:
    whole = train(_config(clips, tmp_path / "whole", epochs=20))
    assert whole["last_loss"] < 0.97 * whole["first_loss"]
    usual = tiny.with_train(tiny.pretrain_config(clips, tmp_path / "usual"), precision="bfloat16", epochs=1)
    assert whole["first_loss"] != train(usual)["first_loss"]
    original = Optimizer.step

    def stepping(self, number, loss):
        if number == 9:
            raise KeyboardInterrupt
        return original(self, number, loss)

    with monkeypatch.context() as patch:
        patch.setattr(Optimizer, "step", stepping)
        with pytest.raises(KeyboardInterrupt):
            train(_config(clips, tmp_path / "parts", epochs=20))
    assert same_bits(train(_config(clips, tmp_path / "parts", epochs=20))["weights"], whole["weights"])
    report = load_weights(build_model(tiny.PRETRAIN_MODEL), whole["weights"])
    assert not report.dropped
    assert not report.initialised


def test_what_is_missing_is_named(clips, tmp_path, monkeypatch) -> None:
    with pytest.raises(ValueError, match=r"train\.precision=float16; set it to bfloat16"):
        TrainConfig(float8=True, precision="float16")
    with monkeypatch.context() as patch:
        patch.setattr(float8, "_torchao", lambda: None)
        with pytest.raises(ValueError, match=r"train\.float8 needs a GPU, and this run is on cpu; set train\.float8=False"):
            train(_config(clips, tmp_path))
        assert not (tmp_path / "tiny_pretrain").exists()
        patch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
        patch.setattr(torch.cuda, "get_device_name", lambda device: "A100")
        with pytest.raises(ValueError, match=r"A100 \(compute capability 8\.0\) has no float8 products, 8\.9 has"):
            check_float8(torch.device("cuda"))
        patch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 9))
        check_float8(torch.device("cuda"))
    monkeypatch.setitem(sys.modules, "torchao.float8", None)
    with pytest.raises(ValueError, match=r"torchao\.float8 cannot be imported .*pip install 'vmae2_fast\[fp8\]'"):
        check_float8(torch.device("cpu"))


def test_models_without_products_for_it_are_named() -> None:
    with pytest.raises(ValueError, match="ActionFormer has no transformer block"):
        use_float8(ActionFormer(dataclasses.replace(tiny.TAD_DETECTOR, inputs=16)))
    with pytest.raises(ValueError, match=r"a product of \d+ by \d+ features, but both must be multiples of 16"):
        use_float8(Block(24, 2))
