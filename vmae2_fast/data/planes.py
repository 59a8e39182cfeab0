"""Frames as their decoder holds them: YUV 4:2:0, half the bytes of RGB and no conversion, for `ops.resize_crop`.

FFmpeg's conversion cuts fractions off where `resize_crop` rounds: pixels of the planes made RGB differ from those of
`decode_video` by up to 3 levels, about 1 in the mean, and from the exact conversion by half a level. Frames whose conversion
is not that of `ops.yuv` stay RGB: other formats than 8-bit YUV 4:2:0, other matrices than BT.601 and BT.709, odd sides (for
which FFmpeg interpolates chroma), interlaced ones (a line of chroma belongs to every other line of luma), rotated ones, and
videos that change any of these midway.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from ..ops.yuv import Yuv420, frame_bytes
from .decode import find_frames, rgb_frames
from .images import image_frames

_MATRICES = {1: "bt709", 2: "bt601", 5: "bt601", 6: "bt601"}
"""FFmpeg's AVColorSpace; 2 says nothing, and is taken for BT.601 as FFmpeg's own conversion does."""
_FULL_RANGE = 2
"""FFmpeg's AVCOL_RANGE_JPEG."""


@dataclass(frozen=True)
class Frames:
    """Decoded frames of one video, as arrays that processes can send each other."""

    pixels: np.ndarray
    """uint8 [T, bytes], the planes of `Yuv420`, or RGB [T, H, W, 3]."""
    planar: tuple[int, int, str, str] | None
    """Height, width, matrix and range of planes; None for RGB."""
    why_rgb: str | None = None
    """Why they are no planes."""

    def __len__(self) -> int:
        return len(self.pixels)

    @property
    def nbytes(self) -> int:
        return int(self.pixels.nbytes)

    def take(self, ids: np.ndarray) -> Frames:
        """Frames `ids` of these, in that order."""
        return replace(self, pixels=self.pixels[ids])

    def tensor(self) -> Yuv420 | torch.Tensor:
        """For `resize_crop`, without a copy."""
        pixels = torch.from_numpy(self.pixels)
        return pixels if self.planar is None else Yuv420(pixels, *self.planar)


class FrameCache:
    """Decoded videos kept in memory, at most `capacity` bytes, thread-safe.

    Filled and then held: every epoch visits every clip once, an order under which throwing out the least recently used
    would throw out each video just before its turn.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity, self.used = capacity, 0
        self._lock = threading.Lock()
        self._videos: dict[Any, Frames] = {}

    def get(self, key: Any) -> Frames | None:
        return self._videos.get(key)

    def has_room(self, size: int) -> bool:
        return self.used + size <= self.capacity

    def put(self, key: Any, video: Frames) -> None:
        """Keep a video if there is room for it."""
        with self._lock:
            if key not in self._videos and self.has_room(video.nbytes):
                self.used += video.nbytes
                self._videos[key] = video


def decode_yuv420(path: str, ids: np.ndarray) -> Yuv420 | torch.Tensor:
    """Frames `ids` (int, any order, repeats allowed) of a video file as `Yuv420` [len(ids), bytes], or, of files whose frames
    are not in that form, as RGB uint8 [len(ids), H, W, 3]; `resize_crop`, `cut_views` and `cut_test_views` take either.

    Raises DecodeError where a frame is missing or damaged.
    """
    return video_frames(path, ids).tensor()


def video_frames(path: str, ids: np.ndarray) -> Frames:
    """`decode_yuv420`, as arrays and with the reason of what stays RGB."""
    return _in_order(ids, lambda wanted: _pack(path, find_frames(path, wanted), turn=True))


def folder_frames(folder: str, files: Sequence[str], ids: np.ndarray) -> Frames:
    """The same of a clip kept as one image a frame; arguments and errors as in `images.image_frames`."""
    return _in_order(ids, lambda wanted: _pack(folder, image_frames(folder, files, wanted), turn=False))


def _in_order(ids: np.ndarray, read: Callable[[np.ndarray], Frames]) -> Frames:
    """`read` of the distinct ids, ascending, in the order and with the repeats of `ids`."""
    ids = np.asarray(ids, dtype=np.int64)
    wanted, place = np.unique(ids, return_inverse=True)
    frames = read(wanted)
    return frames if np.array_equal(wanted, ids) else frames.take(place)


def _pack(path: str, found: list[Any], *, turn: bool) -> Frames:
    """PyAV's frames, copied out of the decoder's buffers; `turn`: shown as their metadata says."""
    forms = [_form(frame, turn) for frame in found]
    form = forms[0] if all(other == forms[0] for other in forms) else "its form changes midway"
    if isinstance(form, str):
        return Frames(rgb_frames(path, found, turn=turn), None, form)
    planes = np.empty((len(found), frame_bytes(*form[:2])), dtype=np.uint8)
    for frame, row in zip(found, planes, strict=True):
        _copy_planes(frame, row)
    return Frames(planes, form)


def _form(frame: Any, turn: bool) -> tuple[int, int, str, str] | str:
    """`Frames.planar` of a frame, or why it has none."""
    if frame.format.name not in ("yuv420p", "yuvj420p"):
        return f"pixel format {frame.format.name}"
    matrix = _MATRICES.get(int(frame.colorspace))
    if matrix is None:
        return f"color matrix {int(frame.colorspace)} of FFmpeg's AVColorSpace"
    if frame.height % 2 or frame.width % 2:
        return "odd height or width"
    if frame.interlaced_frame:
        return "interlaced"
    if turn and round(frame.rotation / 90) % 4:
        return "rotated"
    full = frame.format.name == "yuvj420p" or int(frame.color_range) == _FULL_RANGE
    return frame.height, frame.width, matrix, "full" if full else "limited"


def _copy_planes(frame: Any, row: np.ndarray) -> None:
    """Y, U and V without what the decoder keeps behind the end of lines, one behind the other into `row`, uint8 [bytes]."""
    start = 0
    for i, plane in enumerate(frame.planes):
        height, width = (side // 2 if i else side for side in (frame.height, frame.width))
        lines = np.frombuffer(plane, dtype=np.uint8).reshape(-1, plane.line_size)
        row[start : start + height * width].reshape(height, width)[...] = lines[:height, :width]
        start += height * width
