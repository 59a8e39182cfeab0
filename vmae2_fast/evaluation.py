"""Multi-view test of a classifier on a labelled set: what `vmae2 eval` and `vmae2 score` do, for scripts as well.

Every video is decoded once for all its views. Logits are saved as the work goes on (`tasks.predictions`), so an
interrupted test goes on where it was, several processes share it, and metrics can be computed again without the model.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from tqdm import tqdm

from .config import DataConfig, ViewsConfig, to_dict
from .data.evaluation_loader import EvaluationLoader
from .inference import Loaded
from .models.kinetics import check_label_map, class_names
from .tasks.base import ViewBatch, autocast_dtype, view_batches
from .tasks.metrics.classification import (
    Predictions,
    classification_metrics,
    confusion_matrix,
    merge_predictions,
    most_confused,
)
from .tasks.predictions import PredictionStore, Saved
from .whole import write_json

SAVE_EVERY = 64
"""Videos of one saved part: what a killed test has to do again, at most."""


class Ranks(NamedTuple):
    """Which share of the videos this process takes."""

    rank: int = 0
    world: int = 1
    barrier: bool = False
    """Whether the others run at the same time in one torch.distributed group, and rank 0 merges what all saved."""


@contextlib.contextmanager
def ranks() -> Iterator[Ranks]:
    """The ranks that torchrun started (a gloo group: only the end of the work is waited for), or the one process alone."""
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world == 1:
        yield Ranks()
        return
    from torch import distributed

    mine = not distributed.is_initialized()
    if mine:
        distributed.init_process_group("gloo")
    try:
        yield Ranks(distributed.get_rank(), distributed.get_world_size(), barrier=True)
    finally:
        if mine:
            distributed.destroy_process_group()


def evaluate(
    loaded: Loaded,
    data: DataConfig,
    out: str | Path,
    *,
    views: ViewsConfig | None = None,
    label_map: Sequence[int] | None = None,
    precision: str = "float32",
    device: torch.device | str | None = None,
    share: Ranks | None = None,
    restart: bool = False,
    about: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Test a classification model on the videos of `data` and return `score`'s metrics (an empty dict on ranks above 0).

    The folder `out` gets predictions, `metrics.json`, `confusion.png` (with matplotlib) and `quarantine.jsonl`. Running
    the same test again goes on with the videos that are not saved yet. label_map: for each class of the lists, the index
    of its output. share: default the ranks torchrun started, else all videos. With a share of a job array
    (`Ranks(i, n)`, no barrier) nothing is merged: `score` does that when all are done. `about`: more about the weights.

    Raises ValueError for labels that do not fit the model, an unusable list, or an `out` that holds another test.
    """
    if share is None:
        with ranks() as share:
            return evaluate(
                loaded, data, out, views=views, label_map=label_map, precision=precision, device=device, share=share,
                restart=restart, about=about,
            )  # fmt: skip
    views = views or ViewsConfig()
    device = torch.device(device or (f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu"))
    model, config = loaded.model.to(device).eval(), loaded.model.config
    store = PredictionStore(out)
    cut = {"frames": config.frames, "size": config.size, "segments": views.segments, "crops": views.crops}
    quarantine = Path(out) / "quarantine.jsonl"
    with EvaluationLoader(data, **cut) as listed:
        outputs = config.num_classes if label_map is None else len(label_map)
        _check_labels(listed, outputs, mapped=label_map is not None)
        ours, theirs = loaded.classes if label_map is None else class_names(outputs), listed.label_names
        if ours is not None and theirs is not None and ours != theirs:
            place = next(i for i, pair in enumerate(zip(ours, theirs)) if pair[0] != pair[1])
            raise ValueError(f"class {place} is {theirs[place]!r} in the data and {ours[place]!r} in the weights")
        names = theirs or ours
        header = {
            **(about or {}),
            "model": to_dict(config),
            "views": {**cut, "sampling": "segment" if data.sampling == "segment" else "dense"},
            "sources": [
                {"name": s.name, "videos": len(s.manifest), "stride": s.stride, "list": _digest(s.manifest)}
                for s in listed.sources
            ],
            "label_map": None if label_map is None else list(label_map),
            "classes": None if names is None else list(names),
            "precision": precision,
        }
        videos = listed.num_videos
    if restart and share.world > 1 and not share.barrier:
        raise ValueError("a share of a job array cannot restart what the others may have done; delete the folder instead")
    if share.rank == 0 or not share.barrier:
        store.open(header, restart=restart)
    _wait(share)
    done = store.finished()
    if done and share.rank == 0:
        print(f"{out}: {len(done)} of {videos} videos were done before", file=sys.stderr)
    # by the video's number, so that no two processes take the same one whatever they have seen of each other's parts
    left = [number for number in range(share.rank, videos, share.world) if number not in done]
    loader = EvaluationLoader(data, **cut, quarantine=quarantine, only=left)
    with loader:
        dtype = autocast_dtype(precision, device.type, "precision")
        for rows, paths in _predictions(model, loader, views, device, dtype, label_map):
            store.append(rows, paths, share.rank)
    _wait(share)
    if share.world > 1 and not share.barrier:
        print(f"{out}: share {share.rank} of {share.world} is done; `vmae2 score {out}` merges them", file=sys.stderr)
        return {}
    return score(store, expected=videos) if share.rank == 0 else {}


def _wait(share: Ranks) -> None:
    if share.barrier:
        torch.distributed.barrier()


def _check_labels(loader: EvaluationLoader, outputs: int, *, mapped: bool) -> None:
    where = "the label map has" if mapped else "the model has"
    for source in loader.sources:
        labels = source.manifest.labels
        wrong = np.flatnonzero((labels < 0) | (labels >= outputs))
        if len(wrong):
            record = source.manifest[int(wrong[0])]
            what = "no label" if record.label < 0 else f"label {record.label}"
            raise ValueError(f"{source.path(record)} has {what}, but {where} classes 0..{outputs - 1}")
        if source.classes is not None and source.classes != outputs:
            hint = "" if mapped or outputs != 710 else "; --label-map k400, k600 or k700 takes their part of K710"
            raise ValueError(f"source {source.name} has {source.classes} classes, {where} {outputs}{hint}")


def _digest(manifest: Any) -> str:
    """Of the paths and labels of a list, in order."""
    digest = hashlib.sha256()
    for record in manifest:
        digest.update(repr(tuple(record)).encode("utf-8", "surrogateescape"))
    return digest.hexdigest()[:16]


@torch.no_grad()
def _predictions(
    model: Any, loader: EvaluationLoader, views: ViewsConfig, device: torch.device, dtype: torch.dtype | None,
    label_map: Sequence[int] | None,
) -> Iterator[tuple[Predictions, dict[int, str]]]:  # fmt: skip
    """Logits of whole videos in groups of about `SAVE_EVERY`, all views of a video in one group."""
    per_video = views.segments * views.crops
    columns = None if label_map is None else torch.tensor(label_map, device=device)
    batches: list[ViewBatch] = []
    logits: list[torch.Tensor] = []
    ahead = view_batches(tqdm(loader, desc="testing", unit="video", disable=None), views.batch)
    ready = 0
    for batch in ahead:
        with torch.autocast(device.type, dtype or torch.bfloat16, enabled=dtype is not None):
            out = model(batch.clip.to(device, non_blocking=True)).float()
        logits.append((out if columns is None else out[:, columns]).cpu())
        batches.append(batch._replace(clip=batch.clip[:0]))
        ready += len(batch.video)
        if ready >= SAVE_EVERY * per_video and ready % per_video == 0:
            yield _group(batches, logits, views.crops)
            batches, logits, ready = [], [], 0
    if batches:
        yield _group(batches, logits, views.crops)


def _group(batches: list[ViewBatch], logits: list[torch.Tensor], crops: int) -> tuple[Predictions, dict[int, str]]:
    video, view, label = (
        np.array([x for batch in batches for x in getattr(batch, name)], dtype=np.int64) for name in ("video", "view", "label")
    )
    paths = {number: path for batch in batches for number, path in zip(batch.video, batch.path)}
    return Predictions(video, view // crops, view % crops, label, torch.cat(logits).numpy()), paths


def score(
    source: PredictionStore | Saved,
    *,
    label_map: Sequence[int] | None = None,
    names: Sequence[str] | None = None,
    scores: str = "softmax",
    expected: int | None = None,
    out: str | Path | None = None,
) -> dict[str, Any]:
    """Metrics of saved predictions: top1, top5, mean_class_top1, per_class (name, videos, top1), most_confused, views.

    Also writes `metrics.json` and, with matplotlib, `confusion.png` into `out` (default: the store's folder).
    label_map: for each class of the labels, its column in the saved logits. names: of the classes. scores: average
    "softmax" over views, or "logits". expected: videos there should be; `left_out` counts those that gave no view.
    """
    about: dict[str, Any] = {}
    if isinstance(source, PredictionStore):
        about, out = source.about(), out or source.folder
        source, names = source.read(), names or about.get("classes")
        expected = expected or sum(s["videos"] for s in about["sources"])
    predictions = source.predictions
    columns = predictions.logits.shape[1]
    if label_map is not None:
        check_label_map(label_map, columns, "given")
        predictions = predictions._replace(logits=predictions.logits[:, list(label_map)])
        columns = len(label_map)
    if (wrong := np.flatnonzero((predictions.label < 0) | (predictions.label >= columns))).size:
        video = source.paths[int(predictions.video[wrong[0]])]
        raise ValueError(f"{video} has label {predictions.label[wrong[0]]}, the predictions have classes 0..{columns - 1}")
    names = list(names or class_names(columns) or map(str, range(columns)))
    if len(names) != columns:
        raise ValueError(f"{len(names)} class names for {columns} classes")
    merged = merge_predictions(predictions, scores=scores)
    metrics = classification_metrics(merged.scores, merged.labels)
    counts = confusion_matrix(merged.scores, merged.labels)
    shares = metrics.pop("per_class_top1")
    metrics |= {
        "views_per_video": len(predictions.video) / len(merged.videos),
        "left_out": max((expected or len(merged.videos)) - len(merged.videos), 0),
        "per_class": [
            {"class": name, "videos": int(total), "top1": share}
            for name, total, share in zip(names, counts.sum(axis=1), shares)
        ],
        "most_confused": [{"class": names[a], "predicted": names[b], "videos": n} for a, b, n in most_confused(counts)],
    }
    if out is not None:
        _write(metrics, counts, names, Path(out), {key: about[key] for key in ("weights", "views", "sources") if key in about})
    return metrics


def _write(metrics: dict[str, Any], counts: np.ndarray, names: list[str], out: Path, about: dict[str, Any]) -> None:
    from .pictures import confusion_picture, installed

    write_json(out / "metrics.json", {**about, **metrics}, indent=2)
    if installed():
        confusion_picture(counts, names, out / "confusion.png")
