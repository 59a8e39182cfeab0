"""Progressive training (VideoMAE V2 section 3.4): pre-train, post-pre-train, fine-tune, each from the one before.

Enter and leave at any stage: `--from finetune --init-weights vit_g_k710.pth`, `--until pretrain`. SSv1 and SSv2 go from
pre-training straight to fine-tuning, because post-pre-training on Kinetics made SSv2 worse. The fine-tuning stage has the
values of the paper's table of fine-tuning settings at 16x224^2. AVA and AVA-Kinetics are fine-tuned from it, too.
For THUMOS14 and FineAction the last stage, `detect`, takes features of whole videos with the post-pre-trained weights into
OUT/features and trains ActionFormer on them; `--from detect --init-weights vit_g_k710.pth` takes them with others.

Later stages have smaller batches, which few GPUs share: pre-training ran on 64, post-pre-training on 32, fine-tuning on 32 or
8. One launch on 8 goes through all of them (but `detect`: `--from detect --gpus 1`); on more, launch the stages apart:
`--until pretrain` on 64, then `--from post_pretrain --until post_pretrain` on 32, then `--from finetune` on 8.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Literal

from vmae2_fast.config import ClassifyConfig, Progression, Stage, TadConfig
from vmae2_fast.recipes import ava, finetune, post_pretrain, pretrain, tad

Target = Literal[
    "k400", "k600", "ssv1", "ssv2", "ucf101", "hmdb51", "ava", "ava_kinetics", "thumos14", "fineaction"
]  # fmt: skip


def vit_giant(target: Target = "k400", out: str = "runs/progressive_vit_giant") -> Progression:
    """ViT-g/14 to K400 88.5, K600 88.8, SSv1 68.7, SSv2 77.0, UCF101 99.6, HMDB51 88.1, AVA 42.6, AVA-Kinetics 43.9, THUMOS14
    69.6 or FineAction 18.2. 8 GPUs from end to end; stages apart on as many as their recipes name."""
    last: dict[Target, Callable[..., Stage]] = {
        "k400": finetune.vit_giant_k400, "k600": finetune.vit_giant_k600, "ssv1": finetune.vit_giant_ssv1,
        "ssv2": finetune.vit_giant_ssv2, "ucf101": finetune.vit_giant_ucf101, "hmdb51": finetune.vit_giant_hmdb51,
        "ava": ava.ava_vit_giant, "ava_kinetics": ava.ava_kinetics_vit_giant,
        "thumos14": tad.thumos14_vit_giant, "fineaction": tad.fineaction_vit_giant,
    }  # fmt: skip
    return _progression("giant", target, out, pretrain.vit_giant_hybrid(), post_pretrain.vit_giant_k710(), last[target])


def vit_huge(target: Target = "k400", out: str = "runs/progressive_vit_huge") -> Progression:
    """ViT-H/16 to K400 88.6, K600 88.3, SSv1 66.6 or SSv2 76.8 (the other targets: nothing published). 8 GPUs from end to
    end; stages apart on as many as their recipes name."""
    last: dict[Target, Callable[..., Stage]] = {
        "k400": finetune.vit_huge_k400, "k600": finetune.vit_huge_k600, "ssv1": finetune.vit_huge_ssv1,
        "ssv2": finetune.vit_huge_ssv2, "ucf101": finetune.vit_huge_ucf101, "hmdb51": finetune.vit_huge_hmdb51,
        "ava": ava.ava_vit_huge, "ava_kinetics": ava.ava_kinetics_vit_huge,
        "thumos14": tad.thumos14_vit_huge, "fineaction": tad.fineaction_vit_huge,
    }  # fmt: skip
    return _progression("huge", target, out, pretrain.vit_huge_hybrid(), post_pretrain.vit_huge_k710(), last[target])


def _progression(
    size: str, target: Target, out: str, first: Stage, second: ClassifyConfig, last: Callable[..., Stage]
) -> Progression:
    direct = target in ("ssv1", "ssv2")
    # The scripts' values of ViT-H on Kinetics are those of a start from pre-trained weights; the table's follow K710.
    detects = target in ("ava", "ava_kinetics", "thumos14", "fineaction")
    tuned = last() if detects else last(variant="paper")
    stages: list[Stage] = [dataclasses.replace(first, name="pretrain")]
    if not direct:
        stages.append(dataclasses.replace(second, name="post_pretrain", init="stage:pretrain"))
    source = "stage:pretrain" if direct else "stage:post_pretrain"
    if isinstance(tuned, TadConfig):
        stages.append(_on_own_features(tuned, source, f"{out}/features"))
    else:
        stages.append(dataclasses.replace(tuned, name="finetune", init=source))
    return Progression(
        name=f"progressive_vit_{size}_{target}",
        cites="VideoMAE V2 section 3.4 and tables of settings",
        stages=tuple(stages),
        out=out,
    )


def _on_own_features(stage: TadConfig, trunk: str, folder: str) -> TadConfig:
    assert stage.validation is not None
    data, validation = (dataclasses.replace(part, features=folder) for part in (stage.data, stage.validation))
    return dataclasses.replace(stage, name="detect", trunk_weights=trunk, data=data, validation=validation)
