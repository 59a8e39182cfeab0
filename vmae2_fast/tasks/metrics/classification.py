"""Classification metrics: top-k, per-class accuracy, and the merge of several views of a video."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array = NDArray[np.float64]
_VIDEOS_AT_ONCE = 1024


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


class Predictions(NamedTuple):
    """Logits of many views as arrays; rows in any order, repeats allowed."""

    video: NDArray[np.int64]
    """Number of the video, [R]."""
    chunk: NDArray[np.int64]
    split: NDArray[np.int64]
    label: NDArray[np.int64]
    logits: NDArray[Any]
    """[R, C]."""


class Merged(NamedTuple):
    """One row a video, in order of the videos' numbers (`merge_views`: of first appearance)."""

    videos: list[Hashable]
    scores: Array
    labels: NDArray[np.int64]


def merge_predictions(predictions: Predictions, *, scores: str = "softmax") -> Merged:
    """Mean over the unique (chunk, split) views of each video of softmax(logits), or of the logits (`scores="logits"`).

    The first occurrence of a view counts, as in the official `merge`; padding of a distributed sampler repeats views.
    The official code compares the *concatenated* digits of chunk and split, so (1, 12) hides (11, 2); here they differ.
    Views are summed in the order of (chunk, split), so the result does not depend on how they were spread over processes.
    Raises ValueError for no views at all.
    """
    if not len(predictions.video):
        raise ValueError("no views to merge: the validation set gave no decodable video")
    keys = np.stack((predictions.video, predictions.chunk, predictions.split), axis=1)
    _, first = np.unique(keys, axis=0, return_index=True)  # sorted by video, chunk, split; the first row of each
    videos, begin, count = np.unique(predictions.video[first], return_index=True, return_counts=True)
    mean = np.empty((len(videos), predictions.logits.shape[1]))
    for start in range(0, len(videos), _VIDEOS_AT_ONCE):  # in float64 the logits of a large set would be many gigabytes
        part = slice(start, start + _VIDEOS_AT_ONCE)
        rows = predictions.logits[first[begin[start] : begin[part][-1] + count[part][-1]]]
        values = softmax(rows) if scores == "softmax" else np.asarray(rows, dtype=np.float64)
        mean[part] = np.add.reduceat(values, begin[part] - begin[start], axis=0) / count[part, None]
    return Merged(videos.tolist(), mean, predictions.label[first][begin])


def merge_views(views: Iterable[View], *, scores: str = "softmax") -> Merged:
    """`merge_predictions` of views whose videos have names."""
    number: dict[Hashable, int] = {}
    rows = [(number.setdefault(view.video, len(number)), view) for view in views]
    if not rows:
        raise ValueError("no views to merge: the validation set gave no decodable video")
    table = np.array([(i, view.chunk, view.split, view.label) for i, view in rows], dtype=np.int64)
    logits = np.asarray([np.asarray(view.logits, dtype=np.float64) for _, view in rows])
    merged = merge_predictions(Predictions(table[:, 0], table[:, 1], table[:, 2], table[:, 3], logits), scores=scores)
    return merged._replace(videos=list(number))


def merge_ranks(views: Sequence[View], gather: Callable[[Any], list[Any]]) -> Merged:
    """`merge_views` over all ranks, each of which has all views of its videos; the same on every rank.

    gather: a value of every rank, in their order, on every rank. Raises ValueError where no rank has a view.
    """
    parts: list[Merged] = [part for part in gather(merge_views(views) if views else None) if part is not None]
    if not parts:
        return merge_views(views)
    videos = [video for part in parts for video in part.videos]
    return Merged(videos, np.concatenate([part.scores for part in parts]), np.concatenate([part.labels for part in parts]))


def most_confused(counts: NDArray[np.int64], pairs: int = 20) -> list[tuple[int, int, int]]:
    """(label, predicted, videos) of the most frequent errors in a confusion matrix, most frequent first."""
    errors = counts.copy()
    np.fill_diagonal(errors, 0)
    order = np.argsort(-errors, axis=None, kind="stable")[:pairs]
    found = [(int(i // len(counts)), int(i % len(counts)), int(errors.flat[i])) for i in order]
    return [pair for pair in found if pair[2]]


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
