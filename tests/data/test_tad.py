"""Files of temporal detection and their loader: what is read, what is refused, and which parts are learned from."""

from __future__ import annotations

import json
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch
import torch.nn.functional as F

from vmae2_fast.config import ActionFormerConfig, TadDataConfig
from vmae2_fast.data import DecodeError, decode_video, probe, windows
from vmae2_fast.data.probing import frame_rate
from vmae2_fast.data.streaming import stream_video
from vmae2_fast.data.synthetic_tad import write_tad_features
from vmae2_fast.data.tad import (
    Detections,
    TadError,
    choose_subset,
    read_annotations,
    read_detections,
    read_features,
    read_video_scores,
    write_detections,
)
from vmae2_fast.data.tad_loader import Grid, Sequence, TadLoader, TadSource, cut_sequence, resize_features

DETECTOR = ActionFormerConfig(classes=3, windows=(5, 5, 5, 5), range_ends=(4.0, 8.0, 16.0), max_length=128)


def database(**videos):
    return {"database": {name: {"subset": "test", "duration": 20.0, "fps": 25.0, **entry} for name, entry in videos.items()}}


def event(label="run", start=1.0, end=2.0, **more):
    return {"label": label, "segment": [start, end], **more}


def write(path: Path, content: object) -> Path:
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def test_annotations_are_read_and_what_cannot_be_is_counted(tmp_path):
    listed = [event("b", label_id=0), event("a", label_id=1), event("a", 5, 4, label_id=1), event("a", 25, 26, label_id=1)]
    content = database(one={"annotations": listed, "subset": "Test"}, two={"fps": None}, three={"annotations": []})
    read = read_annotations(write(tmp_path / "a.json", content))
    assert read.classes == ("b", "a")
    assert read.videos["one"].labels == ("b", "a")
    assert read.videos["one"].segments.tolist() == [[1, 2], [1, 2]]
    assert read.videos["two"].fps is None
    assert read.ignored == {
        "annotations that end before they begin": 1, "annotations that begin after the end of their video": 1
    }  # fmt: skip
    assert list(choose_subset(read, "TEST", ["two"])) == ["one", "three"]
    del listed[0]["label_id"]
    assert read_annotations(write(tmp_path / "b.json", content)).classes == ("a", "b")  # by name where one has no number


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "a.json: not JSON"),
        ([1], "needs an object under 'database'"),
        ({"results": {}}, "needs an object under 'database'"),
        ({"database": {"v": 3}}, "v: needs an object with a subset"),
        (database(v={"duration": "long"}), "v.duration: must be a number from 0 on, got 'long'"),
        (database(v={"fps": 0}), "v.fps: must be above 0"),
        (database(v={"annotations": {"label": 1}}), "v.annotations: must be a list, got dict"),
        (database(v={"annotations": [event(), {"label": "x"}]}), r"v.annotations\[1\].segment: must be \[start, end\]"),
        (database(v={"annotations": [event(end=float("nan"))]}), r"annotations\[0\].segment: must be a number"),
        (database(v={"annotations": [event(label=5)]}), r"annotations\[0\].label: must be the name of a class, got 5"),
        (database(v={"annotations": [event("a", label_id=1), event("b", label_id=1)]}), "label_id 1 stands for"),
        (database(v={"annotations": [event("a", label_id=1), event("a", label_id=2)]}), "class 'a' has several numbers"),
    ],
)
def test_malformed_annotations_are_named(tmp_path, content, message):
    with pytest.raises(TadError, match=message):
        read_annotations(write(tmp_path / "a.json", content))


def test_missing_files_subsets_and_videos_are_named(tmp_path):
    with pytest.raises(TadError, match=r"none\.json: No such file"):
        read_annotations(tmp_path / "none.json")
    read = read_annotations(write(tmp_path / "a.json", database(v={})))
    with pytest.raises(TadError, match="no video of subset 'training'; there are: test"):
        choose_subset(read, "training")
    with pytest.raises(TadError, match="block_list names 'w'"):
        choose_subset(read, "test", ["w"])


def test_detections_and_scores_survive_a_round_trip_and_errors_are_named(tmp_path):
    found = {"v": Detections(np.array([[0.5, 2.25], [3.0, 4.0]]), ("a", "b"), np.array([0.75, 0.5])), "w": Detections(
        np.zeros((0, 2)), (), np.zeros(0))}  # fmt: skip
    assert write_detections(tmp_path / "d.json", found) == 2
    again = read_detections(tmp_path / "d.json")
    assert again["v"].labels == ("a", "b")
    assert np.array_equal(again["v"].segments, found["v"].segments)
    assert again["w"].segments.shape == (0, 2)
    for content, message in (
        ({"results": {"v": {}}}, "v: must be a list of detections"),
        ({"results": {"v": [{**event(), "score": None}]}}, r"v\[0\].score: must be a number, got None"),
    ):
        with pytest.raises(TadError, match=message):
            read_detections(write(tmp_path / "bad.json", content))
    for content, message in (
        ({"results": {"v": [0.5]}}, "names of the classes under 'class'"),
        ({"class": ["a", "b"], "results": {"v": [0.5]}}, "v: needs 2 scores"),
        ({"class": ["a", "a"], "results": {}}, "class 'a' is named twice"),
        ({"class": ["a"], "results": {"v": [-1]}}, "must be a number from 0 on"),
    ):
        with pytest.raises(TadError, match=message):
            read_video_scores(write(tmp_path / "bad.json", content))


def test_features_that_cannot_be_used_are_named(tmp_path):
    path = tmp_path / "v.npy"
    for array, message in (
        (np.zeros((3, 4), np.float32), "4 channels, the detector takes 5"), (np.zeros(3, np.float32), r"got float32 \[3\]"),
        (np.zeros((0, 5), np.float32), r"got float32 \[0, 5\]"), (np.zeros((2, 5), np.int64), "got int64"),
        (np.full((2, 5), np.nan, np.float32), "not finite"), (np.array([{}], dtype=object), "not readable"),
    ):  # fmt: skip
        np.save(path, array)
        with pytest.raises(TadError, match=message):
            read_features(path, 5)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(TadError, match="not readable"):
        read_features(path)
    np.save(path, np.ones((2, 5), np.float16))
    assert read_features(path, 5).dtype == np.float32


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    root = tmp_path_factory.mktemp("tad") / "data"
    write_tad_features(root, train=8, test=3)
    return root


def source(root, **changes):
    training = changes.pop("training", True)
    data = {"features": str(root / "features"), "annotations": str(root / "annotations.json"), "workers": 2, **changes}
    return TadSource(TadDataConfig(**data), frames=16, channels=16, training=training)


def test_batches_are_a_function_of_the_position(toy):
    def batches(begin, steps, workers=1, rank=0, world=1):
        loader = TadLoader(
            source(toy, crop_range=(0.5, 0.9), workers=workers), DETECTOR, clips_per_batch=2, seed=3, rank=rank, world=world
        )
        loader.position, loader.steps = begin, steps
        with loader:
            return list(loader)

    whole = batches(0, 6)
    assert [len(b.paths) for b in whole] == [2] * 6
    for other in (batches(4, 4, workers=3), [b for pair in zip(batches(4, 2, 2, 0, 2), batches(4, 2, 2, 1, 2)) for b in pair]):
        for ours, theirs in zip(whole[2:], other, strict=True):
            assert ours.paths == theirs.paths
            for name in ("features", "valid", "classes", "distances"):
                assert torch.equal(getattr(ours, name), getattr(theirs, name))
    first_epoch = [name for b in whole[:4] for name in b.paths]
    assert sorted(first_epoch) == sorted(set(first_epoch))
    assert whole[0].features.shape == (2, 128, 16)
    assert whole[0].classes.shape == (2, 128 + 64 + 32 + 16, 3)


def test_features_and_actions_lie_on_one_grid(toy):
    """In the toy features the class direction begins where the annotated action begins."""
    item = source(toy, subset="test", training=False).read(0)
    loud = item.features.norm(dim=1) > 0.8
    inside = torch.zeros_like(loud)
    for start, end in item.segments.tolist():
        inside[int(np.ceil(start - 1e-3)) : int(np.floor(end + 1e-3)) + 1] = True
    assert (loud == inside).float().mean() > 0.97
    seconds = np.array([0.5, 3.25, 7.0])
    assert item.grid.to_seconds(item.grid.to_features(seconds)) == pytest.approx(seconds)
    assert item.grid.to_seconds(np.array([-9.0, 1e6])).tolist() == [0.0, item.grid.duration]


def test_stretched_features_keep_actions_where_they_are(toy):
    plain, stretched = (source(toy, subset="test", training=False, resize_to=n).read(0) for n in (None, 200))
    assert stretched.features.shape == (200, 16)
    for one in (plain, stretched):
        again = one.grid.to_seconds(one.segments.numpy())
        assert again == pytest.approx(plain.grid.to_seconds(plain.segments.numpy()), abs=1e-4)
    shrunk = resize_features(torch.arange(12.0)[:, None], 4, "roi_align")
    assert shrunk.flatten().tolist() == pytest.approx([1.0, 4.0, 7.0, 10.0])


def test_cut_sequences_keep_an_action_and_its_place():
    features = torch.arange(300.0)[:, None]
    segments, labels = torch.tensor([[250.0, 260.0], [10.0, 12.0]]), torch.tensor([2, 1])
    whole = Sequence("v", features, segments, labels, Grid(30, 4, 16, 40))
    rng = np.random.RandomState(0)
    for _ in range(50):
        part = cut_sequence(whole, rng, longest=20, threshold=0.5, crop_range=None)
        first = float(part.features[0])
        assert len(part.features) == 20
        assert len(part.labels) >= 1
        for (start, end), label in zip(part.segments, part.labels):
            true = segments[labels.tolist().index(int(label))]
            assert start + first >= true[0]
            assert end + first <= true[1]
            assert (end - start) >= 0.5 * (true[1] - true[0])
    shares = [len(cut_sequence(whole, rng, longest=400, threshold=0.5, crop_range=(0.9, 1.0)).features) for _ in range(20)]
    assert 270 <= min(shares) < max(shares) <= 300
    assert cut_sequence(whole, rng, longest=400, threshold=0.5, crop_range=None) is whole
    silent = whole._replace(segments=torch.zeros(0, 2), labels=labels[:0])
    assert len(cut_sequence(silent, rng, longest=20, threshold=0.5, crop_range=None).features) == 20


def test_what_a_run_cannot_use_is_said_before_it_begins(toy, tmp_path, capsys):
    content = json.loads((toy / "annotations.json").read_text())
    first = next(iter(content["database"]))
    content["database"][first]["annotations"] = []
    content["database"]["test_010"]["annotations"].append(event(label="flying", label_id=9))
    partial = write(tmp_path / "partial.json", content)
    assert len(source(toy, annotations=str(partial))) == 7
    assert "1 videos without annotations are left out of training" in capsys.readouterr().err
    assert source(toy, annotations=str(partial), subset="test", training=False).empty == 0
    with pytest.raises(TadError, match="test_010: class 'flying' is none of the model's"):
        TadSource(
            TadDataConfig(features=str(toy / "features"), annotations=str(partial), subset="test"), frames=16, channels=16,
            classes=("circling", "jumping", "waving"),
        )  # fmt: skip
    for changes, message in (
        ({"features": str(tmp_path / "none")}, "none does not exist"),
        ({"features": str(tmp_path)}, "no features of validation_000 and 7 more of subset 'validation'"),
        ({"annotations": ""}, "give data.features"),
    ):
        with pytest.raises(TadError, match=message):
            source(toy, **changes)
    for video in content["database"].values():
        del video["fps"]
    untimed = write(tmp_path / "untimed.json", content)
    with pytest.raises(TadError, match=r"has no fps; set data\.fps"):
        source(toy, annotations=str(untimed))
    assert source(toy, annotations=str(untimed), fps=30.0).read(0).grid.fps == 30


def test_features_of_other_windows_are_refused(toy, tmp_path):
    folder = tmp_path / "features"
    folder.mkdir()
    write(folder / "features.json", {"step": 16, "frames": 16})
    with pytest.raises(TadError, match=r"taken with step 16, data\.stride is 4"):
        source(toy, features=str(folder))


# Windows over encoded video.


def write_video(path: Path, count: int, *, size: int = 32, rate: int = 25, moving: bool = True) -> Path:
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=rate)
        stream.width, stream.height, stream.pix_fmt, stream.thread_count = size, size, "yuv420p", 1
        image = np.zeros((size, size, 3), np.uint8)
        frame = av.VideoFrame.from_ndarray(image, format="rgb24").reformat(format="yuv420p")
        for k in range(count):
            if moving:
                image[:] = (np.arange(size)[:, None, None] * 3 + 5 * k) % 256
                frame = av.VideoFrame.from_ndarray(image, format="rgb24").reformat(format="yuv420p")
            frame.pts, frame.time_base = k, Fraction(1, rate)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def official_windows(path: Path, step: int, frames: int, size: int) -> torch.Tensor:
    """The released script: every window decoded for itself, divided by 255, resized."""
    count, out = probe(str(path)).num_frames, []
    for start in range(0, count - frames + 1, step):
        clip = torch.from_numpy(decode_video(str(path), np.arange(start, start + frames))).permute(3, 0, 1, 2).float() / 255
        out.append(F.interpolate(clip.transpose(0, 1), (size, size), mode="bilinear", align_corners=False).transpose(0, 1))
    return torch.stack(out)


@pytest.mark.parametrize(("count", "step"), [(16, 4), (17, 4), (61, 4), (70, 16), (75, 20), (64, 1)])
def test_windows_are_those_of_the_released_script(tmp_path, count, step, monkeypatch):
    path = write_video(tmp_path / "v.mp4", count)
    decoded = []

    def counted(name):
        for chunk in stream_video(name):
            decoded.append(len(chunk))
            yield chunk

    monkeypatch.setattr(windows, "stream_video", counted)
    taken = list(windows.stream_windows(str(path), frames=16, step=step, size=24, batch=3, normalize="none"))
    assert all(len(clip) == 3 for clip in taken[:-1])
    ours, theirs = torch.cat(taken), official_windows(path, step, 16, 24)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)
    assert sum(decoded) == count  # each once


def test_short_videos_and_both_normalisations(tmp_path):
    path = write_video(tmp_path / "v.mp4", 5)
    (plain,) = windows.stream_windows(str(path), frames=16, step=4, size=32, batch=8, normalize="none")
    (coloured,) = windows.stream_windows(str(path), frames=16, step=4, size=32, batch=8, normalize="imagenet")
    assert plain.shape == (1, 3, 16, 32, 32)
    assert torch.equal(plain[0, :, 4:], plain[0, :, 4:5].expand(3, 12, 32, 32))
    mean, std = (torch.tensor(v)[:, None, None, None] for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    torch.testing.assert_close(coloured[0], (plain[0] - mean) / std)
    assert frame_rate(str(path)) == 25


def test_a_video_that_cannot_be_read_is_an_error_not_a_shorter_one(tmp_path):
    path = write_video(tmp_path / "v.mp4", 200)
    data = bytearray(path.read_bytes())
    data[len(data) // 2 : len(data) // 2 + len(data) // 5] = bytes(len(data) // 5)
    path.write_bytes(data)
    (tmp_path / "bad.mp4").write_bytes(b"no video")
    for name in ("v.mp4", "bad.mp4"):
        with pytest.raises(DecodeError, match=name):
            list(windows.stream_windows(str(tmp_path / name), frames=16, step=4, size=32, batch=8, normalize="none"))


MEASURE = """
import resource, sys, torch
from vmae2_fast.data.windows import stream_windows
torch.set_num_threads(1)
count = 0
for number, clip in enumerate(stream_windows(sys.argv[1], frames=16, step=16, size=32, batch=8, normalize="none")):
    count += len(clip)
    if number == 4:
        early = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(count, early, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


def test_memory_does_not_grow_with_the_length_of_a_video(tmp_path):
    """20 minutes, 332 MB decoded: from the fifth batch on, the peak grows by less than a tenth of that."""
    path = write_video(tmp_path / "long.mp4", 20 * 60 * 10, size=96, rate=10, moving=False)
    done = subprocess.run([sys.executable, "-c", MEASURE, str(path)], capture_output=True, text=True, check=True)
    count, early, peak = map(int, done.stdout.split())
    assert count == (12000 - 16) // 16 + 1
    assert peak - early < 33_000  # KiB
