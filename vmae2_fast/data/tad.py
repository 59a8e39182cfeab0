"""Files of temporal action detection: annotations, detections, class scores of videos, features.

Annotations are JSON in ActivityNet's style, as THUMOS14's and FineAction's come:

    {"database": {"video_test_0000004": {"subset": "test", "duration": 33.83, "fps": 30.0,
        "annotations": [{"label": "CricketBowling", "segment": [0.2, 1.1], "label_id": 5}]}}}

`label_id` and `fps` may be missing. Detections are {"results": {VIDEO: [{"label", "score", "segment"}]}}, class scores
{"class": [NAME, ...], "results": {VIDEO: [score of each class]}}, features one VIDEO.npy, float [windows, channels].
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ..whole import write_json


class TadError(ValueError):
    """A file that cannot be used; names it and the place."""


class UntrimmedVideo(NamedTuple):
    """One video and what happens in it."""

    name: str
    subset: str
    duration: float
    """Seconds."""
    fps: float | None
    segments: np.ndarray
    """float64 [N, 2], seconds."""
    labels: tuple[str, ...]


class Annotations(NamedTuple):
    """A whole annotation file."""

    path: str
    videos: dict[str, UntrimmedVideo]
    classes: tuple[str, ...]
    """In the order of their `label_id` where all have one, else of their names."""
    ignored: dict[str, int]
    """Annotations that were left out, by reason."""


class _Twice(ValueError):
    """A key that a JSON object has twice."""


def _named_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise _Twice(Counter(key for key, _ in pairs).most_common(1)[0][0])
    return found


def _read_json(path: str | Path, what: str, key: str) -> dict[str, Any]:
    """The object under `key` of a JSON file."""
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"), object_pairs_hook=_named_once)
    except OSError as error:
        raise TadError(f"{path}: {error.strerror or error}") from error
    except _Twice as error:
        raise TadError(f"{path}: {error.args[0]!r} is named twice; which one is meant cannot be known") from None
    except (ValueError, RecursionError) as error:
        raise TadError(f"{path}: not JSON: {error}") from error
    if not isinstance(content, dict) or not isinstance(content.get(key), dict):
        raise TadError(f"{path}: no {what}: needs an object under {key!r} at the top")
    return content


def _number(value: Any, where: str, least: float = -math.inf) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value) or value < least:
        raise TadError(f"{where}: must be a number{f' from {least:g} on' if least > -math.inf else ''}, got {value!r}")
    return float(value)


def _segment(entry: Any, where: str) -> tuple[float, float]:
    segment = entry.get("segment") if isinstance(entry, dict) else None
    if not isinstance(segment, (list, tuple)) or len(segment) != 2:
        raise TadError(f"{where}.segment: must be [start, end] in seconds, got {segment!r}")
    return _number(segment[0], f"{where}.segment"), _number(segment[1], f"{where}.segment")


def _label(entry: Mapping[str, Any], where: str) -> str:
    label = entry.get("label")
    if not isinstance(label, str) or not label:
        raise TadError(f"{where}.label: must be the name of a class, got {label!r}")
    return label


def read_annotations(path: str | Path) -> Annotations:
    """Read an annotation file. Raises TadError naming the file, video and key of what cannot be understood; annotations that
    end before they begin, or begin after their video's end, are left out and counted."""
    database = _read_json(path, "annotation file", "database")["database"]
    ignored: Counter[str] = Counter()
    ids: dict[str, set[Any]] = {}
    videos = {name: _video(name, entry, f"{path}: {name}", ids, ignored) for name, entry in database.items()}
    return Annotations(str(path), videos, _classes(str(path), ids), dict(ignored))


def _video(name: str, entry: Any, where: str, ids: dict[str, set[Any]], ignored: Counter[str]) -> UntrimmedVideo:
    if not isinstance(entry, dict) or not isinstance(entry.get("subset"), str):
        raise TadError(f"{where}: needs an object with a subset (as \"training\", \"validation\", \"test\")")
    duration = _number(entry.get("duration"), f"{where}.duration", 0)
    fps = entry.get("fps")
    if fps is not None and _number(fps, f"{where}.fps", 0) == 0:
        raise TadError(f"{where}.fps: must be above 0")
    listed = entry.get("annotations") or []
    if not isinstance(listed, list):
        raise TadError(f"{where}.annotations: must be a list, got {type(listed).__name__}")
    segments, labels = [], []
    for i, annotation in enumerate(listed):
        place = f"{where}.annotations[{i}]"
        start, end = _segment(annotation, place)
        label = _label(annotation, place)
        ids.setdefault(label, set()).add(annotation.get("label_id"))
        if end < start:
            ignored["annotations that end before they begin"] += 1
        elif start >= duration > 0:
            ignored["annotations that begin after the end of their video"] += 1
        else:
            segments.append((start, end))
            labels.append(label)
    rows = np.array(segments, dtype=np.float64).reshape(-1, 2)
    return UntrimmedVideo(name, entry["subset"], duration, None if fps is None else float(fps), rows, tuple(labels))


def _classes(path: str, ids: Mapping[str, set[Any]]) -> tuple[str, ...]:
    known = {label: numbers - {None} for label, numbers in ids.items()}
    for label, numbers in known.items():
        if len(numbers) > 1:
            raise TadError(f"{path}: class {label!r} has several numbers (label_id): {sorted(map(str, numbers))}")
    single = {label: next(iter(numbers)) for label, numbers in known.items() if numbers}
    if len(single) < len(known):
        return tuple(sorted(known))
    twice = [n for n, count in Counter(single.values()).items() if count > 1]
    if twice:
        raise TadError(f"{path}: label_id {twice[0]!r} stands for {sorted(k for k, v in single.items() if v == twice[0])}")
    try:
        return tuple(sorted(single, key=lambda label: single[label]))
    except TypeError as error:
        raise TadError(f"{path}: label_id must be numbers") from error


def choose_subset(annotations: Annotations, subset: str, block_list: Iterable[str] = ()) -> dict[str, UntrimmedVideo]:
    """The videos of a subset (case does not matter), without those of `block_list`, in the order of the file.

    Raises TadError for a subset without videos, naming those that have some, and for a blocked video that is not there."""
    blocked = set(block_list)
    strangers = sorted(blocked - annotations.videos.keys())
    if strangers:
        raise TadError(f"{annotations.path}: block_list names {strangers[0]!r}, which is no video of it")
    wanted = subset.lower()
    chosen = {k: v for k, v in annotations.videos.items() if v.subset.lower() == wanted and k not in blocked}
    if not chosen:
        there = sorted({v.subset for v in annotations.videos.values()})
        raise TadError(f"{annotations.path}: no video of subset {subset!r}; there are: {', '.join(there) or 'none'}")
    return chosen


class Detections(NamedTuple):
    """Detections of one video, best first in what we write: segments float64 [N, 2] in seconds, labels, scores [N]."""

    segments: np.ndarray
    labels: tuple[str, ...]
    scores: np.ndarray


def read_detections(path: str | Path) -> dict[str, Detections]:
    """Read a detection file. Raises TadError naming the file, video and key of what cannot be understood."""
    found = {}
    for video, entries in _read_json(path, "detection file", "results")["results"].items():
        if not isinstance(entries, list):
            raise TadError(f"{path}: {video}: must be a list of detections, got {type(entries).__name__}")
        rows, labels, scores = [], [], []
        for i, entry in enumerate(entries):
            where = f"{path}: {video}[{i}]"
            rows.append(_segment(entry, where))
            labels.append(_label(entry, where))
            scores.append(_number(entry.get("score"), f"{where}.score"))
        segments = np.array(rows, dtype=np.float64).reshape(-1, 2)
        found[video] = Detections(segments, tuple(labels), np.array(scores, dtype=np.float64))
    return found


def write_detections(path: str | Path, found: Mapping[str, Detections], about: Mapping[str, Any] | None = None) -> int:
    """Write a detection file, whole or not at all; `about` goes under "external_data". Returns the number of detections."""
    results = {
        video: [
            {"label": label, "score": round(float(score), 6), "segment": [round(float(x), 4) for x in segment]}
            for segment, label, score in zip(*d)
        ]
        for video, d in found.items()
    }
    write_json(path, {"version": "vmae2_fast", "results": results, "external_data": dict(about or {})})
    return sum(map(len, results.values()))


class VideoScores(NamedTuple):
    """Class scores of whole videos."""

    classes: tuple[str, ...]
    scores: dict[str, np.ndarray]
    """float64 [classes] by video."""


def read_video_scores(path: str | Path) -> VideoScores:
    """Read class scores of videos. Raises TadError naming the file and video of what cannot be understood."""
    content = _read_json(path, "file of class scores", "results")
    classes = content.get("class")
    if not isinstance(classes, list) or not classes or not all(isinstance(name, str) for name in classes):
        raise TadError(f"{path}: needs the names of the classes under 'class'")
    if len(set(classes)) < len(classes):
        raise TadError(f"{path}: class {Counter(classes).most_common(1)[0][0]!r} is named twice")
    scores = {}
    for video, values in content["results"].items():
        if not isinstance(values, list) or len(values) != len(classes):
            raise TadError(f"{path}: {video}: needs {len(classes)} scores, one a class")
        scores[video] = np.array([_number(value, f"{path}: {video}", 0) for value in values], dtype=np.float64)
    return VideoScores(tuple(classes), scores)


def read_features(path: str | Path, channels: int | None = None) -> np.ndarray:
    """Features of a video, float32 [windows, channels]. Raises TadError naming the file for anything else, values that are not
    finite, or another number of channels."""
    try:
        features = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise TadError(f"{path}: not readable as features: {error}") from error
    if not isinstance(features, np.ndarray) or features.ndim != 2 or not len(features) or features.dtype.kind != "f":
        what = f"{features.dtype} {list(features.shape)}" if isinstance(features, np.ndarray) else "an archive"
        raise TadError(f"{path}: features must be floating point [windows, channels], got {what}")
    if channels is not None and features.shape[1] != channels:
        raise TadError(
            f"{path}: features have {features.shape[1]} channels, the detector takes {channels}: they come from another model"
        )
    if not np.isfinite(features).all():
        raise TadError(f"{path}: holds values that are not finite; delete it and take the features again")
    return features.astype(np.float32)


FEATURES_HEADER, FEATURES_VIDEOS = "features.json", "videos.jsonl"
"""Files of a folder of features that we took: how, and the frame rate and duration of every video."""


def read_features_header(folder: str | Path) -> dict[str, Any]:
    """How the features of a folder were taken. Raises TadError naming the file."""
    path = Path(folder) / FEATURES_HEADER
    try:
        header = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise TadError(f"{path}: not the header of a folder of features: {error}") from error
    if not isinstance(header, dict):
        raise TadError(f"{path}: not the header of a folder of features")
    return header


def read_features_videos(folder: str | Path) -> dict[str, dict[str, Any]]:
    """{"fps", "duration", "frames", "windows"} of the videos of a folder of features, by name. Raises TadError."""
    path = Path(folder) / FEATURES_VIDEOS
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
        return {entry["name"]: entry for entry in map(json.loads, lines)}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise TadError(f"{path}: not a list of videos: {error}; take the features with `vmae2 tad features`") from error


def check_features(folder: str | Path, *, step: int, frames: int) -> None:
    """Raise TadError if the folder's header, where it has one, tells of other windows: every time would be wrong."""
    if not (Path(folder) / FEATURES_HEADER).exists():
        return
    header = read_features_header(folder)
    for key, value, where in (("step", step, "data.stride"), ("frames", frames, "model.frames")):
        if header.get(key) != value:
            raise TadError(f"{folder}: features were taken with {key} {header.get(key)}, {where} is {value}; make them equal")
    for key, needed in (("level", "clip"), ("stride", 1), ("format", "npy")):
        if header.get(key, needed) != needed:
            raise TadError(f"{folder}: features were taken with {key} {header[key]}, detection needs {needed}")
