"""What the published classification recipes have in common: clips, augmentations and AdamW of the released scripts."""

from __future__ import annotations

import dataclasses
from typing import Literal

from vmae2_fast.config import AugmentConfig, ClassifyConfig, ModelConfig, OptimConfig, TrainConfig, ViewsConfig
from vmae2_fast.data.augment import OFFICIAL, OFFICIAL_MIX, PAPER
from vmae2_fast.data.labelled_sets import labelled_set

Variant = Literal["official", "paper"]
_PATCH = {"giant": 14}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """What differs between the published runs. Batch in clips, each seen in two views."""

    lr: float
    epochs: int
    warmup: float
    clips: int
    drop_path: float
    layer_decay: float
    weight_decay: float = 0.05
    head_dropout: float = 0.0
    clip_grad: float | None = None
    augment: AugmentConfig = OFFICIAL
    crop: Literal["random_resized", "multi_scale"] = "random_resized"
    group: int = 2
    """Clips mixed with each other (`MixConfig.clips`). The scripts mix all clips of a device, first with last: pairs, as in
    groups of 2, where it holds an even number; of 3 the one in the middle meets its own other view, as in groups of 3."""


def as_printed(settings: Settings) -> Settings:
    """With the augmentations of the paper's tables, RandAug (0, 0.5) and MultiScaleCrop, instead of the scripts'."""
    return dataclasses.replace(settings, augment=PAPER, crop="multi_scale")


def model_name(size: str) -> str:
    """The official name of a classification model at 224^2."""
    return f"vit_{size}_patch{_PATCH.get(size, 16)}_224"


def classification(
    stage: Literal["finetune", "post_pretrain"],
    size: str,
    data: str,
    settings: Settings,
    *,
    clip: tuple[int, int] = (16, 224),
    segments: int | None = None,
    cites: str,
    suffix: str = "",
) -> ClassifyConfig:
    """ViT-`size` on the labelled set `data`, with the augmentations of `settings` and repeated augmentation of two views.

    clip: frames, and pixels of a side. segments: test clips in time; None: the set's own.
    """
    labelled = labelled_set(data)
    views = 2
    large = clip != (16, 224)
    return ClassifyConfig(
        name=f"{stage}_vit_{size}_{data}{f'_{clip[0]}x{clip[1]}' if large else ''}{suffix}",
        cites=cites,
        model=ModelConfig(
            name=model_name(size), frames=clip[0], size=clip[1], num_classes=labelled.classes,
            drop_path=settings.drop_path, head_dropout=settings.head_dropout, positions="interpolate",
            activation_checkpoint="block" if large else "none",
        ),
        data=dataclasses.replace(labelled.training(views=views), augment=settings.augment, crop=settings.crop),
        validation=labelled.testing(),
        optim=OptimConfig(
            # the scripts' rule leaves the two views of a clip out
            lr=settings.lr, lr_batch=256 * views, min_lr=1e-6, warmup_epochs=settings.warmup, betas=(0.9, 0.999),
            weight_decay=settings.weight_decay, layer_decay=settings.layer_decay, clip_grad=settings.clip_grad,
        ),
        train=TrainConfig(
            epochs=settings.epochs, global_batch=views * settings.clips, micro_batch=0, precision="bfloat16",
            checkpoint_every=1000,
        ),
        mix=dataclasses.replace(OFFICIAL_MIX, clips=settings.group),
        views=ViewsConfig(segments=segments or labelled.segments, crops=labelled.crops),
    )  # fmt: skip
