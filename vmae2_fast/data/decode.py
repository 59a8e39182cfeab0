"""Exact frames out of any video PyAV opens.

Reading id k (see `probing`) seeks to the keyframe before it and is accepted only if every timestamp is known, the first
decoded frame is a keyframe at or before the target, and every wanted frame was seen; otherwise the file is read from its
start. A frame that cannot be had is an error, never a black or a wrong one, as far as the codec can tell (VP9 has no means
to notice damaged bytes).
"""

from __future__ import annotations

import threading
from typing import Any, NamedTuple

import numpy as np

from .probing import DecodeError, StreamInfo, av_module, guarded, open_stream, probe, read_frames

_local = threading.local()


class Decoded(NamedTuple):
    """Frames of a video and when they are shown."""

    frames: np.ndarray
    """RGB uint8 [T, H, W, 3]."""
    pts: np.ndarray | None
    """int64 [T] in units of the stream's time base, as the decoder gave them; None where frames were counted because
    the file cannot be trusted with timestamps (see `StreamInfo.pts`)."""


def decode_video(path: str, ids: np.ndarray) -> np.ndarray:
    """Frames `ids` (int, any order, repeats allowed) of a video file as RGB uint8 [len(ids), H, W, 3].

    Rotation metadata is applied. Raises DecodeError where a frame is missing or damaged.
    """
    return decode_timed(path, ids).frames


def decode_timed(path: str, ids: np.ndarray) -> Decoded:
    """`decode_video` with the timestamp of every frame: those of `probe(path).pts[ids]`, or the file is refused."""
    ids = np.asarray(ids, dtype=np.int64)
    wanted, place = np.unique(ids, return_inverse=True)
    found, timed = guarded(path, _find_frames, wanted)
    unique = rgb_frames(path, found)
    pts = np.array([frame.pts for frame in found], dtype=np.int64) if timed else None
    if np.array_equal(wanted, ids):
        return Decoded(unique, pts)
    return Decoded(unique[place], None if pts is None else pts[place])


def find_frames(path: str, wanted: np.ndarray) -> list[Any]:
    """Frames `wanted` (ascending ids) of a video file as PyAV gives them: not converted, not rotated. Raises DecodeError."""
    return guarded(path, _find_frames, wanted)[0]


def _find_frames(path: str, wanted: np.ndarray) -> tuple[list[Any], bool]:
    """The frames, and whether they were found by their timestamps."""
    info = probe(path)
    if wanted[0] < 0 or wanted[-1] >= info.num_frames:
        raise DecodeError(path, f"frame {wanted[-1]} was asked for, the video has {info.num_frames}")
    found = None
    if info.pts is not None:
        found = _by_time(path, info.pts, wanted, seek=wanted[0] > 0)
        if found is None and wanted[0] > 0:
            found = _by_time(path, info.pts, wanted, seek=False)
    timed = found is not None
    return (_by_count(path, info, wanted) if found is None else found), timed


def _by_time(path: str, table: np.ndarray, wanted: np.ndarray, *, seek: bool) -> list[Any] | None:
    """The wanted frames by timestamp, or None where they were not all seen or the seek cannot be trusted."""
    times = {int(table[k]): i for i, k in enumerate(wanted)}
    target, last = int(table[wanted[0]]), int(table[wanted[-1]])
    found: list[Any] = [None] * len(wanted)
    missing = len(wanted)
    container, stream = open_stream(path)
    with container:
        if seek:
            container.seek(target, stream=stream, backward=True, any_frame=False)
        first = True
        for frame in read_frames(container, stream):
            if first and seek and not (frame.key_frame and frame.pts is not None and frame.pts <= target):
                return None
            first = False
            slot = times.get(frame.pts)
            if slot is not None and found[slot] is None:
                found[slot] = frame
                missing -= 1
                if not missing:
                    return found
            if frame.pts is not None and frame.pts > last:
                return None
    return None


def _by_count(path: str, info: StreamInfo, wanted: np.ndarray) -> list[Any]:
    """The wanted frames by their number in decoding order; only where timestamps cannot be used and nothing is missing."""
    slots = {int(k): i for i, k in enumerate(wanted)}
    found: list[Any] = [None] * len(wanted)
    known = set() if info.pts is None else set(info.pts.tolist())
    strangers = info.pts is None
    count = 0
    container, stream = open_stream(path)
    with container:
        for frame in read_frames(container, stream):
            slot = slots.get(count)
            if slot is not None:
                found[slot] = frame
            strangers = strangers or frame.pts not in known
            count += 1
            if info.pts is None and count > wanted[-1]:
                return found
    # counting is right only if no frame was lost on the way: a table of foreign timestamps but of the right length
    if strangers and count == info.num_frames:
        return found
    raise DecodeError(path, f"damaged or cut off: {count} of {info.num_frames} frames can be decoded, planned ones not")


def rgb_frames(path: str, found: list[Any], *, turn: bool = True) -> np.ndarray:
    """PyAV's frames as RGB uint8 [len(found), H, W, 3], rotated as they are to be shown where `turn`. Raises DecodeError."""
    return guarded(path, _rgb_frames, found, turn)


def _rgb_frames(path: str, found: list[Any], turn: bool) -> np.ndarray:
    first = to_rgb(found[0])
    unique = np.empty((len(found), *first.shape), dtype=np.uint8)
    unique[0] = first
    for i in range(1, len(found)):
        unique[i] = to_rgb(found[i], like=found[0])
    turns = round(found[0].rotation / 90) % 4 if turn else 0
    if turns:
        unique = np.ascontiguousarray(np.rot90(unique, turns, axes=(1, 2)))
    return unique


def to_rgb(frame: Any, like: Any | None = None) -> np.ndarray:
    """uint8 [H, W, 3]; of the size of the frame `like`, where a stream changes its size midway."""
    from av.video.reformatter import VideoReformatter

    if not hasattr(_local, "reformatter"):
        # one scaling context per thread: building one per frame costs as much as the conversion; PyAV 17 made the
        # conversion multi-threaded by default, which the loader's own processes leave no room for
        _local.reformatter = VideoReformatter()
        _local.options = {"threads": 1} if int(av_module().__version__.split(".")[0]) >= 17 else {}
    size = {}
    if like is not None and (frame.width, frame.height) != (like.width, like.height):
        size = {"width": like.width, "height": like.height}
    return _local.reformatter.reformat(frame, format="rgb24", **size, **_local.options).to_ndarray()
