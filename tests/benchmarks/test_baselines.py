"""The baselines compute what the official code computed, or comparing with them would mean nothing."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import DynamicOutputShapeException, FakeTensorMode

from tests.golden import cases
from vmae2_fast.benchmarks import baselines
from vmae2_fast.benchmarks.steps import hidden_mask
from vmae2_fast.config import ModelConfig
from vmae2_fast.models import build_model, resolve
from vmae2_fast.ops.masks import DualMask, dual_mask
from vmae2_fast.ops.reconstruction import reconstruction_loss

TINY = ModelConfig(
    name="pretrain_videomae_small_patch16_224", frames=8, size=32, patch=8, width=24, depth=2, heads=2,
    decoder_width=16, decoder_depth=2, decoder_heads=2, layer_scale=0.1,
)
GOLDEN = cases.of_kind("pretrain")


def distance(actual: Tensor, expected: Tensor) -> float:
    actual, expected = actual.detach().double(), expected.detach().double()
    return float((actual - expected).norm() / expected.norm())


def recorded(kind: type, name: str) -> tuple[torch.nn.Module, tuple[Tensor, ...]]:
    """A baseline with the weights of a recorded case, and the arguments of its loss."""
    data = cases.tensors("models", name)
    model = kind(cases.pretrain_model(name).config)
    model.load_state_dict(cases.named(data, "param."))
    clip = data["input.video_f16"].float()
    if kind is baselines.Plain:
        return model, (clip, data["input.encoder_mask"].bool(), data["input.decoder_mask"].bool())
    return model, (clip, *cases.masks(data))


@pytest.mark.parametrize("name", GOLDEN)
@pytest.mark.parametrize("kind", [baselines.Plain, baselines.Strong])
def test_matches_the_official_numbers(kind: type, name: str) -> None:
    # The recorded numbers are the official fp32 run, itself `e` away from float64. A path within twice that of float64
    # lies within 3 e of the recording.
    data, entry = cases.tensors("models", name), cases.MODELS[name]
    model, arguments = recorded(kind, name)
    model.zero_grad()
    loss = model.loss(*arguments, normalize=entry["config"]["norm"])
    loss.backward()
    assert distance(model(*arguments[:3]), data["out.pred"]) <= 3 * entry["rel_l2"]["pred_fp32_vs_fp64"]
    assert loss.item() == pytest.approx(entry["loss"], rel=1e-6)
    names = [key.removeprefix("grad.") for key in data if key.startswith("grad.")]
    assert sorted(names) == sorted(n for n, p in model.named_parameters() if p.grad is not None)
    ours, theirs = ({n: source[n].flatten() for n in names} for source in (cases.gradients(model), cases.named(data, "grad.")))
    everything = [torch.cat([gradient[n] for n in names]) for gradient in (ours, theirs)]
    assert distance(*everything) <= 3 * entry["rel_l2"]["grad_fp32_vs_fp64"]


    if cases.gated_in_bf16(name):
        with torch.autocast("cpu", torch.bfloat16):
            pred = model(*arguments[:3])
        assert pred.dtype == torch.bfloat16
        assert distance(pred, data["out.pred"]) <= 2 * entry["rel_l2"]["pred_bf16_vs_fp64"]


def tiny_batch() -> tuple[Tensor, Tensor, DualMask, tuple[Tensor, Tensor]]:
    """A uint8 clip, the same normalised, its masks as index lists and as the official bool ones."""
    spec = resolve(TINY)
    clip = torch.randint(0, 256, (2, spec.frames, spec.size, spec.size, 3), dtype=torch.uint8)
    video = ((clip / 255 - torch.tensor(baselines.MEAN)) / torch.tensor(baselines.STD)).permute(0, 4, 1, 2, 3).contiguous()
    mask = dual_mask(torch.arange(2), torch.zeros(2, dtype=torch.int64), grid=spec.grid, seed=3)
    return clip, video, mask, (hidden_mask(mask.visible_index, spec.tokens), hidden_mask(mask.decode_index, spec.tokens))


def test_activation_checkpointing_changes_no_bit() -> None:
    _, video, _, hidden = tiny_batch()
    weights, gradients = baselines.Plain(TINY).state_dict(), []
    for option in (False, True):
        model = baselines.Plain(TINY, activation_checkpoint=option)
        model.load_state_dict(weights)
        model.loss(video, *hidden).backward()
        gradients.append(cases.gradients(model))
    assert all(torch.equal(gradients[0][n], gradients[1][n]) for n in gradients[0])


def test_plain_strong_and_ours_share_weights_and_loss() -> None:
    clip, video, mask, hidden = tiny_batch()
    ours, plain, strong = build_model(TINY), baselines.Plain(TINY), baselines.Strong(TINY)
    for model in (plain, strong):
        baselines.tie(model, ours)
        assert {id(p) for p in model.parameters()} == {id(p) for p in ours.parameters()}
    losses = [
        plain.loss(video, *hidden),
        strong.loss(clip, *mask),
        strong.loss(video, *mask),
        reconstruction_loss(ours(clip, mask), clip, mask.loss_index, patch=8),
    ]
    torch.testing.assert_close(torch.stack(losses), losses[0].expand(4), rtol=1e-5, atol=0)


def test_tying_models_that_differ_is_an_error() -> None:
    ours = build_model(TINY)
    with pytest.raises(ValueError, match=r"differ in 8 parameters: decoder\.blocks\.0\.gamma_1"):
        baselines.tie(baselines.Strong(ModelConfig(**{**vars(TINY), "layer_scale": 0.0})), ours)
    with pytest.raises(ValueError, match=r"mask_token is \(1, 1, 32\) in one model and \(1, 1, 16\) in the other"):
        baselines.tie(baselines.Strong(ModelConfig(**{**vars(TINY), "decoder_width": 32})), ours)


def test_strong_reads_nothing_back_and_plain_does() -> None:
    with FakeTensorMode():
        clip = torch.zeros(2, 8, 32, 32, 3, dtype=torch.uint8)
        index = torch.zeros(2, 3, dtype=torch.int32)
        baselines.Strong(TINY).loss(clip, index, index, index, index).backward()
        hidden = torch.zeros(2, 64, dtype=torch.bool)
        with pytest.raises(DynamicOutputShapeException):  # the boolean indexing that makes the official step wait
            baselines.Plain(TINY).loss(torch.zeros(2, 3, 8, 32, 32), hidden, hidden)


def test_step_moves_weights_and_stops_on_nan() -> None:
    clip, _, mask, _ = tiny_batch()
    model, arguments = baselines.Strong(TINY), (clip, *mask)
    optimizer = torch.optim.AdamW(baselines.groups(model), lr=1e-3)
    kept = {n for n, p in model.named_parameters() if any(p is q for q in optimizer.param_groups[1]["params"])}
    assert {"mask_token", "encoder.norm.weight", "decoder.head.bias", "encoder.blocks.0.attn.q_bias"} <= kept
    assert not any(n.endswith("fc1.weight") for n in kept)
    losses = [baselines.step(lambda: model.loss(*arguments), optimizer, torch.bfloat16).item() for _ in range(4)]
    assert losses[-1] < losses[0]
    with pytest.raises(FloatingPointError, match="nan"):
        baselines.step(lambda: model.loss(*arguments) * float("nan"), optimizer, None, check=True)
