"""Progressive training (VideoMAE V2 section 3.4): pre-train, post-pre-train, fine-tune, each from the one before.

Enter and leave at any stage: `--from finetune --init-weights vit_g_k710.pth`, `--until pretrain`. SSv1 and SSv2 go from
pre-training straight to fine-tuning, because post-pre-training on Kinetics made SSv2 worse. The fine-tuning stage has the
values of the paper's table of fine-tuning settings at 16x224^2.
"""

from __future__ import annotations

import dataclasses
from typing import Literal, NamedTuple

from vmae2_fast.config import (
    ClassifyConfig,
    DataConfig,
    ModelConfig,
    OptimConfig,
    Progression,
    SourceConfig,
    Stage,
    TrainConfig,
    ViewsConfig,
)
from vmae2_fast.recipes import post_pretrain, pretrain

Target = Literal["k400", "k600", "ssv1", "ssv2", "ucf101", "hmdb51"]


class _Set(NamedTuple):
    """A target's row of the table of fine-tuning settings; lr per 256 clips, batch and epochs as printed."""

    classes: int
    lr: float
    batch: int
    warmup: float
    epochs: int
    drop_path: float
    segments: int


_SETS: dict[str, _Set] = {
    "k400": _Set(400, 1e-5, 32, 0, 3, 0.3, 5),
    "k600": _Set(600, 1e-5, 32, 0, 3, 0.3, 5),
    "ssv1": _Set(174, 3e-4, 96, 5, 10, 0.35, 2),
    "ssv2": _Set(174, 3e-4, 96, 5, 10, 0.35, 2),
    "ucf101": _Set(101, 1e-3, 24, 5, 50, 0.35, 5),
    "hmdb51": _Set(51, 5e-4, 24, 5, 15, 0.35, 5),
}


def vit_giant(target: Target = "k400", out: str = "runs/progressive_vit_giant") -> Progression:
    """ViT-g/14 to K400 88.5, K600 88.8, SSv1 68.7, SSv2 77.0, UCF101 99.6 or HMDB51 88.1; 64 GPUs."""
    return _progression("giant_patch14", target, out, pretrain.vit_giant_hybrid(), post_pretrain.vit_giant_k710())


def vit_huge(target: Target = "k400", out: str = "runs/progressive_vit_huge") -> Progression:
    """ViT-H/16 to K400 88.6, K600 88.3, SSv1 66.6 or SSv2 76.8 (UCF101, HMDB51: nothing published); 64 GPUs."""
    return _progression("huge_patch16", target, out, pretrain.vit_huge_hybrid(), post_pretrain.vit_huge_k710())


def _progression(model: str, target: Target, out: str, first: Stage, second: ClassifyConfig) -> Progression:
    direct = target in ("ssv1", "ssv2")
    stages: list[Stage] = [dataclasses.replace(first, name="pretrain")]
    if not direct:
        stages.append(dataclasses.replace(second, name="post_pretrain", init="stage:pretrain"))
    stages.append(_finetune(model, target, "stage:pretrain" if direct else "stage:post_pretrain"))
    return Progression(
        name=f"progressive_vit_{model.partition('_')[0]}_{target}",
        cites="VideoMAE V2 section 3.4 and tables of settings",
        stages=tuple(stages),
        out=out,
    )


def _finetune(model: str, target: Target, init: str) -> ClassifyConfig:
    row, moving = _SETS[target], target in ("ssv1", "ssv2")
    sampling: Literal["segment", "dense"] = "segment" if moving else "dense"
    return ClassifyConfig(
        name="finetune",
        cites="VideoMAE V2, table of fine-tuning settings",
        model=ModelConfig(name=f"vit_{model}_224", num_classes=row.classes, drop_path=row.drop_path, head_dropout=0.5),
        data=DataConfig(
            sources=(SourceConfig(name=target),), stride=4, sampling=sampling, views=2, crop="random_resized",
            flip=not moving, workers=8,
        ),
        validation=DataConfig(
            sources=(SourceConfig(name=target, split="val"),), stride=4, sampling=sampling, crop="center", workers=8
        ),
        optim=OptimConfig(
            lr=row.lr, lr_batch=256, min_lr=min(1e-6, row.lr / 10), warmup_epochs=row.warmup, betas=(0.9, 0.999),
            weight_decay=0.05, layer_decay=0.9,
        ),
        train=TrainConfig(epochs=row.epochs, global_batch=row.batch, precision="bfloat16", checkpoint_every=1000),
        views=ViewsConfig(segments=row.segments, crops=3),
        init=init,
    )  # fmt: skip
