"""Pictures of a run while it goes on, in RUN/pictures: its curves, and how the same few clips are reconstructed.

    curves.png                     of all metrics.jsonl holds, drawn anew each time
    reconstruction-STEP.png        of pre-training; at most `_KEPT`, spread over the run

They never end a run: what cannot be drawn or written is said once on stderr.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import os
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..config import RunConfig
from ..data.decode import DecodeError
from ..data.evaluation_loader import EvaluationLoader
from ..data.loader import BadDataError
from ..tasks import PretrainTask, Task
from ..tasks.reconstruct import reconstruct, save_png, sheet
from .curves import Curves, draw_curves
from .log import read_metrics
from .parallel import World
from .run_directory import RunDirectory

_CLIPS = 4
_KEPT = 24
_SIDE = 96
"""Pixels below which a clip is drawn enlarged."""


def missing() -> list[str]:
    """Packages that pictures and report need and that are not installed."""
    return [name for name in ("matplotlib", "jinja2", "PIL") if importlib.util.find_spec(name) is None]


@functools.cache
def _say(text: str) -> None:
    """Once, however many stages run."""
    print(text, file=sys.stderr)


class RunPictures:
    """Draws every `train.picture_every` steps, or with every checkpoint. All ranks call it; the first one draws.

    A model that is split over ranks reconstructs on all of them together, any other one on the first alone.
    """

    def __init__(self, task: Task[Any], run: RunDirectory, world: World) -> None:
        self.task, self.run, self.world = task, run, world
        self.config: RunConfig = task.config
        self.every = self.config.train.picture_every
        self.clips: list[tuple[int, Tensor]] | None = None
        if self.every != 0 and (absent := missing()):
            self.every = 0
            if world.first:
                _say(f"no curves and no reconstructions: {', '.join(absent)} not installed (pip install 'vmae2_fast[report]')")

    def due(self, step: int, saved: bool) -> bool:
        """Whether pictures belong to `step`, after which a checkpoint was `saved`."""
        return saved if self.every is None else bool(self.every) and step % self.every == 0

    def draw(self, step: int) -> None:
        """Draw what there is after `step`. Training mode, generators and gradients stay as they are."""
        if self.world.first:
            self._quietly(self._curves)
        together = self.config.train.parallel != "ddp" and self.world.size > 1
        if isinstance(self.task, PretrainTask) and (together or self.world.first):
            self._reconstructions(step, together)

    def _quietly(self, action: Any) -> Any:
        try:
            self.run.pictures.mkdir(exist_ok=True)
            return action()
        except (OSError, ValueError, DecodeError, BadDataError) as error:
            _say(f"WARNING: {self.config.name}: no pictures: {error}")
            return None

    def _curves(self) -> None:
        trained, validated = (read_metrics(self.run.metrics, kind) for kind in ("train", "validation"))
        curves = Curves(self.config.name, trained, validated, self.config.train.global_batch)
        draw_curves([curves], self.run.pictures / "curves.png")

    def _reconstructions(self, step: int, together: bool) -> None:
        if self.clips is None:
            self.clips = self.world.on_first(self._load) if together else self._load()
        ratio = self.config.mask.encoder_ratio  # type: ignore[attr-defined]
        with torch.compiler.set_stance("force_eager"), self.task.autocast():
            drawn = [
                reconstruct(self.task.model, clip.to(self.task.device), seed=seed, encoder_ratio=ratio)
                for seed, clip in self.clips
            ]
        if drawn and self.world.first:
            self._quietly(lambda: self._write(sheet(drawn, scale=-(-_SIDE // self.config.model.size)), step))

    def _load(self) -> list[tuple[int, Tensor]]:
        """The middle view of a few videos spread over the validation set, or else the training set, with their numbers."""
        data = self.config.validation or self.config.data
        data = dataclasses.replace(data, backend="pyav", workers=min(1, data.workers), prefetch=1, cache_mb=0)
        size: dict[str, Any] = {"frames": self.config.model.frames, "size": self.config.model.size}

        def read() -> list[tuple[int, Tensor]]:
            videos = EvaluationLoader(data, **size).num_videos
            chosen = sorted({i * videos // _CLIPS for i in range(_CLIPS)})
            with EvaluationLoader(data, **size, only=chosen) as loader:
                return [(video.index, video.clips[0].cpu().clone()) for video in loader]

        return self._quietly(read) or []

    def _write(self, picture: Any, step: int) -> None:
        folder = self.run.pictures
        temporary = folder / ".reconstruction.partial.png"
        save_png(picture, temporary)
        os.replace(temporary, folder / f"reconstruction-{step:08d}.png")
        kept = reconstructions(self.run.path)
        if len(kept) > _KEPT:
            steps = [_step(path) for path in kept]
            kept[min(range(1, len(kept) - 1), key=lambda i: steps[i + 1] - steps[i - 1])].unlink()


def _step(path: Path) -> int:
    return int(path.stem.split("-")[1])


def reconstructions(run: Path) -> list[Path]:
    """The reconstructions of a run directory, oldest first."""
    return sorted((run / "pictures").glob("reconstruction-*.png"))
