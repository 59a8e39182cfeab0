"""Detections along time below the ground truth, drawn with matplotlib where it is installed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .data.tad import Detections

_TRUTH, _LANES = "#2a6f97", 4
"""Detections of a class that overlap are drawn one below the other, so many at most."""


def lanes(segments: np.ndarray, scores: np.ndarray) -> np.ndarray:
    """A lane for each segment, so that those of one lane do not overlap, the best in the first lanes: int64 [N]."""
    placed: list[list[tuple[float, float]]] = []
    out = np.zeros(len(segments), dtype=np.int64)
    for i in np.argsort(-scores, kind="stable"):
        start, end = segments[i]
        free = (n for n, lane in enumerate(placed) if all(end <= a or start >= b for a, b in lane))
        out[i] = next(free, len(placed))
        if out[i] == len(placed):
            placed.append([])
        placed[out[i]].append((start, end))
    return out


def draw_timelines(
    found: Mapping[str, Detections],
    truth: Mapping[str, tuple[np.ndarray, Sequence[str]]],
    path: str | Path,
    *,
    threshold: float = 0.1,
    durations: Mapping[str, float] | None = None,
) -> dict[str, Any]:
    """Draw each video as a panel with the classes as rows: what was annotated, below it what was detected.

    found: at least one video. truth: segments [N, 2] in seconds and labels by video. threshold: least score that is shown; the
    stronger the colour, the higher the score. Returns {"out", "videos", "detections" shown, "hidden", what had no place}.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.colors import Normalize
    from matplotlib.patches import Patch

    rows = {video: _rows(found[video], truth.get(video), threshold) for video in found}
    heights = [0.7 + sum(0.16 * (2 + row["lanes"]) for row in video.values()) for video in rows.values()]
    figure, panels = pyplot.subplots(
        len(rows), 1, figsize=(10, 0.9 + sum(heights)), squeeze=False, height_ratios=heights, layout="constrained"
    )
    colours, shade = pyplot.get_cmap("Oranges"), Normalize(-0.3, 1)  # the weakest must still be seen
    shown = hidden = 0
    for panel, (video, classes) in zip(panels[:, 0], rows.items()):
        top, ticks, last = 0.0, [], (durations or {}).get(video, 0.0)
        for row in classes.values():
            for start, end in row["truth"]:
                panel.broken_barh([(start, end - start)], (top + 0.1, 0.8), color=_TRUTH)
            for (start, end), score, lane in zip(*row["found"]):
                hidden += lane >= _LANES
                if lane < _LANES:
                    place = (top + 1.05 + lane, 0.8)
                    panel.broken_barh([(start, end - start)], place, facecolor=colours(shade(score)), edgecolor="white")
                    shown += 1
            last = max([last, *row["truth"][:, 1], *row["found"][0][:, 1]])
            ticks.append(top + (1 + row["lanes"]) / 2)
            top += 2 + row["lanes"]
        panel.set_yticks(ticks, list(classes) or [], fontsize=8)
        panel.set_ylim(max(top - 0.8, 1), -0.2)
        panel.set_xlim(0, max(last, 1e-3))
        panel.set_title(video if classes else f"{video}: nothing annotated, nothing detected", fontsize=9, loc="left")
        panel.tick_params(axis="x", labelsize=8)
        panel.grid(axis="x", alpha=0.3)
        panel.set_axisbelow(True)
    panels[-1, 0].set_xlabel("seconds", fontsize=9)
    bar = figure.colorbar(pyplot.cm.ScalarMappable(shade, colours), ax=panels[:, 0].tolist(), fraction=0.02, pad=0.01)
    bar.ax.set_ylim(min(threshold, 0.9), 1)
    bar.set_label("score", fontsize=8)
    bar.ax.tick_params(labelsize=7)
    figure.legend(
        handles=[Patch(color=_TRUTH, label="annotated"), Patch(color=colours(shade(0.7)), label="detected")],
        loc="outside upper right", ncols=2, fontsize=8, frameon=False,
    )  # fmt: skip
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
    return {"out": str(path), "videos": len(rows), "detections": shown, "hidden": int(hidden), "threshold": threshold}


def _rows(found: Detections, truth: tuple[np.ndarray, Sequence[str]] | None, threshold: float) -> dict[str, dict[str, Any]]:
    """What is drawn of each class of a video."""
    segments, labels = truth or (np.zeros((0, 2)), ())
    strong = [i for i, score in enumerate(found.scores) if score >= threshold]
    out = {}
    for label in sorted({found.labels[i] for i in strong} | set(labels)):
        ids = [i for i in strong if found.labels[i] == label]
        places = lanes(found.segments[ids], found.scores[ids])
        out[label] = {
            "truth": segments[[i for i, name in enumerate(labels) if name == label]],
            "found": (found.segments[ids], found.scores[ids], places),
            "lanes": int(min(places.max(initial=-1) + 1, _LANES)),
        }
    return out
