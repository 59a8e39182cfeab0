"""Features of whole videos by a frozen trunk, window by window: what `vmae2 extract` and `vmae2 tad features` do.

level="clip"   one row a window: `forward_features` of T frames `stride` apart, windows `step` frames apart
level="frame"  one row a tubelet: windows one behind the other, tokens averaged over space only, then the same norm

    OUT/features.json   how they were taken: model and digest of its weights, windows, normalisation, resizing, precision
    OUT/videos.jsonl    one line a video: name, fps, duration, frames, windows
    OUT/NAME.npy        float32 [rows, channels], or NAME.safetensors with `frames` beside them

Every frame is decoded once whatever the overlap of the windows, and memory does not grow with the length of a video. Files
appear whole or not at all and those that are there are left alone, so an interrupted run, or one of many shares, is simply
started again. Features taken in another way, or with other weights, are refused a place in the same folder.
"""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.numpy import save_file
from torch import Tensor
from tqdm import tqdm

from ..config import ExtractConfig, require
from ..data.probing import VIDEO_SUFFIXES, DecodeError, frame_rate, probe
from ..data.tad import FEATURES_HEADER, FEATURES_VIDEOS, read_features_header
from ..data.windows import crop_frames, squash_frames, stream_windows, window_frames
from ..models import VisionTransformer
from ..models.weights import weights_digest
from ..ops.patches import IMAGENET_MEAN, IMAGENET_STD
from ..whole import write_json, write_whole
from .base import autocast_dtype

_FREE = ("batch", "weights_file")
"""Entries of a header that do not change what is written."""


def find_videos(given: Sequence[str | Path], *, by_stem: bool = False) -> dict[str, Path]:
    """Videos by the name of their features: files by their stem, those in folders by their path below without the suffix,
    or by_stem by their stem as well, which is how annotations name them.

    Raises ValueError for a path that does not exist, a folder without a video, or two videos of one name."""
    found: dict[str, Path] = {}
    for entry in map(Path, given):
        require(entry.exists(), f"{entry}: no such video or folder")
        files = [entry]
        if entry.is_dir():
            files = sorted(p for p in entry.rglob("*") if p.suffix.lower() in VIDEO_SUFFIXES and p.is_file())
            require(bool(files), f"{entry}: no video in it")
        for path in files:
            name = path.stem if by_stem or path == entry else str(path.relative_to(entry).with_suffix(""))
            require(name not in found, f"{path} and {found.get(name)} have the same name {name}; take one of them elsewhere")
            found[name] = path
    return found


@torch.no_grad()
def video_features(
    model: VisionTransformer, path: str | Path, config: ExtractConfig
) -> tuple[np.ndarray, np.ndarray, int]:
    """(features float32 [rows, channels], frames each row saw int64 [rows, 2]: first, one past the last; number of windows)
    of one video, `model` in evaluation mode. Raises DecodeError naming the file."""
    spec, device = model.spec, next(model.parameters()).device
    dtype = autocast_dtype(config.precision, device.type, "precision")
    wanted = window_frames(probe(str(path)).num_frames, spec.frames, config)
    prepare = functools.partial(crop_frames if config.resize == "crop" else squash_frames, size=spec.size)
    rows: list[Tensor] = []
    for frames in stream_windows(str(path), wanted, prepare, batch=config.batch, device=device):
        clip = _shown(model, frames, config)
        with torch.autocast(device.type, dtype or torch.bfloat16, enabled=dtype is not None):
            rows.append(_rows(model, clip, config.level).float().cpu())
    features = torch.cat(rows).numpy()
    if config.level == "clip":
        return features, np.stack((wanted[:, 0], wanted[:, -1] + 1), axis=1), len(wanted)
    seen = wanted.reshape(-1, spec.tubelet)
    real = spec.tubelet * config.stride * np.arange(len(seen)) < wanted[-1, -1] + 1  # the others would begin past the end
    return features[real], np.stack((seen[:, 0], seen[:, -1] + 1), axis=1)[real], len(wanted)


def _shown(model: VisionTransformer, frames: Tensor, config: ExtractConfig) -> Tensor:
    """Windows [B, T, H, W, 3] uint8 or [B, T, 3, H, W] in [0, 1] as the model takes them: uint8 as they are, which it
    normalises itself, or float [B, 3, T, H, W]."""
    if frames.dtype == torch.uint8:
        if config.normalize == "imagenet":
            return frames
        frames = frames.permute(0, 1, 4, 2, 3).float() / 255
    elif config.normalize == "imagenet":
        own = model.config.pixel_mean or IMAGENET_MEAN, model.config.pixel_std or IMAGENET_STD
        mean, std = (frames.new_tensor(v)[:, None, None] for v in own)
        frames = (frames - mean) / std
    return frames.transpose(1, 2).contiguous()


def _rows(model: VisionTransformer, clip: Tensor, level: str) -> Tensor:
    if level == "clip":
        return model.forward_features(clip)
    norm = model.norm if model.config.pooling == "first" else model.fc_norm
    tokens: Tensor = norm(model.tokens(clip).unflatten(1, (model.grid[0], -1)).mean(2))
    return tokens.flatten(0, 1)


def extract_features(
    model: VisionTransformer,
    videos: Mapping[str, Path],
    out: str | Path,
    config: ExtractConfig,
    *,
    weights_file: str | None = None,
    shard: tuple[int, int] = (0, 1),
) -> dict[str, Any]:
    """Write the features of `videos` (name -> file) into `out`, those of `shard` (i of n) that are not there yet.

    weights_file: where the weights come from, noted in the header. Returns {"written", "skipped", "rows", "width", "windows",
    "frames" decoded, "frames_by_window", what windows decoded one by one would have cost, "failed": {path: reason}}.
    Raises ValueError if `out` holds features taken in another way or with other weights, or cannot be written.
    """
    model.eval()
    out = Path(out)
    open_folder(out, features_header(model, config, weights_file))
    result: dict[str, Any] = dict.fromkeys(("written", "skipped", "rows", "windows", "frames", "frames_by_window"), 0)
    result |= {"width": model.spec.encoder.width, "failed": {}}
    for name in tqdm(sorted(videos)[shard[0] :: shard[1]], desc="features", unit="video", disable=None):
        target = out / f"{name}.{config.format}"
        if target.exists():
            result["skipped"] += 1
            continue
        path = str(videos[name])
        try:
            features, frames, windows = video_features(model, path, config)
            count, fps = probe(path).num_frames, frame_rate(path)
        except DecodeError as error:
            result["failed"][error.path] = error.reason
            continue
        line = {"name": name, "fps": fps, "duration": count / fps, "frames": count, "windows": windows}
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            # Before the features: a kill between the two leaves a line, which is written again and does no harm.
            _append(out / FEATURES_VIDEOS, json.dumps(line) + "\n")
            _write(target, features, frames, path)
        except OSError as error:
            raise ValueError(f"cannot write {target}: {error.strerror or error}; choose another --out") from error
        result["written"] += 1
        result["rows"] += len(features)
        result["windows"] += windows
        result["frames"] += count
        result["frames_by_window"] += windows * model.spec.frames
    return result


def features_header(model: VisionTransformer, config: ExtractConfig, weights_file: str | None = None) -> dict[str, Any]:
    """Contents of `features.json`, plain JSON values: all that the values depend on. The head does not count."""
    spec = model.spec
    own = {key: getattr(model.config, key) for key in ("positions", "pixel_mean", "pixel_std")}
    header = {
        "model": model.config.name, "weights": weights_digest(model, without=("head.",)), "weights_file": weights_file,
        "frames": spec.frames, "size": spec.size, **own, **asdict(config), "step": config.step or spec.frames * config.stride,
    }  # fmt: skip
    return json.loads(json.dumps({key: value for key, value in header.items() if key != "batch"}))


def open_folder(out: Path, header: dict[str, Any]) -> None:
    """Make the folder with its header, or check that the one there says the same. Raises ValueError naming what differs."""
    path = out / FEATURES_HEADER
    try:
        out.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            write_json(path, header, indent=2)
            return
    except OSError as error:
        raise ValueError(f"cannot write {out}: {error.strerror or error}; choose another --out") from error
    check_header(out, header)


def check_header(out: Path, header: dict[str, Any]) -> None:
    """Raises ValueError naming what differs between the header of the folder `out` and `header`."""
    before = read_features_header(out)
    keys = [key for key in sorted({*before, *header}) if key not in _FREE and before.get(key) != header.get(key)]
    told = "; ".join(f"{key}: {before.get(key)!r} there, {header.get(key)!r} now" for key in keys[:3])
    require(not keys, f"{out} holds features taken in another way ({told}); choose another folder, or delete this one")


def _append(path: Path, line: str) -> None:
    # one write to a file opened for appending: whole lines, also when several processes write
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        os.write(handle, line.encode())
    finally:
        os.close(handle)


def _write(target: Path, features: np.ndarray, frames: np.ndarray, video: str) -> None:
    def npy(path: Path) -> None:
        with open(path, "wb") as file:  # given a name, numpy would add a suffix of its own
            np.save(file, features, allow_pickle=False)

    def safetensors(path: Path) -> None:
        save_file({"features": features, "frames": frames}, path, {"video": video})

    write_whole(target, npy if target.suffix == ".npy" else safetensors)
