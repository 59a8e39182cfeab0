"""A small set in AVA's formats: encoded scenes with two people-like boxes each, whose action is what is inside the box.

Four actions, each one colour of a moving, textured patch on a noisy background; the boxes of a clip have different ones, so
only a model that looks inside the boxes can tell them. Layout written by `write_ava_scenes(root)`:

    root/videos/NAME.mp4    2 seconds at 24 frames a second, key frame at second 1
    root/train.csv, val.csv, labels.pbtxt, exclusions.csv, people.csv (detected boxes of val.csv, with low-scored false ones)
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import numpy as np
from numpy.random import Generator, Philox
from tqdm import tqdm

from . import boxes as geometry
from .synthetic import write_mp4

COLOURS = {
    1: ("red", (210, 40, 40)), 12: ("green", (40, 190, 60)), 14: ("blue", (50, 70, 220)), 80: ("yellow", (220, 210, 50)),
}  # fmt: skip
FRAMES, KEY_SECOND = 48, 1


def render(actions: list[int], rng: Generator, *, height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """(video uint8 [48, H, W, 3], boxes at the key frame as shares [n, 4]); the boxes lie beside each other."""
    video = rng.integers(90, 150, (FRAMES, height, width, 3)).astype(np.float64)
    column = width / len(actions)
    found = []
    for number, action in enumerate(actions):
        h, w = rng.integers(height // 3, height // 2 + 1), rng.integers(int(column) // 2, int(0.75 * column) + 1)
        x = number * column + rng.uniform(2, max(column - w - 2, 3))
        y = rng.uniform(4, height - h - 4)
        texture = rng.integers(-25, 26, (h, w, 1)) + np.asarray(COLOURS[action][1])
        for t in range(FRAMES):
            top, left = round(y + 3 * np.sin(t / 6 + number)), round(x)
            video[t, top : top + h, left : left + w] = texture
            if t == 24 * KEY_SECOND:
                found.append([left, top, left + w - 1, top + h - 1])
    return video.clip(0, 255).astype(np.uint8), geometry.to_shares(np.asarray(found, dtype=np.float64), width, height)


def write_ava_scenes(root: str | Path, *, train: int = 64, val: int = 16, size: int = 48, seed: int = 0) -> Path:
    """Write the set of the head of this file, `size` pixels high and 4/3 as wide; returns `root`. Made once: a finished one
    stays. Raises ValueError if `root` exists and is no such set."""
    root = Path(root)
    if (root / "people.csv").exists():
        return root
    if root.exists():
        raise ValueError(f"{root} exists and holds other data; remove it or choose another --out")
    work = root.with_name(f".{root.name}.partial")
    shutil.rmtree(work, ignore_errors=True)
    (work / "videos").mkdir(parents=True)
    actions, width = list(COLOURS), size * 4 // 3
    lines: dict[str, list[str]] = {"train": [], "val": [], "people": []}
    for number in tqdm(range(train + val), desc="writing scenes", unit="video", disable=None):
        rng = Generator(Philox(key=[seed, number]))
        name, split = f"scene_{number:04d}", "train" if number < train else "val"
        chosen = [int(a) for a in rng.permutation(actions)[:2]]
        video, shares = render(chosen, rng, height=size, width=width)
        write_mp4(video, work / "videos" / f"{name}.mp4")
        for person, (action, box) in enumerate(zip(chosen, shares)):
            where = f"{name},{KEY_SECOND:04d},{','.join(f'{v:.4f}' for v in box)}"
            lines[split].append(f"{where},{action},{person}")
            if split == "val":
                lines["people"].append(f"{where},{0.9 + 0.01 * person:.2f}")
        if split == "val":
            lines["people"].append(f"{name},{KEY_SECOND:04d},0.0100,0.0100,0.0900,0.1200,0.30")
    for name, rows in lines.items():
        (work / f"{name}.csv").write_text("\n".join(rows) + "\n")
    (work / "exclusions.csv").write_text("")
    blocks = [f'item {{\n  name: "{name}"\n  id: {action}\n}}\n' for action, (name, _) in COLOURS.items()]
    (work / "labels.pbtxt").write_text("".join(blocks))
    os.replace(work, root)
    return root
