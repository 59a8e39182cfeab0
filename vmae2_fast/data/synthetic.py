"""A small labelled video set of moving scenes, written as real encoded files with list files in the official formats.

Every scene is one smooth wave of two colours that moves, with a disc wandering over it that has nothing to do with the
label. The twelve classes are kinds of *motion* in opposite pairs: which of eight ways the wave drifts, whether it turns
left or right, whether a red or a blue mark came first. No frame tells a class from its opposite, and shuffling the frames
of a clip takes the answer away. Reconstruction stays possible: of a wave about as long as the picture is wide, a few
visible patches reveal the hidden ones.

Layout written by `write_moving_scenes(root)`:

    root/datasets.toml           the six sources below, as `DataConfig.datasets` reads them
    root/unlabeled_video/        H.264 MP4 at 24 frames a second, list `path 0 -1`
    root/unlabeled_frames/       the same kind of scenes at 12 a second as JPEG folders, list `path 1 total`
    root/labeled_video/          12 classes, H.264 MP4, lists `path label` for training and validation
    root/labeled_frames/         12 classes, JPEG folders, list `path total label`
    root/target/                 6 of the classes with few labels; its own numbering; train and val lists
    root/holdout/                unlabeled clips nobody trains on, to judge reconstruction
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.random import Generator, Philox
from tqdm import tqdm

_DRIFTS = (
    "drift_right",
    "drift_down_right",
    "drift_down",
    "drift_down_left",
    "drift_left",
    "drift_up_left",
    "drift_up",
    "drift_up_right",
)  # fmt: skip  (eighths of a turn, clockwise on the screen)
CLASSES = (*_DRIFTS, "turn_left", "turn_right", "red_then_blue", "blue_then_red")
TARGET_CLASSES = ("drift_right", "drift_left", "turn_left", "turn_right", "red_then_blue", "blue_then_red")
_FPS = 24


@dataclass(frozen=True, kw_only=True)
class SceneSet:
    """How much to write; the defaults are the demo's."""

    size: int = 64
    frames: int = 24
    unlabeled_video: int = 640
    unlabeled_frames: int = 160
    labeled_video: int = 40
    """Clips per class."""
    labeled_frames: int = 12
    """Clips per class."""
    target_train: int = 8
    """Clips per class."""
    target_val: int = 20
    """Clips per class."""
    labeled_val: int = 6
    """Clips per class."""
    holdout: int = 64
    distractors: int = 1
    """Discs that wander over every scene."""
    shake: float = 0.0
    """Deviation of the camera's place from frame to frame, in half pictures; what it shows jumps as a whole."""
    seed: int = 0


def render_scene(
    kind: str, rng: Generator, *, frames: int, size: int, step: float = 1.0, distractors: int = 1, shake: float = 0.0
) -> np.ndarray:
    """One scene as uint8 [frames, size, size, 3].

    `kind` is one of CLASSES; `step` is the time between two frames (2 gives the half frame rate). The picture spans
    [-1, 1]^2; the wave moves by 0.04 to 0.08 periods in a frame of step 1. distractors, shake: as in `SceneSet`.
    """
    t = (np.arange(frames, dtype=np.float32) - (frames - 1) / 2) * np.float32(step)
    axis = (np.arange(size, dtype=np.float32) + 0.5) / size * 2 - 1
    y, x = (np.broadcast_to(a, (frames, size, size)) for a in np.meshgrid(axis, axis, indexing="ij"))
    if shake:
        away = rng.normal(0, shake, (2, frames, 1, 1)).astype(np.float32)
        x, y = x + away[0], y + away[1]
    video = np.full((frames, size, size, 3), 0.5, np.float32) + rng.uniform(-0.15, 0.15, 3).astype(np.float32)
    amplitude = rng.choice([-1.0, 1.0], 3) * rng.uniform(0.1, 0.33, 3)
    video += np.sin(_phase(kind, x, y, t[:, None, None], rng))[..., None] * amplitude.astype(np.float32)
    for _ in range(distractors):
        start, velocity = rng.uniform(-0.7, 0.7, 2), rng.uniform(-0.05, 0.05, 2)
        _paint_disc(
            video, x, y, start[0] + velocity[0] * t, start[1] + velocity[1] * t, rng.uniform(0.12, 0.25), rng.uniform(0, 1, 3)
        )
    if kind in ("red_then_blue", "blue_then_red"):
        early, late = ((0.9, 0.1, 0.1), (0.1, 0.2, 0.95))[:: 1 if kind == "red_then_blue" else -1]
        for colour, visible in ((early, t < 0), (late, t >= 0)):
            cx, cy = rng.uniform(-0.6, 0.6, 2)
            _paint_disc(video, x, y, np.full(frames, cx), np.full(frames, cy), 0.3, np.asarray(colour), visible)
    return (np.clip(video, 0, 1) * 255 + 0.5).astype(np.uint8)


def _phase(kind: str, x: np.ndarray, y: np.ndarray, t: np.ndarray, rng: Generator) -> np.ndarray:
    """Phase of the wave at (x, y, t), float32 [frames, size, size]: what moves is what the label says."""
    speed, direction = rng.uniform(0.04, 0.08), rng.uniform(0, 2 * np.pi)  # periods a frame; radians
    turning = 0.0
    if kind in _DRIFTS:
        direction = _DRIFTS.index(kind) * np.pi / 4 + rng.uniform(-0.3, 0.3)
    elif kind in ("turn_left", "turn_right"):
        turning, speed = (-2 if kind == "turn_left" else 2) * speed, 0.0
    else:
        speed = rng.uniform(-0.02, 0.02)
    angle = np.float32(direction) + np.float32(turning) * t
    periods, start = np.float32(rng.uniform(0.17, 0.4)), np.float32(rng.uniform(0, 1))
    return 2 * np.float32(np.pi) * (periods * (x * np.cos(angle) + y * np.sin(angle)) - np.float32(speed) * t + start)


def _paint_disc(
    video: np.ndarray,
    x: np.ndarray,
    y: np.ndarray,
    cx: np.ndarray,
    cy: np.ndarray,
    radius: float,
    colour: np.ndarray,
    visible: np.ndarray | None = None,
) -> None:
    """Draw a soft-edged disc with centre (cx[t], cy[t]) into `video` where `visible[t]`."""
    distance = np.hypot(x - cx[:, None, None].astype(np.float32), y - cy[:, None, None].astype(np.float32))
    alpha = np.clip((radius - distance) * video.shape[1] / 4 + 0.5, 0, 1).astype(np.float32)
    if visible is not None:
        alpha = alpha * visible[:, None, None]
    video += alpha[..., None] * (colour.astype(np.float32) - video)


def write_moving_scenes(root: str | Path, scenes: SceneSet | None = None) -> Path:
    """Write the six sources under `root` (layout: top of this file) and return the path of its `datasets.toml`.

    Idempotent: a set written before with the same `scenes` is left as it is; an interrupted one is written anew. Files
    appear under their final name only when the whole set is complete. Raises FileExistsError if `root` holds something
    else, OSError if it cannot be written.
    """
    scenes, root = scenes or SceneSet(), Path(root)
    stamp = json.dumps(scenes.__dict__, sort_keys=True)
    toml = root / "datasets.toml"
    if root.exists():
        if (root / "scenes.json").exists() and (root / "scenes.json").read_text() == stamp:
            return toml
        raise FileExistsError(f"{root} exists and holds another data set; remove it or choose another folder")
    work = root.with_name(f".{root.name}.partial")
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    jobs = list(enumerate(_jobs(scenes)))
    lists: dict[str, list[str]] = {}
    with ThreadPoolExecutor() as pool:  # rendering and encoding release the GIL
        written = pool.map(lambda job: _write_clip(work, scenes, *job), jobs)
        for (_, clip), line in zip(jobs, tqdm(written, total=len(jobs), desc="writing scenes", unit="clip", disable=None)):
            lists.setdefault(f"{clip.source}/{clip.split}.csv", []).append(line)
    for path, lines in lists.items():
        (work / path).write_text("\n".join(lines) + "\n")
    (work / "labeled_video" / "classes.txt").write_text("\n".join(CLASSES) + "\n")
    (work / "target" / "classes.txt").write_text("\n".join(TARGET_CLASSES) + "\n")
    (work / "datasets.toml").write_text(source_tables(len(CLASSES), len(TARGET_CLASSES)))
    (work / "scenes.json").write_text(stamp)
    os.replace(work, root)
    return toml


class _Clip(NamedTuple):
    source: str
    split: str
    kind: str
    label: int | None
    as_frames: bool


def _jobs(scenes: SceneSet) -> Iterator[_Clip]:
    """Every clip to write, in order."""
    for source, count, as_frames in (
        ("unlabeled_video", scenes.unlabeled_video, False),
        ("unlabeled_frames", scenes.unlabeled_frames, True),
        ("holdout", scenes.holdout, False),
    ):
        for i in range(count):
            yield _Clip(source, "val" if source == "holdout" else "train", CLASSES[i % len(CLASSES)], None, as_frames)
    for label, kind in enumerate(CLASSES):
        yield from [_Clip("labeled_video", "train", kind, label, False)] * scenes.labeled_video
        yield from [_Clip("labeled_frames", "train", kind, label, True)] * scenes.labeled_frames
    for label, kind in enumerate(TARGET_CLASSES):
        yield from [_Clip("target", "train", kind, label, False)] * scenes.target_train
        yield from [_Clip("target", "val", kind, label, False)] * scenes.target_val
    for label, kind in enumerate(CLASSES):
        yield from [_Clip("labeled_video", "val", kind, label, False)] * scenes.labeled_val


def _write_clip(work: Path, scenes: SceneSet, number: int, clip: _Clip) -> str:
    """Render and encode one clip; returns its line in the list."""
    rng = Generator(Philox(key=[scenes.seed, number]))
    name = f"{clip.split}_{number:05d}"
    folder = work / clip.source
    folder.mkdir(exist_ok=True)
    look = {"size": scenes.size, "distractors": scenes.distractors, "shake": scenes.shake}
    if clip.as_frames:  # half the frame rate, so the same motion takes half the frames
        video = render_scene(clip.kind, rng, frames=scenes.frames // 2, step=2.0, **look)  # type: ignore[arg-type]
        write_jpegs(video, folder / name)
        return f"{name} {len(video)} {clip.label}" if clip.label is not None else f"{name} 1 {len(video)}"
    write_mp4(render_scene(clip.kind, rng, frames=scenes.frames, **look), folder / f"{name}.mp4")  # type: ignore[arg-type]
    return f"{name}.mp4 {clip.label}" if clip.label is not None else f"{name}.mp4 0 -1"


def source_tables(labeled: int, target: int) -> str:
    """`datasets.toml` of the six sources with their numbers of classes; roots are relative to the file."""
    text = ""
    for source in ("unlabeled_video", "unlabeled_frames", "labeled_video", "labeled_frames", "target", "holdout"):
        frames = source.endswith("_frames")
        text += f'[{source}]\nroot = "{source}"\n'
        text += 'val = "val.csv"\n' if source == "holdout" else 'train = "train.csv"\n'
        text += 'val = "val.csv"\n' if source in ("target", "labeled_video") else ""
        text += 'kind = "frames"\ntemplate = "img_{:05}.jpg"\nstride = 1\n' if frames else 'kind = "video"\nstride = 2\n'
        text += 'format = "pretrain"\n' if source in ("unlabeled_video", "unlabeled_frames", "holdout") else ""
        if source in ("labeled_video", "labeled_frames"):
            text += f'classes = {labeled}\nlabels = "../labeled_video/classes.txt"\n'
        if source == "target":
            text += f'classes = {target}\nlabels = "classes.txt"\n'
        text += "\n"
    return text


def write_mp4(video: np.ndarray, path: Path) -> None:
    """A uint8 [T,H,W,3] video as H.264, 4:2:0, 24 frames a second, key frames 12 apart, with B frames."""
    import av

    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=_FPS, options={"crf": "16", "preset": "veryfast", "g": "12"})
        stream.height, stream.width, stream.pix_fmt = video.shape[1], video.shape[2], "yuv420p"
        stream.thread_count = 1
        for image in video:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode())


def write_jpegs(video: np.ndarray, folder: Path) -> None:
    """JPEG frames `img_00001.jpg` ... of a uint8 [T,H,W,3] video in a new folder."""
    import av

    folder.mkdir()
    for i, image in enumerate(video):
        codec = av.CodecContext.create("mjpeg", "w")
        codec.height, codec.width, codec.pix_fmt = image.shape[0], image.shape[1], "yuvj444p"
        codec.options = {"qmin": "2", "qmax": "3"}
        codec.time_base = Fraction(1, _FPS)
        frame = av.VideoFrame.from_ndarray(image, format="rgb24").reformat(format="yuvj444p")
        frame.pts = 0
        packets = [*codec.encode(frame), *codec.encode(None)]
        (folder / f"img_{i + 1:05}.jpg").write_bytes(b"".join(bytes(p) for p in packets))
