"""Non-maximum suppression of segments on a line, hard and soft, and the vote that refines what is left.

    nms_1d      repeatedly take the segment with the highest score; every other one of its class that overlaps it by IoU u has
                its score multiplied by       hard      0 if u >= iou_threshold else 1
                                              linear    1 - u if u >= iou_threshold else 1
                                              gaussian  exp(-u^2 / sigma)
                and is dropped when that falls below min_score (hard: when it was suppressed)
    vote_1d     a kept segment becomes the mean of all candidates with u >= threshold, weighted by score * u

Lengths of the suppression are stretched by 1e-6, so that u is defined for points (0); votes use plain lengths (both as
ActionFormer does, arXiv 2202.07925). Of equal scores the first in the input wins. Everything is computed in float64 on the
host: a detector proposes some thousand segments, and which is taken depends on all taken before. There is no gradient.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import backend
from . import _native
from ._register import check, define, register_backends

METHODS = ("hard", "linear", "gaussian")
_STRETCH = 1e-6


def _overlap(segment: Tensor, others: Tensor, stretch: float) -> Tensor:
    """IoU of each of `segment` [..., 2] with each of `others` [N, 2]: [..., N]; 0 where both are empty."""
    low = torch.maximum(segment[..., None, 0], others[:, 0])
    high = torch.minimum(segment[..., None, 1], others[:, 1])
    common = (high - low).clamp(min=0)
    union = (segment[..., 1] - segment[..., 0] + stretch)[..., None] + (others[:, 1] - others[:, 0] + stretch) - common
    return torch.where(union > 0, common / union.clamp(min=torch.finfo(torch.float64).tiny), 0.0)


def _nms_reference(
    segments: Tensor, scores: Tensor, labels: Tensor, method: str, iou_threshold: float, sigma: float, min_score: float,
    limit: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    index = torch.full(scores.shape, -1, dtype=torch.int64)
    out = torch.zeros_like(scores)
    taken = 0
    for label in labels.unique():
        ids = (labels == label).nonzero().squeeze(1)
        ids = ids[scores[ids] >= min_score]
        values, count = scores[ids].clone(), 0
        while len(ids) and count < limit:
            best = values.argmax()
            index[taken], out[taken] = ids[best], values[best]
            taken, count = taken + 1, count + 1
            u = _overlap(segments[ids[best]], segments[ids], _STRETCH)
            values = values * _weight(u, method, iou_threshold, sigma)
            left = values >= min_score if method != "hard" else u < iou_threshold
            left[best] = False
            ids, values = ids[left], values[left]
    return index, out


def _weight(u: Tensor, method: str, iou_threshold: float, sigma: float) -> Tensor:
    if method == "gaussian":
        return torch.exp(-(u * u) / sigma)
    if method == "linear":
        return torch.where(u >= iou_threshold, 1 - u, 1.0)
    return torch.ones_like(u)


def _vote_reference(kept: Tensor, segments: Tensor, scores: Tensor, threshold: float) -> Tensor:
    u = _overlap(kept, segments, 0.0)
    weight = torch.where(u >= threshold, scores * u, 0.0)
    total = weight.sum(1, keepdim=True)
    return torch.where(total > 0, (weight @ segments) / total.clamp(min=torch.finfo(torch.float64).tiny), kept)


def _nms_native(
    segments: Tensor, scores: Tensor, labels: Tensor, method: str, iou_threshold: float, sigma: float, min_score: float,
    limit: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    index, out = torch.empty_like(labels), torch.empty_like(scores)
    double, long = (torch.float64,), (torch.int64,)
    _native.extension().nms_1d(
        _native.address(segments, double, "nms_1d: segments [N, 2]"),
        _native.address(scores, double, "nms_1d: scores [N]"),
        _native.address(labels, long, "nms_1d: labels [N]"),
        len(scores), method, iou_threshold, sigma, min_score, limit,
        _native.address(index, long, "nms_1d: index"),
        _native.address(out, double, "nms_1d: decayed scores"),
    )  # fmt: skip
    return index, out


def _vote_native(kept: Tensor, segments: Tensor, scores: Tensor, threshold: float) -> Tensor:
    out, double = torch.empty_like(kept), (torch.float64,)
    _native.extension().vote_1d(
        _native.address(kept, double, "vote_1d: kept [K, 2]"), len(kept),
        _native.address(segments, double, "vote_1d: segments [N, 2]"),
        _native.address(scores, double, "vote_1d: scores [N]"), len(scores), threshold,
        _native.address(out, double, "vote_1d: result"), torch.get_num_threads(),
    )  # fmt: skip
    return out


register_backends("nms_1d", _nms_reference, native=_nms_native)
register_backends("vote_1d", _vote_reference, native=_vote_native)

_HOST = torch.device("cpu")
_nms = define(
    "nms_1d(Tensor segments, Tensor scores, Tensor labels, str method, float iou_threshold, float sigma, float min_score, "
    "int limit) -> (Tensor, Tensor)",
    lambda *args: backend.run("nms_1d", backend.pick("nms_1d", _HOST), *args),
    lambda segments, scores, labels, *_: (torch.empty_like(labels), torch.empty_like(scores)),
)
_vote = define(
    "vote_1d(Tensor kept, Tensor segments, Tensor scores, float threshold) -> Tensor",
    lambda *args: backend.run("vote_1d", backend.pick("vote_1d", _HOST), *args),
    lambda kept, *_: torch.empty_like(kept),
)


def _host(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor.detach().to(_HOST, dtype).contiguous()


def _check_segments(op: str, name: str, segments: Tensor) -> None:
    check(
        segments.ndim == 2 and segments.shape[1] == 2 and segments.is_floating_point(),
        f"{op}: {name} must be floating point [N, 2], got {segments.dtype} {tuple(segments.shape)}",
    )


def _check_scores(op: str, scores: Tensor, count: int) -> None:
    check(
        scores.shape == (count,) and scores.is_floating_point(),
        f"{op}: scores must be floating point [{count}], got {scores.dtype} {tuple(scores.shape)}",
    )


def nms_1d(
    segments: Tensor,
    scores: Tensor,
    labels: Tensor | None = None,
    *,
    method: str = "gaussian",
    iou_threshold: float = 0.1,
    sigma: float = 0.5,
    min_score: float = 0.001,
    limit: int = 200,
    voting_threshold: float | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Suppress segments that overlap better ones, and give the `limit` best of what is left.

    Args:
        segments: [N, 2], start and end in any unit.
        scores: [N].
        labels: int [N]: segments of different labels leave each other alone; None: all are one class.
        method: "hard", "linear" or "gaussian" (soft-NMS, arXiv 1704.04503); see the head of this file.
        iou_threshold: overlap from which hard and linear act.
        sigma: width of the gaussian, above 0.
        min_score: scores below it, before or after their decay, are dropped.
        limit: segments returned at most.
        voting_threshold: refine each segment left by a vote of all those that overlap it by at least this; None: do not.

    Returns:
        (segments [K, 2], scores [K], index int64 [K] into the input), scores descending, dtypes and device of the input.

    Runs on the host, whatever the device of the input. Raises ValueError for shapes that do not fit, values that are not
    finite, another method or a parameter out of range.
    """
    _check_segments("nms_1d", "segments", segments)
    count = len(segments)
    _check_scores("nms_1d", scores, count)
    check(method in METHODS, f"nms_1d: method must be one of {', '.join(METHODS)}, got {method!r}")
    check(sigma > 0, f"nms_1d: sigma must be above 0, got {sigma}")
    check(min_score >= 0, f"nms_1d: min_score must not be negative, got {min_score}")
    check(limit >= 1, f"nms_1d: limit must be at least 1, got {limit}")
    if labels is not None:
        check(
            labels.shape == (count,) and not labels.is_floating_point() and labels.dtype != torch.bool,
            f"nms_1d: labels must be whole numbers [{count}], got {labels.dtype} {tuple(labels.shape)}",
        )
    check(
        voting_threshold is None or 0 < voting_threshold <= 1,
        f"nms_1d: voting_threshold must lie above 0 and be at most 1, or be None for no vote, got {voting_threshold}",
    )
    places, values = _host(segments, torch.float64), _host(scores, torch.float64)
    check(
        bool(places.isfinite().all()) and bool(values.isfinite().all()),
        "nms_1d: segments and scores must be finite; drop what is not",
    )
    classes = torch.zeros(count, dtype=torch.int64) if labels is None else _host(labels, torch.int64)
    index, decayed = _nms(
        places, values, classes, method, float(iou_threshold), float(sigma), float(min_score), int(limit)
    )
    index, decayed = index[index >= 0], decayed[index >= 0]
    order = decayed.argsort(descending=True, stable=True)[:limit]
    index, decayed = index[order], decayed[order]
    kept = places[index]
    if voting_threshold is not None:
        kept = _vote(kept, places, values, float(voting_threshold))
    device = segments.device
    return kept.to(device, segments.dtype), decayed.to(device, scores.dtype), index.to(device)


def vote_1d(kept: Tensor, segments: Tensor, scores: Tensor, *, threshold: float) -> Tensor:
    """Mean of the `segments` [N, 2] that overlap each of `kept` [K, 2] by at least `threshold`, weighted by score * IoU.

    Args:
        kept, segments: start and end in one unit; scores: [N].

    Returns:
        [K, 2] in the dtype and on the device of `kept`; a segment that nothing overlaps so far stays as it is.

    Raises ValueError for shapes that do not fit or a threshold outside (0, 1].
    """
    _check_segments("vote_1d", "kept", kept)
    _check_segments("vote_1d", "segments", segments)
    _check_scores("vote_1d", scores, len(segments))
    check(0 < threshold <= 1, f"vote_1d: threshold must lie above 0 and be at most 1, got {threshold}")
    hosted = [_host(t, torch.float64) for t in (kept, segments, scores)]
    out: Tensor = _vote(*hosted, float(threshold))
    return out.to(kept.device, kept.dtype)
