"""Features of untrimmed videos by a frozen trunk: one row a window, one VIDEO.npy a video.

    OUT/features.json   how they were taken: model, weights, frames, step, size, normalisation, resizing, precision
    OUT/videos.jsonl    one line a video: name, fps, duration, frames, windows
    OUT/VIDEO.npy       float32 [windows, channels]

Files appear whole or not at all and are left alone once they are there, so an interrupted run, or one of many shares, is
simply started again. Another way of taking features into the same folder is refused.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from tqdm import tqdm

from ..config import require, to_dict
from ..data.probing import VIDEO_SUFFIXES, DecodeError, frame_rate, probe
from ..data.tad import FEATURES_HEADER, FEATURES_VIDEOS, TadError, read_features_header, write_json
from ..data.windows import Normalize, stream_windows
from ..models import VisionTransformer
from .base import autocast_dtype

RESIZE = "bilinear to a square, no antialiasing, aspect ratio not kept"


@dataclass(frozen=True, kw_only=True)
class FeatureConfig:
    """How features are taken; the defaults are those of the released THUMOS14 features."""

    step: int = 4
    """Frames between the starts of two windows: 4 for THUMOS14, 16 for FineAction."""
    normalize: Normalize = "none"
    """none: pixels in [0, 1], as the released features; imagenet: as the models were trained."""
    batch: int = 16
    """Windows of a forward; changes nothing but speed and memory."""
    precision: Literal["float32", "bfloat16"] = "float32"

    def __post_init__(self) -> None:
        for name in ("step", "batch"):
            require(getattr(self, name) >= 1, f"features: {name}={getattr(self, name)} must be at least 1")


def find_videos(given: Sequence[str | Path]) -> dict[str, Path]:
    """Video files, and those in folders and below, by their name without ending.

    Raises ValueError for a path that is not there, a folder without a video, and two videos of one name."""
    found: dict[str, Path] = {}
    for entry in map(Path, given):
        require(entry.exists(), f"{entry}: no such video or folder")
        files = [entry]
        if entry.is_dir():
            files = sorted(p for p in entry.rglob("*") if p.suffix.lower() in VIDEO_SUFFIXES and p.is_file())
            require(bool(files), f"{entry}: no video in it")
        for path in files:
            require(path.stem not in found, f"{path} and {found.get(path.stem)} have the same name")
            found[path.stem] = path
    return found


@torch.no_grad()
def video_features(model: VisionTransformer, path: str | Path, config: FeatureConfig) -> np.ndarray:
    """Features of one video, float32 [windows, channels], `model` in evaluation mode. Raises DecodeError naming the file."""
    spec, device = model.spec, next(model.parameters()).device
    dtype = autocast_dtype(config.precision, device.type)
    rows = []
    for clip in stream_windows(
        str(path), frames=spec.frames, step=config.step, size=spec.size, batch=config.batch, normalize=config.normalize,
        device=device,
    ):  # fmt: skip
        with torch.autocast(device.type, dtype or torch.bfloat16, enabled=dtype is not None):
            rows.append(model.forward_features(clip).float().cpu().numpy())
    return np.concatenate(rows)


def extract_features(
    model: VisionTransformer,
    videos: Mapping[str, Path],
    out: str | Path,
    config: FeatureConfig,
    *,
    about: Mapping[str, Any] | None = None,
    shard: tuple[int, int] = (0, 1),
) -> dict[str, Any]:
    """Write the features of the videos of `shard` (i of n) that are not there yet.

    about: more entries of the header, such as where the weights come from. Returns {"written", "skipped", "windows", "frames"
    decoded, "frames_by_window", what windows decoded one by one would have cost, "failed": {path: reason}}.
    Raises TadError if `out` holds features taken in another way, OSError if it cannot be written.
    """
    model.eval()
    out = Path(out)
    spec = model.spec
    header = {**(about or {}), "model": to_dict(model.config), "frames": spec.frames, "size": spec.size, "resize": RESIZE}
    header |= {key: value for key, value in asdict(config).items() if key != "batch"}
    open_folder(out, json.loads(json.dumps(header)))
    result: dict[str, Any] = {"written": 0, "skipped": 0, "windows": 0, "frames": 0, "frames_by_window": 0, "failed": {}}
    mine = sorted(videos)[shard[0] :: shard[1]]
    for name in tqdm(mine, desc="features", unit="video", disable=None):
        target = out / f"{name}.npy"
        if target.exists():
            result["skipped"] += 1
            continue
        path = str(videos[name])
        try:
            features, count, fps = video_features(model, path, config), probe(path).num_frames, frame_rate(path)
        except DecodeError as error:
            result["failed"][error.path] = error.reason
            continue
        line = {"name": name, "fps": fps, "duration": count / fps, "frames": count, "windows": len(features)}
        # Before the features: a kill between the two leaves a line, which is written again and does no harm.
        _append(out / FEATURES_VIDEOS, json.dumps(line) + "\n")
        _save(target, features)
        result["written"] += 1
        result["windows"] += len(features)
        result["frames"] += count
        result["frames_by_window"] += len(features) * spec.frames
    return result


def _append(path: Path, line: str) -> None:
    # one write to a file opened for appending: whole lines, also when several processes write
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        os.write(handle, line.encode())
    finally:
        os.close(handle)


def _save(target: Path, features: np.ndarray) -> None:
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:  # given a name, numpy would add an ending of its own
            np.save(file, features, allow_pickle=False)
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)


def open_folder(out: Path, header: dict[str, Any]) -> None:
    """Make the folder with its header, or check that the one there says the same. Raises TadError naming what differs."""
    path = out / FEATURES_HEADER
    out.mkdir(parents=True, exist_ok=True)
    if not path.exists():
        write_json(path, header)
        return
    before = read_features_header(out)
    differ = [key for key in sorted({*before, *header}) if before.get(key) != header.get(key)]
    if differ:
        told = "; ".join(f"{key}: {before.get(key)!r} there, {header.get(key)!r} now" for key in differ[:3])
        raise TadError(f"{out} holds features taken in another way ({told}); choose another --out")
