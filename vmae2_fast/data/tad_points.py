"""Points of a temporal pyramid and what is asked of them (ActionFormer, arXiv 2202.07925, section 3.3).

Level l has a point at every 2^l-th feature. A point is positive for an action if it lies inside it and within
`center_radius` strides of its middle, and the farther end is as far away as the level is responsible for. Of several
actions the shortest wins, with all that are longer than it by no more than 1e-3.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..config import ActionFormerConfig

FARTHEST = 10000.0
"""End of the last level's range, in features."""
_AS_SHORT = 1e-3


class Points(NamedTuple):
    """All points of all levels of a sequence, one level after the other."""

    position: Tensor
    """float32 [P], in features."""
    nearest: Tensor
    farthest: Tensor
    """float32 [P]: the distances to an action's farther end that the point is responsible for."""
    stride: Tensor
    """float32 [P]."""


class Targets(NamedTuple):
    """What the heads should say at every point."""

    classes: Tensor
    """float32 [P, classes], 0 or 1."""
    distances: Tensor
    """float32 [P, 2], in strides; meaningful at positive points."""


def make_points(config: ActionFormerConfig, length: int) -> Points:
    """Points for a sequence of `length` features, a multiple of the last level's stride."""
    ends = [0.0, *config.range_ends, FARTHEST]
    columns = []
    for level in range(len(config.windows)):
        position = torch.arange(0, length, 2**level, dtype=torch.float32)
        columns.append([position, *(torch.full_like(position, v) for v in (ends[level], ends[level + 1], 2.0**level))])
    return Points(*(torch.cat(column) for column in zip(*columns)))


def label_points(points: Points, segments: Tensor, labels: Tensor, classes: int, radius: float) -> Targets:
    """Targets of `points` for actions `segments` float32 [N, 2] in features with `labels` int64 [N]."""
    count = len(points.position)
    if not len(segments):
        return Targets(torch.zeros(count, classes), torch.zeros(count, 2))
    at, stride = points.position[:, None], points.stride[:, None]
    start, end = segments[:, 0], segments[:, 1]
    distances = torch.stack((at - start, end - at), dim=-1)
    middle, reach = (start + end) / 2, stride * radius
    near = torch.minimum(
        at - torch.maximum(middle - reach, start), torch.minimum(middle + reach, end) - at
    )
    farther = distances.amax(-1)
    mine = (near > 0) & (farther >= points.nearest[:, None]) & (farther <= points.farthest[:, None])
    length = torch.where(mine, end - start, torch.inf)
    shortest, which = length.min(dim=1)
    chosen = (length <= shortest[:, None] + _AS_SHORT) & length.isfinite()
    one_hot = torch.nn.functional.one_hot(labels, classes).float()
    hot = (chosen.float() @ one_hot).clamp(max=1)
    return Targets(hot, distances[torch.arange(count), which] / stride)
