"""Frames that come back are the frames that were asked for, or one error names the file."""

from __future__ import annotations

import os
import re
import shutil
import wave
from pathlib import Path
from typing import NamedTuple

import av
import numpy as np
import pytest

from vmae2_fast.data import DecodeError, decode, decode_video, prepare, probe, sampling
from vmae2_fast.data.decode import decode_timed
from vmae2_fast.data.images import decode_image, decode_images
from vmae2_fast.data.planes import FrameCache, Frames
from vmae2_fast.data.probing import VIDEO_SUFFIXES
from vmae2_fast.data.sampling import repeated

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

    monkeypatch.setattr(decode, "to_rgb", fails)
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
    videos = [Frames(np.full((4, 25), k, np.uint8), None) for k in range(4)]
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


def _given() -> list[tuple[str, str]]:
    """(path, README description) of every video under VMAE2_CLIPS; none where it is not set."""
    root = os.environ.get("VMAE2_CLIPS")
    if not root:
        return []
    table = Path(root, "README.md").read_text() if Path(root, "README.md").exists() else ""
    rows = [[column.strip() for column in line.split("|")] for line in table.splitlines() if line.startswith("|")]
    described = {row[1]: row[2] for row in rows if len(row) > 3}
    files = [path for path in sorted(Path(root).rglob("*")) if path.suffix.lower() in VIDEO_SUFFIXES]
    return [(str(path), described.get(path.relative_to(root).as_posix(), "")) for path in files]


class Examined(NamedTuple):
    """What the windows of a file came to, and why those that were refused were."""

    status: str
    reason: str


def _examine(path: str, stated: str) -> Examined:
    """Windows of a file, long and filled up, against a decode of the whole file: equal frame for frame, or refused."""
    try:
        info = probe(path)
    except DecodeError as error:
        return Examined("refused", error.reason)
    size = re.search(r"(\d+)x(\d+).*?(\d+) frames", stated)
    damaged = "error" in stated
    assert damaged or size is None or info.num_frames == int(size[3])
    count = min(info.num_frames, 160)
    shown = _sequential(path, count)
    if len(shown) < count:  # damaged on the way: what came after it has another number, but its timestamp
        assert info.pts is not None or damaged or stated == ""
        by_time = {frame.pts: frame for frame in shown}
        found = [by_time.get(pts) for pts in info.pts[:count].tolist()] if info.pts is not None else [*shown, *[None] * count]
    else:
        found = list(shown)
    rng = np.random.RandomState(info.num_frames)
    windows = [sampling.pretrain_indices(count, 16, stride, rng) for stride in (1, 2, 4, 4)]
    windows.append(sampling.segment_test_views(count, 8, 2).reshape(-1))
    refusals = []
    for ids in windows:
        try:
            decoded = decode_timed(path, ids)
        except DecodeError as error:
            refusals.append(error.reason)
            continue
        assert size is None or sorted(decoded.frames.shape[1:3]) == sorted((int(size[1]), int(size[2])))
        planned = [found[k] for k in ids]
        assert None not in planned, "a frame that plain decoding does not give"
        np.testing.assert_array_equal(decoded.frames, np.stack([frame.picture for frame in planned]))
        if decoded.pts is not None:
            np.testing.assert_array_equal(decoded.pts, info.pts[ids])
            assert decoded.pts.tolist() == [frame.pts for frame in planned]
        filling = np.array([np.array_equal(a, b) for a, b in zip(ids[1:], ids)])
        np.testing.assert_array_equal(repeated(ids)[1:], filling)
    assert damaged or not refusals or stated == "", refusals
    if len(refusals) == len(windows):
        return Examined("refused", refusals[0])
    how = "exact" if info.pts is not None else "exact, frames counted"
    return Examined(how, f"{len(refusals)} of {len(windows)} windows refused: {refusals[0]}" if refusals else "")


def test_every_file_is_exact_or_refused_with_a_reason(clips, capsys):
    """Prints file, status, reason of all of VMAE2_CLIPS and of the clips encoded for these tests. What a table in the
    folder's README says of a file must hold; files that nobody described may be refused."""
    own = {str(path): kind for kind in ("good", "bad") for path in sorted((clips / kind).iterdir())}
    described = dict(_given())
    results = {path: _examine(path, described.get(path, "")) for path in (*described, *own)}
    width = max(len(os.path.basename(path)) for path in results)
    with capsys.disabled():
        print()
        for path, result in results.items():
            print(f"{os.path.basename(path):<{width}}  {result.status:<21}  {result.reason}")
    for path, result in results.items():
        stated = described.get(path, "")
        if own.get(path) == "bad" or "not open" in stated or "audio only" in stated:
            assert result.status == "refused", f"{path}: {result}"
        elif path in own or (stated and "error" not in stated):
            assert result.status != "refused", f"{path}: {result}"
        assert result.status != "refused" or result.reason


class Shown(NamedTuple):
    """A frame as plain decoding gives it."""

    picture: np.ndarray
    pts: int | None


def _sequential(path: str, count: int) -> list[Shown]:
    """The first `count` frames in order of presentation, by plain decoding that goes on behind a packet that fails."""
    found: list[Shown] = []
    with av.open(path, metadata_errors="ignore") as container:
        cover = av.stream.Disposition.attached_pic
        stream = next(stream for stream in container.streams.video if not stream.disposition & cover)
        packets = container.demux(stream)
        while len(found) < count:
            try:
                frames = next(packets).decode()
            except StopIteration:
                break
            except av.FFmpegError:
                continue
            for frame in frames:
                turned = np.rot90(frame.to_ndarray(format="rgb24", threads=1), round(frame.rotation / 90))
                found.append(Shown(turned, frame.pts))
    return found[:count]


def test_probing_needs_the_file_only(clips, tmp_path):
    """Neither the working directory nor open handles matter: the file may be moved once decoded."""
    copy = shutil.copy(clips / "good" / "gop12.mp4", tmp_path / "copy.mp4")
    decode_video(str(copy), np.arange(2))
    os.remove(copy)
    with pytest.raises(DecodeError, match="No such file"):
        probe(str(copy))
