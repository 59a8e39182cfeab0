"""Action detections drawn on their video, for people to look at: boxes with the best actions and scores, as MP4 or GIF.

Boxes stand for half a second around their key frame (AVA annotates one a second). Frames stream through: memory does not
grow with the length of the video.
"""

from __future__ import annotations

import math
import os
from collections import defaultdict
from collections.abc import Mapping
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from .config import require
from .data.ava import Rows
from .data.boxes import has_area
from .data.decode import decode_video
from .data.probing import DecodeError, probe

_CHUNK = 32  # frames held at once
_NEAR = 0.5  # seconds
_FORMS: dict[str, tuple[str, str, float | None, float]] = {
    ".mp4": ("libx264", "yuv420p", None, math.inf), ".gif": ("gif", "rgb8", 10.0, 480)
}  # fmt: skip
"""Codec, pixel format, most frames a second, most pixels of width."""
_COLOURS = ((230, 60, 60), (60, 200, 80), (70, 120, 240), (230, 190, 50), (200, 80, 220), (60, 200, 210))


class Person(NamedTuple):
    """A box of a key frame with its best actions."""

    box: tuple[float, ...]
    """Shares of the frame."""
    actions: list[tuple[float, int]]
    """(score, action), best first."""


def people_of(rows: Rows, video: str, *, threshold: float, most: int) -> tuple[dict[float, list[Person]], int]:
    """Second -> people of one video with the up to `most` actions that score at least `threshold`; and how many such rows have
    no area and are left out."""
    flat, area = 0, has_area(rows.boxes)
    found: defaultdict[float, defaultdict[tuple[float, ...], list[tuple[float, int]]]] = defaultdict(lambda: defaultdict(list))
    columns = rows.frames, rows.boxes.tolist(), rows.actions.tolist(), rows.scores.tolist(), area.tolist()
    for frame, box, action, score, shown in zip(*columns):
        name, _, second = frame.rpartition(",")
        if name != video or not score >= threshold:
            continue
        if not shown:
            flat += 1
        else:
            found[float(second)][tuple(box)].append((score, action))
    people = {
        second: [Person(box, sorted(actions, reverse=True)[:most]) for box, actions in boxes.items()]
        for second, boxes in found.items()
    }
    return people, flat


def draw_frame(image: np.ndarray, people: list[Person], names: Mapping[int, str]) -> np.ndarray:
    """A uint8 [H, W, 3] frame with boxes and labels on it. Needs Pillow (extra `report`)."""
    try:
        from PIL import Image, ImageDraw
    except ImportError as error:
        raise ValueError("drawing boxes needs Pillow: pip install 'vmae2_fast[report]'") from error
    height, width = image.shape[:2]
    canvas = Image.fromarray(image)
    pen = ImageDraw.Draw(canvas)
    line = max(1, round(min(height, width) / 160))
    for number, person in enumerate(people):
        x1, y1, x2, y2 = (float(np.clip(v, 0, 1)) * side for v, side in zip(person.box, (width, height) * 2))
        colour = _COLOURS[number % len(_COLOURS)]
        pen.rectangle((x1, y1, max(x2 - 1, x1), max(y2 - 1, y1)), outline=colour, width=line)
        text = "\n".join(f"{names.get(action, str(action))} {score:.2f}" for score, action in person.actions)
        left, top, right, bottom = pen.multiline_textbbox((x1 + line, y1 + line), text, spacing=1)
        pen.rectangle((left - 1, top - 1, right + 1, bottom + 1), fill=(0, 0, 0))
        pen.multiline_text((x1 + line, y1 + line), text, fill=colour, spacing=1)
    return np.asarray(canvas)


def _shown(seconds: np.ndarray, begin: float | None, end: float | None, most: float | None) -> tuple[np.ndarray, Fraction]:
    """Numbers of the frames from `begin` to `end`, thinned to at most `most` a second, and how many a second that are."""
    length = float(seconds[-1] - seconds[0])
    rate = (len(seconds) - 1) / length if length > 0 else 1.0
    every = 1 if most is None else max(1, math.ceil(rate / most - 1e-6))
    wanted = (seconds >= (-np.inf if begin is None else begin)) & (seconds <= (np.inf if end is None else end))
    return np.flatnonzero(wanted)[::every], Fraction(rate / every).limit_denominator(1001)


def draw_actions(
    video: str | Path, rows: Rows, out: str | Path, *, names: Mapping[int, str], name: str | None = None,
    threshold: float = 0.3, most: int = 3, start_second: float = 0.0, begin: float | None = None, end: float | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Write `video` with the detections `rows` of it drawn on every frame; returns {"out", "frames", "boxes", "flat"}.

    out: a path ending in .mp4 or .gif (of a GIF at most 10 frames a second, at most 480 pixels wide: its frames are hardly
    compressed); name: of the video in `rows`, default the file's name without ending. start_second: of the first frame; begin,
    end: the part to draw, in seconds of `rows`. "flat": detections without area, which are left out.
    Raises ValueError for another ending, no such folder, or no box to draw; DecodeError for a video that cannot be read.
    Nothing half-written stays.
    """
    import av

    target, video = Path(out), str(video)
    ending = target.suffix.lower()
    require(ending in _FORMS, f"{target}: the ending must be .mp4 or .gif")
    require(target.parent.is_dir(), f"{target.parent}: no such folder; make it or choose another --out")
    require(most >= 1, f"--most {most}: must be at least 1")
    require(math.isfinite(start_second), f"--start-second {start_second}: must be a number")
    info = probe(video)
    name = name or Path(video).stem
    people, flat = people_of(rows, name, threshold=threshold, most=most)
    require(
        bool(people), f"no detection of {name!r} scores {threshold:g} or more; lower --threshold or name the video with --name"
    )
    if info.seconds is None:
        raise DecodeError(video, "has no timestamps to put the boxes by")
    seconds = info.seconds + start_second
    codec, pixels, quickest, widest = _FORMS[ending]
    ids, rate = _shown(seconds, begin, end, quickest)
    require(len(ids) > 0, f"{video}: no frame from {begin} to {end} s, it has those from {seconds[0]:g} to {seconds[-1]:g} s")
    keys = np.sort(np.asarray(list(people)))
    first, last = seconds[ids[[0, -1]]]
    require(
        bool(((keys >= first - _NEAR) & (keys <= last + _NEAR)).any()),
        f"{video}: frames lie at {first:g} to {last:g} s, the detections of {name!r} at {keys[0]:g} to {keys[-1]:g} s; "
        "say with --start-second when the film begins",
    )
    temporary, drawn = target.with_name(f".{target.stem}.{os.getpid()}{target.suffix}"), 0
    try:
        with av.open(str(temporary), "w") as container, tqdm(total=len(ids), desc="drawing", disable=None) as bar:
            stream: Any = None
            for start in range(0, len(ids), _CHUNK):
                chunk = ids[start : start + _CHUNK]
                frames = decode_video(video, chunk)
                if stream is None:
                    height, width = frames.shape[1:3]
                    scale = min(1.0, widest / width)
                    stream = container.add_stream(codec, rate=rate)
                    stream.width, stream.height = (max(2, round(side * scale) // 2 * 2) for side in (width, height))
                    stream.pix_fmt = pixels
                for image, second in zip(frames, seconds[chunk]):
                    nearest = float(keys[np.abs(keys - second).argmin()])
                    here = people[nearest] if abs(nearest - second) <= _NEAR else []
                    drawn += len(here)
                    picture = draw_frame(image, here, names)
                    if scale == 1.0:
                        picture = picture[: stream.height, : stream.width]  # even sides, as 4:2:0 wants
                    frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="rgb24")
                    container.mux(stream.encode(frame.reformat(stream.width, stream.height, pixels)))
                    bar.update(1)
            container.mux(stream.encode())
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)
    return {"out": str(target), "frames": len(ids), "boxes": drawn, "flat": flat}
