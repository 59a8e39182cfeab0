"""One HTML page about one run directory, or about two side by side: `vmae2 report RUN [RUN2]`.

Everything is read from what a run writes while it goes on, so a run that still trains, or was killed, has a page too.
"""

from __future__ import annotations

import dataclasses
import json
import math
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from .config import load
from .pages import embedded, missing, write_page
from .pictures import confusion_picture
from .train.checkpoint import committed
from .train.curves import Curves, draw_curves
from .train.log import read_lines, read_metrics
from .train.pictures import reconstructions
from .train.progression import PLAN
from .train.run_directory import flatten

_RECONSTRUCTIONS = 4
_PATHS = 5
"""Clips named of a spike, and of those that could not be decoded."""
_SPIKES = 10
_TEXT = 160
"""Characters a value of a config may take."""

_TASKS = {
    "PretrainConfig": "pre-training", "ClassifyConfig": "classification", "DistillConfig": "distillation",
    "AvaConfig": "action detection in space and time", "TadConfig": "temporal action detection",
}  # fmt: skip

Rows = list[tuple[str, list[str]]]
"""A table: what, and the text of each run."""


@dataclasses.dataclass(frozen=True)
class Run:
    """What a run directory holds so far."""

    path: Path
    config: dict[str, Any]
    environment: dict[str, Any]
    done: dict[str, Any] | None
    """The summary, once it is finished."""
    train: list[dict[str, Any]]
    validation: list[dict[str, Any]]
    quarantine: list[dict[str, Any]]
    spikes: list[dict[str, Any]]

    @property
    def last(self) -> dict[str, Any]:
        return self.train[-1] if self.train else {}

    @property
    def final(self) -> dict[str, Any]:
        """Metrics of the last validation."""
        return (self.done or {}).get("validation") or (self.validation[-1] if self.validation else {})


def read_run(path: str | Path) -> Run:
    """Read a run directory. Raises ValueError where it is none; what a kill cut off is left out."""
    path = Path(path)
    if not (path / "config.json").is_file():
        hint = f"; it is a progression, name one of its stages: {path}/STAGE" if (path / PLAN).is_file() else ""
        raise ValueError(f"{path}: no run directory, there is no config.json{hint}")
    metrics = path / "metrics.jsonl"
    return Run(
        path=path,
        config=_object(path / "config.json"),
        environment=_object(path / "environment.json") if (path / "environment.json").is_file() else {},
        done=_object(path / "done.json") if (path / "done.json").is_file() else None,
        train=read_metrics(metrics),
        validation=read_metrics(metrics, "validation"),
        quarantine=read_lines(path / "quarantine.jsonl"),
        spikes=read_lines(path / "spikes.jsonl"),
    )


def _object(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: cannot be read as JSON ({error})") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path}: not an object")
    return value


def write_stage_reports(progression: str | Path) -> dict[str, Any]:
    """The page of every stage of a progression that has begun. Returns {"reports", "runs"}; raises ValueError if none has."""
    folders = [Path(progression) / stage.name for stage in load(Path(progression) / PLAN).stages]
    begun = [folder for folder in folders if (folder / "metrics.jsonl").is_file()]
    if not begun:
        raise ValueError(f"{progression}: no stage of this progression has logged anything yet")
    written = [write_run_report([run]) for run in begun]
    return {"reports": [one["report"] for one in written], "runs": [run for one in written for run in one["runs"]]}


def write_run_report(paths: Sequence[str | Path], out: str | Path | None = None) -> dict[str, Any]:
    """Write the page of one run, or of two side by side.

    out: the file; None: `report.html` in the run, or `compared-with-NAME.html` in the first of two. Returns {"report",
    "runs": one {"directory", "state", "steps", "loss", "clips_per_s", "skipped_steps", "replaced", "quarantined", "spikes",
    "validation"} each}. Raises ValueError for what is no run directory, and without the extra `report`.
    """
    runs = [read_run(path) for path in paths]
    if absent := missing():
        raise ValueError(f"the report needs {', '.join(absent)}: pip install 'vmae2_fast[report]'")
    names = _names(runs)
    default = runs[0].path / ("report.html" if len(runs) == 1 else f"compared-with-{runs[1].path.resolve().name}.html")
    target = Path(out) if out is not None else default
    if not target.parent.is_dir():
        raise ValueError(f"{target.parent}: no such folder for the report")
    write_page(
        target, "run_report.html.j2", title=" and ".join(names), names=names, overview=overview(runs),
        metrics=final_metrics(runs), spikes_shown=_SPIKES, slowest=slowest_ranks(runs),
        differences=config_differences(runs) if len(runs) == 2 else [], environment=environment_rows(runs),
        curves=_curves(runs, names), runs=[_pictures(run) for run in runs], spikes=[_spike_rows(run) for run in runs],
        quarantined=[_quarantine(run) for run in runs], config=config_rows(runs[0]) if len(runs) == 1 else [],
    )  # fmt: skip
    return {"report": str(target), "runs": [_result(run) for run in runs]}


def _names(runs: Sequence[Run]) -> list[str]:
    names = [str(run.config.get("name", run.path.name)) for run in runs]
    return names if len(set(names)) == len(names) else [str(run.path) for run in runs]


def state(run: Run) -> str:
    """Finished, or how far it has come and when it last wrote a line."""
    if run.done is not None:
        return "finished"
    if not run.train:
        return "not finished, nothing logged yet"
    written = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime((run.path / "metrics.jsonl").stat().st_mtime))
    epochs = run.config.get("train", {}).get("epochs")
    return f"not finished: epoch {run.last.get('epoch', 0):g} of {epochs}, last line written {written}"


def _result(run: Run) -> dict[str, Any]:
    done, last = run.done or {}, run.last
    return {
        "directory": str(run.path), "state": state(run), "steps": done.get("steps", last.get("step", 0)),
        "loss": done.get("last_loss", last.get("loss")), "clips_per_s": _speed(run), "skipped_steps": last.get("skipped", 0),
        "replaced": last.get("replaced", 0), "quarantined": len(run.quarantine), "spikes": len(run.spikes),
        "validation": {k: v for k, v in run.final.items() if isinstance(v, int | float)},
    }  # fmt: skip


def _speed(run: Run) -> float | None:
    seconds = run.last.get("seconds")
    return round(run.last["step"] * run.config["train"]["global_batch"] / seconds, 3) if seconds else None


def overview(runs: Sequence[Run]) -> Rows:
    """State, length, speed and trouble of each run."""

    def row(what: str, value: Callable[[Run], Any]) -> tuple[str, list[str]]:
        return what, [_text(value(run)) for run in runs]

    def waiting(run: Run) -> str | None:
        seconds, waits = run.last.get("seconds"), [line["wait_s"] for line in run.train if "wait_s" in line]
        return f"{100 * sum(waits) / seconds:.1f} %" if seconds and waits else None

    rows = [
        row("state", state),
        row("task", lambda r: _TASKS.get(r.config.get("kind", ""), r.config.get("kind"))),
        row("directory", lambda r: r.path),
        row("steps", lambda r: r.last.get("step", 0)),
        row("epochs", lambda r: r.last.get("epoch", 0)),
        row("processes", lambda r: r.last.get("ranks")),
        row("precision", lambda r: (r.done or r.config["train"]).get("precision")),
        row("first loss", lambda r: (r.done or {}).get("first_loss", r.train[0].get("loss") if r.train else None)),
        row("last loss", lambda r: (r.done or {}).get("last_loss", r.last.get("loss"))),
        row("clips/s over all", _speed),
        row("seconds of training", lambda r: r.last.get("seconds")),
        row("of these waiting for clips (first process)", waiting),
        row("skipped steps", lambda r: r.last.get("skipped", 0)),
        row("gone back to a checkpoint", lambda r: r.last.get("rollbacks", 0)),
        row("loss spikes", lambda r: len(r.spikes)),
        row("replaced clips", lambda r: r.last.get("replaced", 0)),
        row("files in quarantine", lambda r: len(r.quarantine)),
        row("checkpoints", lambda r: ", ".join(c.name for c in committed(r.path / "checkpoints"))),
    ]
    return [(what, values) for what, values in rows if any(values)]


def final_metrics(runs: Sequence[Run]) -> Rows:
    """Numbers of the last validation; per-class tables are left to the summary."""
    names = dict.fromkeys(k for run in runs for k, v in run.final.items() if isinstance(v, int | float) and k != "step")
    rows = [(name, [_text(run.final.get(name)) for run in runs]) for name in names]
    if rows and any(run.done is None for run in runs):
        at = ["at the end" if run.done else f"step {run.final.get('step', '')}" if run.final else "" for run in runs]
        rows.insert(0, ("validated", at))
    return rows


def config_differences(runs: Sequence[Run]) -> Rows:
    """Keys of the config that differ, with the value of each run."""
    flat = [flatten(run.config) for run in runs]
    keys = sorted(k for k in set().union(*flat) if any(k not in f or f[k] != flat[0].get(k) for f in flat))
    return [(key, [_text(f[key], empty="None") if key in f else "(no such key)" for f in flat]) for key in keys]


def config_rows(run: Run) -> Rows:
    """The whole config of a run."""
    return [(key, [_text(value, empty="None")]) for key, value in sorted(flatten(run.config).items())]


def environment_rows(runs: Sequence[Run]) -> Rows:
    """Machine, versions, and which implementation of every op ran."""

    def facts(run: Run) -> dict[str, str]:
        said = run.environment
        packages = {k: str(v) for k, v in said.get("packages", {}).items() if v}
        ops = {f"op {op}": ", ".join(dict.fromkeys(str(where.get("runs")) for where in kinds.values()))
               for op, kinds in said.get("ops", {}).items()}  # fmt: skip
        machine = {"devices": ", ".join(said.get("devices", [])), "threads": _text(said.get("threads"))}
        return {"python": _text(said.get("python")), "platform": _text(said.get("platform")), **machine, **packages, **ops}

    found = [facts(run) for run in runs]
    names = list(dict.fromkeys(name for one in found for name in one))
    return [(name, [one.get(name, "") for one in found]) for name in names if any(one.get(name) for one in found)]


def slowest_ranks(runs: Sequence[Run]) -> list[list[tuple[str, str]]]:
    """Per run: which ranks were the last ones ready for the others, how often, and how much later than the median."""
    tables = []
    for run in runs:
        lines = [line["rank_s"] for line in run.train if isinstance(line.get("rank_s"), dict)]
        counts = Counter(f"rank {line['slowest']} on {line['host']}" for line in lines)
        rows = [(name, f"slowest in {count} of {len(lines)} lines") for name, count in counts.most_common(_PATHS)]
        behind = sorted(line["max"] / line["median"] for line in lines if line["median"])
        if behind:
            rows.append(("its own time over the median rank's", f"{behind[len(behind) // 2]:.2f} (median of lines)"))
        tables.append(rows)
    return tables


def _quarantine(run: Run) -> list[tuple[str, str]]:
    """(reason without its particulars, count and first files)."""
    grouped: dict[str, list[str]] = {}
    for entry in run.quarantine:
        grouped.setdefault(str(entry.get("reason", "")).split(":")[0], []).append(str(entry.get("path")))
    return [(reason, f"{len(paths)}: {_some(paths)}") for reason, paths in grouped.items()]


def _some(paths: Iterable[str]) -> str:
    paths = list(dict.fromkeys(paths))
    return ", ".join(paths[:_PATHS]) + (f" and {len(paths) - _PATHS} more" if len(paths) > _PATHS else "")


def _spike_rows(run: Run) -> list[tuple[int, str, str, str, str]]:
    """(step, loss, running median, gradient norm, clips) of the newest spikes."""
    return [
        (
            entry.get("lost_step", entry["step"]),
            *(_text(entry.get(name)) for name in ("loss", "median", "grad_norm")),
            _some(path for batch in entry.get("batches", []) for path in batch["paths"]),
        )
        for entry in run.spikes[-_SPIKES:]
    ]


def _curves(runs: Sequence[Run], names: Sequence[str]) -> str | None:
    curves = [Curves(n, r.train, r.validation, r.config["train"]["global_batch"]) for n, r in zip(names, runs)]
    with tempfile.TemporaryDirectory() as folder:
        picture = draw_curves(curves, Path(folder) / "curves.png")
        return embedded(picture) if picture else None


def _pictures(run: Run) -> list[tuple[str, str]]:
    """(title, address) of reconstructions over time, first and last among them, and the confusion matrix."""
    found = reconstructions(run.path)
    count = min(_RECONSTRUCTIONS, len(found))
    chosen = [found[round(i * (len(found) - 1) / max(count - 1, 1))] for i in range(count)]
    shown = [(f"Reconstruction after step {int(path.stem.split('-')[1])}", embedded(path)) for path in chosen]
    if matrix := run.final.get("confusion"):
        names = (run.done or {}).get("classes") or [str(i) for i in range(len(matrix))]
        with tempfile.TemporaryDirectory() as folder:
            shown.append(("Confusion (rows: true class)", embedded(confusion_picture(matrix, names, Path(folder) / "c.png"))))
    return shown


def _text(value: Any, empty: str = "") -> str:
    if value is None:
        return empty
    if isinstance(value, float):
        return f"{value:.4g}" if math.isfinite(value) else str(value)
    if isinstance(value, list | dict):
        value = json.dumps(value)
    return value if len(value := str(value)) <= _TEXT else f"{value[:_TEXT]} ..."
