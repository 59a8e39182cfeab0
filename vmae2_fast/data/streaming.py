"""Whole videos in order, each frame decoded once, in memory that does not grow with their length."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from .decode import to_rgb
from .probing import DecodeError, guarded, open_stream, probe, read_frames


def sound_frames(path: str) -> Iterator[Any]:
    """Every sound frame of a video in order of presentation, as PyAV gives it. Raises DecodeError."""
    container, stream = guarded(path, open_stream)
    with container:
        empty = True
        for frame in read_frames(container, stream):
            empty = False
            frame.time_base = stream.time_base  # frames the decoder held back at the end have none
            yield frame
    if empty:
        raise DecodeError(path, "holds no decodable video frame")


def stream_video(path: str, chunk: int = 32) -> Iterator[np.ndarray]:
    """All frames of a video in order, RGB uint8 [<= chunk, H, W, 3] at a time; each is decoded once.

    Memory does not grow with the length of the video. Raises DecodeError where a frame is missing or damaged; what came
    before is right.
    """
    stream = _stream(path, chunk)
    while (frames := guarded(path, lambda _: next(stream, None))) is not None:
        yield frames


def _stream(path: str, chunk: int) -> Iterator[np.ndarray]:
    info = probe(path)
    known = None if info.pts is None else {int(t): k for k, t in enumerate(info.pts)}
    container, stream = open_stream(path)
    rows: list[np.ndarray] = []
    first: Any = None
    count = 0
    with container:
        for frame in read_frames(container, stream):
            number = count if known is None else known.get(frame.pts)
            if number is None:  # sent before the first frame that is shown
                continue
            if number != count:
                break
            first = first or frame
            rows.append(np.rot90(to_rgb(frame, like=first), round(first.rotation / 90) % 4))
            count += 1
            if len(rows) == chunk:
                yield np.stack(rows)
                rows = []
    if rows:
        yield np.stack(rows)
    if count != info.num_frames:
        raise DecodeError(path, f"damaged or cut off: frame {count} of {info.num_frames} cannot be decoded")
