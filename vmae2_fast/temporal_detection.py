"""Temporal detection with trained models: what `vmae2 tad` does, for scripts as well."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from tqdm import tqdm

from .config import TadConfig, load
from .data.probing import DecodeError
from .data.tad import (
    Detections,
    TadError,
    UntrimmedVideo,
    check_features,
    choose_subset,
    read_annotations,
    read_detections,
    read_features,
    read_features_videos,
    read_video_scores,
)
from .data.tad_loader import Sequence as VideoSequence
from .data.tad_loader import TadSource, place_features
from .inference import Loaded, read_views
from .models import resolve
from .models.actionformer import ActionFormer
from .models.actionformer_weights import load_actionformer
from .models.formats import read_checkpoint
from .tasks.metrics.tad import Segments, detection_map, report, thresholds
from .tasks.tad_detect import detect, fuse_all


class Detector(NamedTuple):
    """A trained detector and all that goes with it."""

    model: ActionFormer
    classes: tuple[str, ...]
    config: TadConfig


def load_detector(run: str | Path, weights: str | Path | None = None, device: torch.device | str = "cpu") -> Detector:
    """The detector of a run directory, in evaluation mode. weights: default those of the best validation, else the last ones.

    Raises ValueError for a folder that holds another kind of run, or weights that do not fit."""
    folder = Path(run)
    config = load(folder / "config.json")
    if not isinstance(config, TadConfig):
        raise ValueError(f"{folder} holds no temporal detector but a {type(config).__name__}")
    best, last = folder / "best.safetensors", folder / "weights.safetensors"
    source = Path(weights or (best if best.exists() else last))
    named = [*([] if source.is_dir() else [source]), last]  # the best weights are kept without names
    metas = [json.loads(read_checkpoint(p).metadata.get("meta", "{}")) for p in named if p.is_file()]
    classes = next((tuple(meta["classes"]) for meta in metas if meta.get("classes")), None)
    if classes is None:
        raise ValueError(f"{source} names no classes; give the weights of a finished run")
    channels = config.detector.inputs or resolve(config.model).encoder.width
    model = ActionFormer(dataclasses.replace(config.detector, inputs=channels))
    load_actionformer(model, source)
    return Detector(model.to(device).eval(), classes, config)


def detect_videos(
    detector: Detector, features: str | Path | None = None, *, names: Sequence[str] = (), device: torch.device | str = "cpu"
) -> dict[str, Detections]:
    """Detections of the run's validation videos, or with `features` of all videos (or those of `names`) of such a folder.

    Fused with the class scores of `config.video_scores` where the detector is class-agnostic. Raises TadError for files that
    cannot be used."""
    config = detector.config
    if features is None:
        if config.validation is None:
            raise TadError(f"{config.name}: the run has no validation videos; give --features")
        source = TadSource(
            config.validation, frames=config.model.frames, channels=detector.model.config.inputs, classes=detector.classes
        )
        sequences: Any = (source.read(i) for i in range(len(source)))
        total = len(source)
    else:
        chosen = _folder_videos(features, names)
        sequences = (_folder_sequence(detector, features, name, entry) for name, entry in chosen.items())
        check_features(features, step=config.data.stride, frames=config.model.frames)
        total = len(chosen)
    found = {}
    for sequence in tqdm(sequences, total=total, desc="detecting", unit="video", disable=None):
        found[sequence.video] = detect(detector.model, sequence, config.detection, detector.classes, device=device)
    if config.video_scores is None:
        return found
    return fuse_all(found, read_video_scores(config.video_scores), config.detection)


def _folder_videos(folder: str | Path, names: Sequence[str]) -> dict[str, dict[str, Any]]:
    there = read_features_videos(folder)
    for name in names:
        if name not in there:
            raise TadError(f"{folder}: no features of {name}; there are those of {', '.join(sorted(there)[:5])}")
    return {name: there[name] for name in names or sorted(there)}


def _folder_sequence(detector: Detector, folder: str | Path, name: str, entry: Mapping[str, Any]) -> VideoSequence:
    config = detector.config
    features = torch.from_numpy(read_features(Path(folder) / f"{name}.npy", detector.model.config.inputs))
    features, grid = place_features(features, entry["fps"], entry["duration"], config.data, config.model.frames)
    return VideoSequence(name, features, torch.zeros(0, 2), torch.zeros(0, dtype=torch.int64), grid)


@torch.no_grad()
def score_videos(
    loaded: Loaded, videos: Mapping[str, Path], *, segments: int = 5, crops: int = 3, stride: int = 4, batch: int = 8
) -> tuple[dict[str, Any], dict[str, str]]:
    """Class scores of whole videos by a classifier: softmax of every view, averaged.

    Returns the content of a file of video scores, {"class": names, "results": {video: scores}}, and the reasons of videos that
    could not be decoded. Raises ValueError if the classifier's weights do not name its classes."""
    model, config = loaded.model.eval(), loaded.model.config
    if loaded.classes is None:
        raise ValueError("the classifier's weights do not name its classes; use those of a finished run of ours")
    device = next(model.parameters()).device
    results: dict[str, list[float]] = {}
    failed: dict[str, str] = {}
    for name, path in tqdm(sorted(videos.items()), desc="scoring", unit="video", disable=None):
        try:
            views = read_views(path, frames=config.frames, size=config.size, stride=stride, segments=segments, crops=crops)
        except DecodeError as error:
            failed[error.path] = error.reason
            continue
        scores = torch.cat([model(clip.to(device)).float().softmax(-1) for clip in views.split(batch)]).double().mean(0)
        results[name] = [round(s, 8) for s in scores.tolist()]
    return {"class": list(loaded.classes), "results": results}, failed


def score_files(
    annotations: str | Path, detections: str | Path, *, subset: str, benchmark: str, deduplicate: bool = True,
    block_list: Sequence[str] = (),
) -> dict[str, Any]:
    """mAP of a detection file against an annotation file (see `metrics.tad`), as plain JSON values.

    Raises TadError for files that cannot be used, ValueError for another benchmark."""
    tious = thresholds(benchmark)
    truth, ignored, durations = subset_truth(annotations, subset, block_list)
    found = read_detections(detections)
    kept = {video: Segments(*d) for video, d in found.items() if video not in block_list}
    result = report(detection_map(truth, kept, tious, deduplicate=deduplicate), tious)
    if not result["events"]:
        raise TadError(f"{annotations}: subset {subset!r} has no annotations: there is nothing to score against")
    noted = {
        "videos without any detection": sum(not kept[video].labels if video in kept else 1 for video in truth),
        "videos in which nothing is annotated (detections on them are wrong)": sum(not t.labels for t in truth.values()),
        "detections reaching out of their video by more than a second (they count)": sum(
            _beyond(d.segments, durations[video]) for video, d in kept.items() if video in durations
        ),
    }
    counted = {**ignored, **result["not_counted"], **{what: count for what, count in noted.items() if count}}
    return {**result, "videos": len(truth), "detections": sum(len(d.labels) for d in kept.values()), "not_counted": counted}


def _beyond(segments: np.ndarray, duration: float) -> int:
    """How many segments reach out of a video of `duration` seconds (0: unknown) by more than a second."""
    return int(((segments[:, 0] < -1) | (segments[:, 1] > duration + 1)).sum()) if duration > 0 else 0


def subset_truth(
    annotations: str | Path, subset: str, block_list: Sequence[str] = ()
) -> tuple[dict[str, Segments], dict[str, int], dict[str, float]]:
    """Ground truth of a subset by video, what the annotation file has that was left out or looks wrong, and the durations in
    seconds."""
    read = read_annotations(annotations)
    videos: dict[str, UntrimmedVideo] = choose_subset(read, subset, block_list)
    beyond = sum(_beyond(v.segments, v.duration) for v in videos.values())
    noted = {"annotations reaching out of their video by more than a second (they count)": beyond} if beyond else {}
    truth = {name: Segments(v.segments, v.labels) for name, v in videos.items()}
    return truth, {**read.ignored, **noted}, {name: v.duration for name, v in videos.items()}
