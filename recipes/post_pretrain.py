"""Post-pre-training on LabeledHybrid (K710: the union of K400, K600 and K700 with merged labels, 658 340 clips).

Each starts from a pre-trained model: give its weights with `--init-weights`, or run `progressive`. `variant="official"`
is the released K710 script, "paper" the table of post-pre-training settings (batch 128, lr 1e-3; RandAug (0, 0.5) and
MultiScaleCrop as in fine-tuning), which is about ViT-H and -g: ViT-L and -B keep the other values of their scripts in
it. Batches count clips, each seen in two views. SSv2 is better off without this stage (paper, section on progressive
training).
"""

from __future__ import annotations

import dataclasses

from vmae2_fast.config import ClassifyConfig
from vmae2_fast.recipes._classification import Settings, Variant, as_printed, classification


def vit_giant_k710(variant: Variant = "official") -> ClassifyConfig:
    """ViT-g/14 on K710, 35 epochs, 32 GPUs: 83.8 top-1 of K710, start of K400 88.4."""
    settings = Settings(
        lr=1e-3, epochs=35, warmup=5, clips=96, drop_path=0.3, layer_decay=0.9, weight_decay=0.1, clip_grad=5.0,
        group=3,
    )
    return _k710("giant", variant, settings)


def vit_huge_k710(variant: Variant = "official") -> ClassifyConfig:
    """ViT-H/16 on K710, 40 epochs, 32 GPUs; start of K400 88.6, K600 88.3."""
    settings = Settings(lr=1e-3, epochs=40, warmup=5, clips=128, drop_path=0.2, layer_decay=0.8, head_dropout=0.5)
    return _k710("huge", variant, settings)


def vit_large_k710(variant: Variant = "official") -> ClassifyConfig:
    """ViT-L/16 on K710 with the values of the K400 script, 35 epochs, 32 GPUs. No published result."""
    return _k710("large", variant, Settings(lr=2e-3, epochs=35, warmup=5, clips=192, drop_path=0.2, layer_decay=0.75))


def vit_base_k710(variant: Variant = "official") -> ClassifyConfig:
    """ViT-B/16 on K710, 90 epochs, 32 GPUs; the student that distillation starts from."""
    return _k710("base", variant, Settings(lr=7e-4, epochs=90, warmup=5, clips=512, drop_path=0.1, layer_decay=0.75))


def _k710(size: str, variant: Variant, settings: Settings) -> ClassifyConfig:
    if variant == "paper":
        settings = as_printed(dataclasses.replace(settings, lr=1e-3, clips=128, group=2))
    source = "table of post-pre-training settings" if variant == "paper" else f"vit_{size} K710 fine-tuning script"
    return classification("post_pretrain", size, "k710", settings, cites=f"VideoMAE V2, {source}")
