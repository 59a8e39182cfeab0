"""Dual-masked pre-training as published: UnlabeledHybrid for the scaled runs, one labelled set's videos for ablations.

The sources are tables of your `datasets.toml` (README, "Your own data"): k710, ssv2, ava, webvid, own_web; k400. Batches
count views: 2048 clips x 4 views. Where the paper's table of pre-training settings and the released scripts disagree,
`variant` chooses: "official" is the script (lr 1e-3 without clipping, except for ViT-g: 6e-4 and clip 0.02; 800 effective
epochs for ViT-B), "paper" the table (base lr 1.5e-4 at batch 8192 views, clip 0.02, 1200 effective epochs, loss divided
by all decoded tokens, decoder in float32 and with MLPs of 2048) for every size.
ViT-S has no script of its own: it takes ViT-B's values.
"""

from __future__ import annotations

import dataclasses
import os
import sys
from collections.abc import Iterable
from fractions import Fraction
from pathlib import Path
from typing import Literal

from vmae2_fast.config import DataConfig, MaskConfig, ModelConfig, OptimConfig, PretrainConfig, SourceConfig, TrainConfig
from vmae2_fast.data.labelled_sets import PUBLISHED_CLIPS
from vmae2_fast.data.manifest import open_sources, read_datasets

Variant = Literal["official", "paper"]
HYBRID = {name: PUBLISHED_CLIPS[name] for name in ("k710", "ssv2", "ava", "webvid", "own_web")}
"""Sources of UnlabeledHybrid and their published numbers of clips (paper, table of the hybrid data set)."""

_PATCH = {"small": 16, "base": 16, "large": 16, "huge": 16, "giant": 14}
# size: (clips of a batch, lr per 256 clips, epochs of 4 views, warm-up epochs, clip) of the official scripts
_SCRIPTS: dict[str, tuple[int, float, int, int, float | None]] = {
    "small": (1024, 1e-3, 200, 20, None),
    "base": (1024, 1e-3, 200, 20, None),
    "large": (1536, 1e-3, 300, 30, None),
    "huge": (2048, 1e-3, 300, 30, None),
    "giant": (2048, 6e-4, 300, 30, 0.02),
}


def vit_giant_hybrid(variant: Variant = "official") -> PretrainConfig:
    """ViT-g/14 on UnlabeledHybrid, 1200 effective epochs; the paper's 64 A100-80G. Start of K400 88.5, SSv2 77.0."""
    return _hybrid("giant", variant)


def vit_huge_hybrid(variant: Variant = "official") -> PretrainConfig:
    """ViT-H/16 on UnlabeledHybrid, 1200 effective epochs, 64 GPUs. Start of K400 86.9, SSv2 76.8."""
    return _hybrid("huge", variant)


def vit_large_hybrid(variant: Variant = "official") -> PretrainConfig:
    """ViT-L/16 on UnlabeledHybrid, 1200 effective epochs, 48 GPUs (paper: 64). Start of K400 85.4, SSv2 75.7."""
    return _hybrid("large", variant)


def vit_base_hybrid(variant: Variant = "official") -> PretrainConfig:
    """ViT-B/16 on UnlabeledHybrid, 800 effective epochs, 32 GPUs. Start of K400 81.5, SSv2 71.2."""
    return _hybrid("base", variant)


def vit_small_hybrid(variant: Variant = "official") -> PretrainConfig:
    """ViT-S/16 on UnlabeledHybrid with ViT-B's values, 32 GPUs. No published result: the released ViT-S is distilled."""
    return _hybrid("small", variant)


def hybrid_available(
    size: Literal["small", "base", "large", "huge", "giant"] = "base",
    variant: Variant = "official",
    datasets: str | None = None,
) -> PretrainConfig:
    """UnlabeledHybrid's sources that are in your datasets.toml, missing share printed. No reproduction: other data.

    The sources present keep their published proportions, whatever the lengths of your lists: an epoch has as many clips as
    the lists together, drawn with weights that make up for the lengths. datasets: path of the file; default
    VMAE2_DATASETS, then ./datasets.toml. Raises ValueError if none is there, or a list cannot be read.
    """
    path = datasets or os.environ.get("VMAE2_DATASETS") or "datasets.toml"
    tables = read_datasets(path)
    present = {source.name: source for source in _sources(HYBRID) if source.name in tables}
    if not present:
        raise ValueError(f"{path}: holds none of the sources of UnlabeledHybrid ({', '.join(HYBRID)})")
    missing = [name for name in HYBRID if name not in tables]
    share = sum(HYBRID[name] for name in missing) / sum(HYBRID.values())
    rest = sum(HYBRID[name] for name in present)
    lists = open_sources(DataConfig(sources=tuple(present.values()), datasets=path))
    clips = {source.name: len(source.manifest) for source in lists}
    # a fraction first: lists of the published lengths have a weight of exactly 1
    weights = {name: float(Fraction(HYBRID[name] * sum(clips.values()), rest * clips[name])) for name in present}
    shares = (f"{name} {HYBRID[name] / rest:.1%} ({clips[name]:,} clips, weight {weights[name]:.4g})" for name in present)
    print(
        f"hybrid_available: {', '.join(shares)}; missing "
        f"{', '.join(missing) or 'nothing'} ({share:.1%} of the published clips). "
        "This is not a reproduction of UnlabeledHybrid.",
        file=sys.stderr,
    )
    sources = tuple(dataclasses.replace(source, weight=weights[name]) for name, source in present.items())
    return _hybrid(size, variant, sources, f"pretrain_vit_{size}_hybrid_available", datasets and str(Path(datasets)))


def vit_small_k400(epochs: int = 1600) -> PretrainConfig:
    """ViT-S/16 on K400 with ViT-B's values. No published result."""
    return _single("small", "k400", epochs)


def vit_base_k400(epochs: int = 1600) -> PretrainConfig:
    """ViT-B/16 on K400 with dual masking, batch 1024, stride 4, flips. VideoMAE (v1, encoder masking): K400 81.5."""
    return _single("base", "k400", epochs)


def vit_large_k400(epochs: int = 1600) -> PretrainConfig:
    """ViT-L/16 on K400 with dual masking, batch 1024, stride 4, flips. VideoMAE (v1, encoder masking): K400 85.2."""
    return _single("large", "k400", epochs)


def vit_huge_k400(epochs: int = 1600) -> PretrainConfig:
    """ViT-H/16 on K400 with dual masking, batch 1024, stride 4, flips. VideoMAE (v1, encoder masking): K400 86.6."""
    return _single("huge", "k400", epochs)


def vit_giant_k400(epochs: int = 1600) -> PretrainConfig:
    """ViT-g/14 on K400 by the same rule, clipped at 0.02 as on UnlabeledHybrid. No published result."""
    return _single("giant", "k400", epochs)


def vit_small_ssv2(epochs: int = 800) -> PretrainConfig:
    """ViT-S/16 on SSv2 with ViT-B's values. No published result."""
    return _single("small", "ssv2", epochs)


def vit_base_ssv2(epochs: int = 800) -> PretrainConfig:
    """ViT-B/16 on SSv2, the paper's ablation of dual masking: SSv2 70.15; batch 1024, stride 2, no flips."""
    return _single("base", "ssv2", epochs)


def vit_large_ssv2(epochs: int = 2400) -> PretrainConfig:
    """ViT-L/16 on SSv2 with dual masking, batch 1024, stride 2, no flips. VideoMAE (v1, encoder masking): SSv2 74.3."""
    return _single("large", "ssv2", epochs)


def vit_huge_ssv2(epochs: int = 2400) -> PretrainConfig:
    """ViT-H/16 on SSv2 with dual masking, batch 1024, stride 2, no flips. VideoMAE (v1, encoder masking): SSv2 74.8."""
    return _single("huge", "ssv2", epochs)


def vit_giant_ssv2(epochs: int = 2400) -> PretrainConfig:
    """ViT-g/14 on SSv2 by the same rule, clipped at 0.02 as on UnlabeledHybrid. No published result."""
    return _single("giant", "ssv2", epochs)


def _model(size: str) -> ModelConfig:
    return ModelConfig(name=f"pretrain_videomae_{size}_patch{_PATCH[size]}_224")


def _sources(names: Iterable[str]) -> tuple[SourceConfig, ...]:
    """On SSv2 the frames are 2 apart, on all others 4 (paper, section on data)."""
    return tuple(SourceConfig(name=name, stride=2 if name == "ssv2" else 4) for name in names)


def _hybrid(
    size: str,
    variant: Variant,
    sources: tuple[SourceConfig, ...] | None = None,
    name: str | None = None,
    datasets: str | None = None,
) -> PretrainConfig:
    clips, lr, epochs, warmup, clip_grad = _SCRIPTS[size]
    if variant == "paper":
        # 1.5e-4 at 256 of 8192 views is 6e-4 at 256 of 2048 clips.
        clips, lr, epochs, warmup, clip_grad = 2048, 6e-4, 300, 30, 0.02
    return PretrainConfig(
        name=name or f"pretrain_vit_{size}_hybrid",
        cites=f"VideoMAE V2, {'table of pre-training settings' if variant == 'paper' else f'vit_{size} pre-training script'}",
        model=dataclasses.replace(
            # MLPs of 4 D in the decoder, too: 2048 in ViT-g's, where the code has 2234, its encoder's ratio times 512.
            _model(size), decoder_fp32=variant == "paper", decoder_mlp_ratio=4.0 if variant == "paper" else None,
        ),
        mask=MaskConfig(encoder_ratio=0.9, decoder="running_cell", decoder_ratio=0.5),
        data=DataConfig(
            sources=sources or _sources(HYBRID), datasets=datasets, stride=4, sampling="pretrain", views=4, crop="multi_scale",
            workers=8,
        ),
        # The official rule scales by clips without their views: lr * clips / 256 = lr * global_batch / 1024 here.
        optim=OptimConfig(
            lr=lr, lr_batch=1024, min_lr=1e-5, warmup_epochs=warmup, betas=(0.9, 0.95), weight_decay=0.05, clip_grad=clip_grad
        ),
        train=TrainConfig(
            epochs=epochs, global_batch=4 * clips, micro_batch=0, precision="bfloat16", checkpoint_every=1000,
            keep_checkpoints=3, loss_denominator="paper" if variant == "paper" else "code",
        ),
    )  # fmt: skip


def _single(size: str, source: str, epochs: int) -> PretrainConfig:
    # VideoMAE (v1), appendix, pre-training table: lr 1.5e-4 x batch / 256, batch 1024, warm-up 40, no clipping.
    moving = source == "ssv2"  # labels there tell left from right
    return PretrainConfig(
        name=f"pretrain_vit_{size}_{source}",
        cites="VideoMAE (v1) appendix, pre-training settings; masks of VideoMAE V2 section 3.2",
        model=_model(size),
        mask=MaskConfig(encoder_ratio=0.9, decoder="running_cell", decoder_ratio=0.5),
        data=DataConfig(
            sources=(SourceConfig(name=source),), stride=2 if moving else 4, sampling="pretrain", crop="multi_scale",
            flip=not moving, workers=8,
        ),
        optim=OptimConfig(
            lr=1.5e-4, lr_batch=256, min_lr=1e-5, warmup_epochs=40, betas=(0.9, 0.95), weight_decay=0.05,
            clip_grad=_SCRIPTS["giant"][-1] if size == "giant" else None,
        ),
        train=TrainConfig(
            epochs=epochs, global_batch=1024, micro_batch=0, precision="bfloat16", checkpoint_every=1000, keep_checkpoints=3,
        ),
    )  # fmt: skip
