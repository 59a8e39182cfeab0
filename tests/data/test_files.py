"""`vmae2 data verify` and `transcode`: every file judged, copies complete or absent, shards and second runs add up."""

from __future__ import annotations

import json
import os
import shutil

import numpy as np
import pytest

from vmae2_fast import cli
from vmae2_fast.data import DecodeError, decode_video, files, probe, transcode


@pytest.fixture
def listed(clips, tmp_path):
    """Six good files and three bad ones, in a list with labels."""
    root = tmp_path / "set"
    (root / "sub").mkdir(parents=True)
    for name in ("gop12.mp4", "vfr.mkv", "vp9.webm", "one_frame.mp4", "odd_size_444.mp4", "mpeg4.avi"):
        shutil.copy(clips / "good" / name, root / "sub" / name)
    for name in ("empty.mp4", "audio_only.mp4"):
        shutil.copy(clips / "bad" / name, root / "sub" / name)
    names = [*sorted(os.listdir(root / "sub")), "missing.mp4"]
    (root / "list.csv").write_text("".join(f"sub/{name} {i}\n" for i, name in enumerate(names)))
    return root / "list.csv"


def test_verify_names_every_bad_file_with_its_reason(listed, tmp_path, capsys):
    report = tmp_path / "report.json"
    with pytest.raises(SystemExit) as stop:
        cli.main(["data", "verify", str(listed), "--report", str(report), "--json"])
    assert stop.value.code == 2
    said = capsys.readouterr()
    assert "3 of 9 files are bad; all are in" in said.err
    result = json.loads(report.read_text())
    last = json.loads(said.out.splitlines()[-1])
    assert last.pop("error").startswith("3 of 9 files are bad")
    assert last == result
    assert (result["files"], result["bad"], result["frames"]) == (9, 3, 5 * 40 + 1)
    bad = sorted(os.path.basename(path) for paths in result["reasons"].values() for path in paths)
    assert bad == ["audio_only.mp4", "empty.mp4", "missing.mp4"]
    opened = files.open_list(str(listed))
    parts = [files.verify(opened, shard=f"{i}/3", workers=1) for i in range(3)]
    assert sum(part["files"] for part in parts) == 9
    assert sum(part["bad"] for part in parts) == 3


def test_verify_good_files(clips, jpeg_writer, tmp_path, capsys):
    cli.main(["data", "verify", str(clips / "good"), "--json"])
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["bad"] == 0
    folder = jpeg_writer(tmp_path / "frames" / "a", 12)
    (tmp_path / "list.csv").write_text("frames/a 12 0\n")
    opened = files.open_list(str(tmp_path / "list.csv"), template="img_{:05}.jpg")
    assert files.verify(opened)["frames"] == 12
    os.remove(folder / "img_00012.jpg")
    assert files.verify(opened)["bad"] == 1


@pytest.mark.parametrize("shard", ["3/3", "1", "-1/2", "a/b"])
def test_shards_that_do_not_exist(shard):
    with pytest.raises(ValueError, match=f"--shard {shard}: must be I/N"):
        files.shard_of(shard, 9)


def test_transcode_keeps_frames_and_times_and_goes_on_where_it_was(listed, read_numbers, tmp_path, capsys):
    out = tmp_path / "small"
    for i in range(2):
        with pytest.raises(SystemExit):
            cli.main(["data", "transcode", str(listed), "--out", str(out), "--short-side", "48", "--shard", f"{i}/2"])
    written = sorted(path.name for path in (out / "sub").iterdir())
    assert written == ["gop12.mp4", "mpeg4.mp4", "odd_size_444.mp4", "one_frame.mp4", "vfr.mp4", "vp9.mp4"]
    lines = (out / "list.csv").read_text().splitlines()
    assert [line.split()[0] for line in lines] == [f"sub/{name}" for name in written]
    for name in ("gop12", "mpeg4", "vfr", "vp9"):
        path = str(out / "sub" / f"{name}.mp4")
        assert read_numbers(decode_video(path, np.arange(40))) == list(range(40))
    assert np.diff(probe(str(out / "sub" / "vfr.mp4")).pts).std() > 0
    before = {path.name: path.stat().st_mtime_ns for path in (out / "sub").iterdir()}
    (out / "sub" / "vp9.mp4").unlink()
    result = transcode.transcode(files.open_list(str(listed)), str(out), transcode.Recoding(short_side=48))
    assert (result["files"], result["done"], result["skipped"], result["bad"]) == (9, 1, 5, 3)
    after = {path.name: path.stat().st_mtime_ns for path in (out / "sub").iterdir()}
    assert {k: v for k, v in after.items() if k != "vp9.mp4"} == {k: v for k, v in before.items() if k != "vp9.mp4"}


def test_transcode_leaves_nothing_half_written(clips, header_rotator, tmp_path, monkeypatch):
    data = (clips / "good" / "gop250.mp4").read_bytes()
    start = data.index(b"mdat") + 8
    (tmp_path / "damaged.mp4").write_bytes(data[: start + 900] + bytes(400) + data[start + 1300 :])
    with pytest.raises(DecodeError):
        transcode.transcode_file(str(tmp_path / "damaged.mp4"), str(tmp_path / "out" / "a.mp4"), transcode.Recoding())
    assert not list((tmp_path / "out").iterdir())
    turned = header_rotator(clips / "good" / "gop12.mp4", tmp_path / "turned.mp4")
    transcode.transcode_file(str(turned), str(tmp_path / "out" / "b.mp4"), transcode.Recoding())
    assert decode_video(str(tmp_path / "out" / "b.mp4"), np.array([3])).shape == (1, 64, 48, 3)


def test_transcode_does_not_mix_settings(clips, tmp_path):
    (tmp_path / "set").mkdir()
    shutil.copy(clips / "good" / "one_frame.mp4", tmp_path / "set" / "a.mp4")
    opened, out = files.open_list(str(tmp_path / "set")), tmp_path / "out"
    transcode.transcode(opened, str(out), transcode.Recoding(gop=12), workers=1)
    with pytest.raises(ValueError, match=r"out holds files made with gop 12, crf 20 .*transcode\.json.*choose another --out"):
        transcode.transcode(opened, str(out), transcode.Recoding(gop=24, crf=30), workers=1)
    assert transcode.transcode(opened, str(out), transcode.Recoding(gop=12), workers=1)["skipped"] == 1
    with pytest.raises(ValueError, match=r"set holds a\.mp4, which transcode did not write"):
        transcode.transcode(opened, str(tmp_path / "set"), transcode.Recoding(), workers=1)


def test_a_stopped_transcode_leaves_nothing_behind(clips, tmp_path, monkeypatch, capsys):
    root, out = tmp_path / "set", tmp_path / "out"
    for folder in (root, out):
        folder.mkdir()
    shutil.copy(clips / "good" / "one_frame.mp4", root / "a.mp4")
    (out / "a.mp4.7.partial").touch()  # of a process that was killed
    (out / "of_another_shard.mp4.8.partial").touch()

    def interrupted(function, jobs, **_):
        assert [path.name for path in out.glob("*.partial")] == ["of_another_shard.mp4.8.partial"]
        (out / "a.mp4.9.partial").touch()
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(transcode, "in_processes", interrupted)
        with pytest.raises(SystemExit) as stop:
            cli.main(["data", "transcode", str(root), "--out", str(out)])
    assert stop.value.code == 130
    assert capsys.readouterr().err == "vmae2: interrupted\n"
    assert [path.name for path in out.glob("*.partial")] == ["of_another_shard.mp4.8.partial"]
    assert transcode.transcode(files.open_list(str(root)), str(out), transcode.Recoding(), workers=1)["done"] == 1


def test_transcode_refuses_what_it_cannot_place(clips, tmp_path):
    for lines, message in (
        ("a.mp4 0\na.avi 0\n", "a.avi and a.mp4 would both become a.mp4"),
        ("../a.mp4 0\n", "lies outside the root"),
        ("a 1 20\n", "lists raw frames"),
    ):
        (tmp_path / "list.csv").write_text(lines)
        with pytest.raises(ValueError, match=message):
            transcode.transcode(files.open_list(str(tmp_path / "list.csv")), str(tmp_path / "out"), transcode.Recoding())
    with pytest.raises(ValueError, match="short_side=8"):
        transcode.Recoding(short_side=8)
