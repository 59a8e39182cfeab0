"""The numbers of the published recipes, as paper and scripts print them, beside what our recipes resolve to.

Paper: its tables of settings (pre-training, post-pre-training, fine-tuning by set, distillation), a base learning rate that is
multiplied by batch/256. Scripts: those of the released code, which count GPUs x clips a GPU. Batches are clips, warm-up and
epochs those of the data loader (a pre-training epoch sees each clip in four views at once).
"""

from __future__ import annotations

from typing import Any

import pytest

from vmae2_fast.recipes import distill, finetune, post_pretrain, pretrain

Row = tuple[Any, ...]
# lr at 256, clips, warm-up, epochs, weight decay, drop path, dropout, layer decay, clip of the gradient's norm
_KINETICS_PAPER: Row = (1e-5, 32, 0, 3, 0.05, 0.3, 0.5, 0.9, None)
_LARGE_CLIPS: Row = (1e-4, 32, 0, 5, 0.05, 0.35, 0.5, 0.9, None)
_SOMETHING_PAPER: Row = (3e-4, 96, 5, 10, 0.05, 0.35, 0.5, 0.9, None)
_UCF: Row = (1e-3, 24, 5, 50, 0.05, 0.35, 0.5, 0.9, None)
_HMDB: Row = (5e-4, 24, 5, 15, 0.05, 0.35, 0.5, 0.9, None)
_K710_TO_KINETICS: Row = (1e-5, 96, 1, 3, 0.1, 0.25, 0.0, 0.9, None)
_HUGE_KINETICS: Row = (1e-3, 128, 5, 40, 0.05, 0.2, 0.5, 0.8, None)
PAPER = {
    "post_pretrain:vit_giant_k710": (1e-3, 128, 5, 35, 0.1, 0.3, 0.0, 0.9, 5.0),
    "post_pretrain:vit_huge_k710": (1e-3, 128, 5, 40, 0.05, 0.2, 0.5, 0.8, None),
    "finetune:vit_giant_k400": _KINETICS_PAPER,
    "finetune:vit_giant_k600": _KINETICS_PAPER,
    "finetune:vit_huge_k400": _KINETICS_PAPER,
    "finetune:vit_huge_k600": _KINETICS_PAPER,
    "finetune:vit_giant_k400_64x266": _LARGE_CLIPS,
    "finetune:vit_giant_k600_64x266": _LARGE_CLIPS,
    "finetune:vit_giant_ssv1": _SOMETHING_PAPER,
    "finetune:vit_giant_ssv2": _SOMETHING_PAPER,
    "finetune:vit_huge_ssv1": _SOMETHING_PAPER,
    "finetune:vit_huge_ssv2": _SOMETHING_PAPER,
    "finetune:vit_giant_ucf101": _UCF,
    "finetune:vit_huge_ucf101": _UCF,
    "finetune:vit_giant_hmdb51": _HMDB,
    "finetune:vit_huge_hmdb51": _HMDB,
}
SCRIPTS = {
    "post_pretrain:vit_giant_k710": (1e-3, 32 * 3, 5, 35, 0.1, 0.3, 0.0, 0.9, 5.0),
    "post_pretrain:vit_huge_k710": _HUGE_KINETICS,
    "finetune:vit_giant_k400": _K710_TO_KINETICS,
    "finetune:vit_giant_k600": _K710_TO_KINETICS,
    "finetune:vit_giant_k400_direct": (1e-3, 64 * 3, 5, 30, 0.05, 0.2, 0.0, 0.9, None),
    "finetune:vit_huge_k400": _HUGE_KINETICS,
    "finetune:vit_huge_k600": _HUGE_KINETICS,
    "finetune:vit_giant_ssv2": (3e-4, 32 * 3, 5, 20, 0.05, 0.25, 0.0, 0.9, None),
    "finetune:vit_huge_ssv2": (5e-4, 128, 5, 20, 0.05, 0.2, 0.5, 0.8, None),
    "finetune:vit_giant_ucf101": _UCF,
    "finetune:vit_giant_hmdb51": _HMDB,
    "finetune:vit_large_k400": (2e-3, 32 * 6, 5, 35, 0.05, 0.2, 0.0, 0.75, None),
    "finetune:vit_large_ssv2": (5e-4, 192, 5, 20, 0.05, 0.2, 0.0, 0.75, None),
    "finetune:vit_base_k400": (7e-4, 32 * 16, 5, 90, 0.05, 0.1, 0.0, 0.75, None),
    "finetune:vit_base_ssv2": (2e-3, 16 * 16, 5, 25, 0.05, 0.1, 0.0, 0.65, None),
}
MODULES = {"post_pretrain": post_pretrain, "finetune": finetune}
# lr at 256, clips, warm-up, epochs, clip of the gradient's norm
PRETRAINING = {
    ("giant", "official"): (6e-4, 64 * 32, 30, 300, 0.02),
    ("huge", "official"): (1e-3, 64 * 32, 30, 300, None),
    ("large", "official"): (1e-3, 48 * 32, 30, 300, None),
    ("base", "official"): (1e-3, 32 * 32, 20, 200, None),
    ("giant", "paper"): (1.5e-4 * 4, 8192 // 4, 120 // 4, 1200 // 4, 0.02),
    ("huge", "paper"): (1.5e-4 * 4, 8192 // 4, 120 // 4, 1200 // 4, 0.02),
}


def recipe(name: str, variant: str) -> Any:
    module, _, function = name.partition(":")
    made = getattr(MODULES[module], function)
    return made(variant) if "variant" in made.__annotations__ else made()


def values(run: Any) -> Row:
    optim, clips = run.optim, run.train.global_batch / run.data.views
    at_256 = optim.lr * run.train.global_batch / optim.lr_batch * 256 / clips
    decay = (optim.weight_decay, run.model.drop_path, run.model.head_dropout, optim.layer_decay)
    return at_256, clips, optim.warmup_epochs, run.train.epochs, *decay, optim.clip_grad


@pytest.mark.parametrize(
    ("name", "variant", "row"),
    [(n, "paper", r) for n, r in PAPER.items()] + [(n, "official", r) for n, r in SCRIPTS.items()],
)
def test_training_with_labels(name: str, variant: str, row: Row) -> None:
    run = recipe(name, variant)
    assert values(run) == pytest.approx(row)
    assert (run.data.views, run.optim.betas) == (2, (0.9, 0.999))
    assert (run.mix.mixup, run.mix.cutmix, run.label_smoothing) == (0.8, 1.0, 0.1)


@pytest.mark.parametrize(("size", "variant"), PRETRAINING)
def test_pretraining_on_the_hybrid(size: str, variant: str) -> None:
    run = getattr(pretrain, f"vit_{size}_hybrid")(variant)
    lr, clips, warmup, epochs, clip = PRETRAINING[size, variant]
    assert values(run) == pytest.approx((lr, clips, warmup, epochs, 0.05, 0.0, 0.0, 1.0, clip))
    assert (run.data.views, run.optim.betas) == (4, (0.9, 0.95))
    assert (run.mask.encoder_ratio, run.mask.decoder, run.mask.decoder_ratio) == (0.9, "running_cell", 0.5)
    assert {s.name: s.stride for s in run.data.sources} == {"k710": 4, "ssv2": 2, "ava": 4, "webvid": 4, "own_web": 4}
    assert not run.data.flip


@pytest.mark.parametrize("size", ["small", "base", "large", "huge", "giant"])
def test_frames_lie_two_apart_on_something_something_and_four_elsewhere(size: str) -> None:
    for name, stride in (("k400", 4), ("ssv2", 2)):
        run = getattr(pretrain, f"vit_{size}_{name}")()
        assert [(s.name, s.stride or run.data.stride) for s in run.data.sources] == [(name, stride)]
        assert run.data.flip == (name == "k400")  # VideoMAE, appendix


@pytest.mark.parametrize(("function", "lr", "batch"), [("vit_base_k710", 1e-3, 1024), ("vit_base_ssv2", 5e-4, 512)])
def test_distillation(function: str, lr: float, batch: int) -> None:
    run = getattr(distill, function)()
    assert values(run) == pytest.approx((lr, batch, 5, 100, 0.05, 0.1, 0.0, 0.75, 1.0))
    assert (run.temperature, run.objective, run.optim.betas) == (3.0, "kl", (0.9, 0.999))
    assert (run.mix.mixup, run.mix.cutmix, run.data.crop) == (0.8, 1.0, "multi_scale")
    assert run.teacher.name == "vit_giant_patch14_224"
