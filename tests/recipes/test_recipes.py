"""Every recipe runs, shrunk; the demo leaves what it promises, survives a kill, and takes people's own videos."""

from __future__ import annotations

import html.parser
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from tests.tiny_runs import write_clips
from vmae2_fast import cli
from vmae2_fast.config import Progression
from vmae2_fast.recipes_index import all_recipes
from vmae2_fast.train.smoke import smoke

ROOT = Path(__file__).parents[2]
STAGES = ("pretrain", "post_pretrain", "finetune", "scratch", "distill")


def launch(*arguments: str, capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    cli.main(["launch", *arguments, "--json"])
    return json.loads(capsys.readouterr().out.splitlines()[-1])


# hybrid_available reads a datasets.toml of its own; the demo has tests of its own.
NOT_SMOKED = ("demo:progressive", "pretrain:hybrid_available")


def _one_of_each_kind() -> list[str]:
    """One recipe of each module and kind of run; that all of them resolve and build is tested without training."""
    found: dict[tuple[str, str, str], str] = {}
    for name, recipe in all_recipes().items():
        if name in NOT_SMOKED:
            continue
        run = recipe()
        found.setdefault((name.partition(":")[0], type(run).__name__, str(getattr(run, "objective", ""))), name)
    return list(found.values())


# One of every kind here, all of them in `make recipes-smoke`.
SMOKED = [n for n in all_recipes() if n not in NOT_SMOKED] if os.environ.get("VMAE2_RECIPES") == "all" else _one_of_each_kind()


@pytest.mark.parametrize("name", SMOKED)
def test_recipe_runs_shrunk(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    summary = launch(name, "--smoke", "--out", str(tmp_path), capsys=capsys)
    for stage in smoke(all_recipes()[name]()).stages:
        assert summary[stage.name]["steps"] > 1
        assert 0 < summary[stage.name]["last_loss"] < 4


class _Sources(html.parser.HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found += [value or "" for key, value in attrs if key in ("src", "href")]


def test_demo_leaves_weights_metrics_pictures_and_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "demo"
    summary = launch("demo:progressive", "--smoke", "--out", str(out), capsys=capsys)
    assert summary == json.loads((out / "summary.json").read_text())
    assert summary["chance"] == pytest.approx(1 / 6)
    assert 0 < summary["pretrain"]["ratio_to_zero_predictor"] < 1.5
    for stage, key in (("finetune", "top1"), ("finetune", "top1_shuffled"), ("scratch", "top1"), ("distill", "agreement")):
        assert 0 <= summary[stage][key] <= 1
    for stage in STAGES:
        assert load_file(out / stage / "weights.safetensors")
        assert {"first_loss", "last_loss", "clips_per_s", "seconds"} <= summary[stage].keys()
        assert (out / stage / "metrics.jsonl").read_text().count("\n") >= 1
        assert list((out / stage / "checkpoints").iterdir())
    assert summary["versions"]["torch"]
    assert summary["backend"]["gather_patches"]["cpu"] in ("native", "reference")
    for picture in ("curves.png", "reconstructions.png", "reconstruction.gif", "confusion.png"):
        assert (out / picture).stat().st_size > 1000
    sources = _Sources()
    sources.feed((out / "report.html").read_text())
    assert len(sources.found) == 4
    assert all(source.startswith("data:image/") for source in sources.found)  # self-contained
    # Stages hand their weights on: fine-tuning started from post-pre-training's, not from pre-training's.
    assert json.loads((out / "finetune" / "config.json").read_text())["init"].endswith("post_pretrain/weights.safetensors")

    finished = {stage: (out / stage / "done.json").stat().st_mtime_ns for stage in STAGES}
    again = launch("demo:progressive", "--smoke", "--out", str(out), capsys=capsys)
    assert finished == {stage: (out / stage / "done.json").stat().st_mtime_ns for stage in STAGES}
    assert again["finetune"] == summary["finetune"]


def test_report_and_restart(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "demo"
    launch("demo:progressive", "--smoke", "--until", "finetune", "--out", str(out), capsys=capsys)
    cli.main(["report", str(out)])
    assert "the progression has not finished" in capsys.readouterr().out
    assert {path.parent.name for path in out.glob("*/report.html")} == {"pretrain", "post_pretrain", "finetune"}
    summary = launch("demo:progressive", "--smoke", "--out", str(out), capsys=capsys)
    (out / "report.html").unlink()
    done = (out / "finetune" / "done.json").stat().st_mtime_ns
    cli.main(["report", str(out), "--json"])
    again = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert again["finetune"] == summary["finetune"]
    assert (out / "report.html").exists()
    assert done == (out / "finetune" / "done.json").stat().st_mtime_ns  # nothing was trained

    changed = ["demo:progressive", "--smoke", "--out", str(out), "--finetune.seed", "7"]
    with pytest.raises(SystemExit):
        cli.main(["launch", *changed])
    assert "--restart" in capsys.readouterr().err
    launch(*changed, "--from", "finetune", "--until", "finetune", "--restart", capsys=capsys)
    with pytest.raises(SystemExit):  # the student learned from the teacher that is gone
        cli.main(["launch", *changed])
    assert "teacher_weights changed since this run began" in capsys.readouterr().err


def test_a_label_out_of_range_is_found_before_training(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "demo"
    with pytest.raises(SystemExit):
        cli.main(["launch", "demo:progressive", "--smoke", "--out", str(out), "--post_pretrain.model.num-classes", "5"])
    assert "has label 5, but the model has classes 0..4" in capsys.readouterr().err
    assert not (out / "post_pretrain").exists()  # a run that could not begin leaves nothing


def test_demo_killed_in_the_middle_ends_with_the_same_bits(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "vmae2_fast", "launch", "demo:progressive", "--smoke", "--out", str(tmp_path / "killed")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("[3/5]"):
            process.send_signal(signal.SIGKILL)
            break
    assert process.wait() == -signal.SIGKILL
    assert (tmp_path / "killed" / "post_pretrain" / "done.json").exists()
    assert not (tmp_path / "killed" / "distill").exists()
    launch("demo:progressive", "--smoke", "--out", str(tmp_path / "killed"), capsys=capsys)
    launch("demo:progressive", "--smoke", "--out", str(tmp_path / "straight"), capsys=capsys)
    for stage in STAGES:
        killed, straight = (load_file(tmp_path / run / stage / "weights.safetensors") for run in ("killed", "straight"))
        assert all(killed[key].equal(straight[key]) for key in straight), stage


def test_folder_of_videos_with_a_corrupt_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    clips = write_clips(tmp_path / "<b>clips", per_class=2)
    (clips / "left" / "broken.mp4").write_bytes(b"garbage")
    summary = launch("demo:progressive", "--smoke", "--clips", str(clips), "--out", str(tmp_path / "out"), capsys=capsys)
    assert list(summary["data"]["skipped"]) == [str(clips / "left" / "broken.mp4")]
    assert not summary["data"]["train_is_test"]
    assert summary["chance"] == 0.5
    assert summary["finetune"]["videos"] == 2
    report = (tmp_path / "out" / "report.html").read_text()
    assert "broken.mp4" in report
    assert "<b>clips" not in report  # paths are escaped


def test_one_clip_a_label_serves_for_both_and_the_report_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    clips = write_clips(tmp_path / "clips", per_class=1)
    summary = launch("demo:progressive", "--smoke", "--clips", str(clips), "--out", str(tmp_path / "out"), capsys=capsys)
    assert summary["data"]["train_is_test"]
    report = (tmp_path / "out" / "report.html").read_text()
    assert "same clips serve for training and testing" in report
    assert "not trained on" not in report


def test_no_decodable_video_is_one_error_and_leaves_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "clips").mkdir()
    (tmp_path / "clips" / "a.mp4").write_bytes(b"garbage")
    with pytest.raises(SystemExit) as stop:
        cli.main(["launch", "demo:progressive", "--clips", str(tmp_path / "clips"), "--out", str(tmp_path / "out")])
    assert stop.value.code == 2
    assert "no decodable video" in capsys.readouterr().err
    assert not list((tmp_path / "out").iterdir())


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit) as stop:
        cli.main(["launch", "demo:progressive", "--smoke", "--out", str(tmp_path / "file" / "out")])
    assert stop.value.code == 2
    assert f"cannot write {tmp_path / 'file' / 'out'}" in capsys.readouterr().err


def test_a_stage_alone_needs_the_weights_of_the_one_before(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["launch", "demo:progressive", "--smoke", "--from", "finetune", "--out", str(tmp_path)])
    assert "post_pretrain/weights.safetensors, which does not exist" in capsys.readouterr().err


def test_smoke_keeps_the_stages_and_shrinks_the_models() -> None:
    run = all_recipes()["demo:progressive"]()
    small = smoke(run)
    assert isinstance(small, Progression)
    assert [s.name for s in small.stages] == [s.name for s in run.stages] == list(STAGES)
    assert all(s.model.width == 32 and s.train.epochs == 1 for s in small.stages)


@pytest.mark.parametrize("short", [False, True])
def test_every_demo_stage_outlasts_its_warm_up(short: bool, tmp_path: Path) -> None:
    clips = write_clips(tmp_path / "clips", per_class=1)
    for folder in (None, str(clips)):
        for stage in all_recipes()["demo:progressive"](clips=folder, short=short).stages:
            assert stage.optim.warmup_epochs < stage.train.epochs, stage.name
