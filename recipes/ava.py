"""Action detection on AVA v2.2 and AVA-Kinetics: ViT-B to ViT-g, 16 frames x 4, boxes of people.

Files below `root`: videos/ (VIDEO.mp4, or VIDEO/ folders of images), and AVA's own train.csv, val.csv, label map and
exclusions, and the detected people of the validation set. ViT-g follows the paper's appendix (base lr 3e-4, 10 epochs, layer
decay 0.9, drop path 0.3); the smaller ones the scripts of VideoMAE's action detection code. Both take the learning rate times
batch / 256. Start from a Kinetics-tuned model (`--init-weights`). ViT-g overfits within few epochs: every epoch is validated.
"""

from __future__ import annotations

from typing import Any

from vmae2_fast.config import AvaConfig, AvaDataConfig, ModelConfig, OptimConfig, TrainConfig

_SCRIPT = "VideoMAE action detection scripts (fine-tuned from Kinetics: base lr 5e-4)"
_SCALES = (256, 320)  # of the short side: the paper says "random scale" without a range, this one is SlowFast's
_PAPER = "VideoMAE V2 appendix, table of fine-tuning settings, column AVA / AVA-Kinetics"
# The detection code's own colours (Caffe's), not ImageNet's: mean of 0..255 and one deviation.
_MEAN, _STD = (122.7717 / 255, 115.9465 / 255, 102.9801 / 255), (57.375 / 255,) * 3


def ava_vit_base(root: str = "data/ava") -> AvaConfig:
    """ViT-B/16 on AVA v2.2, 30 epochs, batch 128."""
    return _recipe("base_patch16", "ava", root, lr=5e-4, epochs=30, warmup=5, layer_decay=0.75, drop_path=0.2, cites=_SCRIPT)


def ava_vit_large(root: str = "data/ava") -> AvaConfig:
    """ViT-L/16 on AVA v2.2, 20 epochs, batch 128."""
    return _recipe("large_patch16", "ava", root, lr=5e-4, epochs=20, warmup=5, layer_decay=0.8, drop_path=0.2, cites=_SCRIPT)


def ava_vit_huge(root: str = "data/ava") -> AvaConfig:
    """ViT-H/16 on AVA v2.2, 20 epochs, batch 128. Published: 39.5 (first VideoMAE)."""
    return _recipe("huge_patch16", "ava", root, lr=5e-4, epochs=20, warmup=5, layer_decay=0.8, drop_path=0.2, cites=_SCRIPT)


def ava_vit_giant(root: str = "data/ava") -> AvaConfig:
    """ViT-g/14 on AVA v2.2, 10 epochs, batch 128. Published: 42.6."""
    return _recipe(
        "giant_patch14", "ava", root, lr=3e-4, epochs=10, warmup=2, layer_decay=0.9, drop_path=0.3, cites=_PAPER,
        scales=_SCALES,
    )  # fmt: skip


def ava_kinetics_vit_base(root: str = "data/ava_kinetics") -> AvaConfig:
    """ViT-B/16 on AVA-Kinetics, with the AVA settings."""
    return _recipe(
        "base_patch16", "ava_kinetics", root, lr=5e-4, epochs=30, warmup=5, layer_decay=0.75, drop_path=0.2, cites=_SCRIPT
    )


def ava_kinetics_vit_large(root: str = "data/ava_kinetics") -> AvaConfig:
    """ViT-L/16 on AVA-Kinetics, with the AVA settings."""
    return _recipe(
        "large_patch16", "ava_kinetics", root, lr=5e-4, epochs=20, warmup=5, layer_decay=0.8, drop_path=0.2, cites=_SCRIPT
    )


def ava_kinetics_vit_huge(root: str = "data/ava_kinetics") -> AvaConfig:
    """ViT-H/16 on AVA-Kinetics, with the AVA settings."""
    return _recipe(
        "huge_patch16", "ava_kinetics", root, lr=5e-4, epochs=20, warmup=5, layer_decay=0.8, drop_path=0.2, cites=_SCRIPT
    )


def ava_kinetics_vit_giant(root: str = "data/ava_kinetics") -> AvaConfig:
    """ViT-g/14 on AVA-Kinetics, 10 epochs, batch 128. Published: 43.9."""
    return _recipe(
        "giant_patch14", "ava_kinetics", root, lr=3e-4, epochs=10, warmup=2, layer_decay=0.9, drop_path=0.3, cites=_PAPER,
        scales=_SCALES,
    )  # fmt: skip


def _recipe(
    size: str, data: str, root: str, *, lr: float, epochs: int, warmup: float, layer_decay: float, drop_path: float,
    cites: str, scales: tuple[int, int] = (256, 256),
) -> AvaConfig:  # fmt: skip
    common: dict[str, Any] = {
        "videos": f"{root}/videos", "labels": f"{root}/labels.pbtxt", "short_side": (256, 256), "stride": 4, "workers": 8,
    }  # fmt: skip
    return AvaConfig(
        name=f"{data}_vit_{size.partition('_')[0]}",
        cites=cites,
        model=ModelConfig(
            name=f"vit_{size}_224", num_classes=80, pooling="first", drop_path=drop_path, pixel_mean=_MEAN, pixel_std=_STD
        ),
        data=AvaDataConfig(annotations=f"{root}/train.csv", flip=True, **common | {"short_side": scales}),
        validation=AvaDataConfig(
            annotations=f"{root}/val.csv", boxes=f"{root}/people.csv", exclusions=f"{root}/exclusions.csv", **common
        ),
        optim=OptimConfig(
            lr=lr, lr_batch=256, min_lr=1e-6, warmup_epochs=warmup, betas=(0.9, 0.999), weight_decay=0.05,
            layer_decay=layer_decay,
        ),
        train=TrainConfig(epochs=epochs, global_batch=128, precision="bfloat16", checkpoint_every=500, validate_every=1),
    )  # fmt: skip
