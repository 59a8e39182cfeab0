"""Post-pre-training on LabeledHybrid (K710: the union of K400, K600 and K700 with merged labels, 658 340 clips).

Each starts from a pre-trained model: give its weights with `--init-weights`, or run `progressive`. `variant="official"` is
the released K710 script (batches of clips times two views), "paper" the table of post-pre-training settings (batch 128,
lr 1e-3). SSv2 is better off without this stage (paper, section on progressive training).
"""

from __future__ import annotations

from typing import Literal

from vmae2_fast.config import ClassifyConfig, DataConfig, ModelConfig, OptimConfig, SourceConfig, TrainConfig, ViewsConfig

Variant = Literal["official", "paper"]


def vit_giant_k710(variant: Variant = "official") -> ClassifyConfig:
    """ViT-g/14 on K710, 35 epochs, 32 GPUs: 83.8 top-1 of K710, start of K400 88.4."""
    return _k710(
        "giant_patch14", variant, clips=96, lr=1e-3, epochs=35, drop_path=0.3, layer_decay=0.9, weight_decay=0.1, clip_grad=5.0
    )


def vit_huge_k710(variant: Variant = "official") -> ClassifyConfig:
    """ViT-H/16 on K710, 40 epochs, 32 GPUs; start of K400 88.6, K600 88.3."""
    return _k710("huge_patch16", variant, clips=128, lr=1e-3, epochs=40, drop_path=0.2, layer_decay=0.8, head_dropout=0.5)


def vit_large_k710(variant: Variant = "official") -> ClassifyConfig:
    """ViT-L/16 on K710 with the values of the K400 script, 35 epochs, 32 GPUs. No published result."""
    return _k710("large_patch16", variant, clips=192, lr=2e-3, epochs=35, drop_path=0.2, layer_decay=0.75)


def vit_base_k710(variant: Variant = "official") -> ClassifyConfig:
    """ViT-B/16 on K710, 90 epochs, 32 GPUs; the student that distillation starts from."""
    return _k710("base_patch16", variant, clips=512, lr=7e-4, epochs=90, drop_path=0.1, layer_decay=0.75)


def _k710(
    model: str,
    variant: Variant,
    *,
    clips: int,
    lr: float,
    epochs: int,
    drop_path: float,
    layer_decay: float,
    weight_decay: float = 0.05,
    head_dropout: float = 0.0,
    clip_grad: float | None = None,
) -> ClassifyConfig:
    size = model.partition("_")[0]
    paper = variant == "paper"
    data = DataConfig(
        sources=(SourceConfig(name="k710"),), stride=4, sampling="dense", views=2, crop="random_resized", flip=True, workers=8
    )
    return ClassifyConfig(
        name=f"post_pretrain_vit_{size}_k710",
        cites=f"VideoMAE V2, {'table of post-pre-training settings' if paper else f'vit_{size} K710 fine-tuning script'}",
        model=ModelConfig(name=f"vit_{model}_224", num_classes=710, drop_path=drop_path, head_dropout=head_dropout),
        data=data,
        validation=DataConfig(
            sources=(SourceConfig(name="k710", split="val"),), stride=4, sampling="dense", crop="center", workers=8
        ),
        optim=OptimConfig(
            lr=1e-3 if paper else lr,
            lr_batch=256 if paper else 512,  # the script's rule leaves the two views of a clip out
            min_lr=1e-6,
            warmup_epochs=5,
            betas=(0.9, 0.999),
            weight_decay=weight_decay,
            layer_decay=layer_decay,
            clip_grad=clip_grad,
        ),
        train=TrainConfig(
            epochs=epochs, global_batch=128 if paper else 2 * clips, precision="bfloat16", checkpoint_every=1000
        ),
        views=ViewsConfig(segments=5, crops=3),
    )
