"""Distillation of ViT-g into ViT-B and ViT-S, as in the paper's appendix.

Values: paper, appendix table of knowledge distillation (AdamW, batch 1024 / 512, 100 epochs, temperature 3, KL alone,
RandAug (0, 0.5), MultiScaleCrop, no erasing). The
student starts from weights after post-pre-training (`--init`), the teacher is ViT-g fine-tuned on the same classes
(`--teacher-weights`). `--teacher-cache DIR` keeps what the teacher said about every view: a second student, or the same
one started again, then needs no teacher for them.
"""

from __future__ import annotations

import dataclasses

from vmae2_fast.config import AugmentConfig, DistillConfig, MaskConfig, ModelConfig, OptimConfig, TrainConfig, ViewsConfig
from vmae2_fast.data.augment import OFFICIAL_MIX, PAPER
from vmae2_fast.data.labelled_sets import labelled_set

_CITES = "paper, appendix table of distillation settings"


def vit_base_k710() -> DistillConfig:
    """ViT-B learns K710 from ViT-g: 81.5 on K710, 86.6 on K400, 85.9 on K600 with 5x3 views and no further fine-tuning."""
    return _distill("base", "k710", lr=1e-3, batch=1024)


def vit_small_k710() -> DistillConfig:
    """ViT-S learns K710 from ViT-g: 77.6 on K710, 83.7 on K400, 83.1 on K600 with 5x3 views."""
    return _distill("small", "k710", lr=1e-3, batch=1024)


def vit_base_ssv2() -> DistillConfig:
    """ViT-B learns SSv2 from ViT-g: 75.0 with 7x3 views after fine-tuning."""
    return _distill("base", "ssv2", lr=5e-4, batch=512)


def vit_small_ssv2() -> DistillConfig:
    """ViT-S learns SSv2 from ViT-g with ViT-B's values; the paper gives no result."""
    return _distill("small", "ssv2", lr=5e-4, batch=512)


def vit_base_features() -> DistillConfig:
    """ViT-B predicts ViT-g's tokens where its own are hidden (after MVD), 400 epochs on K710; patch 14 onto patch 16."""
    return DistillConfig(
        name="distill_vit_base_features",
        cites="Wang et al., Masked video distillation: lr 1.5e-4, batch 1024, warm-up 40, 400 epochs, drop path 0.1",
        model=ModelConfig(name="pretrain_videomae_base_patch16_224", decoder_depth=2, drop_path=0.1),
        teacher=ModelConfig(name="vit_giant_patch14_224", num_classes=710),
        objective="features",
        mask=MaskConfig(encoder_ratio=0.9, decoder="none"),
        data=dataclasses.replace(labelled_set("k710").training(views=1), augment=AugmentConfig()),
        optim=OptimConfig(lr=1.5e-4, min_lr=1e-4, warmup_epochs=40, betas=(0.9, 0.95), weight_decay=0.05),
        train=TrainConfig(epochs=400, global_batch=1024, micro_batch=0, precision="bfloat16", checkpoint_every=1000),
    )


def _distill(size: str, name: str, *, lr: float, batch: int) -> DistillConfig:
    labelled = labelled_set(name)
    return DistillConfig(
        name=f"distill_vit_{size}_{name}",
        cites=_CITES,
        model=ModelConfig(name=f"vit_{size}_patch16_224", num_classes=labelled.classes, drop_path=0.1),
        teacher=ModelConfig(name="vit_giant_patch14_224", num_classes=labelled.classes),
        temperature=3.0,
        mix=OFFICIAL_MIX,
        data=dataclasses.replace(
            labelled.training(views=1), crop="multi_scale", augment=AugmentConfig(randaugment=PAPER.randaugment)
        ),
        validation=labelled.testing(),
        optim=OptimConfig(
            lr=lr, min_lr=1e-6, warmup_epochs=5, betas=(0.9, 0.999), weight_decay=0.05, layer_decay=0.75, clip_grad=1.0
        ),
        train=TrainConfig(epochs=100, global_batch=batch, micro_batch=0, precision="bfloat16", checkpoint_every=1000),
        views=ViewsConfig(segments=labelled.segments, crops=labelled.crops),
    )
