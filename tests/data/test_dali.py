"""What DALI decodes is what PyAV decodes, and what it would get wrong never reaches it.

Everything but the comparison itself runs without DALI. Its graph runs on the CPU here, for the codecs its CPU decoder has.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import av
import numpy as np
import pytest
import torch

from vmae2_fast.data import DecodeError, decode_video, probe
from vmae2_fast.data.dali import (
    DaliDecoder,
    DaliError,
    UnsupportedError,
    read_images,
    read_video,
    why_not_dali,
    why_unsupported,
)
from vmae2_fast.data.images import decode_images
from vmae2_fast.data.probing import VIDEO_SUFFIXES, StreamForm

ROOT = Path(__file__).parents[2]
FRAMES = 40
CPU = torch.device("cpu")
VP9 = {"deadline": "realtime", "cpu-used": "8"}
needs_dali = pytest.mark.skipif(why_not_dali() is not None, reason=str(why_not_dali()))


@pytest.fixture(scope="module")
def folder(tmp_path_factory, clips, video_writer, header_rotator):
    """Numbered videos DALI's CPU decoder reads, in `good/`, and some it must not get, in `refused/`."""
    root = tmp_path_factory.mktemp("dali")
    for name in ("good", "refused"):
        (root / name).mkdir()
    good, refused = root / "good", root / "refused"
    video_writer(good / "vp8.webm", codec="libvpx", g="12", **VP9)
    video_writer(good / "vp9_gop12.mp4", codec="libvpx-vp9", g="12", **VP9)
    video_writer(good / "vp9_gop250.webm", codec="libvpx-vp9", g="250", **VP9)
    uneven = np.cumsum(1 + np.arange(FRAMES) * 7 % 11).tolist()
    video_writer(good / "vp9_vfr.mkv", codec="libvpx-vp9", times=uneven, g="12", **VP9)
    video_writer(good / "vp9_444.webm", codec="libvpx-vp9", pix_fmt="yuv444p", height=49, width=65, g="12", **VP9)
    for name in ("mjpeg.avi", "vp9.webm"):
        (good / name).symlink_to(clips / "good" / name)
    header_rotator(good / "vp9_gop12.mp4", refused / "turned.mp4")
    for name in ("gop12.mp4", "ten_bit.mkv", "mpeg4.avi"):
        (refused / name).symlink_to(clips / "good" / name)
    return root


GOOD = ("vp8.webm", "vp9_gop12.mp4", "vp9_gop250.webm", "vp9_vfr.mkv", "vp9_444.webm", "mjpeg.avi", "vp9.webm")


@pytest.fixture(scope="module")
def decoder():
    return DaliDecoder(CPU, batch=2, threads=1)


def dali_frames(decoder: DaliDecoder, *clips) -> list[np.ndarray]:
    with decoder.decode(clips) as frames:
        return [clip.cpu().numpy().copy() for clip in frames]


def planes(path: str, ids: np.ndarray) -> list[list[np.ndarray]]:
    """Y, U, V of the frames `ids` as decoded, float [height, width] each."""
    numbers = {int(pts): k for k, pts in enumerate(probe(path).pts)}
    found = {}
    with av.open(path) as container:
        for frame in container.decode(video=0):
            if (number := numbers.get(frame.pts)) in ids:
                found[number] = [
                    np.frombuffer(plane, np.uint8).reshape(plane.height, plane.line_size)[:, :plane.width].astype(float)
                    for plane in frame.planes
                ]
    return [found[k] for k in ids]


def spread(plane: np.ndarray, height: int, width: int) -> np.ndarray:
    """Largest minus smallest of the 3 x 3 samples around each, at the size of the picture."""
    windows = np.lib.stride_tricks.sliding_window_view(np.pad(plane, 1, mode="edge"), (3, 3))
    range_ = windows.max((2, 3)) - windows.min((2, 3))
    return np.kron(range_, np.ones((-(-height // plane.shape[0]), -(-width // plane.shape[1]))))[:height, :width]


def assert_same_picture(actual: np.ndarray, expected: np.ndarray, path: str, ids: np.ndarray) -> None:
    """Two conversions of the same Y, U and V to RGB.

    Luma is not interpolated. However chroma is brought to full size, a pixel's lies between the samples around it, so two
    ways differ by no more than these do, times the largest coefficients of BT.601, 709 and 2020 (limited range: V to R 1.80,
    U and V to G 0.40 and 0.82, U to B 2.15). Each rounds three products to integers: 2 * 3 * 0.5 levels more.
    """
    assert actual.shape == expected.shape
    height, width = expected.shape[1:3]
    for one, other, (_, u, v) in zip(actual, expected, planes(path, ids), strict=True):
        du, dv = spread(u, height, width), spread(v, height, width)
        allowed = np.stack([1.80 * dv, 0.40 * du + 0.82 * dv, 2.15 * du], axis=-1) + 3
        excess = np.abs(one.astype(float) - other.astype(float)) - allowed
        assert excess.max() <= 0, f"{path}: {excess.max():.1f} levels beyond what interpolation and rounding explain"


@needs_dali
@pytest.mark.parametrize("name", GOOD)
def test_dali_decodes_the_frames_pyav_decodes(folder, decoder, read_numbers, name):
    path = str(folder / "good" / name)
    rng = np.random.RandomState(len(name))
    plans = [np.sort(rng.choice(FRAMES, 4, replace=False)), np.array([FRAMES - 1]), np.array([17, 3, 3, 29])]
    encoded = [read_video(path, lambda count, ids=ids: ids, CPU) for ids in plans]
    for ids, frames in zip(plans, dali_frames(decoder, *encoded), strict=True):
        assert read_numbers(frames) == ids.tolist()
        assert_same_picture(frames, decode_video(path, ids), path, ids)


def real_clips() -> list[Path]:
    return sorted(p for p in Path(os.environ.get("VMAE2_CLIPS", "")).rglob("*") if p.suffix.lower() in VIDEO_SUFFIXES)


@needs_dali
def test_every_clip_is_decoded_alike_or_refused(folder, decoder):
    """All of VMAE2_CLIPS, of which DALI's CPU decoder may know none, and the clips encoded for these tests."""
    rows, compared = [], 0
    own = [folder / "good" / name for name in GOOD]
    for file in (*(real_clips() if "VMAE2_CLIPS" in os.environ else ()), *own):
        path = str(file)
        try:
            encoded = read_video(path, lambda count: np.unique(np.linspace(0, count - 1, 4).astype(int)), CPU)
        except (DecodeError, UnsupportedError) as error:
            rows.append(f"{file.name}: {error}")
            continue
        try:
            (frames,) = dali_frames(decoder, encoded)
        except DaliError as error:  # what the loader then gives to PyAV
            rows.append(f"{file.name}: DALI: {error}")
            continue
        assert_same_picture(frames, decode_video(path, encoded.ids), path, encoded.ids)
        rows.append(f"{file.name}: same")
        compared += 1
    print("\n".join(rows))
    assert compared >= len(own)


@needs_dali
def test_image_folders(decoder, jpeg_writer, read_numbers, tmp_path):
    folder = jpeg_writer(tmp_path / "stills", 12)
    files = [str(folder / f"img_{k:05}.jpg") for k in range(1, 13)]
    plans = [np.array([1, 4, 9]), np.array([7, 2, 2, 11, 0])]
    encoded = [read_images(str(folder), files, ids) for ids in plans]
    for ids, frames in zip(plans, dali_frames(decoder, *encoded), strict=True):
        assert read_numbers(frames) == ids.tolist()
        # 4:4:4, grey: three rounded products and an inverse cosine transform correct to one level, on both sides
        assert np.abs(frames.astype(int) - decode_images(str(folder), files, ids)).max() <= 2 * (3 * 0.5 + 1)


def test_images_that_are_not_for_dali(image_writer, jpeg_writer, tmp_path):
    image_writer(tmp_path / "a.png", np.zeros((8, 8, 3), np.uint8))
    with pytest.raises(UnsupportedError, match="other than JPEG"):
        read_images(str(tmp_path), [str(tmp_path / "a.png")], np.array([0, 0]))
    still = jpeg_writer(tmp_path / "cut", 1) / "img_00001.jpg"
    still.write_bytes(still.read_bytes()[:-20])
    for file in (still, tmp_path / "missing.jpg"):
        with pytest.raises(DecodeError, match=file.name):
            read_images(str(tmp_path), [str(file)], np.array([0]))


@pytest.mark.parametrize(("name", "reason"), [
    ("gop12.mp4", "codec h264"), ("ten_bit.mkv", "codec h264"), ("mpeg4.avi", "count its frames differently"),
    ("turned.mp4", "turned by -90 degrees"),
])  # fmt: skip
def test_what_dali_would_get_wrong_is_refused(folder, name, reason):
    with pytest.raises(UnsupportedError, match=reason):
        read_video(str(folder / "refused" / name), lambda count: np.arange(2), CPU)


@pytest.mark.parametrize("name", ["empty.mp4", "garbage.mp4", "text.mkv", "no_index.mp4", "audio_only.mp4", "missing.mp4"])
def test_unusable_files_never_reach_dali(clips, name):
    with pytest.raises(DecodeError, match=name):
        read_video(str(clips / "bad" / name), lambda count: np.arange(2), CPU)


def test_a_frame_beyond_the_end_is_an_error(folder):
    with pytest.raises(DecodeError, match="frame 40 was asked for, the video has 40"):
        read_video(str(folder / "good" / "vp8.webm"), lambda count: np.array([3, count]), CPU)


@pytest.mark.parametrize(("capability", "av1"), [
    ((7, 5), False), ((8, 0), False), ((8, 6), True), ((8, 9), True), ((9, 0), False), ((10, 0), True), ((12, 0), True),
])  # fmt: skip
def test_codecs_of_a_chip(monkeypatch, capability, av1):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    form = StreamForm("h264", "yuv420p", 240, 320, 0, interlaced=False, streams=1)
    gpu = torch.device("cuda", 0)
    assert why_unsupported(form, gpu) is None
    assert (why_unsupported(form._replace(codec="av1"), gpu) is None) == av1
    for change, reason in (
        ({"codec": "prores"}, "codec prores"), ({"pix_fmt": "yuv420p10le"}, "pixel format yuv420p10le"),
        ({"pix_fmt": "yuv422p"}, "yuv422p"), ({"interlaced": True}, "interlaced"), ({"streams": 2}, "2 video streams"),
        ({"rotation": 180}, "turned by 180 degrees"),
    ):  # fmt: skip
        assert reason in str(why_unsupported(form._replace(**change), gpu))


@needs_dali
def test_a_bad_clip_costs_its_batch_and_nothing_more(folder, decoder, read_numbers):
    good = read_video(str(folder / "good" / "vp8.webm"), lambda count: np.array([5, 6]), CPU)
    for data in (np.zeros(500, np.uint8), good.data[0][:300]):
        with pytest.raises(DaliError), decoder.decode([good, good._replace(data=(data,))]):
            pass
        assert read_numbers(dali_frames(decoder, good)[0]) == [5, 6]
    beyond = good._replace(wanted=np.array([39, 40]))
    with pytest.raises(DaliError, match="out-of-bounds"), decoder.decode([beyond]):
        pass
    with pytest.raises(DaliError, match="of shape"), decoder.decode([good._replace(size=(48, 66))]):
        pass
    with pytest.raises(ValueError, match="clips of one kind"), decoder.decode([]):
        pass


@needs_dali
def test_a_cut_off_file_gives_no_black_frames(folder, decoder, read_numbers, tmp_path):
    whole = (folder / "good" / "vp9_gop12.mp4").read_bytes()
    webm = (folder / "good" / "vp9_gop250.webm").read_bytes()
    (tmp_path / "cut.webm").write_bytes(webm[: len(webm) // 2])
    encoded = read_video(str(tmp_path / "cut.webm"), lambda count: np.arange(count), CPU)
    assert 1 < len(encoded.ids) < FRAMES
    assert read_numbers(dali_frames(decoder, encoded)[0][:-1]) == encoded.ids[:-1].tolist()
    (tmp_path / "cut.mp4").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DecodeError, match=r"cut\.mp4"):
        read_video(str(tmp_path / "cut.mp4"), lambda count: np.arange(count), CPU)


def test_without_dali_one_error_says_how_to_get_it():
    script = (
        "import sys\n"
        "sys.modules['nvidia.dali'] = None\n"
        "import vmae2_fast.data\n"
        "from vmae2_fast.data.dali import DaliDecoder\n"
        "try:\n    DaliDecoder('cpu')\n"
        "except ImportError as error:\n    print(error)\n"
    )  # fmt: skip
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "vmae2_fast[dali]" in done.stdout
    assert "nvidia-dali-cuda130" in done.stdout


@pytest.mark.cuda
@needs_dali
def test_frames_stay_until_a_late_consumer_has_read_them(folder, read_numbers):
    """The consumer's stream is held up while the next batches are decoded into DALI's buffers."""
    device = torch.device("cuda", torch.cuda.current_device())
    decoder = DaliDecoder(device, batch=2)
    path = str(folder / "refused" / "gop12.mp4")
    plans = [np.arange(k, k + 8) for k in range(0, 32, 4)]
    stream, copies = torch.cuda.Stream(device), []
    with torch.cuda.stream(stream):
        for ids in plans:
            with decoder.decode([read_video(path, lambda count, ids=ids: ids, device)]) as (frames,):
                torch.cuda._sleep(200_000_000)
                copies.append(frames.clone())
    stream.synchronize()
    for ids, copy in zip(plans, copies, strict=True):
        assert read_numbers(copy.cpu().numpy()) == ids.tolist()
