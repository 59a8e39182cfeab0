"""From the heads of a temporal detector to detections in seconds, and their fusion with class scores of whole videos."""

from __future__ import annotations

from collections.abc import Sequence as Names
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..config import DetectionConfig
from ..data.tad import Detections, TadError, VideoScores
from ..data.tad_loader import Sequence, pad
from ..models.actionformer import ActionFormer, Level
from ..ops.nms import nms_1d


class Candidates(NamedTuple):
    """Detections of one video before seconds and names."""

    segments: Tensor
    """[N, 2], in features."""
    scores: Tensor
    labels: Tensor


def candidates(levels: list[Level], config: DetectionConfig) -> Candidates:
    """What the levels of one video (batch of 1) propose: the best points of each level and the segments they stand for."""
    found = []
    for level in levels:
        probability = level.logits[0].float().sigmoid() * level.valid[0, :, None]
        classes = probability.shape[1]
        flat = probability.flatten()
        kept = (flat > config.min_probability).nonzero().squeeze(1)
        order = flat[kept].argsort(descending=True, stable=True)[: config.candidates]
        kept = kept[order]
        point = kept // classes
        at = point.float() * level.stride
        near = level.distances[0, point].float() * level.stride
        segments = torch.stack((at - near[:, 0], at + near[:, 1]), dim=1)
        long_enough = segments[:, 1] - segments[:, 0] > config.min_length
        found.append(Candidates(segments[long_enough], flat[kept][long_enough], (kept % classes)[long_enough]))
    return Candidates(*(torch.cat(parts) for parts in zip(*found)))


@torch.no_grad()
def detect(
    model: ActionFormer, sequence: Sequence, config: DetectionConfig, classes: Names[str], *,
    device: torch.device | str = "cpu",
) -> Detections:  # fmt: skip
    """Detections of one video, best first. `model` in evaluation mode on `device`; `classes` names its classes."""
    features, valid = pad([sequence.features], model.padded_length(len(sequence.features)))
    found = candidates(model(features.to(device), valid.to(device)), config)
    segments, scores, index = nms_1d(
        found.segments, found.scores, found.labels if config.per_class else None, method=config.method,
        iou_threshold=config.iou_threshold, sigma=config.sigma, min_score=config.min_score, limit=config.limit,
        voting_threshold=config.voting_threshold,
    )  # fmt: skip
    seconds = sequence.grid.to_seconds(segments.cpu().numpy())
    labels = tuple(classes[i] for i in found.labels[index].tolist())
    return Detections(seconds, labels, scores.double().cpu().numpy())


def fuse(found: Detections, scores: np.ndarray, classes: Names[str], *, keep: int, top: int) -> Detections:
    """Give class-agnostic detections the most likely classes of their video.

    The `keep` best detections are repeated for each of the `top` classes with the highest `scores` [classes], with the score
    sqrt(score of the class * score of the detection); class after class, best first within each.
    """
    best = np.argsort(-found.scores, kind="stable")[:keep]
    likely = np.argsort(-scores, kind="stable")[:top]
    segments, score = found.segments[best], found.scores[best]
    return Detections(
        np.concatenate([segments] * len(likely)),
        tuple(classes[c] for c in likely for _ in best),
        np.concatenate([np.sqrt(scores[c] * score) for c in likely]),
    )


def fuse_all(found: dict[str, Detections], scores: VideoScores, config: DetectionConfig) -> dict[str, Detections]:
    """`fuse` for every video. Raises TadError naming a video without class scores."""
    for video in found:
        if video not in scores.scores:
            raise TadError(f"{video} has no class scores to fuse its detections with; add it to the file of video scores")
    return {
        video: fuse(d, scores.scores[video], scores.classes, keep=config.fused, top=config.fused_classes)
        for video, d in found.items()
    }
