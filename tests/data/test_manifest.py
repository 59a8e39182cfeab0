"""Lists, datasets.toml and folder trees: read as they are, refused with file and line."""

from __future__ import annotations

import shutil

import numpy as np
import pytest

from vmae2_fast.config import DataConfig, SourceConfig
from vmae2_fast.data import Manifest, ManifestError, Record, open_sources
from vmae2_fast.data.labels import read_labels
from vmae2_fast.data.manifest import line_format


def _write(path, text):
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def _records(manifest):
    return [manifest[i] for i in range(len(manifest))]


@pytest.mark.parametrize(
    ("format", "text", "expected"),
    [
        ("pretrain", "a.mp4 0 -1\nd/b 5 62\n", [Record("a.mp4", 0, -1, -1), Record("d/b", 5, 62, -1)]),
        ("video", "a.mp4 3\nmy clip 7.mp4 0\n", [Record("a.mp4", 0, -1, 3), Record("my clip 7.mp4", 0, -1, 0)]),
        ("frames", "d/7 62 14\na b 9 0", [Record("d/7", 1, 62, 14), Record("a b", 1, 9, 0)]),
        ("video", "\ufeffa.mp4 3\n", [Record("a.mp4", 0, -1, 3)]),
        ("video", "\r\na.mp4 3\r\n\r\n  é ü.mp4  4  \r\n\n", [Record("a.mp4", 0, -1, 3), Record("é ü.mp4", 0, -1, 4)]),
    ],
)
def test_official_lines(tmp_path, format, text, expected):
    assert _records(Manifest.read(_write(tmp_path / "list.csv", text), format)) == expected
    assert _records(Manifest.of(expected)) == expected


@pytest.mark.parametrize(
    ("format", "text", "line"),
    [
        ("video", "a.mp4 3\n\nb.mp4\n", 3),
        ("video", "a.mp4 3\nb.mp4 three\n", 2),
        ("pretrain", "a.mp4 -1\n", 1),
        ("frames", "a 5 1\nb 5 1\nc 0 1\n", 3),
        ("video", "a.mp4 3\r\n\r\nb.mp4 10\r\n", 3),
        ("frames", "a 5 -1\n", 1),
    ],
)
def test_bad_lines_are_named(tmp_path, format, text, line):
    path = _write(tmp_path / "list.csv", text)
    with pytest.raises(ManifestError) as caught:
        Manifest.read(path, format, classes=10)
    assert str(caught.value).startswith(f"{path}:{line}: ")


def test_lists_that_cannot_be_read(tmp_path):
    empty = _write(tmp_path / "e.csv", "\n\n")
    for path, reason in ((tmp_path / "none.csv", "No such file"), (tmp_path, "directory"), (empty, "empty")):
        with pytest.raises(ManifestError, match=reason) as caught:
            Manifest.read(path, "video")
        assert str(path) in str(caught.value)


def test_format_by_first_line():
    assert line_format(b"a.mp4 3") == "video" == line_format(b"my clip.mp4 3")
    assert line_format(b"a.mp4 0 -1\n") == "pretrain" == line_format(b"d 1 62\n", labelled=False)
    assert line_format(b"d 62 14\n") == "frames"


TOML = """
[videos]
root = "v"
train = "train.csv"
val = "val.csv"
classes = 3
stride = 2
[stills]
root = "s"
train = "train.csv"
kind = "frames"
template = "img_{:05}.jpg"
labels = "names.txt"
[unlabeled]
root = "s"
train = "pre.csv"
kind = "frames"
template = "img_{:05}.jpg"
"""


@pytest.fixture
def datasets(tmp_path):
    for folder, name, text in (
        ("v", "train.csv", "a.mp4 2\n"), ("v", "val.csv", "b.mp4 0\n"),
        ("s", "train.csv", "d 9 1\n"), ("s", "pre.csv", "d 4 9\n"), ("s", "names.txt", "jump\nrun\n"),
    ):  # fmt: skip
        (tmp_path / folder).mkdir(exist_ok=True)
        _write(tmp_path / folder / name, text)
    return _write(tmp_path / "datasets.toml", TOML)


def _config(toml, *sources, **values):
    opened = tuple(SourceConfig(**{"name": "x", **source}) for source in sources)
    return DataConfig(sources=opened, datasets=toml and str(toml), **values)


def test_datasets_toml(datasets, tmp_path, monkeypatch):
    sources = [{"name": "videos", "stride": 5}, {"name": "stills", "weight": 0.5}, {"name": "unlabeled"}]
    data = _config(datasets, *sources)
    for opened in (open_sources(data), _by_environment(monkeypatch, datasets, sources)):
        videos, stills, unlabeled = opened
        assert (videos.stride, videos.classes, videos.template, videos.weight) == (5, 3, None, 1.0)
        assert videos.path(videos.manifest[0]) == str(tmp_path / "v" / "a.mp4")
        assert videos.manifest[0].label == 2
        assert (stills.classes, stills.label_names, stills.stride) == (2, ("jump", "run"), 4)
        assert stills.manifest[0] == Record("d", 1, 9, 1)
        assert unlabeled.manifest[0] == Record("d", 4, 9, -1)
        assert unlabeled.frame_files(unlabeled.manifest[0])[0].endswith("img_00004.jpg")
    with pytest.raises(ManifestError, match=r"three columns can be .*: give \[unlabeled\] of .* a format"):
        open_sources(_config(datasets, {"name": "unlabeled"}, sampling="dense"))
    datasets.write_text(TOML + 'format = "pretrain"\n')
    assert open_sources(_config(datasets, {"name": "unlabeled"}, sampling="dense"))[0].manifest[0] == Record("d", 4, 9, -1)
    assert open_sources(_config(datasets, {"name": "videos", "split": "val"}))[0].manifest[0].path == "b.mp4"
    assert open_sources(_config(datasets, {"name": "videos"}))[0].stride == 2


def _by_environment(monkeypatch, toml, sources):
    monkeypatch.setenv("VMAE2_DATASETS", str(toml))
    return open_sources(_config(None, *sources))


@pytest.mark.parametrize(
    ("change", "source", "message"),
    [
        (("", ""), {"name": "video"}, r"unknown data set 'video'; did you mean videos\?"),
        (("", ""), {"name": "stills", "split": "val"}, r"\[stills\] has no list for split 'val'; it has: train"),
        (('stride = 2', 'strid = 2'), {"name": "videos"}, r"\[videos\]: unknown key 'strid'; did you mean stride"),
        (('stride = 2', 'stride = 0'), {"name": "videos"}, "stride must be a positive whole number"),
        (('classes = 3', 'classes = 2'), {"name": "videos"}, r"train.csv:1: label 2 is out of range, labels must be in 0..1"),
        (('"frames"', '"stills"'), {"name": "stills"}, "unknown kind 'stills'"),
        (('img_{:05}', 'img'), {"name": "stills"}, "template 'img.jpg' must hold one number"),
        (('root = "v"', 'root = "w"'), {"name": "videos"}, "root folder .*w does not exist"),
        *((('root = "v"', f'root = "v"\n{key} = 3'), {"name": "videos"},
           rf"datasets\.toml: \[videos\]: {key} must be a string, got 3")
          for key in ("test", "labels", "template", "kind", "format")),
        (('root = "v"', 'root = ["v"]'), {"name": "videos"}, r"\[videos\]: root must be a string, got \['v'\]"),
        (('train = "train.csv"', 'train = true'), {"name": "videos"}, r"\[videos\]: train must be a string, got True"),
        (('val = "val.csv"', 'val = {}'), {"name": "videos"}, r"\[videos\]: val must be a string, got \{\}"),
        (('stride = 2', 'stride = true'), {"name": "videos"}, "stride must be a positive whole number, got True"),
        (('root = "v"', 'root = '), {"name": "videos"}, "not valid TOML"),
        (("", ""), {"name": "videos", "weight": 0.0}, "weight must be positive"),
        (('"names.txt"', '"names.txt"\nclasses = 3'), {"name": "stills"}, "classes = 3, but names.txt names 2"),
    ],
)
def test_bad_datasets_are_named(datasets, change, source, message):
    datasets.write_text(TOML.replace(*change, 1) if change[0] else TOML)
    with pytest.raises(ManifestError, match=message):
        open_sources(_config(datasets, source))


def test_everything_missing_is_named_at_once(datasets, tmp_path):
    (tmp_path / "v" / "train.csv").unlink()
    shutil.rmtree(tmp_path / "s")
    with pytest.raises(ManifestError) as caught:
        open_sources(_config(datasets, {"name": "videos"}, {"name": "stills"}))
    assert "train.csv" in str(caught.value)
    assert "root folder" in str(caught.value)
    with pytest.raises(ManifestError, match=r"none\.toml: cannot read the data sets"):
        open_sources(_config(tmp_path / "none.toml", {"name": "videos"}))
    with pytest.raises(ManifestError, match="at least one source"):
        open_sources(DataConfig())


def test_list_and_root_without_toml(tmp_path):
    _write(tmp_path / "mine.csv", "d 3 12\n")
    source = {"root": str(tmp_path), "list": "mine.csv", "template": "{:03}.jpg"}
    assert open_sources(_config(None, source))[0].manifest[0] == Record("d", 3, 12, -1)
    assert open_sources(_config(None, source, sampling="dense"))[0].manifest[0] == Record("d", 1, 3, 12)
    with pytest.raises(ManifestError, match="give the source a template"):
        open_sources(_config(None, {**source, "template": None}))


def _tree(data, **source):
    return open_sources(_config(None, {"root": str(data), **source}))[0]


def _clips(source):
    return [(record.path, source.label_names[record.label], record.total) for record in _records(source.manifest)]


def test_folder_trees(clips, jpeg_writer, tmp_path):
    video = clips / "good" / "five frames.mp4"
    flat = tmp_path / "flat"
    for name in ("clip10.mp4", "clip9.mp4", ".hidden.mp4", "notes.txt"):
        flat.mkdir(exist_ok=True)
        shutil.copy(video, flat / name)
    jpeg_writer(flat / "waving", 6)
    source = _tree(flat)
    assert _clips(source) == [("clip9.mp4", "clip9", -1), ("clip10.mp4", "clip10", -1), ("waving", "waving", 6)]
    assert source.classes == 3
    assert len(source.frame_files(source.manifest[2])) == 6

    deep = tmp_path / "deep"
    for split, name in (("train", "run/a.mp4"), ("train", "jump/x/b.mp4"), ("val", "walk/c.mp4"), ("val", "run/d.mp4")):
        (deep / split / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(video, deep / split / name)
    jpeg_writer(deep / "train" / "jump" / "frames", 4, "f{:02}.jpg", 0)
    train, val = _tree(deep, template="f{:02}.jpg"), _tree(deep, split="val")
    assert train.label_names == val.label_names == ("jump", "run", "walk")
    assert _clips(train) == [("jump/frames", "jump", 4), ("jump/x/b.mp4", "jump", -1), ("run/a.mp4", "run", -1)]
    assert _clips(val) == [("run/d.mp4", "run", -1), ("walk/c.mp4", "walk", -1)]
    assert train.frame_files(train.manifest[0])[0].endswith("f00.jpg")
    with pytest.raises(ManifestError, match="no folder for split 'test'; it has: train, val"):
        _tree(deep, split="test")
    (deep / "sitting").mkdir()  # not splits but classes: one of them happens to be called train
    shutil.copy(video, deep / "sitting" / "e.mp4")
    assert _tree(deep).label_names == ("sitting", "train", "val")


def test_folders_without_a_decodable_video(clips, tmp_path):
    with pytest.raises(ManifestError, match="does not exist"):
        _tree(tmp_path / "none")
    with pytest.raises(ManifestError, match=f"{tmp_path}: no video in this folder"):
        _tree(tmp_path)
    with pytest.raises(ManifestError, match="none of the 5 clips in this folder can be decoded"):
        _tree(clips / "bad")


def test_class_names(tmp_path):
    assert read_labels(_write(tmp_path / "n.txt", "\ufeffa b\r\nc\r\n\n")) == ("a b", "c")
    twice = "n.txt:3: class 'a' is already on line 1"
    for text, message in (("", "no class name"), ("a\n\nb\n", "n.txt:2: an empty"), ("a\nb\na\n", twice)):
        with pytest.raises(ValueError, match=message):
            read_labels(_write(tmp_path / "n.txt", text))
    with pytest.raises(ValueError, match="cannot read"):
        read_labels(tmp_path / "none.txt")


def test_a_large_list_costs_no_object_per_line(tmp_path):
    lines = "".join(f"videos/class {i % 7}/clip_{i:06}.mp4 {i % 7}\n" for i in range(20000))
    manifest = Manifest.read(_write(tmp_path / "big.csv", lines), "video", classes=7)
    assert manifest[12345] == Record("videos/class 4/clip_012345.mp4", 0, -1, 4)
    np.testing.assert_array_equal(manifest.labels, np.arange(20000) % 7)
