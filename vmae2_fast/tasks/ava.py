"""Action detection in space and time: which of 80 actions each person of a key frame does (AVA, AVA-Kinetics)."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Iterator
from itertools import groupby
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..config import AvaConfig
from ..data.ava import ACTIONS, Rows, read_annotations, read_exclusions, read_label_map
from ..data.ava_loader import AvaBatch, AvaClip, AvaEvaluationLoader, AvaLoader
from ..data.manifest import Source
from ..models.detect import Detector
from .base import Task
from .metrics.ava import FrameAP, Style, frame_map


class AvaTask(Task[AvaConfig]):
    """Binary cross-entropy per action, mean over the actions and sum over the boxes, divided by the clips of the batch.

    The released code has the sum over a device's clips; the factor between the two is constant and AdamW does not see it.
    """

    model: Detector
    best_by = "frame_map"

    def __init__(self, config: AvaConfig, device: torch.device | str = "cpu", *, on_meta: bool = False) -> None:
        super().__init__(config, device, on_meta=on_meta)
        if config.model.num_classes != ACTIONS:
            raise ValueError(f"{config.name}: AVA has {ACTIONS} actions, set model.num_classes={ACTIONS} "
                             f"(got {config.model.num_classes})")  # fmt: skip
        self.model = self.place(
            lambda: Detector(config.model, bins=config.bins, aligned=config.aligned, norm_from_head=config.norm_from_head)
        )

    def training_loader(
        self, clips_per_batch: int, quarantine: str | os.PathLike[str] | None = None, *, rank: int = 0, world: int = 1
    ) -> AvaLoader:
        config = self.config
        loader = AvaLoader(
            config.data, frames=config.model.frames, size=config.model.size, seed=config.seed, quarantine=quarantine,
            clips_per_batch=clips_per_batch, rank=rank, world=world,
        )  # fmt: skip
        if loader.boxless:
            print(f"{config.name}: {loader.boxless} key frames without boxes are left out of training", file=sys.stderr)
        return loader

    def validation_views(self, quarantine: str | os.PathLike[str] | None = None) -> AvaEvaluationLoader:
        if self.config.validation is None:
            raise ValueError(f"{self.config.name}: config.validation is not set, there is nothing to evaluate on")
        model = self.config.model
        return AvaEvaluationLoader(
            self.config.validation, frames=model.frames, size=model.size, quarantine=quarantine, rank=self.rank,
            world=self.world,
        )  # fmt: skip

    def class_names(self) -> tuple[str, ...] | None:
        """Names of the actions by number; an action the label map leaves out is called by its number."""
        labels = self.config.data.labels
        if labels is None:
            return None
        names = read_label_map(labels)
        return tuple(names.get(i, str(i)) for i in range(1, ACTIONS + 1))

    def check_labels(self, sources: Iterable[Source]) -> None:
        """Nothing to do: annotations are checked as they are read."""

    def check_validation(self) -> None:
        if self.config.validation is not None:
            self.validation_views()
            self._truth()

    def loss(self, batch: AvaBatch) -> dict[str, Tensor]:  # type: ignore[override]
        boxes, label = batch.boxes.to(self.device, non_blocking=True), batch.label.to(self.device, non_blocking=True)
        with self.autocast():
            logits = self.model(batch.clip.to(self.device, non_blocking=True), boxes).float()
        total = F.binary_cross_entropy_with_logits(logits, label, reduction="sum") / ACTIONS
        return {"loss_sum": total, "boxes": torch.tensor(float(len(boxes)), device=self.device)}

    def detections(self, views: Iterable[AvaClip]) -> Iterator[tuple[str, np.ndarray, int, float]]:
        """(key frame, box as shares, action, score) of every box and action: sigmoid times the person detector's score."""
        for names, boxes, scores in self._scored(views):
            for name, box, row in zip(names, boxes, scores):
                yield from ((name, box, action, float(score)) for action, score in enumerate(row, 1))

    @torch.no_grad()
    def _scored(self, views: Iterable[AvaClip]) -> Iterator[tuple[list[str], np.ndarray, np.ndarray]]:
        """Key frame of each box, boxes float64 [n, 4] as shares, and scores float64 [n, 80], a few clips at a time."""
        self.model.eval()
        for clips in self._of_one_size(views):
            rows = [F.pad(clip.boxes, (1, 0), value=float(i)) for i, clip in enumerate(clips)]
            with self.autocast():
                stacked = torch.stack([clip.clip for clip in clips]).to(self.device, non_blocking=True)
                logits = self.model(stacked, torch.cat(rows).to(self.device, non_blocking=True))
            people = np.concatenate([clip.scores for clip in clips])
            scores = logits.double().sigmoid().cpu().numpy() * people[:, None]
            yield [c.frame.name for c in clips for _ in c.scores], np.concatenate([c.shares for c in clips]), scores

    def _of_one_size(self, views: Iterable[AvaClip]) -> Iterator[list[AvaClip]]:
        """Neighbours of one size, at most `config.clips` of them: key frames of one video follow one another."""
        for _, run in groupby(views, key=lambda clip: clip.clip.shape):
            batch: list[AvaClip] = []
            for clip in run:
                batch.append(clip)
                if len(batch) == self.config.clips:
                    yield batch
                    batch = []
            if batch:
                yield batch

    def _truth(self) -> tuple[Rows, dict[int, str], frozenset[str]]:
        data = self.config.validation
        assert data is not None
        truth = read_annotations(data.annotations)
        names = read_label_map(data.labels) if data.labels else {int(a): str(a) for a in np.unique(truth.actions)}
        return truth, names, read_exclusions(data.exclusions) if data.exclusions else frozenset()

    def _all_rows(self, views: Iterable[AvaClip]) -> Rows:
        """What all ranks found, in the order in which one process finds it: of equal scores the first counts first."""
        scored = [part for parts in self.gather(list(self._scored(views))) for part in parts]
        names = [name for part in scored for name in part[0]]
        boxes = np.concatenate([np.zeros((0, 4)), *(part[1] for part in scored)])
        scores = np.concatenate([np.zeros((0, ACTIONS)), *(part[2] for part in scored)])
        if isinstance(views, AvaEvaluationLoader):
            place = {frame.name: i for i, frame in enumerate(views.key_frames)}
            order = sorted(range(len(names)), key=lambda i: place[names[i]])
            names, boxes, scores = [names[i] for i in order], boxes[order], scores[order]
        return Rows(
            [name for name in names for _ in range(ACTIONS)], boxes.repeat(ACTIONS, axis=0),
            np.tile(np.arange(1, ACTIONS + 1), len(names)), scores.reshape(-1), frozenset(),
        )  # fmt: skip

    def evaluate(self, views: Iterable[AvaClip]) -> dict[str, Any]:  # type: ignore[override]
        """{"frame_map" in `config.style`, "frame_map_activitynet", "boxes", "per_class", "not_counted"} on
        `config.validation`.

        Key frames whose video could not be decoded count as missed: their ground truth stays.
        """
        truth, names, exclusions = self._truth()
        rows = self._all_rows(views)

        def score(style: Style) -> FrameAP:
            return frame_map(truth, rows, names, exclusions=exclusions, style=style)

        result = score(self.config.style)
        not_counted = dict(result.left_out)
        if isinstance(views, AvaEvaluationLoader) and views.boxless:
            not_counted["key frames without a box to look at"] = views.boxless
        return {
            "frame_map": result.mean,
            "frame_map_activitynet": score("activitynet").mean,
            "boxes": len(rows.frames) // ACTIONS,
            "per_class": {names[action]: value for action, value in result.per_class.items()},
            "not_counted": not_counted,
        }
