"""Batches: right clips in the right order whatever the processes, bad files replaced, counted and named."""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import shutil
import threading
from collections import Counter

import numpy as np
import pytest
import torch

from vmae2_fast.config import AugmentConfig, DataConfig, SourceConfig
from vmae2_fast.data import BadDataError, EvaluationLoader, ManifestError, VideoLoader, decode_yuv420
from vmae2_fast.data import loader as loader_module
from vmae2_fast.data import workers as workers_module
from vmae2_fast.data.plan import cut_views
from vmae2_fast.data.sampling import Purpose, counter_rng
from vmae2_fast.ops import Yuv420, resize_crop

FRAMES = 40


@pytest.fixture(scope="module")
def videos(tmp_path_factory, video_writer, jpeg_writer):
    """Ten numbered videos of 40 frames and three folders of 20 stills, as two sources of a datasets.toml."""
    root = tmp_path_factory.mktemp("videos")
    (root / "v").mkdir()
    lines = []
    for i in range(10):
        video_writer(root / "v" / f"clip {i}.mp4", g="12", bf="2", first=i * 20 % 200)
        lines.append(f"clip {i}.mp4 {i % 4}")
    (root / "v" / "train.csv").write_text("\n".join(lines))
    stills = [jpeg_writer(root / "s" / f"d{i}", 20) for i in range(3)]
    (root / "s" / "train.csv").write_text("\n".join(f"{folder.name} 20 {i}" for i, folder in enumerate(stills)))
    (root / "datasets.toml").write_text(
        '[v]\nroot = "v"\ntrain = "train.csv"\nclasses = 4\n'
        '[s]\nroot = "s"\ntrain = "train.csv"\nkind = "frames"\ntemplate = "img_{:05}.jpg"\nstride = 1\nclasses = 4\n')
    return root


def _data(videos, *names, **values):
    sources = tuple(SourceConfig(name=name) for name in names or ("v", "s"))
    return DataConfig(sources=sources, datasets=str(videos / "datasets.toml"), **{"stride": 2, **values})


def _loader(videos, *names, steps=4, start=0, clips=5, rank=0, world=1, quarantine=None, **values):
    return VideoLoader(
        _data(videos, *names, **values), frames=4, size=32, clips_per_batch=clips, seed=11, start=start, steps=steps,
        rank=rank, world=world, quarantine=quarantine)


def _left():
    """Decoders that still run."""
    threads = [thread for thread in threading.enumerate() if thread.name.startswith("vmae2-decode")]
    return threads + [process for process in multiprocessing.active_children() if "pebble" in process.name]


def _same(a, b):
    return (torch.equal(a.clip, b.clip) and torch.equal(a.label, b.label) and torch.equal(a.position, b.position)
            and torch.equal(a.view, b.view) and a.paths == b.paths and a.replaced == b.replaced)  # fmt: skip


def test_batches(videos):
    loader = _loader(videos, views=2)
    batches = list(loader)
    assert len(batches) == 4
    assert loader.num_clips == 13
    assert loader.num_classes == 4
    for step, batch in enumerate(batches):
        assert batch.clip.shape == (10, 4, 32, 32, 3)
        assert batch.clip.dtype == torch.uint8
        assert batch.clip.is_contiguous()
        assert batch.position.tolist() == [p for p in range(5 * step, 5 * step + 5) for _ in range(2)]
        assert batch.view.tolist() == [0, 1] * 5
        assert batch.position.dtype == batch.view.dtype == batch.label.dtype == torch.int64
        assert batch.paths[::2] == batch.paths[1::2]
        assert len(batch.paths) == 10
        assert not batch.replaced
        expected = [int(path[-5]) % 4 if path.endswith(".mp4") else int(path[-1]) for path in batch.paths]
        assert batch.label.tolist() == expected
    paths = [path for batch in batches for path in batch.paths[::2]]
    assert len(set(paths[:13])) == 13
    assert paths[:7] != paths[13:]
    stats = loader.stats
    assert (stats["decoded"], stats["replaced"], stats["bad"]) == (20, 0, {})
    assert stats["decode_s"] > 0
    assert stats["wait_s"] > 0
    assert loader.position == 20
    assert not _left()


def test_pixels_are_those_of_the_planned_frames(videos, read_numbers):
    """With whole frames of the clip's own size the counters drawn in them can be read in the batch."""
    data = _data(videos, "v", crop="center", stride=3)
    loader = VideoLoader(data, frames=4, size=48, clips_per_batch=10, seed=2, steps=2)
    assert loader.planner.windows(48, 64, 0, 0)[0].left == 8
    for batch in loader:
        for clip, position, path in zip(batch.clip, batch.position, batch.paths):
            ids = loader.planner.frame_ids(FRAMES, 3, int(position) // 10, int(position))
            framed = np.pad(clip.numpy(), ((0, 0), (0, 0), (8, 8), (0, 0)))
            framed[:, :24, :8], framed[:, 24:, :8] = 20, 235  # the first and last column are cut off: bits 0 and 7
            framed[:, :24, -8:], framed[:, 24:, -8:] = 20, 235
            first = int(path[-5]) * 20 % 200
            assert read_numbers(framed) == [(first + k) & 0b01111110 for k in ids]


def test_same_batches_for_any_number_of_processes_and_any_prefetch(videos):
    reference = list(_loader(videos, workers=1, prefetch=1, views=2, flip=True))
    for values in ({"workers": 4, "prefetch": 1}, {"workers": 0, "prefetch": 9}, {"cache_mb": 16}):
        assert all(_same(a, b) for a, b in zip(reference, _loader(videos, views=2, flip=True, **values), strict=True))


def _epochs(videos, *, workers, world):
    """Three epochs in global order: path, clip and plan of every position, made by `world` ranks."""
    augment = AugmentConfig(randaugment="rand-m7-n4-mstd0.5-inc1", erase=0.5)
    rows = {}
    for rank in range(world):
        loader = _loader(
            videos, clips=1, steps=-(-39 // world), rank=rank, world=world, workers=workers, views=2, flip=True,
            crop="random_resized", sampling="dense", augment=augment,
        )  # fmt: skip
        for batch in loader:
            position = int(batch.position[0])
            count, stride = (FRAMES, 2) if batch.paths[0].endswith(".mp4") else (20, 1)
            plan = loader.planner.plan(count, 48, 64, stride, epoch=position // 13, position=position)
            rows[position] = (batch.paths[0], batch.clip, plan.frames.tolist(), plan.views)
    return [rows[position] for position in range(39)]


def test_order_and_plans_are_the_same_for_any_workers_and_ranks(videos):
    alone = _epochs(videos, workers=1, world=1)
    paths = [path for path, *_ in alone]
    for e in range(3):  # two sources of 10 and 3 clips: every epoch holds each clip once, in an order of its own
        assert len(set(paths[13 * e:13 * e + 13])) == 13
    assert paths[:13] != paths[13:26]
    for path, clip, frames, views in alone[:5]:  # the plan is what the batch was made by
        video = decode_yuv420(path, np.array(frames)) if path.endswith(".mp4") else None
        if video is not None:
            assert torch.equal(clip, cut_views(video, views, 32))
    for workers, world in ((4, 1), (2, 2)):
        for (path, clip, *plan), (other_path, other_clip, *other_plan) in zip(
            alone, _epochs(videos, workers=workers, world=world), strict=True
        ):
            assert path == other_path
            assert plan == other_plan
            assert torch.equal(clip, other_clip)


def test_resume_continues_where_it_was(videos):
    whole = list(_loader(videos, steps=6))
    assert all(_same(a, b) for a, b in zip(whole[4:], _loader(videos, steps=2, start=20), strict=True))
    loader = _loader(videos, steps=None)
    seen = []
    for batch in loader:
        seen.append(batch)
        if len(seen) == 3:
            break
    assert not _left()
    assert loader.position == 15
    with contextlib.closing(iter(loader)) as batches:
        seen.append(next(batches))
    assert all(_same(a, b) for a, b in zip(whole[:4], seen, strict=True))
    assert not _left()


def test_devices_share_the_positions(videos):
    single = list(_loader(videos, steps=2, clips=6))
    ranks = [list(_loader(videos, steps=2, clips=3, rank=r, world=2)) for r in range(2)]
    for step, batch in enumerate(single):
        parts = [ranks[r][step] for r in range(2)]
        assert torch.equal(batch.clip, torch.cat([part.clip for part in parts]))
        assert batch.paths == parts[0].paths + parts[1].paths


def test_closing_ends_the_processes(videos):
    with _loader(videos, steps=None, workers=3) as loader:
        batches = iter(loader)
        next(batches)
        assert len(multiprocessing.active_children()) == 3
    assert not _left()
    with pytest.raises(StopIteration):
        next(batches)
    loader.close()


def test_views_share_one_decode(videos, monkeypatch):
    calls = []
    decode = workers_module.video_frames
    monkeypatch.setattr(workers_module, "video_frames", lambda path, ids: calls.append(len(ids)) or decode(path, ids))
    batches = list(_loader(videos, "v", views=3, steps=2, workers=0))
    assert calls == [4] * 10
    assert batches[0].clip.shape[0] == 15
    clips = batches[0].clip.unflatten(0, (5, 3))
    assert any(not torch.equal(clip[0], clip[1]) for clip in clips)


def test_cached_videos_are_decoded_once(videos, monkeypatch):
    calls = []
    decode = workers_module.video_frames
    monkeypatch.setattr(workers_module, "video_frames", lambda path, ids: calls.append(path) or decode(path, ids))
    list(_loader(videos, "v", steps=8, cache_mb=64, workers=0, prefetch=1))
    assert len(calls) == 20  # for each of ten videos the planned frames, then all of them to keep


@pytest.mark.parametrize("values", [{}, {"cache_mb": 64}, {"augment": AugmentConfig(randaugment="rand-m7-n4-mstd0.5-inc1")}])
def test_frames_reach_the_clips_as_planes_or_are_counted(videos, tmp_path, video_writer, monkeypatch, values):
    shutil.copytree(videos / "v", tmp_path / "v")
    video_writer(tmp_path / "v" / "clip 3.mp4", pix_fmt="yuv444p", g="12", bf="2", first=60)
    (tmp_path / "datasets.toml").write_text((videos / "datasets.toml").read_text())
    shutil.copytree(videos / "s", tmp_path / "s")
    cut = []

    def spy(video, *arguments, **options):
        cut.append(type(video))
        return cut_views(video, *arguments, **options)

    monkeypatch.setattr(loader_module, "cut_views", spy)
    loader = _loader(tmp_path, steps=1, clips=13, workers=0, **values)
    next(iter(loader))
    assert Counter(cut) == {Yuv420: 9, torch.Tensor: 4}
    assert loader.stats["rgb"] == {"pixel format yuv444p": 1, "pixel format yuvj444p": 3}
    evaluation = EvaluationLoader(_data(tmp_path, workers=0), frames=4, size=48, segments=2, crops=3)
    for _ in range(2):  # counted anew each time
        assert len(list(evaluation)) == 13
        assert evaluation.stats["rgb"] == loader.stats["rgb"]


@pytest.fixture
def damaged(videos, tmp_path):
    """The videos with three of ten made unusable."""
    root = tmp_path / "set"
    shutil.copytree(videos, root)
    (root / "v" / "clip 2.mp4").write_bytes(b"")
    (root / "v" / "clip 5.mp4").write_bytes(bytes(1000))
    (root / "v" / "clip 7.mp4").unlink()
    return root


def test_bad_clips_are_replaced_and_named_once(damaged, tmp_path):
    log = tmp_path / "quarantine.jsonl"
    bad = {str(damaged / "v" / f"clip {i}.mp4") for i in (2, 5, 7)}
    loader = _loader(damaged, "v", steps=6, quarantine=log)
    batches = list(loader)
    replaced = [r for batch in batches for r in batch.replaced]
    assert {r.path for r in replaced} == bad
    assert all(r.reason for r in replaced)
    assert not bad & {path for batch in batches for path in batch.paths}
    assert all(int(path[-5]) % 4 == label for batch in batches for path, label in zip(batch.paths, batch.label))
    stats = loader.stats
    assert stats["decoded"] == 30
    assert stats["replaced"] == len({r.position for r in replaced}) == 9
    assert sum(stats["bad"].values()) == len(replaced)
    assert set(stats["bad"]) == bad
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    assert sorted(line["path"] for line in lines) == sorted(bad)
    assert all(line.keys() == {"path", "reason", "position"} for line in lines)

    again = list(_loader(damaged, "v", steps=6, workers=4, quarantine=log))
    assert all(_same(a, b) for a, b in zip(batches, again, strict=True))
    assert len(log.read_text().splitlines()) == 3


def test_a_replacement_is_drawn_from_its_own_epoch_and_attempt(damaged):
    """Attempt k at a position draws one of the epoch's ten clips, its frames and its window from the streams of k."""
    good = {0, 4, 8}
    for i in set(range(10)) - good:
        (damaged / "v" / f"clip {i}.mp4").write_bytes(b"")
    loader = _loader(damaged, "v", steps=8, max_bad_rate=1.0, max_attempts=100)
    attempts = {}
    for batch in loader:
        for clip, position, path in zip(batch.clip, batch.position.tolist(), batch.paths):
            epoch, attempt = position // 10, 0
            drawn = [loader.mixture.record(position)[1]]
            while drawn[-1] not in good:
                attempt += 1
                rng = counter_rng(11, epoch, position, 0, Purpose.REPLACEMENT, attempt)
                drawn.append(loader.mixture.record(10 * epoch + rng.randint(10))[1])
            attempts[position] = attempt
            assert path == str(damaged / "v" / f"clip {drawn[-1]}.mp4")
            failed = [r.path for r in batch.replaced if r.position == position]
            assert failed == [str(damaged / "v" / f"clip {i}.mp4") for i in drawn[:-1]]
            frames = decode_yuv420(path, loader.planner.frame_ids(FRAMES, 2, epoch, position, attempt))
            windows = loader.planner.windows(48, 64, epoch, position, attempt)
            assert torch.equal(clip, resize_crop(frames, windows, 32)[0])
    for epoch in range(4):
        assert max(attempts[p] for p in range(10 * epoch, 10 * epoch + 10)) >= 2, "the case needs a second attempt"


def test_a_broken_source_stops_the_run(damaged):
    for i in range(10):
        (damaged / "v" / f"clip {i}.mp4").write_bytes(bytes(1000))
    with pytest.raises(BadDataError, match=r"no clip found for position \d+ in 9 attempts; last: .*clip \d.mp4: "):
        list(_loader(damaged, "v"))
    assert not _left()
    loader = _loader(damaged, steps=20, max_bad_rate=0.3, max_attempts=500)
    message = r"of 3\d clips could not be decoded, more than data.max_bad_rate=0.3 allows; for example .*mp4"
    with pytest.raises(BadDataError, match=message):
        list(loader)
    assert not _left()


def test_bad_arguments(videos):
    for values in ({"clips": 0}, {"start": -1}, {"rank": 2, "world": 2}):
        with pytest.raises(ValueError, match="out of range"):
            _loader(videos, **values)
    with pytest.raises(ManifestError, match="unknown data set 'w'"):
        _loader(videos, "w")


def test_unlabelled_sources_give_minus_one(videos, tmp_path):
    shutil.copytree(videos / "v", tmp_path / "v")
    (tmp_path / "v" / "pre.csv").write_text("clip 0.mp4 0 -1\nclip 3.mp4 0 -1\n")
    data = DataConfig(sources=(SourceConfig(name="x", root=str(tmp_path / "v"), list="pre.csv"),), stride=2)
    loader = VideoLoader(data, frames=4, size=32, clips_per_batch=4, steps=1)
    assert [batch.label.tolist() for batch in loader] == [[-1] * 4]
    assert loader.num_classes == 0


@pytest.mark.parametrize("sampling", ["dense", "segment"])
def test_evaluation_decodes_each_video_once_for_all_views(videos, monkeypatch, sampling):
    calls = []
    decode = workers_module.video_frames
    monkeypatch.setattr(workers_module, "video_frames", lambda path, ids: calls.append(path) or decode(path, ids))
    loader = EvaluationLoader(_data(videos, sampling=sampling, workers=0), frames=4, size=48, segments=3, crops=3)
    views = list(loader)
    assert len(views) == len(loader) == loader.num_videos == 13
    assert len(calls) == 10
    assert [v.index for v in views] == list(range(13))
    assert [v.label for v in views] == [0, 1, 2, 3, 0, 1, 2, 3, 0, 1, 0, 1, 2]
    for video in views:
        assert video.clips.shape == (9, 4, 48, 48, 3)
        assert video.clips.is_contiguous()
    # windows 0, 8 and 16 pixels from the left of frames already as high as the clip: shifted copies of each other
    clips = views[4].clips.unflatten(0, (3, 3))
    assert torch.equal(clips[:, 0, :, :, 16:], clips[:, 2, :, :, :-16])
    assert not torch.equal(clips[0, 0], clips[1, 0])
    assert not _left()


def test_one_view_is_the_centre(videos):
    dense = _data(videos, "v", sampling="dense")
    single = list(EvaluationLoader(dense, frames=4, size=48))
    several = list(EvaluationLoader(dense, frames=4, size=48, crops=3))
    for a, b in zip(single, several, strict=True):
        assert a.clips.shape[0] == 1
        assert torch.equal(a.clips[0], b.clips[1])


def test_evaluation_in_shares(videos):
    whole = {v.index: v for v in EvaluationLoader(_data(videos), frames=4, size=32, segments=2)}
    shares = [EvaluationLoader(_data(videos, workers=1), frames=4, size=32, segments=2, rank=r, world=3) for r in range(3)]
    assert [len(share) for share in shares] == [5, 4, 4]
    merged = {v.index: v for share in shares for v in share}
    assert merged.keys() == whole.keys()
    assert all(torch.equal(merged[i].clips, whole[i].clips) for i in whole)


def test_evaluation_leaves_bad_videos_out_and_says_so(damaged, tmp_path):
    log = tmp_path / "quarantine.jsonl"
    loader = EvaluationLoader(_data(damaged, "v"), frames=4, size=32, quarantine=log)
    assert [v.index for v in loader] == [0, 1, 3, 4, 6, 8, 9]
    assert loader.stats["decoded"] == 10
    assert loader.stats["replaced"] == 3
    assert len(loader.stats["bad"]) == 3
    assert [json.loads(line)["position"] for line in log.read_text().splitlines()] == [2, 5, 7]
    for i in range(6):
        (damaged / "v" / f"clip {i}.mp4").write_bytes(b"")
    with pytest.raises(BadDataError, match="7 of 10 clips could not be decoded"):
        list(EvaluationLoader(_data(damaged, "v"), frames=4, size=32))
