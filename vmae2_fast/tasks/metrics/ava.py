"""Frame-mAP at IoU 0.5 of action detections, as the three public evaluators of AVA compute it.

Per key frame and class, detections in falling order of score each take the ground-truth box they overlap most; it is a hit if
IoU >= 0.5 and that box is still free, else a false positive (there is no second choice). AP is the area under the
precision envelope of all detections of a class (all points); mAP the mean over the classes that have ground truth.

    style         excluded key frames   frames without ground truth   of a frame count
    videomae      left out              false positives               all detections      (AlphAction; SlowFast if sorted)
    activitynet   kept                  ignored                       the 50 best         (get_ava_performance.py)
    mmaction2     missed                ignored                       all detections
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np

from ...config import unknown
from ...data.ava import Path_, Rows, read_annotations, read_exclusions, read_label_map, read_results
from ...data.boxes import has_area

Style = Literal["videomae", "activitynet", "mmaction2"]
MOST_OF_A_FRAME = 50  # activitynet


@dataclass(frozen=True)
class FrameAP:
    """What an evaluation found."""

    mean: float
    """mAP; nan where no class has ground truth."""
    per_class: dict[int, float]
    """AP of every class that has ground truth."""
    left_out: dict[str, int]
    """Why rows did not count, and how many; warnings where a file is not what it should be."""


def iou(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Intersection over union [n, m] of boxes [n, 4] and [m, 4]."""
    low, high = np.maximum(a[:, None, :2], b[None, :, :2]), np.minimum(a[:, None, 2:], b[None, :, 2:])
    both = np.clip(high - low, 0, None).prod(-1)
    areas = (a[:, 2:] - a[:, :2]).prod(-1)[:, None] + (b[:, 2:] - b[:, :2]).prod(-1)
    return both / np.maximum(areas - both, np.finfo(np.float64).tiny)


def average_precision(scores: np.ndarray, hits: np.ndarray, positives: int) -> float:
    """Area under the precision envelope; `positives` ground-truth boxes, of equal scores the first counts first."""
    order = np.argsort(-scores, kind="stable")
    true = np.cumsum(hits[order])
    precision = true / np.arange(1, len(true) + 1)
    recall = true / positives
    envelope = np.maximum.accumulate(precision[::-1])[::-1] if len(true) else precision
    return float(np.sum(np.diff(recall, prepend=0.0) * envelope))


def _of_frame(boxes: np.ndarray, truth: np.ndarray, threshold: float) -> np.ndarray:
    """bool [n]: which of the detections, best first, hit."""
    hits = np.zeros(len(boxes), dtype=bool)
    if not len(truth):
        return hits
    overlap = iou(boxes, truth)
    free = np.ones(len(truth), dtype=bool)
    for i, best in enumerate(overlap.argmax(1)):
        hits[i] = overlap[i, best] >= threshold and free[best]
        free[best] &= not hits[i]
    return hits


def frame_map(
    truth: Rows,
    results: Rows,
    classes: Collection[int],
    *,
    exclusions: Collection[str] = (),
    style: Style = "videomae",
    threshold: float = 0.5,
) -> FrameAP:
    """Frame-mAP of result rows against annotation rows over the actions `classes`. Raises ValueError for another style."""
    if style not in get_args(Style):
        raise ValueError(unknown("style", style, list(get_args(Style))))
    excluded = frozenset() if style == "activitynet" else frozenset(exclusions)
    wanted, left_out = set(classes), Counter[str]()

    def kept(rows: Rows, what: str) -> np.ndarray:
        out = np.fromiter((frame in excluded for frame in rows.frames), bool, len(rows.frames))
        other = ~np.isin(rows.actions, list(wanted)) & ~out
        flat = ~has_area(rows.boxes) & ~out & ~other
        left_out.update({f"{what} on excluded key frames": int(out.sum()), f"{what} of other classes": int(other.sum()),
                         f"{what} without area": int(flat.sum())})  # fmt: skip
        beyond = ((rows.boxes < 0) | (rows.boxes > 1)).any(1) & ~(out | other | flat)
        left_out[f"{what} reaching out of the frame (they count)"] = int(beyond.sum())
        return np.flatnonzero(~(out | other | flat))

    boxes_of: defaultdict[tuple[str, int], list[int]] = defaultdict(list)
    positives = Counter[int]()
    for i in kept(truth, "annotations"):
        boxes_of[truth.frames[i], int(truth.actions[i])].append(i)
        positives[int(truth.actions[i])] += 1
    if style == "mmaction2":  # it counts the boxes of excluded key frames, which nothing can hit
        positives.update(int(a) for f, a in zip(truth.frames, truth.actions) if f in excluded and int(a) in wanted)
    annotated = {frame for frame, _ in boxes_of}

    detected: defaultdict[str, list[int]] = defaultdict(list)
    for i in kept(results, "detections"):
        detected[results.frames[i]].append(i)
    left_out["annotated key frames without any detection"] = len(annotated - detected.keys())
    scores: defaultdict[int, list[float]] = defaultdict(list)
    hits: defaultdict[int, list[bool]] = defaultdict(list)
    for frame, found in detected.items():
        if frame not in annotated:
            counts = style == "videomae"
            left_out["detections on frames without ground truth" + (" (false positives)" if counts else "")] += len(found)
            if not counts:
                continue
        rows = np.asarray(found)
        rows = rows[np.argsort(-results.scores[rows], kind="stable")]
        if style == "activitynet" and len(rows) > MOST_OF_A_FRAME:
            left_out[f"detections beyond the {MOST_OF_A_FRAME} best of a frame"] += len(rows) - MOST_OF_A_FRAME
            rows = rows[:MOST_OF_A_FRAME]
        for action in np.unique(results.actions[rows]):
            mine = rows[results.actions[rows] == action]
            there = truth.boxes[boxes_of.get((frame, int(action)), [])]
            scores[int(action)] += results.scores[mine].tolist()
            hits[int(action)] += _of_frame(results.boxes[mine], there, threshold).tolist()
    per_class = {
        action: average_precision(np.asarray(scores[action]), np.asarray(hits[action], dtype=bool), positives[action])
        for action in sorted(positives)
    }
    mean = float(np.mean(list(per_class.values()))) if per_class else float("nan")
    return FrameAP(mean, per_class, {what: count for what, count in left_out.items() if count})


def score_files(
    annotations: Path_, results: Path_, *, labels: Path_ | None = None, exclusions: Path_ | None = None,
    style: Style = "videomae",
) -> dict[str, Any]:  # fmt: skip
    """Frame-mAP from files alone, as plain JSON values: {"frame_map", "style", "classes", "per_class", "left_out"}.

    labels: label map whose actions count (the 60 of the benchmark); None counts every action that is annotated.
    Raises AvaError naming file and line; ValueError if no annotation counts.
    """
    truth, detections = read_annotations(annotations), read_results(results)
    names = read_label_map(labels) if labels is not None else {int(a): str(a) for a in np.unique(truth.actions)}
    excluded = read_exclusions(exclusions) if exclusions is not None else frozenset()
    found = frame_map(truth, detections, names, exclusions=excluded, style=style)
    if not found.per_class:
        why = ", ".join(f"{count} {what}" for what, count in found.left_out.items())
        raise ValueError(f"{annotations}: no annotation counts: {why or 'it names key frames without boxes only'}")
    per_class = {names[action]: value for action, value in found.per_class.items()}
    return {
        "frame_map": found.mean, "style": style, "classes": len(per_class), "per_class": per_class,
        "left_out": found.left_out,
    }  # fmt: skip
