"""Frames handed over as YUV 4:2:0 beside their RGB: the same frames, and the same clips within the stated tolerance."""

from __future__ import annotations

import os
from pathlib import Path

import av
import numpy as np
import pytest
import torch

from vmae2_fast.config import AugmentConfig
from vmae2_fast.data import DecodeError, decode_video, decode_yuv420
from vmae2_fast.data.decode import VIDEO_SUFFIXES, probe
from vmae2_fast.data.plan import Planner, cut_test_views, cut_views
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


@pytest.mark.parametrize(("height", "width"), [(49, 65), (49, 66), (50, 65)])
def test_odd_sides(tmp_path: Path, height: int, width: int) -> None:
    path = str(coloured(tmp_path / "clip.webm", "libvpx-vp9", 6, 1, height, width))
    found = decode_yuv420(path, IDS)
    assert isinstance(found, Yuv420)
    assert (found.height, found.width) == (height, width)
    # FFmpeg takes another way for odd heights, which interpolates chroma
    budget = (16, 2.5) if height % 2 else (3, 1.5)
    assert_near(rgb(found), torch.from_numpy(decode_video(path, IDS)), *budget)


def test_other_frames_stay_rgb(clips: Path, header_rotator, tmp_path: Path) -> None:
    turned = header_rotator(clips / "good" / "gop12.mp4", tmp_path / "turned.mp4")
    for path in (turned, *(clips / "good" / name for name in ("odd_size_444.mp4", "ten_bit.mkv"))):
        found = decode_yuv420(str(path), IDS)
        assert isinstance(found, torch.Tensor)
        np.testing.assert_array_equal(found.numpy(), decode_video(str(path), IDS))
    wide = coloured(tmp_path / "bt2020.mp4", "libx264", 9, 1)  # a matrix resize_crop does not know
    assert isinstance(decode_yuv420(str(wide), IDS), torch.Tensor)


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
    return [] if not root else [str(path) for path in sorted(Path(root).rglob("*")) if path.suffix in VIDEO_SUFFIXES]


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
