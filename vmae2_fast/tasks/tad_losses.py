"""The two losses of ActionFormer, summed over points: what the task divides by its moving average of positives."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

_EPS = 1e-8


def focal_loss(logits: Tensor, targets: Tensor, *, alpha: float = 0.25, gamma: float = 2.0) -> Tensor:
    """Sigmoid focal loss of every entry (arXiv 1708.02002, equation 5), targets in [0, 1]: the shape of `logits`."""
    probability = logits.sigmoid()
    cross_entropy = F.binary_cross_entropy_with_logits(logits, targets, reduction="none")
    right = probability * targets + (1 - probability) * (1 - targets)
    weight = alpha * targets + (1 - alpha) * (1 - targets)
    return weight * cross_entropy * (1 - right) ** gamma


def distance_loss(predicted: Tensor, target: Tensor, kind: str = "diou") -> Tensor:
    """IoU loss of segments given by their distances [..., 2], at least 0, to the left and right of one point: [...].

    1 - IoU + the penalty of `kind`: "diou" (arXiv 1911.08287), the squared distance between the middles as share of the
    hull's; "giou" (arXiv 1902.09630), the share of the hull that neither covers, which is nothing where both hold the point.
    """
    (left, right), (true_left, true_right) = predicted.unbind(-1), target.unbind(-1)
    common = torch.minimum(left, true_left) + torch.minimum(right, true_right)
    union = left + right + true_left + true_right - common
    hull = torch.maximum(left, true_left) + torch.maximum(right, true_right)
    if kind == "giou":
        penalty = (hull - union) / hull.clamp(min=_EPS)
    else:
        penalty = (0.5 * (right - left - true_right + true_left) / hull.clamp(min=_EPS)) ** 2
    return 1 - common / union.clamp(min=_EPS) + penalty


def smooth(targets: Tensor, amount: float) -> Tensor:
    """Targets [..., C] pulled towards 1 / (C + 1) by `amount`."""
    return targets * (1 - amount) + amount / (targets.shape[-1] + 1)
