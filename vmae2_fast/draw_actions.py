"""Action detections drawn on their video, for people to look at: boxes with the best actions and scores, as MP4 or GIF.

Boxes stand for half a second around their key frame (AVA annotates one a second). Frames stream through: memory does not
grow with the length of the video.
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Mapping
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from .data.ava import Rows
from .data.decode import decode_video
from .data.probing import DecodeError, probe

_CHUNK = 32  # frames held at once
_NEAR = 0.5  # seconds
_FORMS = {".mp4": ("libx264", "yuv420p"), ".gif": ("gif", "rgb8")}
_COLOURS = ((230, 60, 60), (60, 200, 80), (70, 120, 240), (230, 190, 50), (200, 80, 220), (60, 200, 210))


class Person(NamedTuple):
    """A box of a key frame with its best actions."""

    box: tuple[float, ...]
    """Shares of the frame."""
    actions: list[tuple[float, int]]
    """(score, action), best first."""


def people_of(rows: Rows, video: str, *, threshold: float, most: int) -> dict[float, list[Person]]:
    """Second -> people of one video with the up to `most` actions that score at least `threshold`; boxes without one are left
    out."""
    found: defaultdict[float, defaultdict[tuple[float, ...], list[tuple[float, int]]]] = defaultdict(lambda: defaultdict(list))
    for frame, box, action, score in zip(rows.frames, rows.boxes.tolist(), rows.actions.tolist(), rows.scores.tolist()):
        name, _, second = frame.rpartition(",")
        if name == video and score >= threshold:
            found[float(second)][tuple(box)].append((score, action))
    return {
        second: [Person(box, sorted(actions, reverse=True)[:most]) for box, actions in boxes.items()]
        for second, boxes in found.items()
    }


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


def draw_actions(
    video: str | Path, rows: Rows, out: str | Path, *, names: Mapping[int, str], name: str | None = None,
    threshold: float = 0.3, most: int = 3, start_second: float = 0.0,
) -> dict[str, Any]:  # fmt: skip
    """Write `video` with the detections `rows` of it drawn on every frame; returns {"out", "frames", "boxes"}.

    out: a path ending in .mp4 or .gif; name: of the video in `rows`, default the file's name without ending.
    start_second: of the first frame. Raises ValueError for another ending, no such folder, or no box to draw; DecodeError
    for a video that cannot be read. Nothing half-written stays.
    """
    import av

    target, video = Path(out), str(video)
    if target.suffix.lower() not in _FORMS:
        raise ValueError(f"{target}: the ending must be .mp4 or .gif")
    if not target.parent.is_dir():
        raise ValueError(f"{target.parent}: no such folder; make it or choose another --out")
    info = probe(video)
    name = name or Path(video).stem
    people = people_of(rows, name, threshold=threshold, most=most)
    if not people:
        raise ValueError(
            f"no detection of {name!r} scores {threshold:g} or more; lower --threshold or name the video with --name"
        )
    if info.seconds is None:
        raise DecodeError(video, "has no timestamps to put the boxes by")
    seconds = info.seconds + start_second
    length = float(info.seconds[-1])
    rate = Fraction((info.num_frames - 1) / length if length > 0 else 1.0).limit_denominator(1001)
    keys = np.sort(np.asarray(list(people)))
    codec, pixels = _FORMS[target.suffix.lower()]
    temporary, drawn = target.with_name(f".{target.stem}.{os.getpid()}{target.suffix}"), 0
    try:
        with av.open(str(temporary), "w") as container, tqdm(total=info.num_frames, desc="drawing", disable=None) as bar:
            stream: Any = None
            for first in range(0, info.num_frames, _CHUNK):
                frames = decode_video(video, np.arange(first, min(first + _CHUNK, info.num_frames)))
                height, width = (side - side % 2 for side in frames.shape[1:3])  # as 4:2:0 wants
                if stream is None:
                    stream = container.add_stream(codec, rate=rate)
                    stream.width, stream.height, stream.pix_fmt = width, height, pixels
                for image, second in zip(frames, seconds[first : first + _CHUNK]):
                    nearest = float(keys[np.abs(keys - second).argmin()])
                    here = people[nearest] if abs(nearest - second) <= _NEAR else []
                    drawn += len(here)
                    picture = draw_frame(image, here, names)[:height, :width]
                    frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="rgb24")
                    container.mux(stream.encode(frame.reformat(format=pixels)))
                    bar.update(1)
            container.mux(stream.encode())
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)
    return {"out": str(target), "frames": info.num_frames, "boxes": drawn}
