"""Small real encoded files whose frames carry their own number, so that a wrong frame is seen."""

from __future__ import annotations

import struct
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest

BITS, BLOCK, FRAMES = 8, 8, 40


def numbered(k: int, height: int = 48, width: int = 64) -> np.ndarray:
    """A picture of number k: its bits as 8-pixel columns, below them the inverse. uint8 [height, width, 3]."""
    image = np.full((height, width, 3), 128, np.uint8)
    for bit in range(BITS):
        value = 235 if k >> bit & 1 else 20
        image[:24, bit * BLOCK:(bit + 1) * BLOCK] = value
        image[24:48, bit * BLOCK:(bit + 1) * BLOCK] = 255 - value
    return image


def numbers(frames: np.ndarray) -> list[int]:
    """The numbers drawn in frames [T, H, W, 3]; -1 where a frame shows none."""
    found = []
    for frame in frames.astype(np.float32):
        top = [frame[6:18, bit * BLOCK + 2:(bit + 1) * BLOCK - 2].mean() for bit in range(BITS)]
        low = [frame[30:42, bit * BLOCK + 2:(bit + 1) * BLOCK - 2].mean() for bit in range(BITS)]
        clear = all(abs(a - b) > 100 for a, b in zip(top, low))
        found.append(sum(1 << bit for bit in range(BITS) if top[bit] > low[bit]) if clear else -1)
    return found


def write_video(
    path: Path, *, count: int = FRAMES, codec: str = "libx264", pix_fmt: str = "yuv420p", height: int = 48, width: int = 64,
    times: list[int] | None = None, container: dict[str, str] | None = None, first: int = 0, **options: str,
) -> Path:
    """`count` numbered frames; `times` in units of 1/100 s make the frame rate variable."""
    with av.open(str(path), "w", options=container or {}) as out:
        stream = out.add_stream(codec, rate=100 if times else 25, options=options)
        stream.height, stream.width, stream.pix_fmt = height, width, pix_fmt
        stream.thread_count = 1
        for k in range(count):
            frame = av.VideoFrame.from_ndarray(numbered(first + k, height, width), format="rgb24")
            frame.pts = times[k] if times else k
            frame.time_base = Fraction(1, 100 if times else 25)
            out.mux(stream.encode(frame))
        out.mux(stream.encode())
    return path


def write_audio(path: Path) -> Path:
    with av.open(str(path), "w") as out:
        stream = out.add_stream("aac", rate=8000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 8000), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 8000
        out.mux(stream.encode(frame))
        out.mux(stream.encode())
    return path


def write_jpegs(folder: Path, count: int, template: str = "img_{:05}.jpg", start: int = 1) -> Path:
    """`count` numbered JPEG files; file number `start` shows 0."""
    folder.mkdir(parents=True, exist_ok=True)
    for k in range(count):
        write_image(folder / template.format(start + k), numbered(k))
    return folder


def write_image(path: Path, image: np.ndarray) -> None:
    with av.open(str(path), "w", format="image2", options={"update": "1"}) as out:
        stream = out.add_stream("mjpeg" if path.suffix == ".jpg" else "png", rate=1)
        stream.height, stream.width = image.shape[:2]
        stream.pix_fmt = "yuvj444p" if path.suffix == ".jpg" else "rgb24"
        out.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        out.mux(stream.encode())


def rotate_header(source: Path, target: Path) -> Path:
    """A copy of an MP4 whose track header asks for a quarter turn clockwise."""
    data = bytearray(source.read_bytes())
    matrix = data.index(b"tkhd") + 44
    data[matrix:matrix + 36] = struct.pack(">9i", 0, 1 << 16, 0, -(1 << 16), 0, 0, 0, 0, 1 << 30)
    target.write_bytes(data)
    return target


@pytest.fixture(scope="session")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of good files of every kind in `good/` and unusable ones in `bad/`."""
    root = tmp_path_factory.mktemp("clips")
    good, bad = root / "good", root / "bad"
    good.mkdir()
    bad.mkdir()
    long_gop = {"g": "250", "bf": "3", "sc_threshold": "0"}
    write_video(good / "gop12.mp4", g="12", bf="2")
    write_video(good / "gop250.mp4", **long_gop)
    write_video(good / "open_gop.mkv", **{"x264-params": "keyint=10:min-keyint=10:bframes=4:open-gop=1:scenecut=0"})
    write_video(good / "vfr.mkv", times=np.cumsum(1 + np.arange(FRAMES) * 7 % 11).tolist(), g="12", bf="2")
    write_video(good / "gray.mkv", pix_fmt="gray", g="12")
    write_video(good / "odd_size_444.mp4", pix_fmt="yuv444p", height=49, width=65, g="12")
    write_video(good / "ten_bit.mkv", pix_fmt="yuv420p10le", g="12")
    write_video(good / "fragmented.mp4", container={"movflags": "frag_keyframe+empty_moov"}, g="12", bf="2")
    write_video(good / "stream.ts", g="12", bf="2")
    write_video(good / "program_stream.mpg", codec="mpeg2video", g="12", bf="2")
    write_video(good / "mpeg4.avi", codec="mpeg4", g="12", bf="2", b="800k")
    write_video(good / "mjpeg.avi", codec="mjpeg", pix_fmt="yuvj420p")
    write_video(good / "vp9.webm", codec="libvpx-vp9", g="12", deadline="realtime", **{"cpu-used": "8"})
    write_video(good / "one_frame.mp4", count=1)
    write_video(good / "five frames.mp4", count=5)
    (bad / "empty.mp4").touch()
    (bad / "garbage.mp4").write_bytes(np.random.RandomState(0).bytes(4000))
    (bad / "text.mkv").write_text("no video\n" * 50)
    whole = (good / "gop12.mp4").read_bytes()
    (bad / "no_index.mp4").write_bytes(whole[: whole.index(b"moov") - 100])
    write_audio(bad / "audio_only.mp4")
    return root


@pytest.fixture(scope="session")
def video_writer() -> Callable[..., Path]:
    return write_video


@pytest.fixture(scope="session")
def jpeg_writer() -> Callable[..., Path]:
    return write_jpegs


@pytest.fixture(scope="session")
def image_writer() -> Callable[[Path, np.ndarray], None]:
    return write_image


@pytest.fixture(scope="session")
def header_rotator() -> Callable[[Path, Path], Path]:
    return rotate_header


@pytest.fixture(scope="session")
def read_numbers() -> Callable[[np.ndarray], list[int]]:
    return numbers
