"""`vmae2 launch RECIPE --check`: the first steps of every stage for real, in a directory that is gone afterwards.

Opens the lists, decodes, trains `STEPS` steps of the full shape on all ranks, writes their checkpoint and reads it back
through the same code as a run. Nothing of an earlier run is touched.
"""

from __future__ import annotations

import dataclasses
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from ..config import RunConfig, Stage, TadConfig, TadDataConfig
from ..data.tad import TadError, choose_subset, read_annotations
from ..tasks.features import find_videos
from .budget import rank_bytes
from .interrupt import Interrupt
from .log import read_metrics
from .loop import Trainer
from .parallel import join
from .progression import handed_on
from .run_directory import RunDirectory

STEPS = 3


def standing_alone(stage: Stage) -> Stage:
    """The stage without weights that another stage has yet to write."""
    changes = {key: None if key == "init" else "random" for key in handed_on(stage)}
    return dataclasses.replace(stage, **changes)  # type: ignore[arg-type]


def _few_videos(config: TadConfig, place: Path) -> TadConfig:
    """Where features are yet to be taken with weights that are yet to be made: those of `STEPS` batches of the shortest
    videos, by a trunk of random weights. Raises TadError where an annotated video is not there."""

    def few(data: TadDataConfig, count: int) -> TadDataConfig:
        wanted = choose_subset(read_annotations(data.annotations), data.subset, data.block_list)
        there = find_videos([data.videos or ""], by_stem=True)
        lost = [name for name in wanted if name not in there]
        if lost:
            raise TadError(f"{data.videos}: no video of {lost[0]}" + (f" and {len(lost) - 1} more" if lost[1:] else ""))
        kept = sorted((v.duration, name) for name, v in wanted.items() if v.labels)[:count]
        others = wanted.keys() - {name for _, name in kept}
        return dataclasses.replace(
            data, features=str(place / "features"), block_list=(*data.block_list, *sorted(others))
        )

    validation = None if config.validation is None else few(config.validation, 1)
    return dataclasses.replace(config, data=few(config.data, STEPS * config.train.global_batch), validation=validation)


def preflight(config: RunConfig, *, device: torch.device | str | None = None) -> dict[str, Any]:
    """Measure the first steps of a run; all ranks call it together.

    Returns plain JSON values: stage, device, ranks, steps, clips (of an epoch), replaced ({path: times}),
    seconds_per_step (the first left out), checkpoint_bytes, checkpoint_seconds ({"held": of the loop, "write", "read"}),
    peak_bytes (the highest of all ranks; None on a CPU), ledger_bytes.
    Raises what `train` raises for bad input, and ValueError where a checkpoint does not come back.
    """
    world, device = join(device)
    place = Path(world.on_first(lambda: _directory(config)))
    train = dataclasses.replace(config.train, log_every=1, picture_every=0, tensorboard=False)
    config = dataclasses.replace(config, out=str(place), train=train)
    try:
        if isinstance(config, TadConfig) and config.trunk_weights == "random":
            config = _few_videos(config, place)
        run = world.on_first(lambda: RunDirectory.open(config, resume=False))
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        trainer = Trainer(config, run, device, world)
        trainer.total_steps = min(STEPS, trainer.total_steps)
        with Interrupt() as interrupt:
            trainer.fit(interrupt)
        written = time.perf_counter()
        peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0
        peak = max(world.gather(peak))
        files = [file for file in run.checkpoints.rglob("*") if file.is_file()]
        again = Trainer(config, run, device, world)
        if again.progress.step != trainer.total_steps:
            raise ValueError(f"{run.checkpoints}: a checkpoint of step {trainer.total_steps} was written, not read again")
        read, saver = time.perf_counter(), trainer.saver
        seconds = [line["seconds"] for line in world.on_first(lambda: read_metrics(run.metrics))]
        return {
            "stage": config.name,
            "device": str(device),
            "ranks": world.size,
            "steps": trainer.total_steps,
            "clips": trainer.loader.num_clips,
            "replaced": trainer.progress.replaced,
            "seconds_per_step": (seconds[-1] - seconds[0]) / (len(seconds) - 1) if len(seconds) > 1 else seconds[0],
            "checkpoint_bytes": sum(file.stat().st_size for file in files),
            "checkpoint_seconds": {"held": saver.held_s, "write": saver.write_s, "read": read - written},
            "peak_bytes": peak or None,
            "ledger_bytes": rank_bytes(trainer.config, world.size, world.local_size)["total"],  # type: ignore[arg-type]
        }
    finally:
        if world.first:  # without a word to the others: one that failed would not answer
            shutil.rmtree(place, ignore_errors=True)


def _directory(config: RunConfig) -> str:
    out = Path(config.out)
    try:
        out.mkdir(parents=True, exist_ok=True)
        return tempfile.mkdtemp(prefix=".check-", dir=out)
    except OSError as error:
        raise ValueError(f"cannot write {out}: {error.strerror or error}; choose another --out") from error


def lines(result: dict[str, Any]) -> list[str]:
    """A preflight for people."""
    times, bad = result["checkpoint_seconds"], len(result["replaced"])
    memory = f"{result['ledger_bytes'] / 1e9:.2f} GB by the ledger"
    if result["peak_bytes"] is not None:
        memory = f"peak {result['peak_bytes'] / 1e9:.2f} GB a GPU, {memory}"
    return [
        f"{result['stage']}: {result['steps']} steps on {result['ranks']} x {result['device']}, "
        f"{result['seconds_per_step']:.3f} s each, {result['clips']:,} clips an epoch, {bad} videos replaced",
        f"  {memory}; checkpoint of {result['checkpoint_bytes'] / 1e9:.3f} GB written in {times['write']:.1f} s "
        f"(training held for {times['held']:.1f} s), read and built again in {times['read']:.1f} s",
    ]
