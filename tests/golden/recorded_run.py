"""A recorded training run through the whole loop: config, schedule, ranks, accumulation, optimiser, log and checkpoints are
those of any run; in place of decoded clips and drawn masks stand the recorded ones.

`python -m tests.golden.recorded_run NAME OUT PARALLEL MICRO_BATCH` trains one rank of it (alone, or under torchrun).
"""

from __future__ import annotations

import math
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from tests.golden.cases import MODELS, masks, named, pretrain_model, tensors
from vmae2_fast.config import DataConfig, MaskConfig, OptimConfig, PretrainConfig, TrainConfig
from vmae2_fast.data.loader import Batch
from vmae2_fast.ops.masks import DualMask
from vmae2_fast.tasks.pretrain import PretrainTask
from vmae2_fast.train import loop, parallel

START = "start.safetensors"


def clips_of(name: str) -> int:
    """Clips of every step of the run."""
    return len(tensors("models", MODELS[name]["start"])["input.video_f16"])


def write_start(name: str, out: Path) -> None:
    """Write the weights that the run starts from into `out`, for all its ranks."""
    save_file(named(tensors("models", MODELS[name]["start"]), "param."), out / START)


def _cosine_end(base: float, last: float, step: int, length: int) -> float:
    """Value that a cosine of `length` steps from `base` tends to, from what it is at `step`."""
    share = 0.5 * (1 + math.cos(math.pi * step / length))
    return (last - base * share) / (1 - share) if share < 1 else base


def config_of(name: str, out: Path, parallel_mode: str, micro_batch: int) -> PretrainConfig:
    """The recorded run as a config: an epoch is one step."""
    entry = MODELS[name]
    start, rates, decays = MODELS[entry["start"]]["config"], entry["lr"], entry["wd"]
    steps, base = entry["steps"], max(entry["lr"])
    warmup = rates.index(base) + 1 if rates[0] < base else 0
    recorded = tensors("models", entry["start"])
    whole = "input.bool_masked_pos" in recorded
    return PretrainConfig(
        name=name, model=pretrain_model(entry["start"]).config, out=str(out), init=str(out / START), data=DataConfig(),
        mask=MaskConfig(
            encoder_ratio=start["er"], decoder="none" if whole else "running_cell",
            decoder_ratio=0.0 if whole else start["dr"],
        ),
        normalize_target=start["norm"],
        optim=OptimConfig(
            lr=base, lr_batch=0, min_lr=_cosine_end(base, rates[-1], steps - 1 - warmup, steps - warmup),
            warmup_epochs=warmup, betas=(0.9, 0.95), eps=1e-8, weight_decay=decays[0],
            weight_decay_end=_cosine_end(decays[0], decays[-1], steps - 1, steps), clip_grad=entry["clip"],
        ),
        train=TrainConfig(
            epochs=steps, global_batch=clips_of(name), micro_batch=micro_batch, parallel=parallel_mode,  # type: ignore[arg-type]
            log_every=1, threads=1,
        ),
    )  # fmt: skip


class RecordedClips:
    """What the loop uses of a `VideoLoader`: at step s the recorded clips, rolled by s frames."""

    sources: tuple[Any, ...] = ()

    def __init__(self, video: Tensor, clips: int, rank: int, world: int) -> None:
        self.video, self.clips, self.rank, self.world = video, clips, rank, world
        self.num_clips = len(video)
        self.position = self.steps = 0
        self.wait_s = self.decode_s = 0.0
        self.fallback = self.rgb = Counter[str]()

    def __enter__(self) -> RecordedClips:
        return self

    def __exit__(self, *exc: object) -> None:
        pass

    def __iter__(self) -> Iterator[Batch]:
        for number in range(self.steps):
            first = self.position + (number * self.world + self.rank) * self.clips
            position = torch.arange(first, first + self.clips)
            step, row = position // self.num_clips, position % self.num_clips
            clip = torch.stack([self.video[r].roll(s, 1) for s, r in zip(step.tolist(), row.tolist())])
            nothing = torch.zeros_like(position)
            yield Batch(clip, nothing - 1, position, nothing, ("recorded",) * self.clips, [])


class RecordedTask(PretrainTask):
    """Pre-training on the recorded clips and masks; at step s the masks are rolled by s clips."""

    def __init__(self, config: PretrainConfig, device: torch.device | str = "cpu", *, on_meta: bool = False) -> None:
        super().__init__(config, device, on_meta=on_meta)
        self.recorded = tensors("models", MODELS[config.name]["start"])
        self.recorded_masks = masks(self.recorded)

    def training_loader(self, clips_per_batch: int, quarantine: Any = None, *, rank: int = 0, world: int = 1) -> Any:
        return RecordedClips(self.recorded["input.video_f16"].float(), clips_per_batch, rank, world)

    def masks(self, position: Tensor, view: Tensor) -> DualMask:
        clips = self.config.train.global_batch
        row = (position - position // clips) % clips
        return DualMask(*(part[row] for part in self.recorded_masks))

    def class_names(self) -> None:
        return None


def run(name: str, out: Path, parallel_mode: str, micro_batch: int) -> None:
    """Train in `out`/`name` from what `write_start` wrote."""
    kept = loop.create_task
    loop.create_task = RecordedTask  # type: ignore[assignment]
    try:
        loop.train(config_of(name, out, parallel_mode, micro_batch), device="cpu")
    finally:
        loop.create_task = kept


if __name__ == "__main__":
    case, folder, mode, clips = sys.argv[1:]
    try:
        run(case, Path(folder), mode, int(clips))
    finally:
        parallel.leave()
