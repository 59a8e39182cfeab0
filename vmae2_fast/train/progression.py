"""A progression: prepare data, run the stages in order, hand weights on, then write summary, pictures and report.

`init="stage:NAME"` (and so `teacher_weights`, `trunk_weights`) of a stage stands for `OUT/NAME/weights.safetensors`, written
when stage NAME has finished. A finished stage is not run again, an interrupted one continues from its last checkpoint, so a
progression that was killed is simply started again.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

from ..config import (
    AvaConfig,
    DistillConfig,
    PrepareConfig,
    PretrainConfig,
    Progression,
    RunConfig,
    SceneKind,
    Stage,
    TadConfig,
    save,
)
from ..data.prepare import prepare_folder, prepare_scenes
from ..data.synthetic_ava import write_ava_scenes
from ..data.synthetic_tad import write_tad_features, write_untrimmed_scenes
from ..models import resolve
from ..ops.masks import mask_sizes
from ..tasks.tad import check_video_scores
from .loop import train
from .parallel import join
from .run_directory import WEIGHT_KEYS

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

    `init` replaces what the first stage starts from (see `starting_from`); `resume=False` runs these stages from their start;
    `profile` writes a trace of each.
    Raises ValueError if a stage wants weights that neither exist nor come from a stage that runs, or class scores of
    videos that nobody has made.
    """
    out = Path(progression.out)
    chosen = selected(progression, start, until)
    if init is not None:
        chosen[0] = starting_from(chosen[0], init)
    stages = [resolved(stage, out) for stage in chosen]
    for stage in stages:
        check_stage(stage)
    _check_handover(stages, out)
    world, _ = join()

    def begin() -> dict[str, Any]:
        made = prepare(progression)
        for stage in stages:
            if isinstance(stage, TadConfig):
                check_video_scores(stage)  # now, not when the stages before have taken weeks
        out.mkdir(parents=True, exist_ok=True)
        save(progression, out / PLAN)
        return made

    results: dict[str, dict[str, Any]] = {"data": world.on_first(begin)}
    for number, stage in enumerate(stages):
        if world.first:
            print(f"[{number + 1}/{len(stages)}] {stage.name}: {stage.cites or type(stage).__name__}", flush=True)
        results[stage.name] = train(stage, resume=resume, profile=profile)
    return results


def prepare(progression: Progression) -> dict[str, Any]:
    """Make the data a progression asks for, every kind in its folder of OUT (`data_folder`); nothing where it is already."""
    wanted = progression.prepare
    if wanted is None:
        return {}
    made = [_prepare(kind, data_folder(progression.out, kind), wanted) for kind in wanted.scenes]
    return {
        **made[0], "kind": "; ".join(one["kind"] for one in made), "train_is_test": any(one["train_is_test"] for one in made),
    }  # fmt: skip


def data_folder(out: str | Path, kind: str) -> Path:
    """Where `prepare` puts data of a kind: OUT/data for clips, OUT/KIND for the others."""
    return Path(out) / ("data" if kind == "moving" else kind)


def _prepare(kind: SceneKind, root: Path, wanted: PrepareConfig) -> dict[str, Any]:
    try:
        root.parent.mkdir(parents=True, exist_ok=True)
        if kind == "moving" and wanted.folder is not None:
            return prepare_folder(root, wanted.folder, size=wanted.size)
        if kind == "moving":
            return prepare_scenes(root, size=wanted.size, scale=wanted.scale, seed=wanted.seed)
        train, held = (24, 12) if kind == "features" else (64, 16) if kind == "boxes" else (16, 8)
        counts: dict[str, int] = {"train": max(8, round(train * wanted.scale)), "seed": wanted.seed}
        few = max(4, round(held * wanted.scale))
        if kind == "boxes":
            write_ava_scenes(root, val=few, **counts)
            told = "scenes with boxes in AVA's formats, as H.264 MP4"
        elif kind == "features":
            write_tad_features(root, test=few, channels=wanted.size, **counts)
            told = "features of untrimmed videos in THUMOS14's style"
        else:
            write_untrimmed_scenes(root, test=few, size=wanted.size, **counts)
            told = "untrimmed videos with annotations in THUMOS14's style, as H.264 MP4"
        return {"kind": told, "train_is_test": False, "skipped": {}}
    except OSError as error:
        shutil.rmtree(root.with_name(f".{root.name}.partial"), ignore_errors=True)
        raise ValueError(f"cannot write {root}: {error.strerror or error}; choose another --out") from error


def handed_on(stage: Stage) -> dict[str, str]:
    """Weights the stage takes from other stages: key of the configuration -> name of the stage."""
    found = {key: getattr(stage, key, None) or "" for key in WEIGHT_KEYS}
    return {key: value.removeprefix(_HANDED) for key, value in found.items() if value.startswith(_HANDED)}


def starting_from(stage: Stage, weights: str) -> Stage:
    """The stage begun with given weights: they stand in for its trunk's where it takes features with those of another stage,
    else for its own `init`."""
    key = "trunk_weights" if "trunk_weights" in handed_on(stage) else "init"
    return dataclasses.replace(stage, **{key: weights})  # type: ignore[arg-type]


def resolved(stage: Stage, out: Path) -> Stage:
    """The stage with its place under `out`, and names of other stages turned into their files."""
    files = {key: str(weights_of(out, name)) for key, name in handed_on(stage).items()}
    return dataclasses.replace(stage, out=str(out), **files)  # type: ignore[arg-type]


def _check_handover(stages: list[Stage], out: Path) -> None:
    running: set[str] = set()
    for stage in stages:
        for path in filter(None, (getattr(stage, key, None) for key in WEIGHT_KEYS)):
            inside = Path(path).name == "weights.safetensors" and Path(path).parent.parent == out
            if inside and not Path(path).exists() and Path(path).parent.name not in running:
                raise ValueError(
                    f"stage {stage.name} starts from {path}, which does not exist; run the stage that writes it "
                    "first, or give --init-weights"
                )
        running.add(stage.name)


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
    return [line + (f", from {run.init}" if run.init else "") + (f" [{run.cites}]" if run.cites else "")]
