"""A recipe shrunk to CPU seconds (`vmae2 launch RECIPE --smoke`): same stages, same code, small models and scenes of ours."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

from ..config import (
    AvaConfig,
    ClassifyConfig,
    DistillConfig,
    ModelConfig,
    PrepareConfig,
    PretrainConfig,
    Progression,
    SceneKind,
    SourceConfig,
    Stage,
    TadConfig,
    ViewsConfig,
)
from ..data.synthetic import CLASSES
from ..data.synthetic_tad import CLASSES as ACTIONS
from ..models import resolve
from .progression import data_folder, handed_on

_SCALE = 0.05


def smoke(run: Stage | Progression) -> Progression:
    """The same recipe shrunk to CPU seconds: two-block models, small clips, one short epoch of few moving scenes.

    A progression keeps its own prepared data; a recipe that needs data of yours gets the scenes in its place. Weights that
    stages hand on are handed on.
    """
    if isinstance(run, Progression) and run.prepare is not None:
        prepare = dataclasses.replace(run.prepare, scale=_SCALE)
        return dataclasses.replace(run, prepare=prepare, stages=tuple(_smoke_stage(stage) for stage in run.stages))
    stages = run.stages if isinstance(run, Progression) else (run,)
    out = run.out if isinstance(run, Progression) else f"{run.out}/{run.name}_smoke"
    kinds = tuple(dict.fromkeys(map(_kind, stages)))
    prepare = PrepareConfig(scale=_SCALE, scenes=kinds)
    if kinds == ("features",):
        prepare = dataclasses.replace(prepare, size=_small(stages[0].model).width or 0)
    return Progression(
        name=f"{run.name}_smoke",
        cites=run.cites,
        prepare=prepare,
        stages=tuple(_smoke_stage(_on_scenes(stage, out)) for stage in stages),
        out=out,
    )


def _kind(stage: Stage) -> SceneKind:
    """The data a stage is smoked on: features ready made where no other stage makes the trunk."""
    if isinstance(stage, TadConfig):
        return "untrimmed" if "trunk_weights" in handed_on(stage) else "features"
    return "boxes" if isinstance(stage, AvaConfig) else "moving"


def _init(stage: Stage) -> str | None:
    """What a stage starts from: only what another stage makes is there."""
    return stage.init if "init" in handed_on(stage) else None


def _on_boxes(stage: AvaConfig, root: Path) -> Stage:
    data = dataclasses.replace(
        stage.data, videos=str(root / "videos"), annotations=str(root / "train.csv"), labels=str(root / "labels.pbtxt"),
        exclusions=None,
    )  # fmt: skip
    people = str(root / "people.csv")
    validation = dataclasses.replace(data, annotations=str(root / "val.csv"), boxes=people, flip=False)
    return dataclasses.replace(stage, data=data, validation=validation, init=_init(stage))


def _on_features(stage: TadConfig, root: Path) -> Stage:
    handed = "trunk_weights" in handed_on(stage)
    data = dataclasses.replace(
        stage.data, features=str(root / "features"), annotations=str(root / "annotations.json"), subset="validation",
        videos=str(root / "videos") if handed else None, stride=4,
        resize_to=None if stage.data.resize_to is None else 128,
    )  # fmt: skip
    validation = dataclasses.replace(data, subset="test", crop_range=None)
    return dataclasses.replace(
        stage, data=data, validation=validation, init=_init(stage), trunk_weights=stage.trunk_weights if handed else None,
        video_scores=stage.video_scores and str(root / "video_scores.json"),
        detector=dataclasses.replace(
            stage.detector, classes=min(stage.detector.classes, len(ACTIONS)), width=32, windows=(9, 9, 9, 0),
            range_ends=stage.detector.range_ends[:3], max_length=128,
        ),
    )  # fmt: skip


def _on_scenes(stage: Stage, out: str) -> Stage:
    root = data_folder(out, _kind(stage))
    if isinstance(stage, AvaConfig):
        return _on_boxes(stage, root)
    if isinstance(stage, TadConfig):
        return _on_features(stage, root)
    labelled = not isinstance(stage, PretrainConfig)
    sources = ("labeled_video", "labeled_frames") if labelled else ("unlabeled_video", "unlabeled_frames")
    data = dataclasses.replace(
        stage.data, sources=tuple(SourceConfig(name=name) for name in sources), datasets=str(root / "datasets.toml")
    )
    changes: dict[str, Any] = {"data": data, "validation": None, "init": _init(stage)}
    if labelled:
        changes["model"] = dataclasses.replace(stage.model, num_classes=len(CLASSES))
    if isinstance(stage, DistillConfig):
        # a random head at its usual thousandth says the same of every clip: a loss of nothing but rounding
        changes["teacher"] = dataclasses.replace(stage.teacher, num_classes=len(CLASSES), head_init_scale=1.0)
        changes["teacher_weights"] = "random"
    return dataclasses.replace(stage, **changes)


def _smoke_stage(stage: Stage) -> Stage:
    # the smallest batch whose clips can be mixed with each other
    clips = max(2, stage.mix.clips) if isinstance(stage, ClassifyConfig | DistillConfig) else 2
    changes: dict[str, Any] = {
        "model": _small(stage.model),
        "data": dataclasses.replace(stage.data, workers=1),
        "train": dataclasses.replace(
            stage.train, epochs=1, global_batch=clips * stage.data.views, micro_batch=None, validate_every=0
        ),
        "optim": dataclasses.replace(stage.optim, warmup_epochs=min(stage.optim.warmup_epochs, 0.5)),
    }
    if isinstance(stage, DistillConfig):
        # one size both patches divide: student and teacher see the same clips
        size = math.lcm(_patch(stage.model), _patch(stage.teacher))
        size *= -(-32 // size)
        changes["model"] = dataclasses.replace(_small(stage.model), size=size)
        changes["teacher"] = dataclasses.replace(_small(stage.teacher), size=size)
    if isinstance(stage, AvaConfig):
        side = changes["model"].size
        changes["data"] = dataclasses.replace(changes["data"], short_side=(side, side))
        if stage.validation is not None:
            changes["validation"] = dataclasses.replace(stage.validation, workers=1, short_side=(side, side))
    if isinstance(stage, ClassifyConfig | DistillConfig):
        changes["views"] = ViewsConfig(segments=1, crops=1, batch=8)
    return dataclasses.replace(stage, **changes)


def _patch(model: ModelConfig) -> int:
    return resolve(model).patch


def _small(model: ModelConfig) -> ModelConfig:
    patch = _patch(model)
    shrunk = dataclasses.replace(
        model, size=min(model.size, 4 * patch), frames=min(model.frames, 8), width=32, depth=2, heads=2, drop_path=0.0
    )
    if model.name.startswith("pretrain"):
        shrunk = dataclasses.replace(shrunk, decoder_width=24, decoder_depth=1, decoder_heads=2)
    return shrunk
