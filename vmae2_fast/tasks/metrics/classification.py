"""Classification metrics: top-k, per-class accuracy, and the merge of several views of a video."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array = NDArray[np.float64]


def softmax(logits: ArrayLike) -> Array:
    """Softmax over the last axis in float64."""
    values = np.asarray(logits, dtype=np.float64)
    exponents = np.exp(values - values.max(axis=-1, keepdims=True))
    return exponents / exponents.sum(axis=-1, keepdims=True)


def topk_accuracy(scores: ArrayLike, labels: ArrayLike, k: int = 1) -> float:
    """Share of rows of `scores` [V, C] whose label is among the k highest; ties go to the lower class index.

    `k` above C is C. NaN for no rows.
    """
    scores, labels = np.asarray(scores), np.asarray(labels)
    if not len(labels):
        return float("nan")
    best = np.argsort(-scores, axis=1, kind="stable")[:, :k]
    return float((best == labels[:, None]).any(axis=1).mean())


def confusion_matrix(scores: ArrayLike, labels: ArrayLike) -> NDArray[np.int64]:
    """Counts [C, C]: row = label, column = highest score."""
    scores, labels = np.asarray(scores), np.asarray(labels)
    counts = np.zeros((scores.shape[1], scores.shape[1]), dtype=np.int64)
    np.add.at(counts, (labels, scores.argmax(axis=1)), 1)
    return counts


class View(NamedTuple):
    """Logits of one view: which video, its label, which clip in time (`chunk`) and crop in space (`split`)."""

    video: Hashable
    label: int
    chunk: int
    split: int
    logits: Sequence[float] | Array


class Merged(NamedTuple):
    """One row a video, in order of first appearance."""

    videos: list[Hashable]
    scores: Array
    labels: NDArray[np.int64]


def merge_views(views: Iterable[View], *, scores: str = "softmax") -> Merged:
    """Mean over the unique (chunk, split) views of each video of softmax(logits), or of the logits (`scores="logits"`).

    The first occurrence of a view counts, as in the official `merge`; padding of a distributed sampler repeats views.
    The official code compares the *concatenated* digits of chunk and split, so (1, 12) hides (11, 2); here they differ.
    Raises ValueError for no views at all.
    """
    rows: dict[Hashable, list[Array]] = {}
    seen: set[tuple[Hashable, int, int]] = set()
    labels: dict[Hashable, int] = {}
    for view in views:
        key = (view.video, view.chunk, view.split)
        if key in seen:
            continue
        seen.add(key)
        row = softmax(view.logits) if scores == "softmax" else np.asarray(view.logits, dtype=np.float64)
        rows.setdefault(view.video, []).append(row)
        labels[view.video] = int(view.label)
    if not rows:
        raise ValueError("no views to merge: the validation set gave no decodable video")
    videos = list(rows)
    return Merged(videos, np.stack([np.mean(rows[v], axis=0) for v in videos]), np.array([labels[v] for v in videos]))


def classification_metrics(scores: ArrayLike, labels: ArrayLike) -> dict[str, Any]:
    """top1, top5 (shares in 0..1), videos, mean_class_top1, per_class_top1 (None for an absent class), confusion.

    `confusion` is left out above 64 classes, where nobody reads it.
    """
    counts = confusion_matrix(scores, labels)
    totals = counts.sum(axis=1)
    per_class = [float(counts[c, c] / totals[c]) if totals[c] else None for c in range(len(counts))]
    present = [p for p in per_class if p is not None]
    out: dict[str, Any] = {
        "top1": topk_accuracy(scores, labels, 1),
        "top5": topk_accuracy(scores, labels, 5),
        "videos": int(totals.sum()),
        "mean_class_top1": float(np.mean(present)),
        "per_class_top1": per_class,
    }
    if len(counts) <= 64:
        out["confusion"] = counts.tolist()
    return out
