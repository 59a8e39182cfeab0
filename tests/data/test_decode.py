"""Frames that come back are the frames that were asked for, or one error names the file."""

from __future__ import annotations

import os
import re
import shutil
import wave
from pathlib import Path

import av
import numpy as np
import pytest

from vmae2_fast.data import DecodeError, decode, decode_video, prepare, probe
from vmae2_fast.data.decode import VIDEO_SUFFIXES, FrameCache, decode_image, decode_images

FRAMES = 40
GOOD = (
    "gop12.mp4", "gop250.mp4", "open_gop.mkv", "vfr.mkv", "gray.mkv", "odd_size_444.mp4", "ten_bit.mkv", "fragmented.mp4",
    "stream.ts", "program_stream.mpg", "mpeg4.avi", "mjpeg.avi", "vp9.webm",
)  # fmt: skip


@pytest.mark.parametrize("name", GOOD)
def test_exact_frames(clips, read_numbers, name):
    path = str(clips / "good" / name)
    assert probe(path).num_frames == FRAMES
    rng = np.random.RandomState(len(name))
    windows = [rng.randint(FRAMES - 9) + 3 * np.arange(4) for _ in range(4)]
    for ids in (np.arange(FRAMES), np.array([FRAMES - 1]), np.array([17, 3, 3, 29]), *windows):
        frames = decode_video(path, ids)
        assert frames.dtype == np.uint8
        assert frames.shape[0] == len(ids)
        assert frames.shape[3] == 3
        assert read_numbers(frames) == ids.tolist()


def test_short_videos_and_paths_with_spaces(clips, read_numbers):
    assert read_numbers(decode_video(str(clips / "good" / "one_frame.mp4"), np.zeros(4, int))) == [0] * 4
    assert read_numbers(decode_video(str(clips / "good" / "five frames.mp4"), np.array([0, 4, 4]))) == [0, 4, 4]


def test_rotation_metadata_is_applied(clips, header_rotator, tmp_path):
    plain = clips / "good" / "gop12.mp4"
    turned = decode_video(str(header_rotator(plain, tmp_path / "turned.mp4")), np.array([5, 20]))
    assert turned.shape == (2, 64, 48, 3)
    np.testing.assert_array_equal(turned, np.rot90(decode_video(str(plain), np.array([5, 20])), -1, axes=(1, 2)))


@pytest.mark.parametrize("name", ["empty.mp4", "garbage.mp4", "text.mkv", "no_index.mp4", "audio_only.mp4", "missing.mp4", ""])
def test_unusable_files_are_named(clips, name):
    path = str(clips / "bad" / name)
    with pytest.raises(DecodeError) as caught:
        decode_video(path, np.arange(2))
    assert caught.value.path == path
    assert str(caught.value).startswith(path)
    assert caught.value.reason


@pytest.mark.parametrize("name", ["sound.wav", "sound.png"])
def test_sound_alone_holds_no_video_stream(tmp_path, name):
    with wave.open(str(tmp_path / name), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(8000)
        file.writeframes(bytes(1600))
    read = decode_image if name.endswith(".png") else probe
    with pytest.raises(DecodeError, match=rf"{name}: holds no video stream"):
        read(str(tmp_path / name))


@pytest.mark.parametrize("fault", [TypeError, IndexError, KeyError, MemoryError])
def test_a_fault_of_this_program_is_no_damaged_clip(clips, monkeypatch, fault):
    def fails(*arguments):
        raise fault("ours")

    monkeypatch.setattr(decode, "_to_rgb", fails)
    with pytest.raises(fault, match="ours"):
        decode_video(str(clips / "good" / "gop12.mp4"), np.arange(2))


def test_small_copies_are_made_in_chunks(clips, monkeypatch):
    """Of a long video only a chunk is held at full size, and the copy is what one chunk would have given."""
    path, sizes = clips / "good" / "gop12.mp4", []

    def counted(name, ids):
        sizes.append(len(ids))
        return decode_video(name, ids)

    monkeypatch.setattr(prepare, "decode_video", counted)
    copy = prepare._small_copy(path, 32)
    assert sizes == [32, 8]
    assert copy.shape == (FRAMES, 32, 42, 3)
    monkeypatch.setattr(prepare, "_CHUNK", 300)
    np.testing.assert_array_equal(copy, prepare._small_copy(path, 32))


def test_frames_beyond_the_end_are_an_error(clips):
    with pytest.raises(DecodeError, match="has 40"):
        decode_video(str(clips / "good" / "gop12.mp4"), np.array([0, FRAMES]))


def test_a_cut_file_is_a_shorter_video(video_writer, read_numbers, tmp_path):
    whole = video_writer(tmp_path / "whole.mp4", container={"movflags": "faststart"}, g="12", bf="0").read_bytes()
    cut = tmp_path / "cut.mp4"
    cut.write_bytes(whole[: len(whole) * 2 // 3])
    count = probe(str(cut)).num_frames
    assert 5 < count < FRAMES
    ids = np.arange(0, count - 1, 2)
    assert read_numbers(decode_video(str(cut), ids)) == ids.tolist()
    with pytest.raises(DecodeError, match="was asked for"):
        decode_video(str(cut), np.array([0, FRAMES - 1]))


@pytest.mark.parametrize("name", ["gop250.mp4", "open_gop.mkv", "gop12.mp4"])
def test_damage_never_gives_a_wrong_frame(clips, read_numbers, tmp_path, name):
    """Noise in the coded pictures, and in what refers to it, is seen: a window is right or refused."""
    data = (clips / "good" / name).read_bytes()
    low = data.index(b"mdat") + 8 if name.endswith(".mp4") else len(data) // 10
    high = data.index(b"moov", low) if b"moov" in data[low:] else len(data)
    right = refused = 0
    for seed in range(6):
        rng = np.random.RandomState(seed)
        place, path = rng.randint(low, high - 60), tmp_path / f"{seed}{name}"
        path.write_bytes(data[:place] + rng.bytes(60) + data[place + 60:])
        for first in range(0, probe(str(path)).num_frames - 3, 4):
            ids = first + np.arange(3)
            try:
                frames = decode_video(str(path), ids)
            except DecodeError:
                refused += 1
                continue
            assert read_numbers(frames) == ids.tolist()
            right += 1
    assert right > 0
    assert refused > 0


def test_image_folder(jpeg_writer, image_writer, read_numbers, tmp_path):
    folder = jpeg_writer(tmp_path / "frames", 12)
    files = sorted(map(str, folder.iterdir()))
    assert read_numbers(decode_images(str(folder), files, np.array([0, 7, 7, 11, 2]))) == [0, 7, 7, 11, 2]
    picture = np.random.RandomState(0).randint(0, 256, (20, 30, 3)).astype(np.uint8)
    image_writer(tmp_path / "exact.png", picture)
    np.testing.assert_array_equal(decode_image(str(tmp_path / "exact.png")), picture)


def test_broken_image_folders_are_named(jpeg_writer, image_writer, tmp_path):
    folder = jpeg_writer(tmp_path / "frames", 4)
    files = sorted(map(str, folder.iterdir()))
    with pytest.raises(DecodeError, match="00009"):
        decode_images(str(folder), [files[0], str(folder / "img_00009.jpg")], np.arange(2))
    data = Path(files[1]).read_bytes()
    for broken in (data[: len(data) // 2], b"", b"\xff\xd8" + bytes(200) + b"\xff\xd9"):
        Path(files[1]).write_bytes(broken)
        with pytest.raises(DecodeError, match="img_00002"):
            decode_images(str(folder), files, np.arange(3))
    image_writer(Path(files[1]), np.zeros((16, 16, 3), np.uint8))
    with pytest.raises(DecodeError, match="is 16x16, the first frame 64x48"):
        decode_images(str(folder), files, np.arange(3))


def test_a_replaced_file_is_probed_again(video_writer, tmp_path):
    path = video_writer(tmp_path / "a.mp4", count=5)
    assert probe(str(path)).num_frames == 5
    video_writer(path, count=9)
    assert probe(str(path)).num_frames == 9


def test_cache_fills_and_holds():
    cache = FrameCache(250)
    videos = [np.full(100, k, np.uint8) for k in range(4)]
    for k, video in enumerate(videos):
        cache.put(k, video)
    assert cache.get(0) is videos[0]
    assert cache.get(1) is videos[1]
    assert cache.get(2) is None
    assert cache.used == 200
    cache.put(0, videos[3])
    assert cache.get(0) is videos[0]
    assert cache.has_room(50)
    assert not cache.has_room(51)


def _check_given_clip(path: str, text: str) -> None:
    """A clip against what its README row says of it and against plain decoding from the start."""
    if "not open" in text or "audio only" in text:
        with pytest.raises(DecodeError, match=re.escape(path)):
            probe(path)
        return
    count = probe(path).num_frames
    stated = re.search(r"(\d+)x(\d+).*?(\d+) frames", text)
    damaged = "error" in text
    assert damaged or stated is None or count == int(stated[3])
    reachable = min(count, 120)
    oracle = _sequential(path, reachable)
    rng = np.random.RandomState(count)
    for _ in range(2):
        ids = np.minimum(rng.randint(max(reachable - 32, 1)) + 2 * np.arange(16), reachable - 1)
        try:
            frames = decode_video(path, ids)
        except DecodeError:
            assert damaged
            continue
        assert stated is None or sorted(frames.shape[1:3]) == sorted((int(stated[1]), int(stated[2])))
        np.testing.assert_array_equal(frames, np.stack([oracle[k] for k in ids]))


def _given() -> list[tuple[str, str]]:
    """(path, README description) of every video under VMAE2_CLIPS; none where it is not set."""
    root = os.environ.get("VMAE2_CLIPS")
    if not root:
        return []
    table = Path(root, "README.md").read_text() if Path(root, "README.md").exists() else ""
    rows = [[column.strip() for column in line.split("|")] for line in table.splitlines() if line.startswith("|")]
    described = {row[1]: row[2] for row in rows if len(row) > 3}
    files = [path for path in sorted(Path(root).rglob("*")) if path.suffix in VIDEO_SUFFIXES]
    return [(str(path), described.get(path.relative_to(root).as_posix(), "")) for path in files]


if GIVEN := _given():

    @pytest.mark.parametrize(("path", "text"), [pytest.param(p, t, id=os.path.basename(p)) for p, t in GIVEN])
    def test_given_clips(path: str, text: str) -> None:
        _check_given_clip(path, text)


def test_every_kind_of_file_against_plain_decoding(clips):
    for name in GOOD:
        _check_given_clip(str(clips / "good" / name), "")


def _sequential(path: str, count: int) -> list[np.ndarray]:
    """The first `count` frames in order of presentation, by plain decoding."""
    frames: list[np.ndarray] = []
    with av.open(path, metadata_errors="ignore") as container:
        try:
            for frame in container.decode(video=0):
                frames.append(np.rot90(frame.to_ndarray(format="rgb24"), round(frame.rotation / 90)))
                if len(frames) == count:
                    break
        except av.FFmpegError:
            pass  # a damaged clip: what came before is what can be compared
    return frames


def test_probing_needs_the_file_only(clips, tmp_path):
    """Neither the working directory nor open handles matter: the file may be moved once decoded."""
    copy = shutil.copy(clips / "good" / "gop12.mp4", tmp_path / "copy.mp4")
    decode_video(str(copy), np.arange(2))
    os.remove(copy)
    with pytest.raises(DecodeError, match="No such file"):
        probe(str(copy))
