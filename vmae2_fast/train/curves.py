"""Curves of one run or of several over each other, from the lines of their metrics.jsonl; needs matplotlib."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ..whole import write_whole

Points = list[tuple[float, float]]

_TITLES = {"loss": "training loss", "grad_norm": "gradient norm", "lr": "learning rate", "clips_per_s": "clips/s"}
_COUNTERS = {"step", "epoch", "seconds", "skipped", "rollbacks", "replaced", "wait_s", "decode_s"}
_VALIDATIONS = 6
"""Validation metrics that get a panel, where there is more than one validation; the last one is in the report's table."""
_COLOURS = ("#1f5f99", "#d1601a", "#3b8f4b", "#8a4fa3")


class Curves(NamedTuple):
    """What one run logged."""

    label: str
    train: list[dict[str, Any]]
    """Lines of kind "train", in order."""
    validation: list[dict[str, Any]]
    clips_per_step: int


def panels(runs: Sequence[Curves]) -> dict[str, list[Points]]:
    """What is drawn: panel title -> the points of each run.

    The horizontal axis is the step, or clips seen where a step of one run has more clips than one of another.
    """
    scales = [float(run.clips_per_step) if counts_clips(runs) else 1.0 for run in runs]
    logged = [name for name in _TITLES if _has(runs, name)]
    logged += [name for name in dict.fromkeys(k for run in runs for line in run.train for k in line)
               if name not in _TITLES and name not in _COUNTERS and _has(runs, name)]  # fmt: skip
    drawn = {_TITLES.get(n, f"training {n}"): [_points(r.train, n, s) for r, s in zip(runs, scales)] for n in logged}
    if waits := [_waits(run.train, scale) for run, scale in zip(runs, scales)]:
        drawn |= {"share of time waiting for clips": waits} if any(waits) else {}
    judged = dict.fromkeys(k for run in runs for line in run.validation for k, v in line.items() if isinstance(v, float))
    for name in list(judged)[:_VALIDATIONS] if any(len(run.validation) > 1 for run in runs) else ():
        drawn[f"validation {name}"] = [_points(run.validation, name, scale) for run, scale in zip(runs, scales)]
    return drawn


def counts_clips(runs: Sequence[Curves]) -> bool:
    """Whether the horizontal axis counts clips instead of steps."""
    return len({run.clips_per_step for run in runs}) > 1


def draw_curves(runs: Sequence[Curves], path: str | Path) -> Path | None:
    """Write all `panels` as one PNG, which takes the place of an earlier one at once; None where nothing was logged yet."""
    from matplotlib.figure import Figure

    drawn = panels(runs)
    if not drawn:
        return None
    columns = min(3, len(drawn))
    rows = -(-len(drawn) // columns)
    figure = Figure(figsize=(4.0 * columns, 2.6 * rows + 0.3), layout="constrained")
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axis, (title, lines) in zip(axes, drawn.items()):
        for points, colour in zip(lines, _COLOURS):
            x, y = [p[0] for p in points], [p[1] for p in points]
            axis.plot(x, y, color=colour, linewidth=1.2, alpha=0.85, marker="o" if len(points) < 12 else "", markersize=3)
        values = [p[1] for points in lines for p in points]
        if min(values) > 0 and max(values) > 20 * min(values) and title != _TITLES["lr"]:
            axis.set_yscale("log")
        axis.set_title(title, fontsize=10)
        axis.tick_params(labelsize=7)
        axis.ticklabel_format(axis="x", style="sci", scilimits=(0, 5))
        axis.xaxis.offsetText.set_fontsize(7)
        axis.grid(alpha=0.3)
    for axis in axes[len(drawn) :]:
        axis.remove()
    for axis in axes[max(0, len(drawn) - columns) : len(drawn)]:
        axis.set_xlabel("clips" if counts_clips(runs) else "step", fontsize=8)
    if len(runs) > 1:
        figure.legend(axes[0].lines, [run.label for run in runs], loc="outside upper center",
                      ncols=len(runs), fontsize=9, frameon=False)  # fmt: skip
    path = Path(path)
    write_whole(path, lambda temporary: figure.savefig(temporary, dpi=110, format="png"))
    return path


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _has(runs: Sequence[Curves], name: str) -> bool:
    return any(_number(line.get(name)) for run in runs for line in run.train)


def _points(lines: list[dict[str, Any]], name: str, scale: float) -> Points:
    return [(line["step"] * scale, float(line[name])) for line in lines if _number(line.get(name))]


def _waits(lines: list[dict[str, Any]], scale: float) -> Points:
    """Of the seconds between two lines, the share the first rank waited for data."""
    pairs = [(a, b, b.get("seconds", 0) - a.get("seconds", 0)) for a, b in zip([{}, *lines], lines) if "wait_s" in b]
    return [(b["step"] * scale, min(1.0, b["wait_s"] / seconds)) for _, b, seconds in pairs if seconds > 0]
