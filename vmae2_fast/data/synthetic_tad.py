"""Untrimmed videos as features: noise in which actions show as the direction of their class, annotated in THUMOS14's style.

Layout written by `write_tad_features(root)`:

    root/annotations.json     subsets "validation" (to train on, as THUMOS14 calls it) and "test"
    root/features/NAME.npy    float32 [windows, channels], one every 4 frames of 30 a second
    root/video_scores.json    class scores of the test videos, as a classifier of whole videos would give
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import numpy as np

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
    database, scores = {}, {}
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
    (work / "annotations.json").write_text(json.dumps({"version": "moving features", "database": database}))
    (work / "video_scores.json").write_text(json.dumps({"class": list(CLASSES), "results": scores}))
    os.replace(work, root)
    return root / "annotations.json"
