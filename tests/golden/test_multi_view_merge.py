"""Merging the views of a video: recorded from the official `merge`, two recordings in two formats."""

from __future__ import annotations

import json

import pytest

from tests.golden.support import golden_root
from vmae2_fast.tasks.metrics.classification import View, merge_views, topk_accuracy

GOLDEN = golden_root()
SAMPLING = GOLDEN / "parity" / "meta" / "sampling.json"
FILES = GOLDEN / "downstream" / "multiview_merge.json"


def _cases():
    if SAMPLING.exists() and (case := json.loads(SAMPLING.read_text()).get("multi_view_merge")):
        views = [View(r["id"], r["label"], r["chunk"], r["split"], r["logits"]) for r in case["rows"]]
        yield "rows-softmax", views, "softmax", case["prob_top1_top5"]
        yield "rows-logits", views, "logits", case["score_top1_top5"]
    if FILES.exists():
        case = json.loads(FILES.read_text())
        views = [_view(line) for text in case["rank_files"] for line in text.strip().splitlines()[1:]]
        yield "files-softmax", views, "softmax", case["expected_top1_top5"]["prob"]
        yield "files-logits", views, "logits", case["expected_top1_top5"]["score"]


def _view(line: str) -> View:
    """A line of the official result files: `id [logits] label chunk split`."""
    video, rest = line.split(" [")
    logits, numbers = rest.split("] ")
    label, chunk, split = map(int, numbers.split())
    return View(video, label, chunk, split, [float(x) for x in logits.split(",")])


@pytest.mark.parametrize(("views", "scores", "expected"), [pytest.param(*c[1:], id=c[0]) for c in _cases()])
def test_top1_and_top5_equal_the_official_merge(views, scores, expected):
    merged = merge_views(views, scores=scores)
    ours = [100 * topk_accuracy(merged.scores, merged.labels, k) for k in (1, 5)]
    assert ours == pytest.approx(expected, rel=1e-12)
