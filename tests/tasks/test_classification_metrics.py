from __future__ import annotations

import numpy as np
import pytest

from vmae2_fast.tasks.metrics import classification
from vmae2_fast.tasks.metrics.classification import (
    Predictions,
    View,
    classification_metrics,
    confusion_matrix,
    merge_predictions,
    merge_views,
    softmax,
    topk_accuracy,
)  # fmt: skip

SCORES = np.array([[0.1, 0.7, 0.2], [0.5, 0.3, 0.2], [0.2, 0.3, 0.5], [0.6, 0.3, 0.1]])
LABELS = np.array([1, 1, 2, 2])


def test_topk():
    assert topk_accuracy(SCORES, LABELS, 1) == 0.5
    assert topk_accuracy(SCORES, LABELS, 2) == 0.75
    assert topk_accuracy(SCORES, LABELS, 5) == 1.0


def test_confusion_and_per_class():
    assert confusion_matrix(SCORES, LABELS).tolist() == [[0, 0, 0], [1, 1, 0], [1, 0, 1]]
    metrics = classification_metrics(SCORES, LABELS)
    assert metrics["per_class_top1"] == [None, 0.5, 0.5]
    assert metrics["mean_class_top1"] == 0.5
    assert metrics["videos"] == 4


def test_a_repeated_view_counts_once_and_two_digit_views_do_not_collide():
    logits = {(0, 0): [1.0, 0.0], (1, 12): [0.0, 3.0], (11, 2): [0.0, 5.0]}
    views = [View("a", 1, *key, values) for key, values in logits.items()]
    merged = merge_views([*views, View("a", 1, 0, 0, [100.0, 0.0])])
    assert merged.videos == ["a"]
    np.testing.assert_allclose(merged.scores[0], np.mean([softmax(v) for v in logits.values()], axis=0), rtol=1e-15)


def test_softmax_of_huge_logits_is_finite():
    np.testing.assert_array_equal(softmax([1e4, 0.0]), [1.0, 0.0])


def test_nothing_to_merge_is_an_error():
    with pytest.raises(ValueError, match="no views to merge"):
        merge_views([])


def test_merging_in_pieces_changes_nothing(monkeypatch):
    rng = np.random.RandomState(0)
    rows = [(v, c, s) for v in rng.permutation(11) for c in range(1 + v % 3) for s in range(2)]
    order = rng.permutation(len(rows))
    table = np.array(rows)[order]
    found = Predictions(table[:, 0], table[:, 1], table[:, 2], table[:, 0] % 4, rng.randn(len(rows), 4).astype(np.float32))
    whole = merge_predictions(found)
    monkeypatch.setattr(classification, "_VIDEOS_AT_ONCE", 3)
    pieces = merge_predictions(found)
    assert np.array_equal(whole.scores, pieces.scores)
    by_hand = [softmax(found.logits[found.video == v]).mean(axis=0) for v in range(11)]
    np.testing.assert_allclose(whole.scores, by_hand, rtol=1e-12)
    assert whole.labels.tolist() == [v % 4 for v in range(11)]


def test_most_confused_pairs_come_first():
    counts = np.array([[9, 2, 0], [5, 9, 1], [0, 0, 9]])
    assert classification.most_confused(counts, 2) == [(1, 0, 5), (0, 1, 2)]
    assert classification.most_confused(np.eye(3, dtype=np.int64)) == []
