"""What every task is: a model, batch -> loss as a sum and a count, and evaluation on given views."""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Generic, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from ..config import RunConfig
from ..data.evaluation_loader import EvaluationLoader, VideoViews
from ..data.loader import Batch, VideoLoader
from ..data.manifest import Source, open_sources
from ..models import LoadReport, PretrainViT, VisionTransformer, load_weights
from ..models.actionformer import ActionFormer

Config = TypeVar("Config", bound=RunConfig)
Model = TypeVar("Model", bound=nn.Module)


@functools.cache
def autocast_dtype(precision: str, device_type: str, key: str = "train.precision") -> torch.dtype | None:
    """Autocast dtype of a precision on a device type, None for full precision. key: where the precision was set.

    A CPU without bfloat16 instructions emulates them at a fraction of the speed of float32: there float32 is used
    instead, and stderr says so once. float16, whose range asks for a scaled loss, is what it says everywhere.
    Raises ValueError for a GPU without bfloat16.
    """
    if precision in ("float32", "float16"):
        return None if precision == "float32" else torch.float16
    if device_type == "cuda" and not torch.cuda.is_bf16_supported():
        raise ValueError(f"{key}=bfloat16: this GPU has no bfloat16; set {key}=float32")
    if device_type == "cpu" and not (torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()):
        print(f"{key}=bfloat16: this CPU has no bfloat16 instructions; computing in float32", file=sys.stderr)
        return None
    return torch.bfloat16


class Task(Generic[Config]):
    """One training task. Subclasses set `model` and define `loss`, `static_count` or `count`, and `evaluate`."""

    model: PretrainViT | VisionTransformer | ActionFormer
    best_by: str | None = None
    """Metric of `evaluate` whose best weights a run keeps beside the last ones (`best.safetensors`)."""
    rank, world = 0, 1
    """`validation_views` gives each of `world` ranks a share of its own, and `evaluate` gathers what all found."""
    gather: Callable[[Any], list[Any]] = staticmethod(lambda value: [value])
    """A picklable value of every rank, in the order of ranks, on every rank."""

    def __init__(self, config: Config, device: torch.device | str = "cpu", *, on_meta: bool = False) -> None:
        """on_meta: leave the model without memory, to be split over ranks before it gets any (`train.parallel.distribute`)."""
        self.config = config
        self.device = torch.device(device)
        self.on_meta = on_meta
        self.dtype = autocast_dtype(config.train.precision, self.device.type)

    def place(self, build: Callable[[], Model]) -> Model:
        """What `build` makes, on this task's device, or on the meta device if it was asked for."""
        if not self.on_meta:
            return build().to(self.device)
        with torch.device("meta"):
            return build()

    def autocast(self) -> AbstractContextManager[Any]:
        """Autocast as `train.precision` asks."""
        return torch.autocast(self.device.type, self.dtype or torch.bfloat16, enabled=self.dtype is not None)

    def needs_labels(self) -> bool:
        """Whether the loss reads labels, so that every clip must have one."""
        return False

    def load_init(self, source: str | Path) -> LoadReport:
        """Load the weights a run starts from into the model. Raises ValueError naming what does not fit."""
        assert not isinstance(self.model, ActionFormer)
        return load_weights(self.model, source)

    def training_loader(
        self, clips_per_batch: int, quarantine: str | os.PathLike[str] | None = None, *, rank: int = 0, world: int = 1
    ) -> VideoLoader:
        """Batches of `config.data`, `clips_per_batch` decodes each, of rank `rank` among `world`."""
        config = self.config
        return VideoLoader(
            config.data, frames=config.model.frames, size=config.model.size, seed=config.seed, quarantine=quarantine,
            clips_per_batch=clips_per_batch, rank=rank, world=world,
        )  # fmt: skip

    def class_names(self) -> tuple[str, ...] | None:
        """Names of the model's classes, where the sources of its training or validation data agree on them."""
        for data in filter(None, (self.config.data, self.config.validation)):
            names = {source.label_names for source in open_sources(data)}
            (first, *others) = names or {None}
            if first and not others and len(first) == self.config.model.num_classes:
                return first
        return None

    def check_validation(self) -> None:
        """Raises ValueError for validation data that cannot be used, before anything is trained."""
        if self.config.validation is not None:
            self.check_labels(open_sources(self.config.validation))

    def check_labels(self, sources: Iterable[Source]) -> None:
        """Raises ValueError naming the first clip whose label is missing or out of range, or a source with another number of
        classes than the model, before anything is trained."""
        if not self.needs_labels():
            return
        classes = self.config.model.num_classes
        for source in sources:
            labels = source.manifest.labels
            for index in ((labels < 0) | (labels >= classes)).nonzero()[0][:1]:
                class_labels(torch.tensor(labels[index : index + 1]), [source.path(source.manifest[int(index)])], classes)
            if source.classes is not None and source.classes != classes:
                raise ValueError(
                    f"{self.config.name}: source {source.name} has {source.classes} classes, model.num_classes is {classes}"
                )

    def static_count(self, clips: int) -> float | None:
        """What the loss sum of `clips` clips is divided by, or None where it depends on the batch (see `count`)."""
        return float(clips)

    def count(self, batches: Sequence[Batch]) -> Tensor:
        """Denominator over all micro-batches of a step, on the device; called where `static_count` gives None."""
        raise NotImplementedError

    def denominator(self, count: Tensor) -> Tensor:
        """What the loss sums of a step are divided by, given the count over its whole global batch; once a step."""
        return count

    def loss(self, batch: Batch) -> dict[str, Tensor]:
        """{"loss_sum": differentiable fp32 scalar, ...}; other entries are detached sums over the clips, for the log.

        The loop divides the sums of a step's micro-batches by the count of the whole global batch, so that
        accumulation gives the gradient of the big batch.
        """
        raise NotImplementedError

    def evaluate(self, views: Iterable[VideoViews]) -> dict[str, Any]:
        """Metrics on given videos, and on those that were given to the other ranks, in evaluation mode; plain JSON values."""
        raise NotImplementedError

    def validation_views(self, quarantine: str | os.PathLike[str] | None = None) -> EvaluationLoader:
        """This rank's share of the views of `config.validation`: the centre view, unless the task's config asks for more.

        quarantine: JSONL file for videos that cannot be decoded; they are left out.
        """
        if self.config.validation is None:
            raise ValueError(f"{self.config.name}: config.validation is not set, there is nothing to evaluate on")
        model, wanted = self.config.model, getattr(self.config, "views", None)
        segments, crops = (wanted.segments, wanted.crops) if wanted else (1, 1)
        return EvaluationLoader(
            self.config.validation, frames=model.frames, size=model.size, segments=segments, crops=crops,
            quarantine=quarantine, rank=self.rank, world=self.world,
        )  # fmt: skip


class ViewBatch(NamedTuple):
    """Views of several videos in one tensor: clip uint8 [B,T,H,W,C], and per row its video, view, label and path."""

    clip: Tensor
    video: list[int]
    view: list[int]
    label: list[int]
    path: list[str]


def view_batches(videos: Iterable[VideoViews], batch: int) -> Iterator[ViewBatch]:
    """Regroup the views of videos into batches of `batch` views (the last one smaller), in order."""
    rows: list[tuple[Tensor, int, int, int, str]] = []
    for video in videos:
        rows += [(clip, video.index, v, int(video.label), video.path) for v, clip in enumerate(video.clips)]
        while len(rows) >= batch:
            yield _stack(rows[:batch])
            rows = rows[batch:]
    if rows:
        yield _stack(rows)


def _stack(rows: list[tuple[Tensor, int, int, int, str]]) -> ViewBatch:
    clips, video, view, label, path = (list(column) for column in zip(*rows))
    return ViewBatch(torch.stack(clips), video, view, label, path)


def class_labels(label: Tensor, paths: Sequence[str], classes: int) -> Tensor:
    """`label` [B] int64 on the host, checked. Raises ValueError naming the clip whose label is missing or out of range."""
    for value, path in zip(label.tolist(), paths):
        if not 0 <= value < classes:
            what = "has no label" if value < 0 else f"has label {value}"
            raise ValueError(
                f"{path} {what}, but the model has classes 0..{classes - 1}; set model.num_classes or fix the list"
            )
    return label
