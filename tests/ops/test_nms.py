"""nms_1d and vote_1d: every backend against the specification read word by word, and what bad input says."""

from __future__ import annotations

import math
import re

import pytest
import torch
from torch import Tensor

from tests.support import assert_within_budget, awkward, backends, opcheck
from vmae2_fast import backend
from vmae2_fast.ops import nms_1d, vote_1d

BACKENDS = backends("nms_1d")
METHODS = ("hard", "linear", "gaussian")


def random_case(count: int, classes: int = 3, seed: int = 0, dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    start = 40 * torch.rand(count, generator=generator, dtype=torch.float64)
    segments = torch.stack((start, start + 8 * torch.rand(count, generator=generator, dtype=torch.float64)), dim=1)
    scores = (torch.randperm(count, generator=generator) + 1) / (count + 1)
    return segments.to(dtype), scores.to(dtype), torch.randint(classes, (count,), generator=generator)


def plain(segments, scores, labels, method, iou_threshold, sigma, min_score, limit):
    """The definition, candidate by candidate on Python numbers: [(index, score)], best first."""
    left = {i: s for i, s in enumerate(scores.tolist()) if s >= min_score}
    out = []
    places = segments.tolist()
    while left:
        best = max(left, key=lambda i: (left[i], -i))
        out.append((best, left.pop(best)))
        a, b = places[best]
        for i in [i for i in left if labels[i] == labels[best]]:
            c, d = places[i]
            common = max(0.0, min(b, d) - max(a, c))
            u = common / ((b - a + 1e-6) + (d - c + 1e-6) - common)
            factor = {
                "hard": 0.0 if u >= iou_threshold else 1.0,
                "linear": 1 - u if u >= iou_threshold else 1.0,
                "gaussian": math.exp(-u * u / sigma),
            }[method]
            left[i] *= factor
            if left[i] < min_score or factor == 0.0:
                del left[i]
    return sorted(out, key=lambda item: -item[1])[:limit]


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("count", "classes"), [(1, 1), (2, 1), (60, 1), (150, 4)])
def test_equals_the_definition(name, method, count, classes):
    segments, scores, labels = random_case(count, classes, dtype=torch.float64)
    options = {"method": method, "iou_threshold": 0.2, "sigma": 0.4, "min_score": 0.03, "limit": 40}
    with backend.use_backend(name):
        kept, decayed, index = nms_1d(segments, scores, labels, **options)
    wanted = plain(segments, scores, labels.tolist(), **options)
    assert index.tolist() == [i for i, _ in wanted]
    assert torch.equal(kept, segments[index])
    truth = torch.tensor([s for _, s in wanted], dtype=torch.float64)
    assert_within_budget(decayed, truth, truth)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_backends_agree_in_every_dtype_and_layout(method, dtype):
    segments, scores, labels = random_case(90, dtype=dtype)
    results = {}
    for name in BACKENDS:
        with backend.use_backend(name):
            results[name] = nms_1d(segments, scores, labels, method=method, voting_threshold=0.6)
            for _, layout in awkward(segments):
                again = nms_1d(layout, scores, labels, method=method, voting_threshold=0.6)
                assert all(torch.equal(a, b) for a, b in zip(again, results[name]))
    first, *others = results.values()
    assert first[0].dtype == first[1].dtype == dtype
    for other in others:
        assert torch.equal(first[2], other[2])
        torch.testing.assert_close(first[1], other[1], rtol=torch.finfo(dtype).eps, atol=0)


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("method", METHODS)
def test_equal_scores_go_by_their_order(name, method):
    segments = torch.tensor([[0.0, 1.0], [5.0, 6.0], [0.0, 1.0], [9.0, 10.0]])
    with backend.use_backend(name):
        index = nms_1d(segments, torch.full((4,), 0.5), method=method, min_score=0.3)[2]
    assert index[:3].tolist() == [0, 1, 3]


@pytest.mark.parametrize("name", BACKENDS)
def test_classes_leave_each_other_alone_and_points_overlap_nothing(name):
    segments = torch.tensor([[2.0, 4.0], [2.0, 4.0], [3.0, 3.0], [3.0, 3.0]])
    scores = torch.tensor([0.9, 0.8, 0.7, 0.6])
    with backend.use_backend(name):
        apart = torch.tensor([0, 1, 0, 0])
        assert nms_1d(segments, scores, apart, method="hard", iou_threshold=0.5)[2].tolist() == [0, 1, 2, 3]
        assert nms_1d(segments, scores, method="hard", iou_threshold=0.5)[2].tolist() == [0, 2, 3]
        empty = nms_1d(segments[:0], scores[:0])
        assert [len(x) for x in empty] == [0, 0, 0]
        assert len(nms_1d(segments, scores, min_score=0.95)[1]) == 0
        assert nms_1d(segments, scores, torch.tensor([0, 1, 2, 3]), limit=2)[2].tolist() == [0, 1]


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_vote_is_the_weighted_mean_of_what_overlaps(name, dtype):
    segments, scores, _ = random_case(80, dtype=dtype)
    kept = segments[:20]

    def mean(kind):
        a, s, w = kept.to(kind), segments.to(kind), scores.to(kind)
        common = (torch.minimum(a[:, None, 1], s[:, 1]) - torch.maximum(a[:, None, 0], s[:, 0])).clamp(min=0)
        u = common / ((a[:, 1] - a[:, 0])[:, None] + (s[:, 1] - s[:, 0]) - common)
        weight = torch.where(u >= 0.3, w * u, 0.0)
        return weight @ s / weight.sum(1, keepdim=True)

    with backend.use_backend(name):
        voted = vote_1d(kept, segments, scores, threshold=0.3)
        alone = vote_1d(torch.tensor([[500.0, 510.0], [7.0, 7.0]], dtype=dtype), segments, scores, threshold=0.3)
    assert_within_budget(voted, mean(dtype), mean(torch.float64))
    assert alone.tolist() == [[500.0, 510.0], [7.0, 7.0]]


def test_opcheck():
    segments, scores, labels = random_case(12, dtype=torch.float64)
    opcheck(torch.ops.vmae2.nms_1d.default, (segments, scores, labels, "gaussian", 0.1, 0.5, 0.001, 5))
    opcheck(torch.ops.vmae2.vote_1d.default, (segments[:3], segments, scores, 0.5))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"segments": torch.zeros(4, 3)}, "segments must be floating point [N, 2], got torch.float32 (4, 3)"),
        ({"scores": torch.zeros(3)}, "scores must be floating point [4]"),
        ({"labels": torch.zeros(4)}, "labels must be whole numbers [4]"),
        ({"method": "soft"}, "method must be one of hard, linear, gaussian, got 'soft'"),
        ({"sigma": 0.0}, "sigma must be above 0"),
        ({"min_score": -1.0}, "min_score must not be negative"),
        ({"limit": 0}, "limit must be at least 1"),
        ({"voting_threshold": 0.0}, "voting_threshold must lie above 0"),
        ({"scores": torch.tensor([0.1, math.nan, 0.2, 0.3])}, "must be finite"),
    ],
)
def test_bad_input_is_named(changes, message):
    arguments = {"segments": torch.rand(4, 2), "scores": torch.rand(4), **changes}
    with pytest.raises(ValueError, match=re.escape(message)):
        nms_1d(**arguments)
