"""Temporal action detection on THUMOS14 and FineAction: ActionFormer on features of a fine-tuned ViT-B to ViT-g.

Files below `root`: videos/, annotations.json (ActivityNet style) and, for FineAction, video_scores.json; features appear in
features_SIZE/. `--trunk-weights` takes the features that are missing before training; with several GPUs or machines take them
first, `vmae2 tad features --shard I/N`. The papers' features come from ViT-g tuned on Kinetics-710; the detector and its
settings do not change with the trunk.
"""

from __future__ import annotations

from typing import Any

from vmae2_fast.config import (
    ActionFormerConfig,
    DetectionConfig,
    ModelConfig,
    OptimConfig,
    TadConfig,
    TadDataConfig,
    TrainConfig,
)

_THUMOS = "ActionFormer's THUMOS14 configuration, on VideoMAE V2 features without modification (VideoMAE V2 section 4.4)"
_FINEACTION = "ActionFormer's ActivityNet-style configuration for FineAction with VideoMAE V2 features (InternVideo, OpenTAD)"


def thumos14_vit_base(root: str = "data/thumos14") -> TadConfig:
    """ViT-B/16 features on THUMOS14, 35 epochs of ActionFormer."""
    return _thumos14("base_patch16", root)


def thumos14_vit_large(root: str = "data/thumos14") -> TadConfig:
    """ViT-L/16 features on THUMOS14, 35 epochs of ActionFormer."""
    return _thumos14("large_patch16", root)


def thumos14_vit_huge(root: str = "data/thumos14") -> TadConfig:
    """ViT-H/16 features on THUMOS14, 35 epochs of ActionFormer."""
    return _thumos14("huge_patch16", root)


def thumos14_vit_giant(root: str = "data/thumos14") -> TadConfig:
    """ViT-g/14 features on THUMOS14, 35 epochs of ActionFormer. Published: average mAP 69.6 (reproduced by others: 68.7)."""
    return _thumos14("giant_patch14", root)


def thumos14_vit_giant_long(root: str = "data/thumos14") -> TadConfig:
    """ViT-g/14 features on THUMOS14, 50 epochs of ActionFormer (InternVideo's schedule)."""
    return _thumos14("giant_patch14", root, epochs=50, suffix="_long")


def fineaction_vit_base(root: str = "data/fineaction") -> TadConfig:
    """ViT-B/16 features on FineAction, class-agnostic, fused with class scores of whole videos."""
    return _fineaction("base_patch16", root)


def fineaction_vit_large(root: str = "data/fineaction") -> TadConfig:
    """ViT-L/16 features on FineAction, class-agnostic, fused with class scores of whole videos."""
    return _fineaction("large_patch16", root)


def fineaction_vit_huge(root: str = "data/fineaction") -> TadConfig:
    """ViT-H/16 features on FineAction, class-agnostic, fused with class scores of whole videos."""
    return _fineaction("huge_patch16", root)


def fineaction_vit_giant(root: str = "data/fineaction") -> TadConfig:
    """ViT-g/14 features on FineAction, class-agnostic, fused with class scores of videos. Published: average mAP 18.2."""
    return _fineaction("giant_patch14", root)


def _thumos14(size: str, root: str, *, epochs: int = 35, suffix: str = "") -> TadConfig:
    data = _data(size, root, stride=4, crop_range=(0.9, 1.0))
    return TadConfig(
        name=f"thumos14_vit_{size.partition('_')[0]}{suffix}",
        cites=_THUMOS,
        model=ModelConfig(name=f"vit_{size}_224"),
        detector=ActionFormerConfig(classes=20),
        data=TadDataConfig(subset="validation", **data),
        validation=TadDataConfig(subset="test", **data),
        optim=_optim(lr=1e-4),
        train=TrainConfig(epochs=epochs, global_batch=2, checkpoint_every=500),
    )


def _fineaction(size: str, root: str) -> TadConfig:
    data = _data(size, root, stride=16, resize_to=192, class_agnostic=True)
    return TadConfig(
        name=f"fineaction_vit_{size.partition('_')[0]}",
        cites=_FINEACTION,
        model=ModelConfig(name=f"vit_{size}_224"),
        detector=ActionFormerConfig(
            classes=1, width=256, windows=(7, 7, 7, 7, 7, 0), positions=True, max_length=192, initial_normalizer=200.0
        ),
        data=TadDataConfig(subset="training", **data),
        validation=TadDataConfig(subset="validation", **data),
        detection=DetectionConfig(min_length=0.001, sigma=0.75, per_class=False, limit=100, voting_threshold=0.9),
        benchmark="fineaction",
        distance_weight=2.0,
        label_smoothing=0.1,
        video_scores=f"{root}/video_scores.json",
        optim=_optim(lr=1e-3),
        train=TrainConfig(epochs=25, global_batch=16, checkpoint_every=500, validate_every=1),
    )


def _data(size: str, root: str, **values: Any) -> dict[str, Any]:
    return {
        "features": f"{root}/features_{size.partition('_')[0]}", "annotations": f"{root}/annotations.json",
        "videos": f"{root}/videos", "workers": 4, **values,
    }  # fmt: skip


def _optim(lr: float) -> OptimConfig:
    return OptimConfig(
        lr=lr, lr_batch=0, min_lr=1e-8, warmup_epochs=5, betas=(0.9, 0.999), weight_decay=0.05, clip_grad=1.0, ema_decay=0.999
    )
