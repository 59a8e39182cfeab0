"""Distillation: a student matches a frozen teacher's class distribution on the very same views.

Temperature 3 and no label term as in the paper's appendix, after Beyer et al., "Knowledge distillation: a good teacher
is patient and consistent".
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..config import DistillConfig
from ..data.augment import mix_clips, mix_targets, plan_mix, smooth_targets
from ..data.loader import Batch, VideoViews
from ..models.weights import load_weights
from .base import Task, class_labels, view_batches
from .classify import build_classifier, kept_branches, logits_of, view_rows
from .metrics.classification import classification_metrics, merge_views


def distillation_loss(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """T^2 * sum over the batch of KL(softmax(teacher / T) || softmax(student / T)), fp32 inside; logits [B, C] both.

    Divided by B it is PyTorch's "batchmean". T^2 keeps the gradient's size independent of T.
    """
    target = F.log_softmax(teacher.float() / temperature, dim=-1)
    predicted = F.log_softmax(student.float() / temperature, dim=-1)
    return temperature**2 * F.kl_div(predicted, target, reduction="sum", log_target=True)


class DistillTask(Task[DistillConfig]):
    """`model` is the student; `teacher` has no gradients, stays in evaluation mode and is in no checkpoint."""

    def __init__(self, config: DistillConfig, device: torch.device | str = "cpu") -> None:
        super().__init__(config, device)
        if config.teacher.num_classes != config.model.num_classes:
            raise ValueError(
                f"{config.name}: teacher.num_classes={config.teacher.num_classes} differs from "
                f"model.num_classes={config.model.num_classes}; student and teacher must share their classes"
            )
        for key in ("frames", "size", "in_chans"):
            ours, theirs = getattr(config.model, key), getattr(config.teacher, key)
            if ours != theirs:
                raise ValueError(
                    f"{config.name}: teacher.{key}={theirs} differs from model.{key}={ours}; both see the same clips"
                )
        if config.teacher_weights is None:
            raise ValueError(f'{config.name}: set teacher_weights (or "random", which is good for trying things out only)')
        self.model = build_classifier(config.model, config.name).to(self.device)
        self.teacher = build_classifier(config.teacher, config.name).to(self.device)
        if config.teacher_weights != "random":
            load_weights(self.teacher, config.teacher_weights)
        self.teacher.eval().requires_grad_(False)

    def needs_labels(self) -> bool:
        return self.config.label_weight > 0

    def loss(self, batch: Batch) -> dict[str, Tensor]:
        mix = plan_mix(self.config.mix, batch.position, self.config.model.size, self.config.seed)
        clip = mix_clips(batch.clip.to(self.device, non_blocking=True), mix)
        with self.autocast():
            with torch.no_grad():
                target = self.teacher(clip).float()
            logits = self.model(clip, kept_branches(self, batch)).float()
        total = distillation_loss(logits, target, self.config.temperature)
        if self.config.label_weight > 0:
            classes = self.config.model.num_classes
            label = class_labels(batch.label, batch.paths, classes).to(self.device, non_blocking=True)
            wanted = mix_targets(smooth_targets(label, classes, 0.0), mix)
            total = total + self.config.label_weight * F.cross_entropy(logits, wanted, reduction="sum")
        return {"loss_sum": total, "agreement": (logits.detach().argmax(-1) == target.argmax(-1)).sum()}

    @torch.no_grad()
    def evaluate(self, views: Iterable[VideoViews]) -> dict[str, Any]:
        """Multi-view metrics of the student (see `classification_metrics`), `teacher_top1`, and `agreement`: the share
        of videos on which student and teacher choose the same class."""
        self.model.eval()
        student, teacher = [], []
        for batch in view_batches(views, self.config.views.batch):
            class_labels(torch.tensor(batch.label), batch.path, self.config.model.num_classes)
            student += view_rows(batch, logits_of(self, self.model, batch.clip))
            teacher += view_rows(batch, logits_of(self, self.teacher, batch.clip))
        ours, theirs = merge_views(student), merge_views(teacher)
        agree = ours.scores.argmax(axis=1) == theirs.scores.argmax(axis=1)
        return {
            **classification_metrics(ours.scores, ours.labels),
            "teacher_top1": classification_metrics(theirs.scores, theirs.labels)["top1"],
            "agreement": float(agree.mean()),
        }
