"""Fine-tuning on the eight labelled sets, as published, and on videos of your own.

`variant="official"` has the values of the released scripts, `"paper"` those of the paper's appendix (table of
fine-tuning settings) where the two disagree, its RandAug (0, 0.5) and MultiScaleCrop among them; both scale the
learning rate by clips, not by their two views (repeated augmentation), as the scripts do. Start weights are yours to
give: `--init` with post-pre-trained (K710) weights for Kinetics, UCF101 and HMDB51, whose head is turned into K400's,
K600's or K700's rows; pre-trained weights for SSv1 and SSv2, which post-pre-training makes worse (paper, section 4.2).
GPUs are the scripts', and where the paper's batch of 32 is meant the most it can be cut over in pairs of clips to mix;
fewer take more forwards a step. Sets are tables of your `datasets.toml` (`vmae2_fast.data.labelled_sets`).

Clips of more frames or pixels than 16x224 (64x266: K400 90.0, K600 89.9) get the 16x224 position table interpolated along
t, y and x; the released script scrambles it there (`models.positions`). The paper does not say how far apart their frames
are: 4, as for 16 frames.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

from vmae2_fast.config import (
    AugmentConfig,
    ClassifyConfig,
    DataConfig,
    MixConfig,
    ModelConfig,
    OptimConfig,
    SourceConfig,
    TrainConfig,
)
from vmae2_fast.data.augment import OFFICIAL, OFFICIAL_MIX
from vmae2_fast.data.manifest import open_tree
from vmae2_fast.recipes._classification import Settings, Variant, as_printed, classification, model_name

_PAPER = "paper, appendix table of fine-tuning settings"


_KINETICS_PAPER = as_printed(
    Settings(lr=1e-5, epochs=3, warmup=0, clips=32, drop_path=0.3, layer_decay=0.9, head_dropout=0.5)
)
_LARGE_CLIPS_PAPER = dataclasses.replace(_KINETICS_PAPER, lr=1e-4, epochs=5, drop_path=0.35)
_SOMETHING_PAPER = as_printed(
    Settings(lr=3e-4, epochs=10, warmup=5, clips=96, group=3, drop_path=0.35, layer_decay=0.9, head_dropout=0.5)
)
_UCF101 = Settings(lr=1e-3, epochs=50, warmup=5, clips=24, group=3, drop_path=0.35, layer_decay=0.9, head_dropout=0.5)
_HMDB51 = dataclasses.replace(_UCF101, lr=5e-4, epochs=15)


def vit_giant_k400(variant: Variant = "official") -> ClassifyConfig:
    """ViT-g on K400 from K710 weights, 16x224: 88.5 / 98.1 with 5x3 views (released model 88.4). 32 GPUs (paper: 16)."""
    return _giant_kinetics("k400", variant)


def vit_giant_k600(variant: Variant = "official") -> ClassifyConfig:
    """ViT-g on K600 from K710 weights, 16x224: 88.8 / 98.2 with 5x3 views. 32 GPUs (paper: 16)."""
    return _giant_kinetics("k600", variant)


def vit_giant_k700(variant: Variant = "official") -> ClassifyConfig:
    """ViT-g on K700 from K710 weights, with K400's settings: the paper gives no result. 32 GPUs (paper: 16)."""
    return _giant_kinetics("k700", variant)


def _giant_kinetics(name: str, variant: Variant) -> ClassifyConfig:
    official = Settings(lr=1e-5, epochs=3, warmup=1, clips=96, group=3, drop_path=0.25, layer_decay=0.9, weight_decay=0.1)
    settings = official if variant == "official" else _KINETICS_PAPER
    return classification("finetune", "giant", name, settings, cites=_cite(variant, f"ViT-g, K710 to {name.upper()}"))


def vit_giant_k400_direct() -> ClassifyConfig:
    """ViT-g on K400 from pre-trained weights, without post-pre-training: 87.2 / 97.4 with 5x3 views. 64 GPUs."""
    settings = Settings(lr=1e-3, epochs=30, warmup=5, clips=192, group=3, drop_path=0.2, layer_decay=0.9)
    return classification("finetune", "giant", "k400", settings, cites=_cite("official", "ViT-g, K400"), suffix="_direct")


def vit_giant_k400_64x266() -> ClassifyConfig:
    """ViT-g on K400 from K710 weights, 64 frames of 266^2: 90.0 / 98.4 with 2x3 views, 160 TMAC. 16 GPUs."""
    return classification("finetune", "giant", "k400", _LARGE_CLIPS_PAPER, clip=(64, 266), segments=2, cites=_PAPER)


def vit_giant_k600_64x266() -> ClassifyConfig:
    """ViT-g on K600 from K710 weights, 64 frames of 266^2: 89.9 / 98.5 with 2x3 views. 16 GPUs."""
    return classification("finetune", "giant", "k600", _LARGE_CLIPS_PAPER, clip=(64, 266), segments=2, cites=_PAPER)


def vit_huge_k400_64x288() -> ClassifyConfig:
    """ViT-H on K400 from K710 weights, 64 frames of 288^2: 89.8 / 98.3 with 4x3 views. 16 GPUs."""
    return classification("finetune", "huge", "k400", _LARGE_CLIPS_PAPER, clip=(64, 288), segments=4, cites=_PAPER)


def vit_huge_k600_32x384() -> ClassifyConfig:
    """ViT-H on K600 from K710 weights, 32 frames of 384^2: 89.6 / 98.4 with 4x3 views. 16 GPUs."""
    return classification("finetune", "huge", "k600", _LARGE_CLIPS_PAPER, clip=(32, 384), segments=4, cites=_PAPER)


def vit_giant_ssv2(variant: Variant = "official") -> ClassifyConfig:
    """ViT-g on SSv2 from pre-trained weights: 77.0 / 95.9 with 2x3 views. 32 GPUs."""
    return _giant_something("ssv2", variant)


def vit_giant_ssv1(variant: Variant = "official") -> ClassifyConfig:
    """ViT-g on SSv1 from pre-trained weights, settings of SSv2: 68.7 / 91.9 with 2x3 views. 32 GPUs."""
    return _giant_something("ssv1", variant)


def _giant_something(name: str, variant: Variant) -> ClassifyConfig:
    official = Settings(lr=3e-4, epochs=20, warmup=5, clips=96, group=3, drop_path=0.25, layer_decay=0.9)
    settings = official if variant == "official" else _SOMETHING_PAPER
    return classification("finetune", "giant", name, settings, cites=_cite(variant, "ViT-g, SSv2"))


def vit_giant_ucf101(variant: Variant = "official") -> ClassifyConfig:
    """ViT-g on UCF101 from K710 weights: 99.6 with 5x3 views. 8 GPUs."""
    return _small_set("giant", "ucf101", variant)


def vit_giant_hmdb51(variant: Variant = "official") -> ClassifyConfig:
    """ViT-g on HMDB51 from K710 weights: 88.1 / 98.5 with 5x3 views. 8 GPUs."""
    return _small_set("giant", "hmdb51", variant)


def vit_huge_ucf101(variant: Variant = "official") -> ClassifyConfig:
    """ViT-H on UCF101 from K710 weights, with ViT-g's settings: the paper gives no result. 8 GPUs."""
    return _small_set("huge", "ucf101", variant)


def vit_huge_hmdb51(variant: Variant = "official") -> ClassifyConfig:
    """ViT-H on HMDB51 from K710 weights, with ViT-g's settings: the paper gives no result. 8 GPUs."""
    return _small_set("huge", "hmdb51", variant)


def _small_set(size: str, name: str, variant: Variant) -> ClassifyConfig:
    """Script and table agree but for the augmentations."""
    settings = _UCF101 if name == "ucf101" else _HMDB51
    settings = settings if variant == "official" else as_printed(settings)
    return classification("finetune", size, name, settings, cites=_cite(variant, f"ViT-g, K710 to {name.upper()}"))


def vit_huge_k400(variant: Variant = "official") -> ClassifyConfig:
    """ViT-H on K400: 86.9 from pre-trained weights (official); 88.6 / 97.9 from K710 weights (paper). 5x3 views.
    32 GPUs (paper: 16)."""
    return _huge_kinetics("k400", variant)


def vit_huge_k600(variant: Variant = "official") -> ClassifyConfig:
    """ViT-H on K600 from pre-trained (official) or K710 weights (paper: 88.3 / 98.1), 5x3 views.
    32 GPUs (paper: 16)."""
    return _huge_kinetics("k600", variant)


def _huge_kinetics(name: str, variant: Variant) -> ClassifyConfig:
    official = Settings(lr=1e-3, epochs=40, warmup=5, clips=128, drop_path=0.2, layer_decay=0.8, head_dropout=0.5)
    settings = official if variant == "official" else _KINETICS_PAPER
    return classification("finetune", "huge", name, settings, cites=_cite(variant, f"ViT-H, {name.upper()}"))


def vit_huge_ssv2(variant: Variant = "official") -> ClassifyConfig:
    """ViT-H on SSv2 from pre-trained weights: 76.8 / 95.8 with 2x3 views. 32 GPUs."""
    return _huge_something("ssv2", variant)


def vit_huge_ssv1(variant: Variant = "official") -> ClassifyConfig:
    """ViT-H on SSv1 from pre-trained weights, settings of SSv2: 66.6 / 90.8 with 2x3 views. 32 GPUs."""
    return _huge_something("ssv1", variant)


def _huge_something(name: str, variant: Variant) -> ClassifyConfig:
    official = Settings(lr=5e-4, epochs=20, warmup=5, clips=128, drop_path=0.2, layer_decay=0.8, head_dropout=0.5)
    settings = official if variant == "official" else _SOMETHING_PAPER
    return classification("finetune", "huge", name, settings, cites=_cite(variant, "ViT-H, SSv2"))


def vit_large_k400() -> ClassifyConfig:
    """ViT-L on K400 from pre-trained weights: 85.4 with 5x3 views. 32 GPUs."""
    settings = Settings(lr=2e-3, epochs=35, warmup=5, clips=192, drop_path=0.2, layer_decay=0.75)
    return classification(
        "finetune", "large", "k400", settings, cites=_cite("official", "ViT-L, K400") + " (drop path: ViT-H's)"
    )


def vit_large_ssv2() -> ClassifyConfig:
    """ViT-L on SSv2 from pre-trained weights: 75.7 with 2x3 views. 32 GPUs."""
    settings = Settings(lr=5e-4, epochs=20, warmup=5, clips=192, drop_path=0.2, layer_decay=0.75)
    return classification(
        "finetune", "large", "ssv2", settings, cites=_cite("official", "ViT-L, SSv2") + " (drop path: ViT-H's)"
    )


def vit_base_k400() -> ClassifyConfig:
    """ViT-B on K400 from pre-trained weights: 81.5 with 5x3 views. 32 GPUs."""
    settings = Settings(lr=7e-4, epochs=90, warmup=5, clips=512, drop_path=0.1, layer_decay=0.75)
    return classification("finetune", "base", "k400", settings, cites=_cite("official", "ViT-B, K400"))


def vit_base_ssv2() -> ClassifyConfig:
    """ViT-B on SSv2 from pre-trained weights: 71.2 with 2x3 views. 16 GPUs."""
    settings = Settings(lr=2e-3, epochs=25, warmup=5, clips=256, drop_path=0.1, layer_decay=0.65)
    return classification("finetune", "base", "ssv2", settings, cites=_cite("official", "ViT-B, SSv2"))


def folder(
    data: str | None = None,
    size: Literal["small", "base", "large", "huge", "giant"] = "base",
    probe: Literal["none", "linear", "attentive"] = "none",
    classes: int | None = None,
) -> ClassifyConfig:
    """Your own videos on one card of 24 GB: a folder tree `DATA[/train, /val]/LABEL/*.mp4`, start weights by --init.

    probe: train only a linear or an attentive head on a trunk that stands still, which is the better choice below some
    tens of clips a class and fits any model. classes: default the folders found; must be given where the videos are not a
    tree but the table `folder` of datasets.toml (no --data). Values are those of few epochs on a pre-trained or K710
    model; ViT-H and -g recompute activations.
    """
    names, split = _tree(data) if data is not None else ((), "val")
    frozen = probe != "none"
    decay = {"small": 0.7, "base": 0.75, "large": 0.75, "huge": 0.8, "giant": 0.9}[size]
    train = _source(data, "train")
    model = ModelConfig(
        name=model_name(size), num_classes=classes or len(names), pooling="attentive" if probe == "attentive" else "mean",
        drop_path=0.0 if frozen else 0.1, activation_checkpoint="block" if size in ("huge", "giant") else "none",
    )  # fmt: skip
    return ClassifyConfig(
        name=f"finetune_{size}_folder" if not frozen else f"{probe}_probe_{size}_folder",
        cites="no table: defaults for small sets",
        model=model,
        data=dataclasses.replace(train, crop="random_resized", flip=True, augment=AugmentConfig() if frozen else OFFICIAL),
        mix=MixConfig() if frozen else OFFICIAL_MIX,
        validation=_source(data, split),
        frozen=frozen,
        optim=OptimConfig(
            lr=1e-3, lr_batch=0 if frozen else 256, min_lr=1e-6, warmup_epochs=1 if frozen else 3, betas=(0.9, 0.999),
            weight_decay=0.05, layer_decay=1.0 if frozen else decay, clip_grad=5.0,
        ),
        train=TrainConfig(epochs=20 if frozen else 30, global_batch=32, micro_batch=0, precision="bfloat16"),
    )  # fmt: skip


def _tree(data: str) -> tuple[tuple[str, ...], str]:
    """Class names of a folder tree, and the split to test on: val where there is one."""
    try:
        _, names, top = open_tree(data, "val")
    except FileNotFoundError as error:
        raise ValueError(f"{data}: no such folder of videos") from error
    return names, "val" if top != data else "train"


def _source(data: str | None, split: str) -> DataConfig:
    return DataConfig(sources=(SourceConfig(name="folder", split=split, root=data),), sampling="dense", crop="center")


def _cite(variant: Variant, script: str) -> str:
    return f"official fine-tuning script, {script}" if variant == "official" else _PAPER
