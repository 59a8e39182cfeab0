"""Data made before the first stage of a progression: the moving scenes, or small copies of a folder's labelled videos.

Both give the same six sources (see `vmae2_fast.data.synthetic`), so one recipe trains on either.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from ..ops.resize import Window, resize_crop
from .decode import decode_video
from .probing import VIDEO_SUFFIXES, DecodeError, probe
from .synthetic import SceneSet, source_tables, write_jpegs, write_moving_scenes, write_mp4

_MAX_FRAMES = 300  # of each copy: enough for any demo clip, bounded for hour-long videos
_CHUNK = 32  # frames held at full size at once: 300 of a 4K video would be 7.5 GB


def folder_labels(folder: str | Path) -> dict[str, list[Path]]:
    """Labelled videos of a folder tree: label -> files, both sorted. Sub-folder = label, else the file name's stem.

    Raises ValueError if the folder is missing or holds no video file.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder of videos")
    found: dict[str, list[Path]] = {}
    for path in sorted(folder.rglob("*")):
        if path.suffix.lower() in VIDEO_SUFFIXES and path.is_file() and not path.name.startswith("."):
            label = path.stem if path.parent == folder else path.relative_to(folder).parts[0]
            found.setdefault(label, []).append(path)
    if not found:
        raise ValueError(f"{folder}: no video file in it (looked for {', '.join(VIDEO_SUFFIXES)})")
    return dict(sorted(found.items()))


def prepare_scenes(root: str | Path, *, size: int, scale: float, seed: int) -> dict[str, Any]:
    """Write the moving scenes under `root`; `scale` multiplies their number. Returns what the summary says of the data."""
    plain = SceneSet()

    def count(n: int) -> int:
        return max(1, round(n * scale))

    scenes = SceneSet(
        size=size, seed=seed, unlabeled_video=count(plain.unlabeled_video), unlabeled_frames=count(plain.unlabeled_frames),
        labeled_video=count(plain.labeled_video), labeled_frames=count(plain.labeled_frames),
        target_train=count(plain.target_train), target_val=count(plain.target_val), labeled_val=count(plain.labeled_val),
        holdout=count(plain.holdout),
    )  # fmt: skip
    write_moving_scenes(root, scenes)
    return {
        "kind": "moving scenes, written as H.264 MP4 and JPEG folders",
        **scenes.__dict__,
        "train_is_test": False,
        "skipped": {},
    }


def prepare_folder(root: str | Path, folder: str | Path, *, size: int) -> dict[str, Any]:
    """Copy the videos of `folder` small (short side `size`, H.264 MP4 and, at half the rate, JPEG folders) under `root`.

    With two or more clips of a label the last quarter (at least one) is kept for testing; with one clip a label the same
    clips serve for training and testing, and the returned summary says so. Videos that cannot be decoded are skipped and
    named there with the reason. Raises ValueError if none can be decoded.
    """
    root = Path(root)
    done = root / "folder.json"
    labels = folder_labels(folder)
    stamp = {"folder": str(Path(folder).resolve()), "size": size, "files": sum(len(f) for f in labels.values())}
    if done.exists():
        before = json.loads(done.read_text())
        if {k: before.get(k) for k in stamp} == stamp:
            return before
    if root.exists():
        raise ValueError(f"{root} exists and holds other data; remove it or choose another --out")
    work = root.with_name(f".{root.name}.partial")
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    train, test, skipped = _copy_all(work, labels, size)
    if not train:
        shutil.rmtree(work)
        raise ValueError(f"{folder}: no decodable video in it; first reason: {next(iter(skipped.values()))}")
    classes = list(labels)
    train_is_test = not test
    _write_lists(work, train, test or train, classes)
    summary = {
        **stamp, "kind": "labelled videos of a folder, copied small", "classes": len(classes), "clips": len(train) + len(test),
        "train_is_test": train_is_test, "skipped": skipped,
    }  # fmt: skip
    (work / "folder.json").write_text(json.dumps(summary, indent=2) + "\n")
    os.replace(work, root)
    return summary


Copied = tuple[str, int, int]  # name, frames of the JPEG folder, label


def _copy_all(work: Path, labels: dict[str, list[Path]], size: int) -> tuple[list[Copied], list[Copied], dict[str, str]]:
    train: list[Copied] = []
    test: list[Copied] = []
    skipped: dict[str, str] = {}
    (work / "video").mkdir()
    (work / "frames").mkdir()
    total = sum(len(files) for files in labels.values())
    with tqdm(total=total, desc="copying videos", unit="video", disable=None) as bar:
        for label, files in enumerate(labels.values()):
            good: list[Copied] = []
            for path in files:
                name = f"{label:04d}_{len(good):04d}"
                try:
                    video = _small_copy(path, size)
                except DecodeError as error:
                    skipped[str(path)] = str(error)
                else:
                    write_mp4(video, work / "video" / f"{name}.mp4")
                    half = video[::2]
                    write_jpegs(half, work / "frames" / name)
                    good.append((name, len(half), label))
                bar.update()
            kept = max(1, len(good) // 4) if len(good) > 1 else 0
            train += good[: len(good) - kept]
            test += good[len(good) - kept :]
    return train, test, skipped


def _small_copy(path: Path, size: int) -> np.ndarray:
    """The first frames of a video, uint8 [T,h,w,3] with short side `size` (even sides, as 4:2:0 wants)."""
    count = min(probe(str(path)).num_frames, _MAX_FRAMES)
    small: list[torch.Tensor] = []
    shape: tuple[int, int] | None = None
    for first in range(0, count, _CHUNK):
        frames = torch.from_numpy(decode_video(str(path), np.arange(first, min(first + _CHUNK, count))))
        height, width = frames.shape[1:3]
        if shape is None:  # of the first frame: a stream may change its size midway
            ratio = size / min(height, width)
            shape = max(size, 2 * round(height * ratio / 2)), max(size, 2 * round(width * ratio / 2))
        small.append(resize_crop(frames, [Window(0, 0, height, width)], shape)[0])
    return torch.cat(small).numpy()


def _write_lists(work: Path, train: list[Copied], test: list[Copied], classes: list[str]) -> None:
    lists = {
        "unlabeled_video": ("train", [f"../video/{name}.mp4 0 -1" for name, _, _ in train]),
        "unlabeled_frames": ("train", [f"../frames/{name} 1 {total}" for name, total, _ in train]),
        "holdout": ("val", [f"../video/{name}.mp4 0 -1" for name, _, _ in test]),
        "labeled_video": ("train", [f"../video/{name}.mp4 {label}" for name, _, label in train]),
        "labeled_frames": ("train", [f"../frames/{name} {total} {label}" for name, total, label in train]),
        "target": ("train", [f"../video/{name}.mp4 {label}" for name, _, label in train]),
    }
    for source, (split, lines) in lists.items():
        (work / source).mkdir()
        (work / source / f"{split}.csv").write_text("\n".join(lines) + "\n")
    for source in ("labeled_video", "target"):
        (work / source / "val.csv").write_text("\n".join(f"../video/{name}.mp4 {label}" for name, _, label in test) + "\n")
        (work / source / "classes.txt").write_text("\n".join(classes) + "\n")
    (work / "datasets.toml").write_text(source_tables(len(classes), len(classes)))
