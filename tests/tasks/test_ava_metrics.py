"""Frame-mAP by hand, its rules, and the commands that read files."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from vmae2_fast import cli, draw_actions
from vmae2_fast.data import decode_video, probe
from vmae2_fast.data.ava import Rows, read_annotations, read_results
from vmae2_fast.data.synthetic_ava import write_ava_scenes
from vmae2_fast.tasks.metrics.ava import average_precision, frame_map

STYLES = ["videomae", "activitynet", "mmaction2"]


def rows(*table: tuple) -> Rows:
    return Rows(
        [r[0] for r in table], np.asarray([r[1] for r in table], dtype=float).reshape(-1, 4),
        np.asarray([r[2] for r in table], dtype=int), np.asarray([r[3] if len(r) > 3 else 1 for r in table], dtype=float),
        frozenset(),
    )  # fmt: skip


A, B, C = (0.0, 0.0, 0.4, 0.4), (0.5, 0.5, 0.9, 0.9), (0.05, 0.0, 0.45, 0.4)
TRUTH = rows(("v,0001", A, 1), ("v,0001", B, 1), ("v,0002", A, 2), ("v,0002", A, 3))


def test_average_precision_by_hand() -> None:
    # hits 1 0 1 of 4: precision 1, 1/2, 2/3 at recall 1/4, 1/4, 1/2
    hits = np.asarray([True, False, True])
    assert average_precision(np.asarray([0.9, 0.8, 0.7]), hits, 4) == pytest.approx(0.25 * 1 + 0.25 * 2 / 3)


@pytest.mark.parametrize("style", STYLES)
def test_ground_truth_scores_one_and_nothing_scores_zero(style: str) -> None:
    assert frame_map(TRUTH, TRUTH, {1, 2, 3}, style=style).mean == 1.0
    assert frame_map(TRUTH, rows(), {1, 2, 3}, style=style).mean == 0.0
    assert np.isnan(frame_map(TRUTH, TRUTH, {9}, style=style).mean)


def test_a_second_detection_of_a_box_is_false_and_has_no_second_choice() -> None:
    twice = rows(("v,0001", A, 1, 0.9), ("v,0001", C, 1, 0.8), ("v,0001", B, 1, 0.7))
    assert frame_map(TRUTH, twice, {1}).mean == pytest.approx(0.5 * 1 + 0.5 * 2 / 3)


def test_frames_without_ground_truth_and_exclusions() -> None:
    found = rows(("v,0009", A, 1, 0.99), ("v,0001", A, 1, 0.9), ("v,0001", B, 1, 0.7))
    assert frame_map(TRUTH, found, {1}).mean == pytest.approx(2 / 3)
    for style in ("activitynet", "mmaction2"):
        assert frame_map(TRUTH, found, {1}, style=style).mean == 1.0
    assert frame_map(TRUTH, found, {1}, exclusions={"v,0009"}).mean == 1.0
    excluded = frame_map(TRUTH, TRUTH, {1, 2, 3}, exclusions={"v,0002"})
    assert set(excluded.per_class) == {1}
    assert excluded.left_out == {"annotations on excluded key frames": 2, "detections on excluded key frames": 2}


def test_rows_that_do_not_count_are_counted() -> None:
    flat = (0.4, 0.1, 0.4, 0.5)
    odd = rows(("v,0001", flat, 1, 0.99), ("v,0001", A, 7, 0.99), ("v,0001", (-0.01, 0, 0.4, 0.4), 1, 0.9))
    found = frame_map(TRUTH, odd, {1})
    assert found.mean == 0.5
    assert found.left_out["detections without area"] == 1
    assert found.left_out["detections of other classes"] == 1
    assert found.left_out["detections reaching out of the frame (they count)"] == 1
    with pytest.raises(ValueError, match="unknown style 'coco'"):
        frame_map(TRUTH, odd, {1}, style="coco")


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = write_ava_scenes(tmp_path_factory.mktemp("ava") / "scenes", train=1, val=3)
    lines = (root / "val.csv").read_text().splitlines()
    (root / "det.csv").write_text("\n".join(line[: line.rindex(",")] + ",0.9" for line in lines) + "\n")
    return root


def test_score_command(scenes: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    command = ["score", "ava", str(scenes / "val.csv"), str(scenes / "det.csv"), "--labels", str(scenes / "labels.pbtxt")]
    cli.main([*command, "--json"])
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["frame_map"] == 1.0
    assert set(found["per_class"]) <= {"red", "green", "blue", "yellow"}
    (tmp_path / "bad.csv").write_text("v,1\n")
    for arguments, message in (
        ([*command[:3], str(tmp_path / "bad.csv")], "bad.csv:1: expected"),
        ([*command[:3], str(tmp_path / "gone.csv")], "gone.csv: cannot be read"),
        (["draw", "avs"], "unknown command 'draw avs'; did you mean draw ava"),
    ):
        with pytest.raises(SystemExit) as stop:
            cli.main(arguments)
        assert stop.value.code == 2
        assert message in capsys.readouterr().err
    with pytest.raises(SystemExit) as stop:
        cli.main(["score", "ava", "--help"])
    assert stop.value.code == 0
    assert "Example: vmae2 score ava" in capsys.readouterr().out


@pytest.mark.parametrize("ending", ["mp4", "gif"])
def test_boxes_are_drawn_on_the_video(scenes: Path, ending: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("PIL")
    name = read_results(scenes / "det.csv").frames[0].partition(",")[0]
    video, out = scenes / "videos" / f"{name}.mp4", tmp_path / f"drawn.{ending}"
    command = ["draw", "ava", str(video), str(scenes / "det.csv"), "--labels", str(scenes / "labels.pbtxt"), "--out", str(out)]
    cli.main([*command, "--json"])
    written = json.loads(capsys.readouterr().out.splitlines()[-1])
    every = {"mp4": 1, "gif": 3}[ending]  # 25 frames a second, of a GIF at most 10
    assert written["frames"] == -(-probe(str(video)).num_frames // every) == probe(str(out)).num_frames
    assert abs(written["boxes"] - 2 * 25 / every) <= 2  # within half a second of the key frame
    ids = np.asarray([0, 24])
    before, after = (decode_video(str(p), ids // e).astype(int) for p, e in ((video, 1), (out, every)))
    changed = np.abs(before - after).max(-1) > 60
    assert changed[1].mean() > 0.05  # boxes and labels at the key frame
    assert changed[0].mean() < changed[1].mean() / 2  # none a second before
    assert [f.name for f in tmp_path.iterdir()] == [out.name]
    for changes, message in (
        (["--out", str(tmp_path / "a.avi")], "must be .mp4 or .gif"),
        (["--threshold", "0.95"], "no detection of"),
        (["--most", "0"], "--most 0: must be at least 1"),
        (["--start-second", "902"], "say with --start-second when the film begins"),
        (["--begin", "70"], "no frame from 70.0 to None s, it has those from 0 to"),
        (["--start-second", "nan"], "--start-second nan: must be a number"),
    ):
        with pytest.raises(SystemExit) as stop:
            cli.main([*command, *changes])
        assert stop.value.code == 2
        assert message in capsys.readouterr().err
    assert [f.name for f in tmp_path.iterdir()] == [out.name]


def test_a_part_is_drawn_and_boxes_without_area_are_counted(
    scenes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("PIL")
    frame = read_results(scenes / "det.csv").frames[0]
    name, _, second = frame.partition(",")
    (tmp_path / "det.csv").write_text(f"{frame},0.2,0.2,0.8,0.8,3,0.9\n{frame},0.8,0.8,0.2,0.2,3,0.9\n")
    cli.main(["draw", "ava", str(scenes / "videos" / f"{name}.mp4"), str(tmp_path / "det.csv"), "--begin", second, "--end",
              str(float(second) + 0.21), "--out", str(tmp_path / "part.mp4"), "--json"])  # fmt: skip
    told = capsys.readouterr()
    written = json.loads(told.out.splitlines()[-1])
    assert (written["frames"], written["boxes"], written["flat"]) == (6, 6, 1)
    assert probe(str(tmp_path / "part.mp4")).num_frames == 6
    assert "warning: 1 detections without area" in told.err


def test_frames_of_a_gif_are_few_and_small() -> None:
    seconds = np.arange(300) / 30
    ids, rate = draw_actions._shown(seconds, None, None, 10.0)
    assert (ids[:3].tolist(), rate) == ([0, 3, 6], 10)
    ids, rate = draw_actions._shown(seconds, 2.0, 3.0, None)
    assert (ids[0], ids[-1], rate) == (60, 90, 30)


def test_nothing_detected_is_told(
    scenes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "none.csv").write_text("")
    cli.main(["score", "ava", str(scenes / "val.csv"), str(tmp_path / "none.csv"), "--json"])
    told = capsys.readouterr()
    found = json.loads(told.out.splitlines()[-1])
    assert found["frame_map"] == 0
    assert found["left_out"] == {"annotated key frames without any detection": 3}
    assert "warning: 3 annotated key frames without any detection" in told.err


def test_annotations_of_the_scenes_are_read(scenes: Path) -> None:
    truth = read_annotations(scenes / "val.csv")
    assert len(truth.frames) == 6
    assert (truth.boxes >= 0).all()
    assert (truth.boxes <= 1).all()
