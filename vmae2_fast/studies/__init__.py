"""Small studies of what the paper claims, on generated video that a CPU core can learn: `vmae2 study`.

progressive   from scratch, pre-train -> fine-tune, pre-train -> post-pre-train -> fine-tune (section 3.4), each with the same
              few labels of the target classes
masking       encoder-only against dual masking, decoder masks none, frame, random, running cell (section 3.2)
scaling       three widths x three sizes of the pre-training set

Each is run for several seeds, data and models drawn anew, and written as a table of means and spread with a picture. The
scenes are harder than the demo's: shaking camera, four discs that mean nothing, few labelled clips of the target classes.
The studies share scenes and stages: what one of them has trained, the others take.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, Literal

from .. import backend
from ..config import require
from ..data.synthetic import SceneSet, write_moving_scenes
from ..train.loop import train
from ..train.progression import resolved
from .arms import FULL, SHORT, STUDIES, THREADS, figures
from .table import markdown, write_table

__all__ = ["markdown", "study"]

Name = Literal["progressive", "masking", "scaling"]


def study(
    name: Name, out: str | Path, *, runs: str | Path | None = None, seeds: tuple[int, ...] = (0, 1, 2), length: float = 1.0,
    short: bool = False,
) -> dict[str, Any]:  # fmt: skip
    """Run a study and write `out`/NAME.json, NAME.md and, with matplotlib, NAME.png; returns the table.

    The table is written after every seed, of those that are finished. Scenes and stages lie in `runs`/seed-N (default:
    `out`); a finished stage is not run again and an interrupted one goes on from its checkpoint, so a study that was stopped
    is simply started again. `length` multiplies the epochs of every stage; `short` shrinks everything to seconds. Raises
    ValueError for no seeds or the same one twice, or `runs` with other scenes or stages of another length.
    """
    require(bool(seeds) and len(set(seeds)) == len(seeds), f"study: needs different seeds, got {list(seeds)}")
    require(length > 0, f"study: length={length} must be above 0")
    epochs = (SHORT if short else FULL).scaled(length)
    out, runs = Path(out), Path(out if runs is None else runs)
    found: dict[str, list[dict[str, float]]] = {}
    options = (f" --length {length:g}" if length != 1 else "") + (" --short" if short else "")
    seconds = 0.0
    table: dict[str, Any] = {}
    for number, seed in enumerate(seeds, start=1):
        folder = runs / f"seed-{seed}"
        _write_scenes(folder, seed, short)
        done: dict[str, dict[str, Any]] = {}
        for arm in STUDIES[name](folder, seed, epochs):
            for stage in arm.stages:
                if stage.name not in done:
                    print(f"seed {seed}: {stage.name}", flush=True)
                    done[stage.name] = train(resolved(stage, folder))
            found.setdefault(arm.name, []).append({**figures(arm, done), **arm.cost})
        seconds += sum(summary["seconds"] for summary in done.values())
        table = {
            "study": name,
            "command": f"vmae2 study {name} --seeds {' '.join(map(str, seeds[:number]))}{options}",
            "seeds": list(seeds[:number]),
            "short": short,
            "training_seconds": round(seconds, 1),
            "environment": _environment(),
            "rows": [{"name": row, "runs": listed} for row, listed in found.items()],
        }
        write_table(table, out)
    return table


def _environment() -> dict[str, Any]:
    found = backend.environment()
    packages = {key: value for key, value in found["packages"].items() if value}
    return {"python": found["python"], **packages, "cpu": found["native"] and found["native"]["cpu_isa"], "threads": THREADS}


def _write_scenes(folder: Path, seed: int, short: bool) -> None:
    scenes = SceneSet(
        size=48, unlabeled_video=400, unlabeled_frames=100, labeled_video=36, labeled_frames=12, target_train=4, target_val=40,
        labeled_val=4, distractors=4, shake=0.03, seed=seed,
    )  # fmt: skip
    if short:
        scenes = dataclasses.replace(
            scenes, unlabeled_video=16, unlabeled_frames=16, labeled_video=1, labeled_frames=1, target_train=2, target_val=1,
            labeled_val=1, holdout=2,
        )  # fmt: skip
    try:
        write_moving_scenes(folder / "data", scenes)
    except FileExistsError as error:
        raise ValueError(f"{error}; scenes of other studies need another --runs") from error
