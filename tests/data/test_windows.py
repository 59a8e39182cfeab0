"""Windows over encoded video: those of the released script, one decode a frame, memory that does not grow."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import torch

from tests.tiny_runs import official_windows, write_untrimmed
from vmae2_fast.config import ExtractConfig
from vmae2_fast.data import DecodeError, decode_video, probe, windows
from vmae2_fast.data.probing import frame_rate
from vmae2_fast.data.streaming import stream_video
from vmae2_fast.data.windows import squash_frames, stream_windows, window_frames


def test_stream_is_every_frame_once(tmp_path):
    path = str(write_untrimmed(tmp_path / "v.mp4", 50))
    whole = decode_video(path, np.arange(50))
    for chunk in (7, 50, 64):
        pieces = list(stream_video(path, chunk))
        assert all(len(piece) == chunk for piece in pieces[:-1])
        assert np.array_equal(np.concatenate(pieces), whole)


@pytest.mark.parametrize(("count", "step"), [(16, 4), (17, 4), (61, 4), (70, 16), (75, 20), (64, 1)])
def test_windows_are_those_of_the_released_script(tmp_path, count, step, monkeypatch):
    path = write_untrimmed(tmp_path / "v.mp4", count)
    decoded = []

    def counted(name):
        for chunk in stream_video(name):
            decoded.append(len(chunk))
            yield chunk

    monkeypatch.setattr(windows, "stream_video", counted)
    wanted = window_frames(count, 16, ExtractConfig(step=step))
    taken = list(stream_windows(str(path), wanted, lambda frames: squash_frames(frames, 24), batch=3))
    assert all(len(clip) == 3 for clip in taken[:-1])
    ours, theirs = torch.cat(taken).transpose(1, 2), official_windows(path, step, 16, 24)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)
    assert sum(decoded) == count  # each once


def test_a_short_video_is_one_window_that_repeats_its_last_frame(tmp_path):
    path = str(write_untrimmed(tmp_path / "v.mp4", 5))
    assert frame_rate(path) == 25
    wanted = window_frames(probe(path).num_frames, 16, ExtractConfig(step=4))
    assert wanted.tolist() == [[0, 1, 2, 3] + [4] * 12]
    (clip,) = stream_windows(path, wanted, lambda frames: squash_frames(frames, 32), batch=8)
    assert clip.shape == (1, 16, 3, 32, 32)
    assert torch.equal(clip[0, 4:], clip[0, 4:5].expand(12, 3, 32, 32))


def test_a_video_that_cannot_be_read_is_an_error_not_a_shorter_one(tmp_path):
    path = write_untrimmed(tmp_path / "v.mp4", 200)
    data = bytearray(path.read_bytes())
    data[len(data) // 2 : len(data) // 2 + len(data) // 5] = bytes(len(data) // 5)
    path.write_bytes(data)
    (tmp_path / "bad.mp4").write_bytes(b"no video")
    wanted = window_frames(20, 16, ExtractConfig(step=4))  # what lies behind the last window counts as well
    for name in ("v.mp4", "bad.mp4"):
        with pytest.raises(DecodeError, match=name):
            list(stream_windows(str(tmp_path / name), wanted, lambda frames: frames, batch=8))


MEASURE = """
import resource, sys, torch
from vmae2_fast.config import ExtractConfig
from vmae2_fast.data import probe
from vmae2_fast.data.windows import squash_frames, stream_windows, window_frames
torch.set_num_threads(1)
for path in sys.argv[1:]:
    wanted = window_frames(probe(path).num_frames, 16, ExtractConfig(step=16))
    clips = stream_windows(path, wanted, lambda frames: squash_frames(frames, 32), batch=8)
    count = sum(len(clip) for clip in clips)
    print(count, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


def test_memory_does_not_grow_with_the_length_of_a_video(tmp_path):
    """20 minutes, 332 MB decoded: the peak is less than a tenth of that above the peak of one minute."""
    short = write_untrimmed(tmp_path / "short.mp4", 60 * 10, size=96, rate=10, moving=False)
    path = write_untrimmed(tmp_path / "long.mp4", 20 * 60 * 10, size=96, rate=10, moving=False)
    done = subprocess.run([sys.executable, "-c", MEASURE, str(short), str(path)], capture_output=True, text=True, check=True)
    (_, early), (count, peak) = (map(int, line.split()) for line in done.stdout.splitlines())
    assert count == (12000 - 16) // 16 + 1
    assert peak - early < 33_000  # KiB
