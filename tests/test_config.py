"""Configurations: JSON there and back, batch rules, names with close matches."""

from __future__ import annotations

import dataclasses
import json

import pytest

from vmae2_fast.config import (
    DataConfig,
    ModelConfig,
    PretrainConfig,
    Progression,
    SourceConfig,
    TrainConfig,
    from_dict,
    load,
    save,
    to_dict,
    unknown,
)
from vmae2_fast.recipes_index import all_recipes


def test_every_recipe_survives_json() -> None:
    for name, recipe in all_recipes().items():
        run = recipe()
        assert from_dict(json.loads(json.dumps(to_dict(run)))) == run, name


def test_configs_are_frozen(tmp_path) -> None:
    run = PretrainConfig(name="a", model=ModelConfig(name="m"), data=DataConfig(sources=(SourceConfig(name="s"),)))
    with pytest.raises(dataclasses.FrozenInstanceError):
        run.name = "b"  # type: ignore[misc]
    save(run, tmp_path / "c.json")
    assert load(tmp_path / "c.json") == run


@pytest.mark.parametrize(
    ("train", "views", "message"),
    [
        (TrainConfig(global_batch=65), 4, r"train.global_batch=65 is not divisible by data.views=4; .* 64 or 68"),
        (TrainConfig(global_batch=64, micro_batch=24), 4, r"train.global_batch=64 .* train.micro_batch=24; .* 48 or 72"),
        (TrainConfig(global_batch=64, micro_batch=2), 4, r"train.micro_batch=2 .* data.views=4; .* 4"),
        (TrainConfig(global_batch=0), 1, r"train.global_batch must be at least 1, got 0"),
    ],
)
def test_indivisible_batches_name_the_nearest(train: TrainConfig, views: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PretrainConfig(name="a", model=ModelConfig(name="m"), data=DataConfig(views=views), train=train)


def test_unknown_keys_and_files_are_named(tmp_path) -> None:
    run = to_dict(PretrainConfig(name="a", model=ModelConfig(name="m"), data=DataConfig()))
    run["optim"]["lrr"] = 1.0
    (tmp_path / "c.json").write_text(json.dumps(run))
    with pytest.raises(ValueError, match=r"c\.json: .*OptimConfig: unknown key 'lrr'; did you mean lr"):
        load(tmp_path / "c.json")
    assert "there are: a, b" in unknown("thing", "zzzzz", ["b", "a"])


def test_stage_lookup_in_a_progression() -> None:
    run = all_recipes()["demo:progressive"]()
    assert isinstance(run, Progression)
    assert run.stage("finetune").name == "finetune"
    with pytest.raises(ValueError, match="unknown stage 'finetun'; did you mean finetune"):
        run.stage("finetun")
