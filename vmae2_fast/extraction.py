"""Features of whole videos by a trained trunk, window by window: what `vmae2 extract` does, for scripts as well.

level="clip"   one row a window: `forward_features` of T frames `stride` apart, windows `step` frames apart
level="frame"  one row a tubelet: windows one behind the other, tokens averaged over space only, then the same norm

Every frame is decoded once whatever the overlap of the windows, and memory does not grow with the length of a video. A
video shorter than a window gives one, its last frame repeated. Files appear whole or not at all and those that are there
are left alone, so an interrupted run, or one of many shares, is simply started again.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.numpy import save_file
from torch import Tensor
from tqdm import tqdm

from .config import ExtractConfig, require, to_dict
from .data.plan import test_windows
from .data.probing import VIDEO_SUFFIXES, DecodeError, probe
from .data.sampling import tad_window_starts
from .data.streaming import stream_video
from .models import VisionTransformer
from .models.weights import write_whole
from .ops.resize import Window, resize_crop
from .tasks.base import autocast_dtype

HEADER = "extraction.json"


def find_videos(given: Sequence[str | Path]) -> dict[str, Path]:
    """Videos by the name of their features: files by their stem, those in folders by their path below without the suffix.

    Raises ValueError for a path that does not exist, a folder without a video, or two videos of one name."""
    found: dict[str, Path] = {}
    for entry in map(Path, given):
        if entry.is_dir():
            files = sorted(p for p in entry.rglob("*") if p.suffix.lower() in VIDEO_SUFFIXES and p.is_file())
            require(bool(files), f"{entry}: no video file in it")
            named = {str(p.relative_to(entry).with_suffix("")): p for p in files}
            require(len(named) == len(files), f"{entry}: two videos differ only in their suffix; give them one by one")
        else:
            require(entry.is_file(), f"{entry}: no such video")
            named = {entry.stem: entry}
        for name, path in named.items():
            require(name not in found, f"{path} and {found.get(name)} would both be written as {name}")
            found[name] = path
    return found


def windows(num_frames: int, frames: int, config: ExtractConfig) -> np.ndarray:
    """Frame ids of every window, int64 [windows, frames]; ids past the end repeat the last frame.

    Clip level: starts 0, step, ... while a whole window fits (the official rule; short videos give one). Frame level: one
    behind the other up to the end."""
    span = frames * config.stride
    if config.level == "clip":
        starts = tad_window_starts(max(num_frames, span), config.step or span, span)
    else:
        starts = np.arange(0, num_frames, span)
    return np.minimum(starts[:, None] + config.stride * np.arange(frames), num_frames - 1)


@torch.no_grad()
def extract_video(model: VisionTransformer, path: str | Path, config: ExtractConfig) -> tuple[np.ndarray, np.ndarray]:
    """Features float32 [N, D] of one video and the frames each row saw, int64 [N, 2] (first, one past the last).

    Raises DecodeError naming the file."""
    spec, device = model.spec, next(model.parameters()).device
    dtype = autocast_dtype(config.precision, device.type, "precision")
    wanted = windows(probe(str(path)).num_frames, spec.frames, config)
    rows: list[Tensor] = []
    clips: list[Tensor] = []

    def flush() -> None:
        if clips:
            clip = torch.stack(clips).to(device, non_blocking=True)
            with torch.autocast(device.type, dtype or torch.bfloat16, enabled=dtype is not None):
                rows.append(_features(model, clip, config.level).float().cpu())
            clips.clear()

    for clip in _clips(str(path), wanted, spec.size, config.resize):
        clips.append(clip)
        if len(clips) == config.batch:
            flush()
    flush()
    features = torch.cat(rows).numpy()
    if config.level == "clip":
        return features, np.stack((wanted[:, 0], wanted[:, -1] + 1), axis=1)
    seen = wanted.reshape(-1, spec.tubelet)
    real = spec.tubelet * config.stride * np.arange(len(seen)) < wanted[-1, -1] + 1  # the others would begin past the end
    return features[real], np.stack((seen[:, 0], seen[:, -1] + 1), axis=1)[real]


def _features(model: VisionTransformer, clip: Tensor, level: str) -> Tensor:
    if level == "clip":
        return model.forward_features(clip)
    norm = model.norm if model.config.pooling == "first" else model.fc_norm
    tokens: Tensor = norm(model.tokens(clip).unflatten(1, (model.grid[0], -1)).mean(2))
    return tokens.flatten(0, 1)


def _clips(path: str, wanted: np.ndarray, size: int, resize: str) -> Iterator[Tensor]:
    """The windows of frame ids `wanted` in order, uint8 [T, size, size, 3] each, from one pass over the video."""
    kept: dict[int, Tensor] = {}
    count, following = 0, 0
    for chunk in stream_video(path):
        height, width = chunk.shape[1:3]
        window = Window(0, 0, height, width) if resize == "squash" else test_windows(height, width, size, 1)[0]
        frames = resize_crop(torch.from_numpy(chunk), [window], size)[0]
        for frame in frames:
            kept[count] = frame
            count += 1
        while following < len(wanted) and wanted[following, -1] < count:
            yield torch.stack([kept[k] for k in wanted[following].tolist()])
            following += 1
        oldest = wanted[following, 0] if following < len(wanted) else count
        for k in [k for k in kept if k < oldest]:
            del kept[k]
        if following == len(wanted):
            return


def extract(
    model: VisionTransformer,
    videos: dict[str, Path],
    out: str | Path,
    config: ExtractConfig,
    *,
    about: dict[str, Any] | None = None,
    shard: tuple[int, int] = (0, 1),
) -> dict[str, Any]:
    """Write the features of `videos` (name -> file) into `out`, those of `shard` (i of n) that are not there yet.

    Returns {"written", "skipped", "rows", "width", "failed": {path: reason}}. `out`/extraction.json tells how features
    were taken; another way, or other weights (`about`), in the same folder raises ValueError."""
    model.eval()
    out = Path(out)
    header = {**(about or {}), "model": to_dict(model.config), **asdict(config)}
    header.pop("batch")
    _open(out, json.loads(json.dumps(header)))
    number, count = shard
    mine = [name for place, name in enumerate(sorted(videos)) if place % count == number]
    result: dict[str, Any] = {"written": 0, "skipped": 0, "rows": 0, "width": model.spec.encoder.width, "failed": {}}
    for name in tqdm(mine, desc="extracting", unit="video", disable=None):
        target = out / f"{name}.{config.format}"
        if target.exists():
            result["skipped"] += 1
            continue
        try:
            features, frames = extract_video(model, videos[name], config)
        except DecodeError as error:
            result["failed"][error.path] = error.reason
            continue
        target.parent.mkdir(parents=True, exist_ok=True)
        _write(target, features, frames, videos[name])
        result["written"] += 1
        result["rows"] += len(features)
    return result


def _write(target: Path, features: np.ndarray, frames: np.ndarray, video: Path) -> None:
    def npy(path: Path) -> None:
        with open(path, "wb") as file:  # given a name, numpy would add a suffix of its own
            np.save(file, features, allow_pickle=False)

    def safetensors(path: Path) -> None:
        save_file({"features": features, "frames": frames}, path, {"video": str(video)})

    write_whole(target, npy if target.suffix == ".npy" else safetensors)


def _open(out: Path, header: dict[str, Any]) -> None:
    path = out / HEADER
    try:
        out.mkdir(parents=True, exist_ok=True)
        if path.exists():
            before = json.loads(path.read_text())
            keys = [key for key in sorted({*before, *header}) if before.get(key) != header.get(key)]
            told = "; ".join(f"{k}: {before.get(k)!r} there, {header.get(k)!r} now" for k in keys[:3])
            require(not keys, f"{out} holds features taken otherwise ({told}); choose another --out")
        else:
            write_whole(path, lambda temporary: temporary.write_text(json.dumps(header, indent=2) + os.linesep))
    except OSError as error:
        raise ValueError(f"cannot write {out}: {error.strerror or error}; choose another --out") from error
