"""Frames handed over as YUV 4:2:0 beside their RGB: the same frames, and the same clips within the stated tolerance."""

from __future__ import annotations

import os
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from torch.nn import functional as F

from vmae2_fast.config import AugmentConfig
from vmae2_fast.data import DecodeError, decode_video, decode_yuv420
from vmae2_fast.data.images import decode_images
from vmae2_fast.data.plan import Planner, cut_test_views, cut_views
from vmae2_fast.data.planes import folder_frames, video_frames
from vmae2_fast.data.probing import VIDEO_SUFFIXES, probe
from vmae2_fast.ops import Window, Yuv420, resize_crop

IDS = np.array([7, 3, 3, 4])


def rgb(video: Yuv420) -> torch.Tensor:
    """The whole frames, uint8 [T, H, W, 3]."""
    return resize_crop(video, [Window(0, 0, video.height, video.width)], (video.height, video.width))[0]


def assert_near(found: torch.Tensor, ffmpeg: torch.Tensor, most: int = 3, mean: float = 1.5) -> None:
    """FFmpeg's fast conversion cuts fractions off, three of them in green."""
    assert found.shape == ffmpeg.shape
    difference = found.int() - ffmpeg.int()
    assert int(difference.abs().max()) <= most
    assert float(difference.double().abs().mean()) <= mean


def coloured(path: Path, codec: str, colorspace: int, color_range: int, height: int = 50, width: int = 66) -> Path:
    """Ten frames of strong colours that move, tagged with FFmpeg's numbers of a matrix and a range."""
    with av.open(str(path), "w") as out:
        stream = out.add_stream(codec, rate=25, options={"g": "4"})
        stream.height, stream.width, stream.pix_fmt, stream.thread_count = height, width, "yuv420p", 1
        stream.codec_context.colorspace, stream.codec_context.color_range = colorspace, color_range
        y, x = np.mgrid[:height, :width]
        for k in range(10):
            image = np.stack([4 * x + 9 * k, 5 * y, 255 - 3 * x - 5 * k], -1).clip(0, 255).astype(np.uint8)
            frame = av.VideoFrame.from_ndarray(image, format="rgb24").reformat(format="yuv420p")
            frame.colorspace, frame.color_range = colorspace, color_range
            frame.pts = k
            out.mux(stream.encode(frame))
        out.mux(stream.encode())
    return path


@pytest.mark.parametrize("color_range", [1, 2])
@pytest.mark.parametrize(("colorspace", "matrix"), [(1, "bt709"), (2, "bt601"), (5, "bt601"), (6, "bt601")])
@pytest.mark.parametrize(("codec", "suffix"), [("libx264", "mp4"), ("libvpx-vp9", "webm")])
def test_matrix_and_range_of_the_file(
    tmp_path: Path, codec: str, suffix: str, colorspace: int, matrix: str, color_range: int
) -> None:
    path = str(coloured(tmp_path / f"clip.{suffix}", codec, colorspace, color_range))
    found, ffmpeg = decode_yuv420(path, IDS), torch.from_numpy(decode_video(path, IDS))
    assert isinstance(found, Yuv420)
    assert (found.matrix, found.value_range) == (matrix, ("limited", "full")[color_range - 1])
    assert found.planes.shape == (4, 50 * 66 * 3 // 2)
    assert_near(rgb(found), ffmpeg)
    other = Yuv420(found.planes, 50, 66, {"bt601": "bt709", "bt709": "bt601"}[matrix], found.value_range)
    assert int((rgb(other).int() - ffmpeg.int()).abs().max()) > 8  # these colours tell matrices apart


def exact_clip(video: Yuv420, window: Window, size: int) -> torch.Tensor:
    """The window by the matrices of ITU-R BT.601 and BT.709, nothing rounded: float64 [T, size, size, 3]."""
    planes, (h, w) = video.planes.double(), (video.height, video.width)
    y, u, v = planes.split((h * w, h * w // 4, h * w // 4), dim=1)
    full = video.value_range == "full"
    y = (y if full else (y - 16) * 255 / 219).view(-1, h, w)
    u, v = (
        ((c - 128) * (1 if full else 255 / 224)).view(-1, h // 2, w // 2).repeat_interleave(2, 1).repeat_interleave(2, 2)
        for c in (u, v)
    )
    red, blue = {"bt601": (0.299, 0.114), "bt709": (0.2126, 0.0722)}[video.matrix]
    r, b = y + 2 * (1 - red) * v, y + 2 * (1 - blue) * u
    rgb = torch.stack([r, (y - red * r - blue * b) / (1 - red - blue), b], 1).clamp(0, 255)
    cut = rgb[:, :, window.top : window.top + window.height, window.left : window.left + window.width]
    small = F.interpolate(cut, size=(size, size), mode="bilinear", antialias=True)
    return (small.flip(-1) if window.flip else small).permute(0, 2, 3, 1)


@pytest.mark.parametrize("color_range", [1, 2])
@pytest.mark.parametrize("colorspace", [1, 6])
def test_clips_are_within_a_level_of_exact_conversion_and_resize(tmp_path: Path, colorspace: int, color_range: int) -> None:
    found = decode_yuv420(str(coloured(tmp_path / "clip.mp4", "libx264", colorspace, color_range)), IDS)
    assert isinstance(found, Yuv420)
    windows = [Window(0, 0, 50, 66), Window(3, 7, 41, 33, True), Window(5, 1, 32, 32), Window(8, 9, 20, 24)]
    for window, clip in zip(windows, resize_crop(found, windows, 32), strict=True):
        assert float((clip.double() - exact_clip(found, window, 32)).abs().max()) <= 1


def test_frames_that_stay_rgb_say_why(clips: Path, header_rotator, jpeg_writer, video_writer, tmp_path: Path) -> None:
    good = clips / "good"
    files = {
        header_rotator(good / "gop12.mp4", tmp_path / "turned.mp4"): "rotated",
        good / "odd_size_444.mp4": "pixel format yuv444p",
        good / "ten_bit.mkv": "pixel format yuv420p10le",
        video_writer(tmp_path / "gray.mkv", codec="ffv1", pix_fmt="gray"): "pixel format gray",
        video_writer(tmp_path / "422.mp4", pix_fmt="yuv422p"): "pixel format yuv422p",
        coloured(tmp_path / "bt2020.mp4", "libx264", 9, 1): "color matrix 9 of FFmpeg's AVColorSpace",
        video_writer(tmp_path / "fields.mp4", **{"x264-params": "tff=1"}): "interlaced",
    }
    for height, width in ((49, 65), (49, 66), (50, 65)):
        path = coloured(tmp_path / f"{height}x{width}.webm", "libvpx-vp9", 6, 1, height, width)
        files[path] = "odd height or width"
    for path, why in files.items():
        found = video_frames(str(path), IDS)
        assert (found.planar, found.why_rgb) == (None, why)
        np.testing.assert_array_equal(found.pixels, decode_video(str(path), IDS))
    folder = jpeg_writer(tmp_path / "frames", 8)
    names = sorted(map(str, folder.iterdir()))
    images = folder_frames(str(folder), names, IDS)
    assert (images.planar, images.why_rgb) == (None, "pixel format yuvj444p")
    np.testing.assert_array_equal(images.pixels, decode_images(str(folder), names, IDS))


def test_jpeg_folders(tmp_path: Path) -> None:
    """Images with halved chroma are planes of full range; one of another kind among them makes all of them RGB."""
    names = []
    for k in range(4):
        names.append(str(tmp_path / f"{k}.jpg"))
        y, x = np.mgrid[:50, :66]
        image = np.stack([3 * x + 9 * k, 4 * y, 200 - 2 * x], -1).clip(0, 255).astype(np.uint8)
        picture = av.VideoFrame.from_ndarray(image, format="rgb24")
        with av.open(names[-1], "w", format="image2", options={"update": "1"}) as out:
            stream = out.add_stream("mjpeg", rate=1)
            stream.height, stream.width, stream.pix_fmt = 50, 66, "yuvj444p" if k == 3 else "yuvj420p"
            out.mux(stream.encode(picture))
            out.mux(stream.encode())
    ids = np.array([2, 0, 0])
    found = folder_frames(str(tmp_path), names, ids)
    assert found.planar == (50, 66, "bt601", "full")
    planes = found.tensor()
    assert isinstance(planes, Yuv420)
    assert_near(rgb(planes), torch.from_numpy(decode_images(str(tmp_path), names, ids)))
    mixed = folder_frames(str(tmp_path), names, np.array([2, 3]))
    assert (mixed.planar, mixed.why_rgb) == (None, "its form changes midway")
    np.testing.assert_array_equal(mixed.pixels, decode_images(str(tmp_path), names, np.array([2, 3])))


@pytest.mark.parametrize("name", ["empty.mp4", "garbage.mp4", "no_index.mp4", "missing.mp4"])
def test_unusable_files_are_named(clips: Path, name: str) -> None:
    with pytest.raises(DecodeError, match=name):
        decode_yuv420(str(clips / "bad" / name), np.arange(2))
    with pytest.raises(DecodeError, match="frame 99 was asked for"):
        decode_yuv420(str(clips / "good" / "gop12.mp4"), np.array([99]))


def test_views_of_planes(tmp_path: Path) -> None:
    """Plans are carried out on planes as on their RGB frames, RandAugment and erased rectangles included."""
    path = str(coloured(tmp_path / "clip.mp4", "libx264", 1, 1))
    found = decode_yuv420(path, IDS)
    assert isinstance(found, Yuv420)
    whole, ffmpeg = rgb(found), torch.from_numpy(decode_video(path, IDS))
    for augment in (AugmentConfig(), AugmentConfig(randaugment="rand-m7-n4-mstd0.5-inc1", erase=1.0)):
        planner = Planner(
            frames=4, size=32, sampling="dense", crop="random_resized", flip=True, views=3, seed=0, augment=augment
        )
        plans = planner.view_plans(50, 66, 0, 5)
        views = cut_views(found, plans, 32)
        assert torch.equal(views, cut_views(whole, plans, 32))
        if not augment.erase:
            assert_near(views, cut_views(ffmpeg, plans, 32))
    views = cut_test_views(found, segments=2, size=32, crops=3)
    assert torch.equal(views, cut_test_views(whole, segments=2, size=32, crops=3))
    assert_near(views, cut_test_views(ffmpeg, segments=2, size=32, crops=3))


def _given() -> list[str]:
    root = os.environ.get("VMAE2_CLIPS")
    return [] if not root else [str(path) for path in sorted(Path(root).rglob("*")) if path.suffix.lower() in VIDEO_SUFFIXES]


if GIVEN := _given():

    @pytest.mark.parametrize("path", [pytest.param(p, id=os.path.basename(p)) for p in GIVEN])
    def test_given_clips(path: str) -> None:
        try:
            ids = np.arange(min(3, probe(path).num_frames))
            ffmpeg = decode_video(path, ids)
        except DecodeError:
            with pytest.raises(DecodeError):
                decode_yuv420(path, np.arange(3))
            return
        found = decode_yuv420(path, ids)
        if isinstance(found, Yuv420):
            assert_near(rgb(found), torch.from_numpy(ffmpeg))
        else:
            np.testing.assert_array_equal(found.numpy(), ffmpeg)
