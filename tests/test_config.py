"""Configurations: JSON there and back, batch rules, names with close matches."""

from __future__ import annotations

import dataclasses
import json

import pytest

from vmae2_fast.config import (
    ClassifyConfig,
    DataConfig,
    DistillConfig,
    ModelConfig,
    OptimConfig,
    PrepareConfig,
    PretrainConfig,
    Progression,
    SourceConfig,
    TrainConfig,
    ViewsConfig,
    from_dict,
    load,
    save,
    to_dict,
    unknown,
)
from vmae2_fast.recipes_index import all_recipes

MODEL = ModelConfig(name="m")
RUN = {"name": "a", "model": MODEL, "data": DataConfig()}


def test_every_recipe_survives_json(tmp_path, monkeypatch) -> None:
    (tmp_path / "datasets.toml").write_text('[k710]\nroot = "."\ntrain = "train.csv"\n')  # hybrid_available reads it
    (tmp_path / "train.csv").write_text("a.mp4 0 -1\n")
    monkeypatch.setenv("VMAE2_DATASETS", str(tmp_path / "datasets.toml"))
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


@pytest.mark.parametrize(
    ("make", "message"),
    [
        *((lambda key=key: TrainConfig(**{key: 0}), rf"^train\.{key}=0: must be at least 1$") for key in (
            "epochs", "global_batch", "shard_within", "threads", "checkpoint_every", "keep_checkpoints", "log_every",
        )),
        (lambda: TrainConfig(validate_every=-1), r"^train\.validate_every=-1: must be at least 0$"),
        (lambda: TrainConfig(micro_batch=-1), r"^train\.micro_batch=-1: must be at least 0$"),
        *((lambda key=key: DataConfig(**{key: 0}), rf"^data\.{key}=0: must be at least 1$")
          for key in ("stride", "views", "prefetch")),
        *((lambda key=key: DataConfig(**{key: -1}), rf"^data\.{key}=-1: must be at least 0$")
          for key in ("workers", "cache_mb", "max_attempts")),
        *((lambda rate=rate: DataConfig(max_bad_rate=rate), rf"data\.max_bad_rate={rate}: must lie above 0")
          for rate in (0.0, 1.5, float("nan"))),
        (lambda: SourceConfig(name="s", stride=0), r"source\.stride=0: must be at least 1"),
        *((lambda key=key: ViewsConfig(**{key: 0}), rf"views\.{key}=0: must be at least 1")
          for key in ("segments", "crops", "batch")),
        *((lambda key=key: OptimConfig(**{key: -1}), rf"optim\.{key}=-1: must be at least 0") for key in (
            "lr", "lr_batch", "min_lr", "warmup_epochs", "eps", "weight_decay", "weight_decay_end",
        )),
        (lambda: OptimConfig(betas=(0.9, 1.0)), r"optim\.betas=\(0\.9, 1\.0\): both must lie in \[0, 1\)"),
        (lambda: OptimConfig(layer_decay=0.0), r"optim\.layer_decay=0\.0: must lie above 0 and be at most 1"),
        (lambda: OptimConfig(clip_grad=0.0), r"optim\.clip_grad=0\.0: must be above 0, or None"),
        (lambda: ClassifyConfig(**RUN, label_smoothing=1.0), r"label_smoothing=1\.0: must lie in \[0, 1\)"),
        (lambda: DistillConfig(**RUN, teacher=MODEL, temperature=0.0), r"temperature=0\.0: must be above 0"),
        (lambda: DistillConfig(**RUN, teacher=MODEL, label_weight=-1.0), r"label_weight=-1\.0: must be at least 0"),
        (lambda: PrepareConfig(scale=0.0), r"prepare\.scale=0\.0: must be above 0"),
        (lambda: PrepareConfig(size=0), r"prepare\.size=0: must be at least 1"),
    ],
)  # fmt: skip
def test_values_out_of_range_are_named(make, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("name", 3, r"PretrainConfig\.name: must be a string, got 3"),
        ("model.name", None, r"ModelConfig\.name: must be a string, got None"),
        ("model.width", "x", r"ModelConfig\.width: must be a whole number, got 'x'"),
        ("model.width", 1.5, r"ModelConfig\.width: must be a whole number, got 1\.5"),
        ("model.frames", True, r"ModelConfig\.frames: must be a whole number, got True"),
        ("model.qkv_bias", 1, r"ModelConfig\.qkv_bias: must be true or false, got 1"),
        ("model.pixel_mean", 0.5, r"ModelConfig\.pixel_mean: must be a list, got 0\.5"),
        ("model.pixel_mean", ["a"], r"ModelConfig\.pixel_mean: must be a number, got 'a'"),
        ("model", [], r"PretrainConfig\.model: must be an object, got \[\]"),
        ("model", {}, r"ModelConfig: missing key 'name'"),
        ("data.sources", [3], r"DataConfig\.sources: must be an object, got 3"),
        ("validation", "x", r"PretrainConfig\.validation: must be an object"),
        ("validation", {"kind": "Progression"}, "kind: DataConfig was expected, got 'Progression'"),
        ("optim.lr", "x", r"OptimConfig\.lr: must be a number, got 'x'"),
        ("optim.betas", [0.9], r"OptimConfig\.betas: must be a list of 2"),
        ("mask.decoder", "cell", r"MaskConfig\.decoder: must be one of 'running_cell', .*, got 'cell'"),
        ("mask.decoder", [], r"MaskConfig\.decoder: must be one of"),
        ("train.epochs", 0, r"train\.epochs=0: must be at least 1"),
        ("kind", ["PretrainConfig"], "unknown config kind"),
    ],
)
def test_values_of_a_wrong_type_are_named(path: str, value, message: str) -> None:
    run = to_dict(PretrainConfig(**RUN))
    *groups, key = path.split(".")
    place = run
    for group in groups:
        place = place[group]
    place[key] = value
    with pytest.raises(ValueError, match=message):
        from_dict(run)


def test_what_is_no_configuration_at_all_is_named(tmp_path) -> None:
    faults = {"[]": "must be an object", "{}": "missing key 'kind'", '{"kind": 3}': "unknown config kind"}
    for content, message in faults.items():
        (tmp_path / "c.json").write_text(content)
        with pytest.raises(ValueError, match=rf"c\.json: not a run configuration: .*{message}"):
            load(tmp_path / "c.json")
    stages = {"kind": "Progression", "name": "p", "stages": [{"kind": "Progression", "name": "q", "stages": []}]}
    with pytest.raises(ValueError, match=r"Progression\.stages: must be one of PretrainConfig, .*, got Progression"):
        from_dict(stages)


def test_whole_numbers_serve_as_numbers() -> None:
    assert from_dict({"lr": 1, "clip_grad": None, "betas": [0, 0.5]}, OptimConfig) == OptimConfig(lr=1.0, betas=(0, 0.5))


def test_stage_lookup_in_a_progression() -> None:
    run = all_recipes()["demo:progressive"]()
    assert isinstance(run, Progression)
    assert run.stage("finetune").name == "finetune"
    with pytest.raises(ValueError, match="unknown stage 'finetun'; did you mean finetune"):
        run.stage("finetun")
