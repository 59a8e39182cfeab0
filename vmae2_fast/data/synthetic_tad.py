"""Untrimmed videos in which actions come and go, annotated in THUMOS14's style.

    root/annotations.json     subsets "validation" (to train on, as THUMOS14 calls it) and "test"
    root/video_scores.json    class scores of the test videos, as a classifier of whole videos would give
    root/features/NAME.npy    `write_tad_features`: float32 [windows, channels], one every 4 frames of 30 a second; noise in
                              which actions show as the direction of their class
    root/videos/NAME.mp4      `write_untrimmed_scenes`: encoded, 24 frames a second; still pictures between moving scenes
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import numpy as np
from numpy.random import Generator, Philox
from tqdm import tqdm

from .synthetic import render_scene, write_mp4

FPS, STRIDE, FRAMES = 30.0, 4, 16
CLASSES = ("circling", "jumping", "waving")


def write_tad_features(root: str | Path, *, train: int = 24, test: int = 12, channels: int = 16, seed: int = 0) -> Path:
    """Write the set and return the path of its annotations; a folder written before is left as it is.

    Raises OSError if it cannot be written."""
    root = Path(root)
    if root.exists():
        return root / "annotations.json"
    work = root.with_name(f".{root.name}.partial")
    shutil.rmtree(work, ignore_errors=True)
    (work / "features").mkdir(parents=True)
    rng = np.random.default_rng(seed)
    directions = np.linalg.qr(rng.normal(size=(channels, channels)))[0][: len(CLASSES)]
    database: dict[str, object] = {}
    scores: dict[str, list[float]] = {}
    for number in range(train + test):
        subset = "validation" if number < train else "test"
        name = f"{subset}_{number:03d}"
        length = int(rng.integers(80, 129))
        features = rng.normal(scale=0.15, size=(length, channels))
        annotations, seen = [], np.full(len(CLASSES), 0.05)
        at = float(rng.uniform(2, 12))
        while at < length - 6:
            label = int(rng.integers(len(CLASSES)))
            end = min(at + float(rng.uniform(4, 30)), length - 1.0)
            inside = (np.arange(length) >= at) & (np.arange(length) <= end)
            features[inside] += directions[label]
            segment = [round((g * STRIDE + FRAMES / 2) / FPS, 4) for g in (at, end)]
            annotations.append({"label": CLASSES[label], "label_id": label, "segment": segment})
            seen[label] += end - at
            at = end + float(rng.uniform(4, 25))
        np.save(work / "features" / f"{name}.npy", features.astype(np.float32), allow_pickle=False)
        duration = ((length - 1) * STRIDE + FRAMES) / FPS
        database[name] = {"subset": subset, "duration": duration, "fps": FPS, "annotations": annotations}
        if subset == "test":
            scores[name] = [round(float(s), 6) for s in seen / seen.sum()]
    _finish(work, root, database, scores)
    return root / "annotations.json"


MOVES = ("turn_left", "drift_right", "drift_up")
"""The moving scene that stands for each of `CLASSES`."""


def write_untrimmed_scenes(root: str | Path, *, train: int = 16, test: int = 8, size: int = 64, seed: int = 0) -> Path:
    """Write the set as videos of `size` pixels, about 7 seconds each; returns the path of its annotations. A folder written
    before is left as it is. Raises OSError if it cannot be written."""
    root = Path(root)
    if root.exists():
        return root / "annotations.json"
    work = root.with_name(f".{root.name}.partial")
    shutil.rmtree(work, ignore_errors=True)
    (work / "videos").mkdir(parents=True)
    database: dict[str, object] = {}
    scores: dict[str, list[float]] = {}
    for number in tqdm(range(train + test), desc="writing untrimmed videos", unit="video", disable=None):
        subset = "validation" if number < train else "test"
        name, rng = f"{subset}_{number:03d}", Generator(Philox(key=[seed, number]))
        pieces, annotations, seen = [], [], np.full(len(CLASSES), 0.05)
        at = 0
        for _ in range(3):
            still = np.full((int(rng.integers(12, 30)), size, size, 3), rng.integers(60, 190, 3), dtype=np.uint8)
            label, length = int(rng.integers(len(CLASSES))), int(rng.integers(24, 48))
            pieces += [still, render_scene(MOVES[label], rng, frames=length, size=size)]
            segment = [(at + len(still)) / 24, (at + len(still) + length) / 24]
            annotations.append({"label": CLASSES[label], "label_id": label, "segment": [round(t, 4) for t in segment]})
            seen[label] += length
            at += len(still) + length
        write_mp4(np.concatenate(pieces), work / "videos" / f"{name}.mp4")
        database[name] = {"subset": subset, "duration": at / 24, "fps": 24.0, "annotations": annotations}
        if subset == "test":
            scores[name] = [round(float(s), 6) for s in seen / seen.sum()]
    _finish(work, root, database, scores)
    return root / "annotations.json"


def _finish(work: Path, root: Path, database: dict[str, object], scores: dict[str, list[float]]) -> None:
    (work / "annotations.json").write_text(json.dumps({"version": "made up", "database": database}))
    (work / "video_scores.json").write_text(json.dumps({"class": list(CLASSES), "results": scores}))
    os.replace(work, root)
