"""The demo: a whole progressive training that two CPU cores finish in minutes.

`vmae2 launch demo:progressive` writes moving scenes as real encoded files and trains on them;
`vmae2 launch demo:progressive --clips DIR` does the same on a folder of labelled videos.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from vmae2_fast.config import (
    ClassifyConfig,
    DataConfig,
    DistillConfig,
    MaskConfig,
    ModelConfig,
    OptimConfig,
    PrepareConfig,
    PretrainConfig,
    Progression,
    SourceConfig,
    TrainConfig,
    ViewsConfig,
)
from vmae2_fast.data.prepare import folder_labels
from vmae2_fast.data.synthetic import CLASSES, TARGET_CLASSES

# Official initial values (0.02, head x 0.001) are for widths of 384 and more: narrow models hardly start from them.
_CLIP: dict[str, Any] = {"frames": 8, "size": 48, "patch": 8, "init_std": 0.1, "head_init_scale": 1.0}
_WIDE: dict[str, Any] = {**_CLIP, "width": 64, "depth": 2, "heads": 2}


def progressive(out: str = "runs/demo", clips: str | None = None, short: bool = False) -> Progression:
    """Pre-train, post-pre-train, fine-tune, distil; and a from-scratch model beside them. 2 CPU cores, about 6 minutes.

    The stages are those of VideoMAE V2 section 3.4 at toy size. `clips`: a folder of labelled videos instead of the
    moving scenes. `short`: a tenth of the steps, to see everything run.
    """
    labeled = len(CLASSES) if clips is None else len(folder_labels(clips))
    target = len(TARGET_CLASSES) if clips is None else labeled
    steps = 10 if short else 1
    few = clips is not None  # a folder's few clips make short epochs
    classifier = ModelConfig(name="vit_small_patch16_224", num_classes=target, **_WIDE)
    pretrain = PretrainConfig(
        name="pretrain",
        cites="paper section 3.2: dual masking, 90 % tube and 50 % running cell",
        model=ModelConfig(
            name="pretrain_videomae_small_patch16_224", decoder_width=96, decoder_depth=2, decoder_heads=2, **_WIDE
        ),
        mask=MaskConfig(encoder_ratio=0.9, decoder="running_cell", decoder_ratio=0.5),
        data=_data(out, "unlabeled_video", "unlabeled_frames", views=2),
        validation=_data(out, "holdout", split="val"),
        optim=OptimConfig(lr=2e-3, lr_batch=0, min_lr=1e-5, warmup_epochs=2.0 / steps, betas=(0.9, 0.95)),
        train=_train((450 if few else 16) // steps),
    )
    post_pretrain = ClassifyConfig(
        name="post_pretrain",
        cites="paper section 3.4: supervised on the merged labelled set",
        model=ModelConfig(name="vit_small_patch16_224", num_classes=labeled, **_WIDE),
        data=_data(out, "labeled_video", "labeled_frames", sampling="dense"),
        validation=_data(out, "labeled_video", split="val", sampling="dense"),
        optim=OptimConfig(lr=2e-3, lr_batch=0, min_lr=1e-5, warmup_epochs=1.0 / steps, betas=(0.9, 0.999)),
        train=_train((200 if few else 15) // steps),
        views=ViewsConfig(segments=1, crops=1),
        init="stage:pretrain",
    )
    finetune = ClassifyConfig(
        name="finetune",
        cites="paper section 3.4: specific fine-tuning on the target set",
        model=dataclasses.replace(classifier, head_init_scale=0.01),
        data=_data(out, "target", sampling="dense"),
        validation=_data(out, "target", split="val", sampling="dense"),
        optim=OptimConfig(lr=5e-4, lr_batch=0, min_lr=1e-5, warmup_epochs=2.0 / steps, betas=(0.9, 0.999), layer_decay=0.9),
        train=_train((120 if few else 40) // steps),
        views=ViewsConfig(segments=2, crops=3),
        init="stage:post_pretrain",
    )
    scratch = ClassifyConfig(
        name="scratch",
        cites="for comparison: no earlier stage, as many labelled clips as post-pre-training and fine-tuning took together",
        model=classifier,
        data=finetune.data,
        validation=finetune.validation,
        optim=OptimConfig(lr=2e-3, lr_batch=0, min_lr=1e-5, warmup_epochs=2.0 / steps, betas=(0.9, 0.999)),
        train=_train((520 if few else 235) // steps),
        views=finetune.views,
    )
    distill = DistillConfig(
        name="distill",
        cites="paper appendix on distillation: KL at temperature 3, no labels",
        model=ModelConfig(name="vit_small_patch16_224", num_classes=target, width=48, depth=1, heads=2, **_CLIP),
        teacher=classifier,
        teacher_weights="stage:finetune",
        data=_data(out, "labeled_video", "labeled_frames", "target", sampling="dense"),
        validation=finetune.validation,
        optim=OptimConfig(lr=2e-3, lr_batch=0, min_lr=1e-5, warmup_epochs=1.0 / steps, betas=(0.9, 0.999)),
        train=_train((150 if few else 10) // steps),
        views=finetune.views,
    )
    return Progression(
        name="demo",
        cites="VideoMAE V2 section 3.4, progressive training, at toy size",
        prepare=PrepareConfig(folder=str(Path(clips).resolve()) if clips else None),
        stages=(pretrain, post_pretrain, finetune, scratch, distill),
        out=out,
    )


def _data(out: str, *sources: str, split: str = "train", sampling: str = "pretrain", views: int = 1) -> DataConfig:
    return DataConfig(
        sources=tuple(SourceConfig(name=name, split=split) for name in sources),
        datasets=f"{out}/data/datasets.toml",
        sampling=sampling,  # type: ignore[arg-type]
        views=views,
        cache_mb=512,
    )


def _train(epochs: int) -> TrainConfig:
    return TrainConfig(epochs=max(1, epochs), global_batch=16, threads=1, checkpoint_every=200, log_every=20)
