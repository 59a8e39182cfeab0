"""The arms of each study: stages whose weights are handed on, the same but for what the study is about.

Stages that are the same have the same name, in one study and between studies, so each is trained once for a seed.
"""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import torch

from ..config import (
    ClassifyConfig,
    DataConfig,
    MaskConfig,
    ModelConfig,
    OptimConfig,
    PretrainConfig,
    SourceConfig,
    Stage,
    TrainConfig,
    ViewsConfig,
)
from ..data.loader import Batch
from ..data.synthetic import CLASSES, TARGET_CLASSES
from ..tasks.pretrain import PretrainTask
from ..train.execution import accumulate
from ..train.ledger import ledger
from ..whole import write_whole

THREADS = 1
"""Models this small are no faster on more."""

_CLIP: dict[str, Any] = {"frames": 8, "size": 32, "patch": 8, "init_std": 0.1, "head_init_scale": 1.0}
_WIDTH = 64
_ENCODER_RATIO = 0.75
"""Four of sixteen tubes stay visible; the paper's 0.9 would leave two of a picture of 4 x 4 patches."""


class Arm(NamedTuple):
    """One row of a table."""

    name: str
    stages: tuple[Stage, ...]
    cost: Mapping[str, float] = MappingProxyType({})
    """What is known without its training."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Epochs:
    """Of each kind of stage."""

    pretrain: int
    post_pretrain: int
    finetune: int
    scratch: int

    def scaled(self, length: float) -> Epochs:
        return Epochs(**{key: max(1, round(length * count)) for key, count in dataclasses.asdict(self).items()})


FULL = Epochs(pretrain=12, post_pretrain=16, finetune=80, scratch=160)
SHORT = Epochs(pretrain=2, post_pretrain=1, finetune=2, scratch=2)


def figures(arm: Arm, done: dict[str, dict[str, Any]]) -> dict[str, float]:
    """What an arm came to, of the summaries of its stages: masked prediction on unseen clips, and target top-1."""
    found: dict[str, float] = {}
    for stage in arm.stages:
        if isinstance(stage, PretrainConfig):
            found["loss / zero predictor"] = done[stage.name]["validation"]["ratio_to_zero_predictor"]
    return {**found, "top-1 %": 100 * done[arm.stages[-1].name]["validation"]["top1"]}


def progressive(out: Path, seed: int, epochs: Epochs) -> list[Arm]:
    """Top-1 on unseen clips of the target classes, each arm with the same few labels of them."""
    pretrain = _pretrain(out, seed, epochs, "pretrain")
    direct, both = (_post_pretrain(out, seed, epochs, init) for init in (None, "pretrain"))
    return [
        Arm("from scratch", (_finetune(out, seed, epochs, None),)),
        Arm("post-pre-train from scratch, fine-tune", (direct, _finetune(out, seed, epochs, direct.name))),
        Arm("pre-train, fine-tune", (pretrain, _finetune(out, seed, epochs, pretrain.name))),
        Arm("pre-train, post-pre-train, fine-tune", (pretrain, both, _finetune(out, seed, epochs, both.name))),
    ]


def masking(out: Path, seed: int, epochs: Epochs) -> list[Arm]:
    """Decoder masks: masked prediction, fine-tuned top-1, and what a step costs in time, tokens and activations."""
    names = {
        "none": "pretrain_none", "frame": "pretrain_frame", "random": "pretrain_random", "running_cell": "pretrain",
    }  # fmt: skip
    pretrains = {key: _pretrain(out, seed, epochs, name, mask=_mask(key)) for key, name in names.items()}
    times = step_seconds(list(pretrains.values()))
    arms = []
    for (decoder, pretrain), seconds in zip(pretrains.items(), times):
        account = ledger(pretrain.model, pretrain.mask, precision="float32")
        cost = {
            "step ms": 1000 * seconds,
            "decoder tokens": float(account["tokens"]["sequence"]),
            "activation KiB / clip": account["activation_bytes"]["total"] / 1024,
        }
        title = "encoder only" if decoder == "none" else f"dual, {decoder.replace('_', ' ')}"
        arms.append(Arm(title, (pretrain, _finetune(out, seed, epochs, pretrain.name)), cost))
    return arms


def scaling(out: Path, seed: int, epochs: Epochs) -> list[Arm]:
    """Widths x sizes of the pre-training set, the same number of steps: masked prediction and fine-tuned top-1."""
    arms = []
    for width in (16, 32, _WIDTH):
        for share in (16, 4, 1):
            sources, clips = _subset(out, share)
            name = "pretrain" if width == _WIDTH and share == 1 else f"pretrain_{width}_{clips}"
            pretrain = _pretrain(out, seed, epochs, name, width=width, sources=sources, repeat=share)
            arms.append(
                Arm(f"width {width}, {clips} clips", (pretrain, _finetune(out, seed, epochs, pretrain.name, width=width)))
            )
    return arms


STUDIES: dict[str, Callable[[Path, int, Epochs], list[Arm]]] = {
    "progressive": progressive,
    "masking": masking,
    "scaling": scaling,
}


def step_seconds(configs: list[PretrainConfig], rounds: int = 25) -> list[float]:
    """Median seconds of a forward and backward of one global batch of random clips, the configs in turn."""
    generator = torch.Generator().manual_seed(0)
    before = torch.get_num_threads()
    torch.set_num_threads(THREADS)
    try:
        tasks = [PretrainTask(config) for config in configs]
        taken: list[list[float]] = [[] for _ in tasks]
        for round_ in range(rounds + 2):
            for task, times in zip(tasks, taken):
                clips, model = task.config.train.global_batch, task.config.model
                shape = (clips, model.frames, model.size, model.size, 3)
                batch = Batch(
                    clip=torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator),
                    label=torch.full((clips,), -1), position=torch.arange(clips) + round_ * clips,
                    view=torch.zeros(clips, dtype=torch.int64), paths=("random",) * clips, replaced=[],
                )  # fmt: skip
                begin = time.perf_counter()
                task.model.zero_grad()
                accumulate(task, iter([batch]), 1, clips)
                times.append(time.perf_counter() - begin)
    finally:
        torch.set_num_threads(before)
    return [statistics.median(times[2:]) for times in taken]  # the first two warm up


def _subset(out: Path, share: int) -> tuple[tuple[SourceConfig, ...], int]:
    """The first 1 / `share` of each unlabelled source, every class in it, and how many clips that is."""
    if share == 1:
        lists = [(out / "data" / name / "train.csv").read_text().splitlines() for name in _UNLABELLED]
        return (), sum(map(len, lists))
    sources, total = [], 0
    for name in _UNLABELLED:
        folder = out / "data" / name
        lines = (folder / "train.csv").read_text().splitlines()
        lines = lines[: max(len(lines) // share, 1)]
        listed = folder / f"first_{len(lines)}.csv"
        write_whole(listed, lambda path, lines=lines: path.write_text("\n".join(lines) + "\n"))  # type: ignore[misc]
        frames = name.endswith("_frames")
        sources.append(
            SourceConfig(
                name=name, root=str(folder), list=listed.name, stride=1 if frames else 2,
                template="img_{:05}.jpg" if frames else None,
            )
        )  # fmt: skip
        total += len(lines)
    return tuple(sources), total


_UNLABELLED = ("unlabeled_video", "unlabeled_frames")
_POST = "post_pretrain"


def _data(out: Path, *sources: str, split: str = "train", sampling: Any = "dense", views: int = 1) -> DataConfig:
    # decoded once and kept: a process of decoders would only wait
    return DataConfig(
        sources=tuple(SourceConfig(name=name, split=split) for name in sources), workers=0,
        datasets=str(out / "data" / "datasets.toml"), sampling=sampling, views=views, cache_mb=512,
    )  # fmt: skip


def _mask(decoder: Any) -> MaskConfig:
    return MaskConfig(encoder_ratio=_ENCODER_RATIO, decoder=decoder)


def _pretrain(
    out: Path, seed: int, epochs: Epochs, name: str, *, mask: MaskConfig | None = None, width: int = _WIDTH,
    sources: tuple[SourceConfig, ...] = (), repeat: int = 1,
) -> PretrainConfig:  # fmt: skip
    data = _data(out, *_UNLABELLED, sampling="pretrain", views=2)
    return PretrainConfig(
        name=name, out=str(out), seed=seed, mask=mask or _mask("running_cell"),
        model=ModelConfig(
            name="pretrain_videomae_small_patch16_224", width=width, depth=2, heads=2, decoder_width=64, decoder_depth=1,
            decoder_heads=2, **_CLIP,
        ),
        data=dataclasses.replace(data, sources=sources) if sources else data,
        validation=_data(out, "holdout", split="val", sampling="pretrain"),
        optim=OptimConfig(lr=2e-3, lr_batch=0, min_lr=1e-5, warmup_epochs=1.0 * repeat),
        train=TrainConfig(epochs=epochs.pretrain * repeat, global_batch=8, threads=THREADS, checkpoint_every=500),
    )  # fmt: skip


def _post_pretrain(out: Path, seed: int, epochs: Epochs, init: str | None) -> ClassifyConfig:
    """On the merged labelled set, of which the target's classes are half."""
    return _classify(
        out, seed, f"{_POST}_from_{init or 'scratch'}", ("labeled_video", "labeled_frames"), "labeled_video",
        classes=len(CLASSES), epochs=epochs.post_pretrain, init=init, width=_WIDTH,
    )  # fmt: skip


def _finetune(out: Path, seed: int, epochs: Epochs, init: str | None, *, width: int = _WIDTH) -> ClassifyConfig:
    """On the few labels of the target classes, from stage `init` or, longer, from scratch.

    A trunk that learned from labels is kept near where it was (the paper's tables fine-tune on Kinetics at a hundredth of the
    rate after K710): at the full rate it forgets on a few dozen clips what hundreds taught it.
    """
    return _classify(
        out, seed, f"finetune_from_{init or 'scratch'}", ("target",), "target", classes=len(TARGET_CLASSES),
        epochs=epochs.finetune if init else epochs.scratch, init=init, width=width,
        layer_decay=0.25 if init and init.startswith(_POST) else 1.0,
    )  # fmt: skip


def _classify(
    out: Path, seed: int, name: str, sources: tuple[str, ...], tested: str, *, classes: int, epochs: int, init: str | None,
    width: int, layer_decay: float = 1.0,
) -> ClassifyConfig:  # fmt: skip
    return ClassifyConfig(
        name=name, out=str(out), seed=seed, init=init and f"stage:{init}",
        model=ModelConfig(name="vit_small_patch16_224", num_classes=classes, width=width, depth=2, heads=2, **_CLIP),
        data=_data(out, *sources), validation=_data(out, tested, split="val"),
        optim=OptimConfig(
            lr=1e-3 if init else 2e-3, lr_batch=0, min_lr=1e-5, warmup_epochs=min(2.0, epochs / 2), betas=(0.9, 0.999),
            layer_decay=layer_decay,
        ),
        train=TrainConfig(epochs=epochs, global_batch=8, threads=THREADS, checkpoint_every=500),
        views=ViewsConfig(segments=2, crops=1),
    )  # fmt: skip
