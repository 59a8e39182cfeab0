"""Distillation: a student learns from a frozen teacher that sees the very same clips.

kl          T^2 KL(softmax(t / T) || softmax(s / T)), T = 3 and no label term: the paper's appendix, after Beyer et al.,
            "Knowledge distillation: a good teacher is patient and consistent"
soft_ce     cross-entropy with the teacher's distribution softmax(t)
deit_soft   (1 - a) CE(s, label) + a T^2 KL(...) / C       C classes; Touvron et al., "Training data-efficient image
deit_hard   (1 - a) CE(s, label) + a CE(s, argmax t)       transformers & distillation through attention", section 4
features    the student, a masked autoencoder, predicts the teacher's tokens where its own are hidden: smooth L1, after
            Wang et al., "Masked video distillation" (MVD); grids of another patch size are resized
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from ..config import DistillConfig, to_dict
from ..data.augment import mix_clips, mix_targets, plan_mix, smooth_targets
from ..data.evaluation_loader import VideoViews
from ..data.loader import Batch
from ..models import PretrainViT, VisionTransformer, build_model, resolve
from ..models.weights import load_weights, weights_digest
from ..ops.masks import DualMask, dual_mask, mask_sizes
from .base import Task, autocast_dtype, class_labels, view_batches
from .classify import build_classifier, kept_branches, view_rows
from .metrics.classification import classification_metrics, merge_ranks
from .teacher_cache import FREE, TeacherCache


def distillation_loss(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """T^2 * sum over the batch of KL(softmax(teacher / T) || softmax(student / T)), fp32 inside; logits [B, C] both.

    Divided by B it is PyTorch's "batchmean". T^2 keeps the gradient's size independent of T.
    """
    target = F.log_softmax(teacher.float() / temperature, dim=-1)
    predicted = F.log_softmax(student.float() / temperature, dim=-1)
    return temperature**2 * F.kl_div(predicted, target, reduction="sum", log_target=True)


def soft_cross_entropy(student: Tensor, teacher: Tensor) -> Tensor:
    """Sum over the batch of -sum_c softmax(teacher)_c log softmax(student)_c, fp32; logits [B, C] both."""
    return F.cross_entropy(student.float(), teacher.float().softmax(-1), reduction="sum")


def deit_loss(
    student: Tensor, teacher: Tensor, label: Tensor, *, hard: bool, alpha: float = 0.5, temperature: float = 3.0
) -> Tensor:
    """The DeiT objectives as sums over the batch (head of this file); logits [B, C], label int64 [B] or targets [B, C]."""
    base = F.cross_entropy(student.float(), label, reduction="sum")
    if hard:
        taught = F.cross_entropy(student.float(), teacher.argmax(-1), reduction="sum")
    else:  # the released code divides by B * C, not by B
        taught = distillation_loss(student, teacher, temperature) / student.shape[-1]
    return (1 - alpha) * base + alpha * taught


def feature_loss(
    predicted: Tensor, target: Tensor, *, normalize: bool = True, distance: Literal["smooth_l1", "l2"] = "smooth_l1"
) -> Tensor:
    """Smooth L1 or squared difference as a sum over tokens of the mean over channels, fp32: predicted and the teacher's tokens
    [B, N, D].

    normalize: each target token is brought to mean 0 and variance 1 first (LayerNorm without affine, eps 1e-6).
    """
    target = target.float()
    if normalize:
        target = F.layer_norm(target, target.shape[-1:], eps=1e-6)
    each = F.smooth_l1_loss if distance == "smooth_l1" else F.mse_loss
    return each(predicted.float(), target, reduction="none").mean(-1).sum()


def resize_tokens(tokens: Tensor, old: tuple[int, int, int], new: tuple[int, int, int]) -> Tensor:
    """Tokens [B, T'H'W', D] of grid `old` on grid `new`: linear in time, bilinear in space (pixel centres at halves)."""
    if old == new:
        return tokens
    grid = tokens.float().unflatten(1, old).movedim(-1, 1)
    return F.interpolate(grid, size=new, mode="trilinear", align_corners=False).flatten(2).transpose(1, 2)


class DistillTask(Task[DistillConfig]):
    """`model` is the student; `teacher` has no gradients, stays in evaluation mode and is in no checkpoint."""

    teacher: VisionTransformer

    model: PretrainViT | VisionTransformer

    def __init__(self, config: DistillConfig, device: torch.device | str = "cpu") -> None:
        super().__init__(config, device)
        self.features = config.objective == "features"
        if not self.features and config.teacher.num_classes != config.model.num_classes:
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
        student = _feature_student(config) if self.features else build_classifier(config.model, config.name)
        self.model = student.to(self.device)
        self.teacher = build_classifier(config.teacher, config.name, head=not self.features).to(self.device)
        if config.teacher_weights != "random":
            report = load_weights(self.teacher, config.teacher_weights)
            if not self.features and any(key.startswith("head.") for key in report.initialised):
                notes = f" ({'; '.join(report.notes)})" if report.notes else ""
                raise ValueError(
                    f"{config.name}: {report.source} has no head for teacher.num_classes={config.teacher.num_classes}{notes}; "
                    "a teacher must be fine-tuned on the student's classes"
                )
        self.teacher.eval().requires_grad_(False)
        self.teacher_dtype = autocast_dtype(config.teacher_precision, self.device.type, "teacher_precision")
        self.cache = self._open_cache() if config.teacher_cache else None

    def _open_cache(self) -> TeacherCache:
        config = self.config
        data = {key: value for key, value in to_dict(config.data).items() if key not in FREE}
        about = {
            "data": data, "seed": config.seed, "frames": config.model.frames, "size": config.model.size,
            "teacher": weights_digest(self.teacher), "teacher_precision": config.teacher_precision, "mix": to_dict(config.mix),
        }  # fmt: skip
        return TeacherCache(str(config.teacher_cache), about, config.model.num_classes, config.data.views)

    def needs_labels(self) -> bool:
        return self.config.label_weight > 0 or self.config.objective.startswith("deit")

    def static_count(self, clips: int) -> float | None:
        if not self.features:
            return float(clips)
        mask = self.config.mask
        if mask.decoder != "none":
            return None
        return float(clips * mask_sizes(self.model.grid, **dataclasses.asdict(mask))[2])

    def count(self, batches: Any) -> Tensor:
        return torch.stack([(self._mask(b.position, b.view).loss_index >= 0).sum() for b in batches]).sum().float()

    def loss(self, batch: Batch) -> dict[str, Tensor]:
        config, classes = self.config, self.config.model.num_classes
        mix = plan_mix(config.mix, batch.position, config.model.size, config.seed)
        clip = mix_clips(batch.clip.to(self.device, non_blocking=True), mix)
        if self.features:
            return {"loss_sum": self._feature_loss(clip, self._mask(batch.position, batch.view))}
        target = self._teacher_logits(batch, clip)
        with self.autocast():
            logits = self.model(clip, kept_branches(self, batch)).float()
        wanted = None
        if self.needs_labels():
            label = class_labels(batch.label, batch.paths, classes).to(self.device, non_blocking=True)
            wanted = mix_targets(smooth_targets(label, classes, 0.0), mix)
        return {
            "loss_sum": self._objective(logits, target, wanted),
            "agreement": (logits.detach().argmax(-1) == target.argmax(-1)).sum(),
        }

    def _objective(self, student: Tensor, teacher: Tensor, label: Tensor | None) -> Tensor:
        config = self.config
        if config.objective.startswith("deit"):
            assert label is not None
            hard = config.objective == "deit_hard"
            return deit_loss(student, teacher, label, hard=hard, alpha=config.alpha, temperature=config.temperature)
        if config.objective == "soft_ce":
            total = soft_cross_entropy(student, teacher)
        else:
            total = distillation_loss(student, teacher, config.temperature)
        if label is not None:
            total = total + config.label_weight * F.cross_entropy(student, label, reduction="sum")
        return total

    @torch.no_grad()
    def _teach(self, clip: Tensor, *, tokens: bool = False) -> Tensor:
        """The teacher's logits [B, C], or its tokens [B, N, D] behind the last block, fp32."""
        with torch.autocast(self.device.type, self.teacher_dtype or torch.bfloat16, enabled=self.teacher_dtype is not None):
            return (self.teacher.tokens(clip) if tokens else self.teacher(clip)).float()

    def _teacher_logits(self, batch: Batch, clip: Tensor) -> Tensor:
        if self.cache is None:
            return self._teach(clip)
        kept = self.cache.read(batch.position, batch.view, batch.paths)
        if kept is not None:
            return kept.to(self.device, non_blocking=True)
        logits = self._teach(clip)
        self.cache.write(batch.position, batch.view, batch.paths, logits)
        return logits

    def _mask(self, position: Tensor, view: Tensor) -> DualMask:
        position, view = (t.to(self.device, non_blocking=True) for t in (position, view))
        mask = dataclasses.asdict(self.config.mask)
        return dual_mask(position, view, grid=self.model.grid, seed=self.config.seed, **mask)

    def _feature_loss(self, clip: Tensor, mask: DualMask) -> Tensor:
        target = resize_tokens(self._teach(clip, tokens=True), self.teacher.grid, self.model.grid)
        index = mask.loss_index.long()
        valid = index >= 0
        target = target.gather(1, index.clamp(min=0)[..., None].expand(-1, -1, target.shape[-1]))
        with self.autocast():
            predicted = self.model(clip, mask).float()
        # a padded place counts nothing: there student and teacher are made the same
        predicted = torch.where(valid[..., None], predicted, 0.0)
        target = torch.where(valid[..., None], target, 0.0)
        return feature_loss(predicted, target, normalize=self.config.normalize_features, distance=self.config.feature_distance)

    @torch.no_grad()
    def evaluate(self, views: Iterable[VideoViews]) -> dict[str, Any]:
        """Multi-view metrics of the student (see `classification_metrics`), `teacher_top1`, `kl` (of single views, without
        the factor T^2), and `agreement`: the share of videos on which student and teacher choose the same class.
        objective=features: `loss` per hidden token and `clips`."""
        self.model.eval()
        if self.features:
            return self._evaluate_features(views)
        student, teacher, kl, rows = [], [], 0.0, 0
        for batch in view_batches(views, self.config.views.batch):
            class_labels(torch.tensor(batch.label), batch.path, self.config.model.num_classes)
            clip = batch.clip.to(self.device, non_blocking=True)
            with self.autocast():
                ours = self.model(clip).float()
            theirs = self._teach(clip)
            kl += distillation_loss(ours, theirs, self.config.temperature).item() / self.config.temperature**2
            rows += len(clip)
            student += view_rows(batch, ours.double().cpu().numpy())
            teacher += view_rows(batch, theirs.double().cpu().numpy())
        merged, taught = (merge_ranks(found, self.gather) for found in (student, teacher))
        kl, rows = (sum(values) for values in zip(*self.gather((kl, rows))))
        agree = merged.scores.argmax(axis=1) == taught.scores.argmax(axis=1)
        return {
            **classification_metrics(merged.scores, merged.labels),
            "teacher_top1": classification_metrics(taught.scores, taught.labels)["top1"],
            "agreement": float(agree.mean()),
            "kl": kl / rows,
        }

    def _evaluate_features(self, views: Iterable[VideoViews]) -> dict[str, Any]:
        total = torch.zeros((), device=self.device)
        tokens = torch.zeros((), dtype=torch.int64, device=self.device)
        clips = 0
        for batch in view_batches(views, self.config.views.batch):
            mask = self._mask(torch.tensor(batch.video), torch.tensor(batch.view))
            total += self._feature_loss(batch.clip.to(self.device, non_blocking=True), mask)
            tokens += (mask.loss_index >= 0).sum()
            clips += len(batch.clip)
        clips, counted, loss = (sum(values) for values in zip(*self.gather((clips, tokens.item(), total.item()))))
        if not clips:
            raise ValueError(f"{self.config.name}: the validation set gave no decodable video")
        return {"clips": clips, "loss": loss / counted}


def _feature_student(config: DistillConfig) -> PretrainViT:
    """The student of objective=features: its decoder predicts as many values as the teacher is wide."""
    width = resolve(config.teacher).encoder.width
    if config.model.decoder_outputs not in (None, width):
        raise ValueError(
            f"{config.name}: model.decoder_outputs={config.model.decoder_outputs}, the teacher is {width} wide; leave it out"
        )
    model = build_model(dataclasses.replace(config.model, decoder_outputs=width))
    if not isinstance(model, PretrainViT):
        raise ValueError(
            f"{config.name}: objective=features needs a pretrain_videomae_* student, got model.name={config.model.name}"
        )
    return model
