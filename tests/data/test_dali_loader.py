"""A loader over DALI gives the clips of a loader over PyAV; what DALI cannot decode, PyAV does, and it is counted.

DALI's CPU graph runs here: VP9, VP8 and JPEG by it, H.264 by PyAV's processes.
"""

from __future__ import annotations

import contextlib
import dataclasses
import multiprocessing
import threading
import warnings
from collections import Counter

import numpy as np
import pytest
import torch

from vmae2_fast.config import DataConfig, SourceConfig
from vmae2_fast.data import EvaluationLoader, VideoLoader, dali_pool
from vmae2_fast.data.ava_loader import AvaEvaluationLoader
from vmae2_fast.data.dali import DaliDecoder, DaliError, why_not_dali
from vmae2_fast.ops.yuv import Yuv420, frame_size

needs_dali = pytest.mark.skipif(why_not_dali() is not None, reason=str(why_not_dali()))
LEVELS = 5
"""What two decoders of the same grey picture may differ by: see `test_dali.py`, 3 levels for video and 5 for JPEG; resizing
takes means of pixels, which do not differ by more, and the rounding after it is that of the same kernel."""


@pytest.fixture(scope="module")
def videos(tmp_path_factory, video_writer, jpeg_writer):
    """Six VP9, two H.264 and a broken video, and two folders of stills, as sources v, h, b and s."""
    root = tmp_path_factory.mktemp("videos")
    for name in "vhbs":
        (root / name).mkdir()
    fast = {"deadline": "realtime", "cpu-used": "8"}
    for i in range(6):
        video_writer(root / "v" / f"{i}.webm", codec="libvpx-vp9", g="12", first=20 * i, **fast)
    for i in range(2):
        video_writer(root / "h" / f"{i}.mp4", g="12", first=20 * i)
        jpeg_writer(root / "s" / str(i), 20)
    (root / "b" / "0.mp4").write_text("no video\n" * 50)
    (root / "v" / "train.csv").write_text("".join(f"{i}.webm {i % 4}\n" for i in range(6)))
    (root / "h" / "train.csv").write_text("0.mp4 0\n1.mp4 1\n")
    (root / "b" / "train.csv").write_text("0.mp4 0\n")
    (root / "s" / "train.csv").write_text("0 20 0\n1 20 1\n")
    sources = [f'[{name}]\nroot = "{name}"\ntrain = "train.csv"\nclasses = 4\n' for name in "vhbs"]
    (root / "datasets.toml").write_text("".join(sources) + 'kind = "frames"\ntemplate = "img_{:05}.jpg"\nstride = 1\n')
    return root


def _data(videos, names, **values):
    sources = tuple(SourceConfig(name=name) for name in names)
    return DataConfig(sources=sources, datasets=str(videos / "datasets.toml"), **{"stride": 2, "workers": 1, **values})


def _batches(videos, names, *, steps=4, clips=3, **values):
    with VideoLoader(_data(videos, names, **values), frames=4, size=32, clips_per_batch=clips, seed=5, steps=steps) as loader:
        return list(loader), loader.stats


def _left():
    threads = [thread for thread in threading.enumerate() if thread.name.startswith(("vmae2-dali", "vmae2-decode"))]
    return threads + [process for process in multiprocessing.active_children() if "pebble" in process.name]


def _difference(a, b):
    return int((a.clip.int() - b.clip.int()).abs().max())


@needs_dali
@pytest.mark.filterwarnings("ignore:.*decoded by PyAV")
def test_the_clips_are_those_of_pyav(videos):
    theirs, _ = _batches(videos, "vhs", backend="pyav", views=2, flip=True)
    ours, stats = _batches(videos, "vhs", backend="dali", pipelines=2, views=2, flip=True)
    for a, b in zip(ours, theirs, strict=True):
        assert a.paths == b.paths
        for name in ("label", "position", "view", "padded"):
            assert torch.equal(getattr(a, name), getattr(b, name))
        assert a.clip.shape == b.clip.shape == (6, 4, 32, 32, 3)
        assert _difference(a, b) <= LEVELS
        h264 = [i for i, path in enumerate(a.paths) if path.endswith(".mp4")]
        assert torch.equal(a.clip[h264], b.clip[h264])
    by_pyav = sum(path.endswith(".mp4") for batch in ours for path in batch.paths[::2])
    assert by_pyav
    assert stats["fallback"] == {"codec h264 is not decoded by DALI on this cpu device": by_pyav}
    assert (stats["decoded"], stats["replaced"]) == (12, 0)
    assert not _left()


@needs_dali
def test_any_number_of_pipelines_gives_the_same_clips(videos):
    reference, _ = _batches(videos, "vs", backend="dali", pipelines=1, prefetch=1)
    for pipelines in (2, 4):
        again, stats = _batches(videos, "vs", backend="dali", pipelines=pipelines)
        assert all(torch.equal(a.clip, b.clip) and a.paths == b.paths for a, b in zip(again, reference, strict=True))
        assert not stats["fallback"]


@needs_dali
def test_a_bad_clip_is_replaced_by_the_same_one(videos):
    theirs, their_stats = _batches(videos, "vb", backend="pyav")
    ours, stats = _batches(videos, "vb", backend="dali", pipelines=2)
    assert stats["bad"] == their_stats["bad"]
    assert stats["replaced"] == their_stats["replaced"] > 0
    for a, b in zip(ours, theirs, strict=True):
        assert a.paths == b.paths
        assert _difference(a, b) <= LEVELS
        assert [r[:2] for r in a.replaced] == [r[:2] for r in b.replaced]


@needs_dali
@pytest.mark.parametrize("sampling", ["dense", "segment"])
def test_test_views_are_those_of_pyav(videos, sampling):
    views = {}
    for backend in ("pyav", "dali"):
        data = _data(videos, "vs", backend=backend, pipelines=2, sampling=sampling)
        with EvaluationLoader(data, frames=4, size=32, segments=2, crops=3) as loader:
            views[backend] = list(loader)
    for a, b in zip(views["dali"], views["pyav"], strict=True):
        assert (a.path, a.label, a.index) == (b.path, b.label, b.index)
        assert torch.equal(a.padded, b.padded)
        assert int((a.clips.int() - b.clips.int()).abs().max()) <= LEVELS


@needs_dali
@pytest.mark.filterwarnings("ignore:.*decoded by PyAV")
def test_clips_without_a_place_come_back_whole(videos, monkeypatch):
    """As those of AVA's evaluation, whose size is known only once the video is open."""
    monkeypatch.setattr(AvaEvaluationLoader, "_open", EvaluationLoader._open)
    job = {}
    with EvaluationLoader(_data(videos, "vh"), frames=4, size=32) as loader:
        for index, name in ((0, "v"), (6, "h")):
            job[name], _ = loader._job(index, dali_pool.DeviceMemory(torch.device("cpu")))
    pool = dali_pool.DaliPool("cpu", pipelines=1, workers=0, timeout_s=60, fallback=Counter())
    with contextlib.closing(pool):
        for name in "vh":
            whole = dataclasses.replace(job[name], cut=_shape, place=None)
            done = pool.result(pool.submit(whole, out=None))
            assert done.cut == (4, 48, 64)
            assert len(done.ids) == 4


def _shape(video, out):
    assert out is None
    planar = isinstance(video, Yuv420)  # of PyAV
    return (len(video.planes if planar else video), *frame_size(video))


@needs_dali
def test_a_run_that_fails_is_repeated_by_pyav(videos, monkeypatch):
    expected, _ = _batches(videos, "v", backend="pyav", steps=2)
    broken = iter([True])
    decode = DaliDecoder.decode

    def fails_once(self, clips):
        if next(broken, False):
            raise DaliError("no surface left")
        return decode(self, clips)

    monkeypatch.setattr(DaliDecoder, "decode", fails_once)
    with pytest.warns(UserWarning, match="is decoded by PyAV, not DALI: a DALI run failed: no surface left"):
        batches, stats = _batches(videos, "v", backend="dali", pipelines=1, steps=2)
    assert sum(stats["fallback"].values()) > 0
    for a, b in zip(batches, expected, strict=True):
        assert a.paths == b.paths
        assert _difference(a, b) <= LEVELS


@needs_dali
@pytest.mark.filterwarnings("ignore:.*decoded by PyAV")
def test_dali_that_always_fails_ends_the_run(videos, monkeypatch):
    def fails(self, clips):
        raise DaliError("no engine")

    monkeypatch.setattr(DaliDecoder, "decode", fails)
    with pytest.raises(RuntimeError, match=r"DALI failed 17 times in a row.*no engine.*data\.backend=pyav"):
        _batches(videos, "v", backend="dali", pipelines=1, steps=20, clips=6, workers=0, prefetch=1)
    assert not _left()


@needs_dali
def test_a_hung_run_names_its_files(videos, monkeypatch):
    over = threading.Event()

    @contextlib.contextmanager
    def hangs(self, clips):
        over.wait()
        yield []

    monkeypatch.setattr(DaliDecoder, "decode", hangs)
    with pytest.raises(RuntimeError, match=r"within data\.timeout_s=0\.2 seconds of any of: .*\.webm.*data\.backend=pyav"):
        _batches(videos, "v", backend="dali", pipelines=1, timeout_s=0.2)
    over.set()
    for thread in _left():
        thread.join()


@needs_dali
def test_a_fault_of_this_program_is_no_bad_clip(videos, monkeypatch):
    def fails(self, clips):
        raise TypeError("ours")

    monkeypatch.setattr(DaliDecoder, "decode", fails)
    with pytest.raises(TypeError, match="ours"):
        _batches(videos, "v", backend="dali", pipelines=1)


@needs_dali
def test_breaking_off_ends_threads_and_processes(videos):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loader = VideoLoader(_data(videos, "vh", backend="dali", pipelines=3), frames=4, size=32, clips_per_batch=4, seed=1)
        iteration = iter(loader)
        next(iteration)
        assert _left()
        loader.close()
    assert not _left()


def test_which_decoder_auto_is(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(dali_pool, "why_not_dali", lambda: None)
    assert dali_pool.dali_device(DataConfig()) is None
    assert dali_pool.dali_device(DataConfig(backend="dali")) == torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    assert dali_pool.dali_device(DataConfig()) == torch.device("cuda", 3)
    assert dali_pool.dali_device(DataConfig(backend="pyav")) is None
    assert dali_pool.dali_device(DataConfig(cache_mb=1)) is None
    monkeypatch.setattr(dali_pool, "why_not_dali", lambda: "NVIDIA DALI is not installed: pip install it")
    assert dali_pool.dali_device(DataConfig()) is None
    with pytest.raises(ValueError, match=r"data\.backend=dali: NVIDIA DALI is not installed: pip install it; or choose auto"):
        dali_pool.dali_device(DataConfig(backend="dali"))


def test_a_cache_is_for_pyav():
    with pytest.raises(ValueError, match=r"data\.cache_mb=5: only PyAV's frames are cached.*data\.backend=pyav"):
        DataConfig(backend="dali", cache_mb=5)


@pytest.mark.cuda
@needs_dali
@pytest.mark.filterwarnings("ignore:.*decoded by PyAV")
def test_a_late_training_step_sees_its_own_clips(videos):
    """The stream that trains is held up in every step, while clips for later ones are decoded and cut on other streams."""
    data = _data(videos, "h", backend="dali", pipelines=4)
    loader = VideoLoader(data, frames=4, size=32, clips_per_batch=2, seed=5, steps=12)
    theirs, _ = _batches(videos, "h", backend="pyav", steps=12, clips=2)
    copies = []
    for batch in loader:
        assert batch.clip.is_cuda
        torch.cuda._sleep(100_000_000)
        copies.append(batch.clip.clone())
    assert not loader.stats["fallback"]
    for copy, b in zip(copies, theirs, strict=True):
        assert np.abs(copy.cpu().numpy().astype(int) - b.clip.numpy()).max() <= LEVELS
