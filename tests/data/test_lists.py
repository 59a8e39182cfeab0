"""Long lists: parsed in pieces, indexed beside the list, mapped afterwards; a stale or damaged index is never believed."""

from __future__ import annotations

import os
import re

import numpy as np
import pytest

from vmae2_fast.data import Manifest, ManifestError, Record, lists


@pytest.fixture
def short(monkeypatch):
    """Every list counts as long, and pieces are shorter than some lines."""
    monkeypatch.setattr(lists, "INDEXED_BYTES", 0)
    monkeypatch.setattr(lists, "_CHUNK", 37)


def _write(path, records):
    path.write_text("".join(f"{r.path} {r.start} {r.total}\n" for r in records), encoding="utf-8")
    return path


def _records(seed, count=200):
    rng = np.random.RandomState(seed)
    names = ["v/clip.mp4", "a name with spaces 7", "é/ü.webm", "x" * 90, "12 34"]
    return [
        Record(f"{names[rng.randint(5)]}{i}", int(rng.randint(2**31)), int(rng.choice([-1, 1, 300, 2**31 - 1])), -1)
        for i in range(count)
    ]


def _all(manifest):
    return [manifest[i] for i in range(len(manifest))]


def _index(path):
    return path.with_name(f".{path.name}.vmae2")


def test_an_index_gives_the_same_clips_as_the_list(tmp_path, short):
    records = _records(0)
    path = _write(tmp_path / "list.csv", records)
    first, second = Manifest.read(path, "pretrain"), Manifest.read(path, "pretrain")
    assert _all(first) == _all(second) == records
    assert not isinstance(first.table.rows, np.memmap)
    assert isinstance(second.table.rows, np.memmap)
    assert isinstance(second.table.paths, np.memmap)
    assert [p.name for p in tmp_path.iterdir() if p != path] == [_index(path).name]


def test_a_changed_list_is_indexed_anew(tmp_path, short):
    path = _write(tmp_path / "list.csv", _records(0))
    stamp = os.stat(path)
    Manifest.read(path, "pretrain")
    text = path.read_bytes()
    path.write_bytes(text.replace(b"clip.mp4", b"clop.mp4"))
    os.utime(path, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))  # same size and time: only its bytes tell
    assert any("clop" in record.path for record in _all(Manifest.read(path, "pretrain")))
    whole_line, only_path = (Manifest.read(path, format)[0].path for format in ("paths", "pretrain"))
    assert whole_line.startswith(only_path + " ")  # the index of the other format is not taken


@pytest.mark.parametrize(
    "damage", [lambda b: b[:-1], lambda b: b[:100], lambda b: b"", lambda b: b"[]" + b[2:], lambda b: b + b"0"]
)
def test_a_damaged_index_is_replaced(tmp_path, short, damage):
    records = _records(1)
    path = _write(tmp_path / "list.csv", records)
    Manifest.read(path, "pretrain")
    good = _index(path).read_bytes()
    _index(path).write_bytes(damage(good))
    assert _all(Manifest.read(path, "pretrain")) == records
    assert _index(path).read_bytes() == good


def test_a_list_in_a_folder_that_cannot_be_written(tmp_path, short, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(lists.os, "replace", full)
    records = _records(2)
    path = _write(tmp_path / "list.csv", records)
    for _ in range(2):
        assert _all(Manifest.read(path, "pretrain")) == records
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("v.mp4 0", "expected `path start total`"), ("v.mp4 0 --1", "expected"), ("v.mp4 0 99999999999", "expected"),
        ("v.mp4 0 2147483648", "expected"), ("0 -1", "expected"), ("v.mp4 1x 5", "expected"),
        ("v.mp4 0 0", "a clip of 0 frames"),
    ],
)  # fmt: skip
def test_a_bad_line_far_into_the_list(tmp_path, short, line, message):
    path = _write(tmp_path / "list.csv", _records(3))
    path.write_text(f"{path.read_text()}\n\r\n{line}\n")
    with pytest.raises(ManifestError, match=rf"list\.csv:203: .*{re.escape(message)}"):
        Manifest.read(path, "pretrain")
    assert not _index(path).exists()


def test_labels_are_checked_against_an_index_too(tmp_path, short):
    path = tmp_path / "list.csv"
    path.write_text("a 1\n\nb 7\nc 9\n")
    assert len(Manifest.read(path, "video")) == 3
    with pytest.raises(ManifestError, match=r"list\.csv:4: label 9 is out of range, labels must be in 0\.\.8"):
        Manifest.read(path, "video", classes=9)


def test_lists_of_paths_alone(tmp_path):
    path = tmp_path / "list.csv"
    path.write_text("a.mp4\r\n\n  my clip 3.mp4 \n")
    assert _all(Manifest.read(path, "paths")) == [Record("a.mp4", 0, -1, -1), Record("my clip 3.mp4", 0, -1, -1)]
