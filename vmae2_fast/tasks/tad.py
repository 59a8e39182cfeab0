"""Temporal action detection: ActionFormer on features of a frozen trunk (THUMOS14, FineAction)."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from ..config import ExtractConfig, TadConfig, TadDataConfig
from ..data.manifest import Source
from ..data.tad import FEATURES_HEADER, Detections, TadError, choose_subset, read_annotations, read_video_scores
from ..data.tad_loader import AGNOSTIC, TadBatch, TadEvaluationLoader, TadLoader, TadSource
from ..data.tad_loader import Sequence as VideoSequence
from ..models import LoadReport, VisionTransformer, build_model, load_weights, resolve
from ..models.actionformer import ActionFormer
from ..models.actionformer_weights import load_actionformer
from .base import Task
from .features import check_header, extract_features, features_header, find_videos
from .metrics.tad import Segments, detection_map, report, thresholds
from .tad_detect import detect, fuse_all
from .tad_losses import distance_loss, focal_loss, smooth


@contextlib.contextmanager
def _ranks() -> Iterator[tuple[int, int, Callable[[Any], list[Any]]]]:
    """(rank, ranks, gather) of a run on several ranks, or of a process alone. Taking the features of long videos keeps ranks
    apart for hours, which a group of their own waits for."""
    dist = torch.distributed
    if not (dist.is_available() and dist.is_initialized()):
        yield 0, 1, lambda value: [value]
        return
    group = dist.new_group(backend="gloo", timeout=datetime.timedelta(days=7))
    size = dist.get_world_size()

    def gather(value: Any) -> list[Any]:
        values: list[Any] = [None] * size
        dist.all_gather_object(values, value, group=group)
        return values

    try:
        yield dist.get_rank(), size, gather
    finally:
        dist.destroy_process_group(group)


def check_video_scores(config: TadConfig) -> None:
    """Raises TadError, saying what makes them, if validation lacks the class scores of a video; costs no decoding."""
    data, path = config.validation, config.video_scores
    if data is None or path is None:
        return
    how = f"make them first: vmae2 tad scores {data.videos or 'VIDEOS'} --weights CLASSIFIER --out {path}"
    if not os.path.exists(path):
        raise TadError(f"{path}: the class scores of the videos are not there; {how}")
    scores, annotations = read_video_scores(path), read_annotations(data.annotations)
    missing = [n for n in choose_subset(annotations, data.subset, data.block_list) if n not in scores.scores]
    if missing:
        raise TadError(f"{path}: no class scores of {missing[0]} (and {len(missing) - 1} more); {how}")
    strangers = [name for name in scores.classes if name not in annotations.classes]
    if strangers:
        told = f"{len(strangers)} of {len(scores.classes)} classes are in no annotation, for example {strangers[0]!r}"
        print(f"{path}: {told}", file=sys.stderr)


class TadTask(Task[TadConfig]):
    """Focal loss of every valid point and IoU loss of the positive ones, both divided by the moving average of the number of
    positive points of a global batch (`ActionFormer.normalizer`)."""

    model: ActionFormer
    best_by = "average_map"

    def __init__(self, config: TadConfig, device: torch.device | str = "cpu") -> None:
        super().__init__(config, device)
        width = resolve(config.model).encoder.width
        channels = config.detector.inputs or width
        if channels != width:
            raise ValueError(
                f"{config.name}: detector.inputs={channels}, but features of {config.model.name} have {width} channels; "
                "set detector.inputs=0 to take the trunk's width"
            )
        self.model = ActionFormer(dataclasses.replace(config.detector, inputs=channels)).to(self.device)
        self._names: tuple[str, ...] | None = None
        self._taken: list[TadDataConfig] = []

    def load_init(self, source: str | Path) -> LoadReport:
        return load_actionformer(self.model, source)

    def _source(self, data: TadDataConfig, *, training: bool) -> TadSource:
        self._take_features(data)
        model = self.config.model
        return TadSource(
            data, frames=model.frames, channels=self.model.config.inputs, classes=self.class_names(), training=training
        )

    def _take_features(self, data: TadDataConfig) -> None:
        """Take the features of annotated videos that are not there yet, where the config says how; ranks share the work."""
        config = self.config
        if config.trunk_weights is None or data.videos is None or data in self._taken:
            return
        self._taken.append(data)
        wanted = choose_subset(read_annotations(data.annotations), data.subset, data.block_list)
        missing = [name for name in wanted if not os.path.isfile(os.path.join(data.features, f"{name}.npy"))]
        there = os.path.exists(os.path.join(data.features, FEATURES_HEADER))
        with _ranks() as (rank, world, gather):
            gather(None)  # nobody writes before all have looked
            if not missing and not there:
                return
            how = ExtractConfig(
                step=data.stride, resize="squash", normalize=config.normalize, precision=config.train.precision
            )
            trunk = self._trunk(config.trunk_weights)
            if not missing:
                check_header(Path(data.features), features_header(trunk, how))
                return
            videos = find_videos([data.videos], by_stem=True)
            lost = [name for name in missing if name not in videos]
            if lost:
                raise TadError(f"{data.videos}: no video of {lost[0]}" + (f" and {len(lost) - 1} more" if lost[1:] else ""))
            taken = extract_features(
                trunk.to(self.device), {name: videos[name] for name in missing}, data.features, how,
                weights_file=config.trunk_weights, shard=(rank, world),
            )  # fmt: skip
            for failed in gather(taken["failed"]):
                for path, reason in failed.items():
                    raise TadError(f"{path}: {reason}; mend it, or put it on data.block_list")

    def _trunk(self, weights: str) -> VisionTransformer:
        # The random numbers of a run are the same with features there and without.
        with torch.random.fork_rng(devices=[]), torch.device("cpu" if weights == "random" else "meta"):
            torch.manual_seed(self.config.seed)
            trunk = build_model(self.config.model)
        assert isinstance(trunk, VisionTransformer)
        if weights != "random":
            print(f"features: {load_weights(trunk, weights)}", file=sys.stderr)
        return trunk

    def class_names(self) -> tuple[str, ...]:
        """Names of the classes, those of the training annotations. Raises ValueError if the detector has another number."""
        if self._names is None:
            config, data = self.config, self.config.data
            names = (AGNOSTIC,) if data.class_agnostic else read_annotations(data.annotations).classes
            if len(names) != config.detector.classes:
                raise ValueError(
                    f"{config.name}: {data.annotations} has {len(names)} classes, detector.classes={config.detector.classes}; "
                    f"set it to {len(names)}"
                )
            self._names = names
        return self._names

    def training_loader(  # type: ignore[override]
        self, clips_per_batch: int, quarantine: str | os.PathLike[str] | None = None, *, rank: int = 0, world: int = 1
    ) -> TadLoader:
        check_video_scores(self.config)  # before the features, which may take days
        source = self._source(self.config.data, training=True)
        return TadLoader(
            source, self.model.config, clips_per_batch=clips_per_batch, seed=self.config.seed, rank=rank, world=world
        )

    def validation_views(self, quarantine: str | os.PathLike[str] | None = None) -> TadEvaluationLoader:  # type: ignore[override]
        if self.config.validation is None:
            raise ValueError(f"{self.config.name}: config.validation is not set, there is nothing to evaluate on")
        return TadEvaluationLoader(self._source(self.config.validation, training=False), self.rank, self.world)

    def check_labels(self, sources: Iterable[Source]) -> None:
        """Nothing to do: annotations are checked as they are read."""

    def check_validation(self) -> None:
        if self.config.validation is not None:
            self.validation_views()

    def static_count(self, clips: int) -> None:
        """The number of positive points differs from batch to batch."""

    def count(self, batches: Sequence[TadBatch]) -> Tensor:  # type: ignore[override]
        """Positive points on the device."""
        counts = [(batch.classes.sum(-1) > 0).logical_and_(self._valid(batch.valid)).sum() for batch in batches]
        return torch.stack(counts).sum().to(self.device, torch.float32)

    def denominator(self, count: Tensor) -> Tensor:
        momentum = self.config.normalizer_momentum
        normalizer = self.model.normalizer
        normalizer.mul_(momentum).add_(count.clamp(min=1), alpha=1 - momentum)
        return normalizer.clone()

    def _valid(self, valid: Tensor) -> Tensor:
        """Which points of all levels lie on features that are there: bool [B, P]."""
        return torch.cat([valid[:, ::stride] for stride in self.model.strides], dim=1)

    def loss(self, batch: TadBatch) -> dict[str, Tensor]:  # type: ignore[override]
        config = self.config
        features, valid, classes, target = (
            x.to(self.device, non_blocking=True) for x in (batch.features, batch.valid, batch.classes, batch.distances)
        )
        with self.autocast():
            levels = self.model(features, valid)
        logits, distances = (torch.cat([getattr(v, name).float() for v in levels], 1) for name in ("logits", "distances"))
        inside = torch.cat([level.valid for level in levels], dim=1)
        positive = (classes.sum(-1) > 0) & inside
        each = focal_loss(logits, smooth(classes, config.label_smoothing)).sum(-1)
        class_sum = torch.where(inside, each, 0.0).sum()
        # Where there is no action the distances are zero and the target is noise: neither may reach a gradient as NaN.
        shown = torch.where(positive[..., None], target, 1.0)
        said = torch.where(positive[..., None], distances, 1.0)
        distance_sum = torch.where(positive, distance_loss(said, shown, config.distance_loss), 0.0).sum()
        return {
            "loss_sum": class_sum + config.distance_weight * distance_sum,
            "class_loss": class_sum.detach(),
            "distance_loss": distance_sum.detach(),
            "positives": positive.sum(),
        }

    @torch.no_grad()
    def detections(self, views: Iterable[VideoSequence]) -> dict[str, Detections]:
        """Detections of every video, fused with the class scores of `config.video_scores` where there are some."""
        self.model.eval()
        found = {}
        total = len(views) if isinstance(views, TadEvaluationLoader) else None
        for sequence in tqdm(views, total=total, desc="detecting", unit="video", disable=None, leave=False):
            with self.autocast():
                found[sequence.video] = detect(
                    self.model, sequence, self.config.detection, self.class_names(), device=self.device
                )
        if self.config.video_scores is None:
            return found
        return fuse_all(found, read_video_scores(self.config.video_scores), self.config.detection)

    def evaluate(self, views: TadEvaluationLoader) -> dict[str, Any]:  # type: ignore[override]
        """{"average_map", "map" and recall by tIoU, "per_class", "events", "detections", "not_counted"} on these videos."""
        parts = self.gather(self.detections(views))
        found = {v.name: part[v.name] for v in views.source.videos for part in parts if v.name in part}
        truth = {v.name: Segments(v.segments, v.labels) for v in views.source.videos}
        tious = thresholds(self.config.benchmark)
        score = detection_map(
            truth, {video: Segments(*d) for video, d in found.items()}, tious, deduplicate=self.config.deduplicate
        )
        return {**report(score, tious), "detections": sum(len(d.labels) for d in found.values())}
