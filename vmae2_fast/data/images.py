"""Clips kept as a folder of images, one for each frame."""

from __future__ import annotations

import os
import re
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .decode import rgb_frames
from .probing import DecodeError, av_module, guarded, open_stream, read_frames

IMAGE_SUFFIXES = frozenset((".jpg", ".jpeg", ".png", ".bmp", ".webp"))
_local = threading.local()


def image_files(folder: str) -> list[str]:
    """The image files of a folder, sorted by name."""
    try:
        names = sorted(n for n in os.listdir(folder) if os.path.splitext(n)[1].lower() in IMAGE_SUFFIXES and n[0] != ".")
    except OSError as error:
        raise DecodeError(folder, error.strerror or str(error)) from error
    return [os.path.join(folder, name) for name in names]


def is_jpeg(path: str) -> bool:
    return path.lower().endswith((".jpg", ".jpeg"))


def read_jpeg(path: str) -> bytes:
    """A JPEG file that is all there. Raises DecodeError."""
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise DecodeError(path, error.strerror or str(error)) from error
    # FFmpeg fills what a cut file lacks with grey; a whole JPEG has its end marker near its end
    if not data.startswith(b"\xff\xd8") or b"\xff\xd9" not in data[-4096:]:
        raise DecodeError(path, "damaged or cut-off JPEG")
    return data


def image_frame(path: str) -> Any:
    """One image as PyAV gives it: not converted. Raises DecodeError."""
    return guarded(path, _image_frame)


def _image_frame(path: str) -> Any:
    if is_jpeg(path):
        data = read_jpeg(path)
        codec = getattr(_local, "jpeg", None)
        if codec is None:
            codec = _local.jpeg = av_module().CodecContext.create("mjpeg", "r")
        frames = codec.decode(av_module().Packet(data))
    else:
        container, stream = open_stream(path)
        with container:
            frames = list(read_frames(container, stream))
    if not frames or frames[0].is_corrupt:
        raise DecodeError(path, "damaged image")
    return frames[0]


def image_frames(folder: str, files: Sequence[str], wanted: np.ndarray) -> list[Any]:
    """Images `wanted` of a clip as PyAV gives them; `files` are the paths of frame 0, 1, ...

    Raises DecodeError for a missing or damaged one or differing sizes.
    """
    found = [image_frame(files[k]) for k in wanted]
    for frame, k in zip(found, wanted, strict=True):
        if (frame.width, frame.height) != (found[0].width, found[0].height):
            first = f"the first frame {found[0].width}x{found[0].height}"
            raise DecodeError(folder, f"{files[k]} is {frame.width}x{frame.height}, {first}")
    return found


def decode_image(path: str) -> np.ndarray:
    """One image as RGB uint8 [H, W, 3], not turned. Raises DecodeError."""
    return rgb_frames(path, [image_frame(path)], turn=False)[0]


def decode_images(folder: str, files: Sequence[str], ids: np.ndarray) -> np.ndarray:
    """Frames `ids` of a clip kept as one image a frame, RGB uint8 [len(ids), H, W, 3]; arguments and errors as in
    `image_frames`."""
    wanted, inverse = np.unique(np.asarray(ids, dtype=np.int64), return_inverse=True)
    return rgb_frames(folder, image_frames(folder, files, wanted), turn=False)[inverse]


def natural_key(name: str) -> list[Any]:
    """Sort key under which `frame10` follows `frame9`."""
    return [int(part) if i % 2 else part for i, part in enumerate(re.split(r"(\d+)", name))]
