"""Tables of studies: means and spread over seeds, as JSON, Markdown and pictures."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

from ..pictures import installed, pyplot
from ..whole import write_json, write_whole

Runs = list[dict[str, float]]


def write_table(table: dict[str, Any], out: Path) -> None:
    """Write `out`/NAME.json, NAME.md and, with matplotlib, NAME.png; rows gain "mean" and "spread" of their runs."""
    out.mkdir(parents=True, exist_ok=True)
    for row in table["rows"]:
        row |= summary(row["runs"])
    name = table["study"]
    write_json(out / f"{name}.json", table, indent=1)
    write_whole(out / f"{name}.md", lambda path: path.write_text(markdown(table)))
    if installed():
        write_whole(out / f"{name}.png", lambda path: picture(table, path))


def summary(runs: Runs) -> dict[str, dict[str, float]]:
    """Mean, and spread from the lowest to the highest run, of every figure."""
    columns = {key: [run[key] for run in runs] for key in runs[0]}
    return {
        "mean": {key: statistics.fmean(values) for key, values in columns.items()},
        "spread": {key: max(values) - min(values) for key, values in columns.items()},
    }


def columns(table: dict[str, Any]) -> list[str]:
    """The figures of a table in order of appearance; a row need not have all."""
    return list(dict.fromkeys(key for row in table["rows"] for key in row["mean"]))


def markdown(table: dict[str, Any]) -> str:
    """The table as Markdown: mean and, in brackets, lowest to highest of the seeds."""
    keys = columns(table)
    lines = [f"| | {' | '.join(keys)} |", "|---" * (len(keys) + 1) + "|"]
    for row in table["rows"]:
        cells = [_cell([run[key] for run in row["runs"]]) if key in row["mean"] else "" for key in keys]
        lines.append(f"| {row['name']} | {' | '.join(cells)} |")
    seeds = len(table["seeds"])
    told = "1 seed" if seeds == 1 else f"{seeds} seeds: mean (lowest to highest)"
    minutes = table["training_seconds"] / 60
    return "\n".join([*lines, "", f"`{table['command']}`, {told}; {minutes:.0f} minutes of training.", ""])


def _cell(values: list[float]) -> str:
    mean, low, high = (f"{value:.4g}" for value in (statistics.fmean(values), min(values), max(values)))
    return mean if low == high else f"{mean} ({low} to {high})"


def picture(table: dict[str, Any], path: Path) -> None:
    """A dot for each seed and a line at the mean; where rows are named `SERIES, N clips`, curves over N instead."""
    plt = pyplot()
    draw = _lines if all(row["name"].endswith(" clips") for row in table["rows"]) else _dots
    keys = columns(table)
    across = min(len(keys), 3)
    down = -(-len(keys) // across)
    height = 3.4 if draw is _lines else 0.9 + 0.35 * len(table["rows"])
    figure, panels = plt.subplots(down, across, figsize=(1.8 + 2.8 * across, height * down), squeeze=False)
    for number, (panel, key) in enumerate(zip(panels.flat, keys)):
        draw(panel, table["rows"], key)
        panel.set_title(key, fontsize=9)
        panel.tick_params(labelsize=8)
        if draw is _dots and number % across:
            panel.set_yticklabels([])
    for panel in panels.flat[len(keys) :]:
        panel.remove()
    figure.tight_layout()
    figure.savefig(path, dpi=110, format="png")
    plt.close(figure)


def _dots(panel: Any, rows: list[dict[str, Any]], key: str) -> None:
    for place, row in enumerate(rows):
        values = [run[key] for run in row["runs"] if key in run]
        panel.plot(values, [place] * len(values), "o", color="tab:blue", alpha=0.6, markersize=5)
        if key in row["mean"]:
            panel.plot(row["mean"][key], place, "k|", markersize=14, markeredgewidth=2)
    panel.set_yticks(range(len(rows)), [row["name"] for row in rows])
    panel.set_ylim(len(rows) - 0.5, -0.5)
    panel.margins(x=0.12)
    panel.grid(axis="x", alpha=0.3)


def _lines(panel: Any, rows: list[dict[str, Any]], key: str) -> None:
    series: dict[str, list[tuple[int, dict[str, Any]]]] = {}
    for row in rows:
        name, _, clips = row["name"].removesuffix(" clips").rpartition(", ")
        series.setdefault(name, []).append((int(clips), row))
    for number, (name, points) in enumerate(series.items()):
        points.sort(key=lambda point: point[0])
        colour = f"C{number}"
        panel.plot([n for n, _ in points], [row["mean"][key] for _, row in points], "-", color=colour, label=name)
        for clips, row in points:
            panel.plot([clips] * len(row["runs"]), [run[key] for run in row["runs"]], ".", color=colour, markersize=5)
    panel.set_xscale("log")
    ticks = sorted({clips for points in series.values() for clips, _ in points})
    panel.set_xticks(ticks, [str(tick) for tick in ticks])
    panel.minorticks_off()
    panel.set_xlabel("clips of the pre-training set", fontsize=8)
    panel.legend(fontsize=7)
