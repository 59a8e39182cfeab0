"""The bytes a step keeps, against the official way: what the project promises of ViT-g."""

from __future__ import annotations

import pytest
import torch

from benchmarks import baselines, memory, report
from tests.models.tiny import SHAPE
from vmae2_fast.config import ModelConfig
from vmae2_fast.models import build_model

PRETRAIN, FINETUNE = "pretrain_videomae_giant_patch14_224", "vit_giant_patch14_224"


def test_the_giant_keeps_a_fraction_of_what_plain_keeps() -> None:
    result = memory.bench_memory((PRETRAIN, FINETUNE))
    share = {(row["model"], row["variant"]): row["share"] for row in result["rows"]}
    assert share[PRETRAIN, "ours bf16, bf16 residual"] <= 0.29
    assert share[FINETUNE, "ours bf16, bf16 residual"] <= 0.14
    assert share[PRETRAIN, "ours bf16, fp32 residual"] <= 0.32
    assert share[FINETUNE, "ours bf16, fp32 residual"] <= 0.16
    assert PRETRAIN in report.render(result)


def test_plain_classifier_is_the_model() -> None:
    config = ModelConfig(name="vit_base_patch16_224", **SHAPE, num_classes=5, head_init_scale=1.0)
    model, plain = build_model(config).eval(), baselines.PlainClassifier(config)
    names = {"fc_norm": "stack.norm", "blocks": "stack.blocks"}
    state = {f"{names.get(k.split('.')[0], k.split('.')[0])}.{k.split('.', 1)[1]}": v for k, v in model.state_dict().items()}
    plain.load_state_dict(state)
    clip = torch.randn(2, 3, 8, 32, 32)
    torch.testing.assert_close(plain(clip), model(clip))


def test_unknown_model() -> None:
    with pytest.raises(ValueError, match="unknown model"):
        memory.bench_memory(("vit_bose_patch16_224",))
