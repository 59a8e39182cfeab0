"""Temporal detection: mean average precision over tIoU thresholds, and recall, as the benchmarks compute them.

Per class: all detections in descending score; each takes the event of its video with the highest tIoU that is still free,
and is right if that tIoU reaches the threshold. AP is the area under the precision envelope over all recalls; the mean is
over the classes that have ground truth, the average over thresholds. Equal to ActionFormer's and OpenTAD's evaluators with
`deduplicate`, to ActivityNet's without.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

BENCHMARKS: dict[str, tuple[float, float, int]] = {"thumos14": (0.3, 0.7, 5), "fineaction": (0.5, 0.95, 10)}
"""First and last tIoU and their number: `thresholds` gives the evaluators' own values, which a tIoU may equal exactly."""

DUPLICATE = 1e-3
"""Seconds: events shorter than this, and events of one label whose ends both lie this close, are one mistake of annotation."""


def thresholds(benchmark: str) -> Array:
    """The tIoU thresholds of "thumos14" (0.3 to 0.7) or "fineaction" (0.5 to 0.95). Raises ValueError for another name."""
    if benchmark not in BENCHMARKS:
        raise ValueError(f"unknown benchmark {benchmark!r}; there are: {', '.join(BENCHMARKS)}")
    low, high, count = BENCHMARKS[benchmark]
    return np.linspace(low, high, count)


class Segments(NamedTuple):
    """Events of one video: segments float64 [N, 2] in seconds, labels (class names) and, of detections, scores [N]."""

    segments: Array
    labels: Sequence[str]
    scores: Array | None = None


class DetectionScore(NamedTuple):
    """What `detection_map` returns."""

    mean: Array
    """mAP at each threshold, in 0..1; 0 without a class."""
    average: float
    """Mean over the thresholds."""
    classes: tuple[str, ...]
    """Those with ground truth, sorted."""
    ap: Array
    """[thresholds, classes]."""
    recall: Array
    """[thresholds, 2], mean over classes: share of events found among the 1x and 5x as many best detections of their video."""
    events: int
    """Ground truth that counted."""
    left_out: dict[str, int]
    """What did not count, by reason."""


def tiou(first: Array, second: Array) -> Array:
    """Overlap of segments [N, 2] with segments [M, 2] as share of their union: [N, M]; 0 where the union is empty."""
    common = np.minimum(first[:, None, 1], second[None, :, 1]) - np.maximum(first[:, None, 0], second[None, :, 0])
    common = np.maximum(common, 0.0)
    union = (first[:, 1] - first[:, 0])[:, None] + (second[:, 1] - second[:, 0])[None] - common
    return np.divide(common, union, out=np.zeros_like(common), where=union > 0)


def average_precision(precision: Array, recall: Array) -> float:
    """Area under the envelope of a precision-recall curve, both in the order of descending score."""
    envelope = np.concatenate([[0.0], precision, [0.0]])
    reached = np.concatenate([[0.0], recall, [1.0]])
    envelope = np.maximum.accumulate(envelope[::-1])[::-1]
    steps = np.flatnonzero(reached[1:] != reached[:-1]) + 1
    return float(((reached[steps] - reached[steps - 1]) * envelope[steps]).sum())


def without_duplicates(events: Segments) -> Segments:
    """Events of one video without those shorter than `DUPLICATE` and without repetitions; the first one stays."""
    kept: list[int] = []
    for i, (start, end) in enumerate(events.segments):
        same = [k for k in kept if events.labels[k] == events.labels[i]]
        repeated = any(np.abs(events.segments[k] - events.segments[i]).max() <= DUPLICATE for k in same)
        if end - start >= DUPLICATE and not repeated:
            kept.append(i)
    return Segments(events.segments[kept], [events.labels[i] for i in kept])


def detection_map(
    truth: Mapping[str, Segments], found: Mapping[str, Segments], tious: Array, *, deduplicate: bool = True
) -> DetectionScore:
    """mAP of detections against ground truth, both by video; in every video of `truth` everything that happens is annotated.

    deduplicate: drop repeated and empty events first (ActionFormer, OpenTAD), or take all (ActivityNet).
    Detections on videos without annotations are wrong ones, detections with a label no event has do not count and are
    counted in `left_out`, as are the events dropped.
    """
    events = {video: without_duplicates(e) if deduplicate else e for video, e in truth.items()}
    classes = tuple(sorted({label for e in events.values() for label in e.labels}))
    known, left_out = set(classes), {}
    dropped = sum(len(e.labels) for e in truth.values()) - sum(len(e.labels) for e in events.values())
    unknown = sum(label not in known for f in found.values() for label in f.labels)
    elsewhere = sum(len(f.labels) for video, f in found.items() if video not in events)
    backwards = sum(int((f.segments[:, 1] < f.segments[:, 0]).sum()) for f in found.values())
    for what, count in (
        ("repeated or empty events", dropped),
        ("detections with a label that no event has", unknown),
        ("detections on videos without annotations, counted as wrong", elsewhere),
        ("detections that end before they begin, counted as wrong", backwards),
    ):
        if count:
            left_out[what] = count
    ap, recall = np.zeros((len(tious), len(classes))), np.zeros((len(tious), 2, len(classes)))
    for c, label in enumerate(classes):
        true = {video: e.segments[_of(e, label)] for video, e in events.items() if label in e.labels}
        ap[:, c] = _class_precision(true, *_ranked(found, label), tious)
        recall[:, :, c] = _class_recall(true, found, label, tious)
    mean = ap.mean(1) if classes else np.zeros(len(tious))
    total = sum(len(e.labels) for e in events.values())
    found_share = recall.mean(2) if classes else np.zeros((len(tious), 2))
    return DetectionScore(mean, float(mean.mean()), classes, ap, found_share, total, left_out)


def _of(events: Segments, label: str) -> NDArray[np.int64]:
    return np.array([i for i, name in enumerate(events.labels) if name == label], dtype=np.int64)


def _ranked(found: Mapping[str, Segments], label: str) -> tuple[list[str], Array]:
    """Videos and segments [N, 2] of a class's detections, best first."""
    videos: list[str] = []
    rows: list[Array] = []
    scores: list[Array] = []
    for video, detections in found.items():
        chosen = _of(detections, label)
        assert detections.scores is not None
        videos += [video] * len(chosen)
        rows.append(detections.segments[chosen])
        scores.append(detections.scores[chosen])
    if not videos:
        return [], np.zeros((0, 2))
    order = np.argsort(-np.concatenate(scores), kind="stable")
    return [videos[i] for i in order], np.concatenate(rows)[order]


def _class_precision(true: Mapping[str, Array], videos: list[str], segments: Array, tious: Array) -> Array:
    total = sum(len(e) for e in true.values())
    free = {video: np.ones((len(tious), len(e)), dtype=bool) for video, e in true.items()}
    right = np.zeros((len(tious), len(videos)), dtype=bool)
    for i, video in enumerate(videos):
        if video not in true:
            continue
        overlap = tiou(segments[i : i + 1], true[video])[0]
        for event in np.argsort(-overlap, kind="stable"):
            takes = (overlap[event] >= tious) & free[video][:, event] & ~right[:, i]
            free[video][takes, event] = False
            right[takes, i] = True
    hits = np.cumsum(right, axis=1)
    precision = hits / np.arange(1, len(videos) + 1)
    return np.array([average_precision(precision[t], hits[t] / total) for t in range(len(tious))])


def _class_recall(true: Mapping[str, Array], found: Mapping[str, Segments], label: str, tious: Array) -> Array:
    """[thresholds, 2]."""
    hits = np.zeros((len(tious), 2))
    for video, events in true.items():
        if video not in found:
            continue
        detections = found[video]
        assert detections.scores is not None
        chosen = _of(detections, label)
        order = chosen[np.argsort(-detections.scores[chosen], kind="stable")]
        overlap = tiou(detections.segments[order], events)
        for column, times in enumerate((1, 5)):
            best = overlap[: times * len(events)].max(axis=0, initial=0.0)
            hits[:, column] += (best[None] >= tious[:, None]).sum(axis=1)
    return hits / sum(len(e) for e in true.values())


def report(score: DetectionScore, tious: Array) -> dict[str, Any]:
    """A `DetectionScore` as plain JSON values: average_map, map by tIoU, per_class (mean over tIoUs), recall, events, ..."""
    names = [f"{t:.2f}" for t in tious]
    return {
        "average_map": score.average,
        "map": dict(zip(names, score.mean.tolist())),
        "recall_1x": dict(zip(names, score.recall[:, 0].tolist())),
        "recall_5x": dict(zip(names, score.recall[:, 1].tolist())),
        "per_class": dict(zip(score.classes, score.ap.mean(0).tolist())),
        "events": score.events,
        "not_counted": score.left_out,
    }
