"""ActionFormer: how far a block reaches, what padding may not change, released checkpoints, errors."""

from __future__ import annotations

import dataclasses
import re

import pytest
import torch

from vmae2_fast.config import ActionFormerConfig
from vmae2_fast.models import save_weights
from vmae2_fast.models.actionformer import ActionFormer, Block
from vmae2_fast.models.actionformer_weights import from_released, load_actionformer
from vmae2_fast.recipes import tad as recipes

CONFIG = ActionFormerConfig(
    inputs=6, classes=3, width=16, heads=2, windows=(5, 5, 3, 0), range_ends=(4.0, 8.0, 16.0), max_length=64, stem_blocks=1,
    drop_path=0.0, layer_scale=0.1,
)  # fmt: skip


def batch(*lengths: int, total: int = 64):
    torch.manual_seed(1)
    valid = torch.arange(total) < torch.tensor(lengths)[:, None]
    return torch.randn(len(lengths), total, CONFIG.inputs) * valid[..., None], valid


@pytest.mark.parametrize(("stride", "window"), [(1, 5), (2, 5), (2, 0)])
def test_block_reaches_no_farther_than_its_band(stride, window):
    block = Block(16, 2, stride=stride, window=window, layer_scale=0.5)
    x, valid = torch.randn(1, 64, 16, requires_grad=True), torch.ones(1, 64, dtype=torch.bool)
    out, inside = block(x, valid)
    assert out.shape == (1, 64 // stride, 16)
    assert inside.shape == (1, 64 // stride)
    middle = 32 // stride
    (gradient,) = torch.autograd.grad(out[0, middle].sum(), x)
    seen = gradient[0].any(1).nonzero().squeeze(1)
    reach = stride * (window // 2) + 1  # of the band, and of the convolutions
    assert (seen.min().item(), seen.max().item()) == ((32 - reach, 32 + reach) if window else (0, 63))


def test_padding_changes_nothing_and_says_nothing():
    """Neither how much of it there is, nor what lies in it, nor who else is in the batch."""
    model = ActionFormer(CONFIG).eval()
    features, valid = batch(41, 64)
    together = model(features, valid)
    noisy = torch.where(valid[..., None], features, 7.0)
    alone = model(features[:1, :48], valid[:1, :48])
    for level, other, single in zip(together, model(noisy, valid), alone):
        n = int(level.valid[0].sum())
        assert torch.equal(level.distances[0, n:], torch.zeros_like(level.distances[0, n:]))
        for name in ("logits", "distances"):
            torch.testing.assert_close(getattr(level, name)[0, :n], getattr(single, name)[0, :n], rtol=1e-5, atol=1e-5)
        assert torch.equal(level.valid, other.valid)
    assert [level.logits.shape[1] for level in together] == [64, 32, 16, 8]


def test_every_class_starts_at_its_prior():
    levels = ActionFormer(CONFIG).eval()(*batch(64))
    probability = torch.cat([level.logits.flatten() for level in levels]).sigmoid()
    assert float(probability.detach().mean()) == pytest.approx(CONFIG.prior, rel=0.5)


def test_longer_videos_are_padded_as_the_released_code_does():
    config = dataclasses.replace(CONFIG, windows=(19,) * 6, range_ends=(4.0, 8.0, 16.0, 32.0, 64.0), max_length=2304)
    assert [config.padded_length(n) for n in (1, 2304, 2305, 5000)] == [2304, 2304, 2880, 5184]  # multiples of 32 * 9 * 2
    model = ActionFormer(dataclasses.replace(CONFIG, positions=True)).eval()
    features, valid = batch(100, total=model.padded_length(100))
    assert model(features, valid)[0].logits.shape[1] == model.padded_length(100) > 100


@pytest.mark.parametrize(
    ("recipe", "millions"), [("thumos14_vit_giant", 28.3), ("fineaction_vit_giant", 7.6)]
)
def test_parameters_are_those_of_the_released_detectors(recipe, millions):
    with torch.device("meta"):
        model = ActionFormer(dataclasses.replace(getattr(recipes, recipe)().detector, inputs=1408))
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(millions, abs=0.05)


def released(model: ActionFormer) -> dict[str, torch.Tensor]:
    """The model's weights under the released names, by the inverse of what `from_released` states for every single one."""
    out = {}
    for key, value in model.state_dict().items():
        if key == "normalizer":
            continue
        if key == "distance_scale":
            out |= {f"reg_head.scale.{level}.scale": scale for level, scale in enumerate(value)}
            continue
        name, wide = key, value.dim() == 1 and ("norm" in key or "neck" in key or "gamma" in key)
        for pattern, replacement in (
            (r"^embed\.(\d+)\.conv\.", r"backbone.embd.\1."), (r"^embed\.(\d+)\.norm", r"backbone.embd_norm.\1"),
            (r"^(stem|branch)", r"backbone.\1"), (r"\.norm([12])\.", r".ln\1."), (r"\.proj\.", ".attn.proj."),
            (r"\.(query|key|value)\.conv\.", r".attn.\1_conv."), (r"\.(query|key|value)\.norm\.", r".attn.\1_norm."),
            (r"\.(query|key|value)\.linear\.", r".attn.\1."), (r"\.fc1\.", ".mlp.0."), (r"\.fc2\.", ".mlp.3."),
            (r"\.gamma_1$", ".drop_path_attn.scale"), (r"\.gamma_2$", ".drop_path_mlp.scale"), (r"^neck", "neck.fpn_norms"),
            (r"^class_head\.last", "cls_head.cls_head"), (r"^distance_head\.last", "reg_head.offset_head"),
            (r"^class_head\.layers\.(\d+)\.conv", r"cls_head.head.\1"),
            (r"^class_head\.layers\.(\d+)\.norm", r"cls_head.norm.\1"),
            (r"^distance_head\.layers\.(\d+)\.conv", r"reg_head.head.\1"),
            (r"^distance_head\.layers\.(\d+)\.norm", r"reg_head.norm.\1"),
        ):  # fmt: skip
            name = re.sub(pattern, replacement, name)
        matrix = value.dim() == 2
        out[name] = value[None, :, None] if wide else value[:, :, None] if matrix else value
    return out


def test_a_released_checkpoint_loads_with_its_averaged_weights(tmp_path):
    source, model = ActionFormer(CONFIG), ActionFormer(CONFIG)
    wrapped = {f"module.{k}": v for k, v in released(source).items()}
    other = {key: torch.zeros_like(value) for key, value in wrapped.items()}
    constants = {"module.point_generator.buffer_points.0": torch.zeros(9, 4), "module.backbone.pos_embd": torch.zeros(1, 8, 9)}
    path = tmp_path / "epoch_034.pth.tar"
    torch.save({"epoch": 34, "state_dict": other, "state_dict_ema": {**wrapped, **constants}}, path)
    report = load_actionformer(model, path)
    for (name, ours), theirs in zip(model.named_parameters(), source.parameters()):
        assert torch.equal(ours, theirs), name
    assert report.initialised == ("normalizer",)
    assert set(from_released(released(source))) == set(dict(source.named_parameters()))


def test_own_weights_load_with_another_number_of_classes(tmp_path):
    source, model = ActionFormer(CONFIG), ActionFormer(dataclasses.replace(CONFIG, classes=5))
    source.normalizer.fill_(12.0)
    save_weights(source, tmp_path / "weights.safetensors", {"classes": ["a", "b", "c"]})
    before = model.class_head.last.conv.weight.detach().clone()
    report = load_actionformer(model, tmp_path)
    assert torch.equal(model.class_head.last.conv.weight, before)
    assert model.normalizer == 12
    assert "3 classes dropped, the model has 5" in str(report)
    assert torch.equal(model.stem[0].fc1.weight, source.stem[0].fc1.weight)


def test_weights_that_do_not_fit_are_named_and_change_nothing(tmp_path):
    model = ActionFormer(CONFIG)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    other = ActionFormer(dataclasses.replace(CONFIG, width=24, stem_blocks=2))
    save_weights(other, tmp_path / "weights.safetensors")
    with pytest.raises(ValueError, match=r"unexpected: stem\.1.*other shape: branch\.0"):
        load_actionformer(model, tmp_path)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize(
    ("features", "valid", "message"),
    [
        (torch.zeros(1, 60, 6), torch.ones(1, 60, dtype=torch.bool), "T a multiple of 8"),
        (torch.zeros(1, 64, 7), torch.ones(1, 64, dtype=torch.bool), r"takes \[B, T, 6\]"),
        (torch.zeros(1, 64, 6), torch.ones(1, 64), r"must be bool \[1, 64\]"),
    ],
)
def test_misshapen_input_is_named(features, valid, message):
    with pytest.raises(ValueError, match=message):
        ActionFormer(CONFIG)(features, valid)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"windows": (4, 5, 5, 5)}, "each must be 0 or odd"),
        ({"range_ends": (4.0, 8.0)}, "must be 3 ascending numbers"),
        ({"heads": 3}, "not divisible by detector.heads=3"),
        ({"max_length": 63}, "not divisible by stride of the last level=8"),
        ({"prior": 0.0}, "detector.prior"),
    ],
)
def test_impossible_detectors_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(CONFIG, **changes)
