"""A progression: prepare data, run the stages in order, hand weights on, then write summary, pictures and report.

`init="stage:NAME"` (and `teacher_weights="stage:NAME"`) of a stage stand for `OUT/NAME/weights.safetensors`, written when
stage NAME has finished. A finished stage is not run again, an interrupted one continues from its last checkpoint, so a
progression that was killed is simply started again.
"""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
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
    RunConfig,
    SourceConfig,
    Stage,
    TadConfig,
    ViewsConfig,
    save,
)
from ..data.prepare import prepare_folder, prepare_scenes
from ..data.synthetic import CLASSES
from ..data.synthetic_ava import write_ava_scenes
from ..data.synthetic_tad import CLASSES as ACTIONS
from ..data.synthetic_tad import write_tad_features
from ..models import resolve
from ..ops.masks import mask_sizes
from .loop import train
from .parallel import join

_HANDED = "stage:"
PLAN = "progression.json"
"""The progression as it was run, in its folder: what `vmae2 report` reads."""


def weights_of(out: str | Path, stage: str) -> Path:
    return Path(out) / stage / "weights.safetensors"


def selected(progression: Progression, start: str | None, until: str | None) -> list[Stage]:
    """The stages from `start` to `until`, both included. Raises ValueError for a name that is not a stage."""
    names = [stage.name for stage in progression.stages]
    first = names.index(progression.stage(start).name) if start else 0
    last = names.index(progression.stage(until).name) if until else len(names) - 1
    if first > last:
        raise ValueError(f"--from {start} comes after --until {until}; stages in order: {', '.join(names)}")
    return list(progression.stages[first : last + 1])


def check_stage(stage: Stage) -> None:
    """Raises ValueError if the stage's model, clip size and masks do not fit each other; costs nothing."""
    spec = resolve(stage.model)
    if isinstance(stage, PretrainConfig):
        mask_sizes(spec.grid, **dataclasses.asdict(stage.mask))
    if isinstance(stage, DistillConfig):
        resolve(stage.teacher)


def finished(progression: Progression) -> dict[str, dict[str, Any]]:
    """What `run_progression` returned, read from the stages' directories. Raises ValueError naming an unfinished stage."""
    results = {"data": prepare(progression)}
    for stage in progression.stages:
        done = Path(progression.out) / stage.name / "done.json"
        if not done.exists():
            raise ValueError(f"{done.parent}: this stage has not finished; launch the progression again to go on with it")
        results[stage.name] = json.loads(done.read_text())
    return results


def run_progression(
    progression: Progression,
    *,
    start: str | None = None,
    until: str | None = None,
    init: str | None = None,
    resume: bool = True,
    profile: bool = False,
) -> dict[str, dict[str, Any]]:
    """Run the stages from `start` to `until` and return stage name -> summary (`train`), data under `"data"`.

    `init` replaces the first stage's own starting weights; `resume=False` runs these stages from their start; `profile`
    writes a trace of each.
    Raises ValueError if a stage wants weights that neither exist nor come from a stage that runs.
    """
    out = Path(progression.out)
    stages = [resolved(stage, out) for stage in selected(progression, start, until)]
    for stage in stages:
        check_stage(stage)
    _check_handover(stages, out, init)
    world, _ = join()

    def begin() -> dict[str, Any]:
        made = prepare(progression)
        out.mkdir(parents=True, exist_ok=True)
        save(progression, out / PLAN)
        return made

    results: dict[str, dict[str, Any]] = {"data": world.on_first(begin)}
    for number, stage in enumerate(stages):
        if world.first:
            print(f"[{number + 1}/{len(stages)}] {stage.name}: {stage.cites or type(stage).__name__}", flush=True)
        results[stage.name] = train(stage, init=init if number == 0 else None, resume=resume, profile=profile)
    return results


def prepare(progression: Progression) -> dict[str, Any]:
    """Make the data a progression asks for under `OUT/data`; nothing if it is there already."""
    wanted = progression.prepare
    if wanted is None:
        return {}
    root = Path(progression.out) / "data"
    try:
        root.parent.mkdir(parents=True, exist_ok=True)
        if wanted.scenes == "boxes":
            train, val = max(8, round(64 * wanted.scale)), max(4, round(16 * wanted.scale))
            write_ava_scenes(root, train=train, val=val, seed=wanted.seed)
            return {"kind": "scenes with boxes in AVA's formats, as H.264 MP4", "train_is_test": False, "skipped": {}}
        if wanted.scenes == "features":
            train, test = max(8, round(24 * wanted.scale)), max(4, round(12 * wanted.scale))
            write_tad_features(root, train=train, test=test, channels=wanted.size, seed=wanted.seed)
            return {"kind": "features of untrimmed videos in THUMOS14's style", "train_is_test": False, "skipped": {}}
        if wanted.folder is not None:
            return prepare_folder(root, wanted.folder, size=wanted.size)
        return prepare_scenes(root, size=wanted.size, scale=wanted.scale, seed=wanted.seed)
    except OSError as error:
        shutil.rmtree(root.with_name(f".{root.name}.partial"), ignore_errors=True)
        raise ValueError(f"cannot write {root}: {error.strerror or error}; choose another --out") from error


def resolved(stage: Stage, out: Path) -> Stage:
    """The stage with its place under `out`, and names of other stages turned into their files."""
    changes: dict[str, Any] = {"out": str(out)}
    if stage.init and stage.init.startswith(_HANDED):
        changes["init"] = str(weights_of(out, stage.init.removeprefix(_HANDED)))
    if isinstance(stage, DistillConfig) and stage.teacher_weights and stage.teacher_weights.startswith(_HANDED):
        changes["teacher_weights"] = str(weights_of(out, stage.teacher_weights.removeprefix(_HANDED)))
    return dataclasses.replace(stage, **changes)


def _check_handover(stages: list[Stage], out: Path, init: str | None) -> None:
    running: set[str] = set()
    for number, stage in enumerate(stages):
        wanted = [] if number == 0 and init else [stage.init]
        wanted += [stage.teacher_weights] if isinstance(stage, DistillConfig) else []
        for path in filter(None, wanted):
            inside = Path(path).name == "weights.safetensors" and Path(path).parent.parent == out
            if inside and not Path(path).exists() and Path(path).parent.name not in running:
                raise ValueError(
                    f"stage {stage.name} starts from {path}, which does not exist; run the stage that writes it "
                    "first, or give --init-weights"
                )
        running.add(stage.name)


def smoke(run: Stage | Progression) -> Progression:
    """The same recipe shrunk to CPU seconds: two-block models, small clips, one short epoch of few moving scenes.

    A progression keeps its own prepared data; a recipe that needs data of yours gets the scenes in its place.
    """
    if isinstance(run, Progression) and run.prepare is not None:
        prepare = dataclasses.replace(run.prepare, scale=_SMOKE_SCALE)
        return dataclasses.replace(run, prepare=prepare, stages=tuple(_smoke_stage(stage) for stage in run.stages))
    stages = run.stages if isinstance(run, Progression) else (run,)
    out = run.out if isinstance(run, Progression) else f"{run.out}/{run.name}_smoke"
    return Progression(
        name=f"{run.name}_smoke",
        cites=run.cites,
        prepare=_smoke_data(stages[0]),
        stages=tuple(_smoke_stage(_on_scenes(stage, out)) for stage in stages),
        out=out,
    )


_SMOKE_SCALE = 0.05


def _on_boxes(stage: AvaConfig, out: str) -> Stage:
    root = f"{out}/data"
    data = dataclasses.replace(
        stage.data, videos=f"{root}/videos", annotations=f"{root}/train.csv", labels=f"{root}/labels.pbtxt", exclusions=None
    )
    validation = dataclasses.replace(data, annotations=f"{root}/val.csv", boxes=f"{root}/people.csv", flip=False)
    return dataclasses.replace(stage, data=data, validation=validation, init=None)


def _smoke_data(stage: Stage) -> PrepareConfig:
    if isinstance(stage, TadConfig):
        return PrepareConfig(scale=_SMOKE_SCALE, scenes="features", size=_small(stage.model).width or 0)
    return PrepareConfig(scale=_SMOKE_SCALE, scenes="boxes" if isinstance(stage, AvaConfig) else "moving")


def _on_features(stage: TadConfig, out: str) -> Stage:
    data = dataclasses.replace(
        stage.data, features=f"{out}/data/features", annotations=f"{out}/data/annotations.json", subset="validation",
        videos=None, stride=4, resize_to=None if stage.data.resize_to is None else 128,
    )  # fmt: skip
    validation = dataclasses.replace(data, subset="test", crop_range=None)
    return dataclasses.replace(
        stage, data=data, validation=validation, init=None, trunk_weights=None,
        video_scores=stage.video_scores and f"{out}/data/video_scores.json",
        detector=dataclasses.replace(
            stage.detector, classes=min(stage.detector.classes, len(ACTIONS)), width=32, windows=(9, 9, 9, 0),
            range_ends=stage.detector.range_ends[:3], max_length=128,
        ),
    )  # fmt: skip


def _on_scenes(stage: Stage, out: str) -> Stage:
    if isinstance(stage, AvaConfig):
        return _on_boxes(stage, out)
    if isinstance(stage, TadConfig):
        return _on_features(stage, out)
    labelled = not isinstance(stage, PretrainConfig)
    sources = ("labeled_video", "labeled_frames") if labelled else ("unlabeled_video", "unlabeled_frames")
    data = dataclasses.replace(
        stage.data, sources=tuple(SourceConfig(name=name) for name in sources), datasets=f"{out}/data/datasets.toml"
    )
    changes: dict[str, Any] = {"data": data, "validation": None}
    changes["init"] = stage.init if stage.init and stage.init.startswith(_HANDED) else None
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


def describe(run: RunConfig | Progression) -> list[str]:
    """The plan in lines: what will run, from what, on how much."""
    if isinstance(run, Progression):
        return [f"progression {run.name} -> {run.out}"] + ["  " + line for stage in run.stages for line in describe(stage)]
    sources = ", ".join(f"{s.name}" + (f" x{s.weight:g}" if s.weight != 1 else "") for s in run.data.sources)
    if isinstance(run, AvaConfig):
        sources = f"key frames of {run.data.annotations}"
    if isinstance(run, TadConfig):
        sources = f"features of {run.data.annotations} in {run.data.features}"
    line = f"{run.name}: {run.model.name} {run.model.frames}x{run.model.size}^2, batch {run.train.global_batch}"
    line += f", {run.train.epochs} epochs, lr {run.optim.lr:g}, {run.train.precision}, data {sources or '(none)'}"
    return [line + (f", from {run.init}" if run.init else "")]
