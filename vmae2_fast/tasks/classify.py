"""Classification: post-pre-training and fine-tuning with mixup, cutmix and label smoothing, multi-view test."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..config import ClassifyConfig, ModelConfig
from ..data.augment import mix_clips, mix_targets, plan_mix, smooth_targets
from ..data.evaluation_loader import VideoViews
from ..data.loader import Batch
from ..models import VisionTransformer, build_model
from .base import Task, ViewBatch, class_labels, view_batches
from .metrics.classification import View, classification_metrics, merge_ranks


class ClassifyTask(Task[ClassifyConfig]):
    """Cross-entropy with the (mixed, smoothed) targets over `model.num_classes` classes."""

    def __init__(self, config: ClassifyConfig, device: torch.device | str = "cpu", *, on_meta: bool = False) -> None:
        super().__init__(config, device, on_meta=on_meta)
        self.model = self.place(lambda: build_classifier(config.model, config.name))
        if config.frozen:
            self.model.freeze_trunk()

    def needs_labels(self) -> bool:
        return True

    def loss(self, batch: Batch) -> dict[str, Tensor]:
        config, classes = self.config, self.config.model.num_classes
        label = class_labels(batch.label, batch.paths, classes).to(self.device, non_blocking=True)
        mix = plan_mix(config.mix, batch.position, config.model.size, config.seed)
        clip = mix_clips(batch.clip.to(self.device, non_blocking=True), mix)
        target = mix_targets(smooth_targets(label, classes, config.label_smoothing), mix)
        with self.autocast():
            logits = self.model(clip, kept_branches(self, batch)).float()
        total = F.cross_entropy(logits, target, reduction="sum")
        # of mixed clips: how often the larger share was named
        return {"loss_sum": total, "top1": (logits.detach().argmax(-1) == target.argmax(-1)).sum()}

    @torch.no_grad()
    def evaluate(self, views: Iterable[VideoViews], *, shuffled: bool = False) -> dict[str, Any]:
        """Multi-view metrics (see `classification_metrics`). `shuffled` puts each clip's frames into a random order
        (fixed by seed, video and view): what is left is what single frames tell."""
        self.model.eval()
        merged, classes = [], self.config.model.num_classes
        for batch in view_batches(views, self.config.views.batch):
            class_labels(torch.tensor(batch.label), batch.path, classes)
            clip = shuffle_frames(batch, self.config.seed) if shuffled else batch.clip
            merged += view_rows(batch, logits_of(self, self.model, clip))
        result = merge_ranks(merged, self.gather)
        return classification_metrics(result.scores, result.labels)


def build_classifier(config: ModelConfig, run: str, *, head: bool = True) -> VisionTransformer:
    """The classification model of `config`. Raises ValueError when it has no `head`, or is a pre-training model."""
    if head and config.num_classes < 1:
        raise ValueError(f"{run}: set num_classes of {config.name} to the number of classes, got {config.num_classes}")
    model = build_model(config)
    if not isinstance(model, VisionTransformer):
        raise ValueError(f"{run}: classification needs a vit_* model, got model.name={config.name}")
    return model


def kept_branches(task: Task[Any], batch: Batch) -> list[Tensor] | None:
    """The samples that run each branch of `task.model`, where its drop path skips the others."""
    if not task.config.model.drop_path_skip:
        return None
    model: VisionTransformer = task.model  # type: ignore[assignment]
    return model.draw_kept(batch.position, batch.view, task.config.seed)


def logits_of(task: Task[Any], model: nn.Module, clip: Tensor) -> np.ndarray:
    """Logits float64 [B, C] on the host for clip uint8 [B,T,H,W,C]."""
    with task.autocast():
        return model(clip.to(task.device, non_blocking=True)).double().cpu().numpy()


def view_rows(batch: ViewBatch, logits: np.ndarray) -> list[View]:
    """One `View` a row of a batch; views of a video are numbered as the loader orders them."""
    return [View(video, label, v, 0, row) for video, v, label, row in zip(batch.video, batch.view, batch.label, logits)]


def shuffle_frames(batch: ViewBatch, seed: int) -> Tensor:
    """The clips with frames permuted, one permutation a clip, a pure function of (seed, video, view)."""
    frames = batch.clip.shape[1]
    rows = [np.random.default_rng((seed, video, view)).permutation(frames) for video, view in zip(batch.video, batch.view)]
    return torch.stack([clip[torch.from_numpy(row)] for clip, row in zip(batch.clip, rows)])
