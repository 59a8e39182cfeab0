"""Small sets learned through the whole pipeline: encoded videos, lists, loader, loop, checkpoints, multi-view test."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from vmae2_fast.config import (
    ClassifyConfig,
    DataConfig,
    DistillConfig,
    ModelConfig,
    OptimConfig,
    SourceConfig,
    TrainConfig,
    ViewsConfig,
)
from vmae2_fast.data.synthetic import write_mp4
from vmae2_fast.tasks import create_task
from vmae2_fast.tasks.distill import DistillTask
from vmae2_fast.train.checkpoint import committed
from vmae2_fast.train.loop import train

COLOURS = {"red": (220, 40, 40), "green": (40, 220, 40), "blue": (40, 40, 220), "yellow": (220, 220, 40)}
MODEL = ModelConfig(
    name="vit_small_patch16_224", frames=8, size=32, patch=8, width=32, depth=2, heads=2, num_classes=4, init_std=0.1,
    head_init_scale=1.0,
)  # fmt: skip


@pytest.fixture(scope="module")
def squares(tmp_path_factory) -> Path:
    """Videos of a coloured square on grey that drifts to the right: 12 a colour to train on, 6 unseen."""
    root = tmp_path_factory.mktemp("squares")
    rng = np.random.RandomState(0)
    for split, count in (("train", 12), ("val", 6)):
        for name, colour in COLOURS.items():
            (root / split / name).mkdir(parents=True)
            for number in range(count):
                video = np.full((16, 48, 48, 3), rng.randint(60), dtype=np.uint8)
                y, x = rng.randint(32), rng.randint(28)
                for t, frame in enumerate(video):
                    shade = np.clip(np.add(colour, rng.randint(-15, 15, 3)), 0, 255)
                    frame[y : y + 16, x + t // 4 : x + t // 4 + 16] = shade
                write_mp4(video, root / split / name / f"{number}.mp4")
    return root


def _data(root: Path, split: str, **changes: Any) -> DataConfig:
    source = SourceConfig(name="squares", split=split, root=str(root))
    return DataConfig(sources=(source,), stride=2, workers=1, sampling="dense", crop="center", cache_mb=64, **changes)


def _common(root: Path, out: Path, epochs: int, *, tested: str) -> dict[str, Any]:
    return {
        "out": str(out),
        "data": _data(root, "train"),
        "validation": _data(root, tested),
        "optim": OptimConfig(lr=4e-3, lr_batch=0, min_lr=1e-5, warmup_epochs=1, betas=(0.9, 0.999)),
        "train": TrainConfig(epochs=epochs, global_batch=8, threads=1),
        "views": ViewsConfig(segments=2, crops=1),
    }


@pytest.fixture(scope="module")
def teacher(squares, tmp_path_factory) -> dict[str, Any]:
    return train(
        ClassifyConfig(name="finetune", model=MODEL, **_common(squares, tmp_path_factory.mktemp("t"), 20, tested="train"))
    )


def test_fine_tuning_learns_its_training_set(teacher):
    assert teacher["validation"]["top1"] == 1.0
    assert teacher["classes"] == sorted(COLOURS)


def test_a_student_comes_to_agree_with_its_teacher_on_unseen_clips(squares, teacher, tmp_path):
    config = DistillConfig(
        name="distill", model=dataclasses.replace(MODEL, width=16, depth=1), teacher=MODEL, teacher_weights=teacher["weights"],
        teacher_cache=str(tmp_path / "cache"), **_common(squares, tmp_path, 20, tested="val"),
    )  # fmt: skip
    torch.manual_seed(config.seed)
    fresh = create_task(config)
    assert isinstance(fresh, DistillTask)
    before = fresh.evaluate(fresh.validation_views())
    found = train(config)
    assert found["validation"]["teacher_top1"] >= 0.9
    assert found["validation"]["agreement"] >= 0.9
    assert found["validation"]["kl"] < before["kl"] / 5
    # a second run of the same clips asks the cache, not the teacher, and ends with the same bits
    again = train(dataclasses.replace(config, name="again"))
    ours, theirs = load_file(found["weights"]), load_file(again["weights"])
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)


@pytest.mark.parametrize("pooling", ["mean", "attentive"])
def test_a_probe_learns_behind_a_trunk_that_stands_still(pooling, squares, teacher, tmp_path):
    model = dataclasses.replace(MODEL, pooling=pooling, num_classes=4)
    config = ClassifyConfig(
        name="probe", model=model, frozen=True, init=teacher["weights"], **_common(squares, tmp_path, 10, tested="train")
    )
    found = train(config)
    trunk, probed = load_file(teacher["weights"]), load_file(found["weights"])
    assert all(torch.equal(trunk[key], probed[key]) for key in trunk if key.startswith(("blocks.", "patch_embed.")))
    assert not torch.equal(trunk["head.weight"], probed["head.weight"])
    assert any(key.startswith("pool.") for key in probed) == (pooling == "attentive")
    assert found["validation"]["top1"] == 1.0
    moments = load_file(committed(tmp_path / "probe" / "checkpoints")[-1] / "optimizer.safetensors")
    assert {name.split(".")[0] for name in moments} == {"fc_norm", "head"} | ({"pool"} if pooling == "attentive" else set())


def test_the_moving_average_is_what_is_tested_and_kept(squares, tmp_path):
    common = _common(squares, tmp_path, 1, tested="train")
    plain = train(ClassifyConfig(name="plain", model=MODEL, **common))
    common["optim"] = dataclasses.replace(common["optim"], ema_decay=0.5)
    averaged = train(ClassifyConfig(name="averaged", model=MODEL, **common))
    last, kept = load_file(plain["weights"]), load_file(averaged["weights"])
    checkpoint = committed(tmp_path / "averaged" / "checkpoints")[-1]
    raw, state = load_file(checkpoint / "model.safetensors"), load_file(checkpoint / "optimizer.safetensors")
    for key in last:
        assert torch.equal(raw[key], last[key])  # training itself is the same
        assert torch.equal(kept[key], state[f"{key}.ema"])
    assert not torch.equal(kept["head.weight"], last["head.weight"])
