"""Pages of single runs and of two: they say what the run directories hold, in whatever state these are."""

from __future__ import annotations

import dataclasses
import json
import re
from html import unescape
from pathlib import Path

import pytest

from tests import tiny_runs as tiny
from vmae2_fast import cli, run_report
from vmae2_fast.config import (
    ActionFormerConfig,
    AvaConfig,
    AvaDataConfig,
    ModelConfig,
    Progression,
    TadConfig,
    TadDataConfig,
    TrainConfig,
)
from vmae2_fast.train import train
from vmae2_fast.train.curves import Curves, panels
from vmae2_fast.train.log import MetricsLog, read_metrics
from vmae2_fast.train.optim import Optimizer
from vmae2_fast.train.progression import run_progression
from vmae2_fast.train.run_directory import RunDirectory


@pytest.fixture(scope="module")
def clips(tmp_path_factory) -> Path:
    return tiny.write_clips(tmp_path_factory.mktemp("clips"))


class Killed(Exception):
    pass


def _killed_after(monkeypatch, step: int, config) -> Path:
    """A run that ended at `step` and left half a line."""
    original = Optimizer.step

    def stepping(self, number, loss):
        if number == step:
            raise Killed
        return original(self, number, loss)

    with monkeypatch.context() as patch:
        patch.setattr(Optimizer, "step", stepping)
        with pytest.raises(Killed):
            train(config)
    run = Path(config.out) / config.name
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "train", "st')
    return run


def cells(page: Path) -> dict[str, list[str]]:
    """First cell of every row of the page's tables -> the others."""
    rows = re.findall(r"<tr>(.*?)</tr>", page.read_text(), re.S)
    table = [[unescape(cell) for cell in re.findall(r"<td>(.*?)</td>", row, re.S)] for row in rows]
    return {row[0]: row[1:] for row in table if row}


def test_two_runs_stand_side_by_side_one_of_them_killed(clips, tmp_path, monkeypatch, capsys):
    config = tiny.classify_config(clips, tmp_path, name="whole")
    whole = train(tiny.with_train(config, validate_every=2))
    other = dataclasses.replace(config, name="other", optim=dataclasses.replace(config.optim, lr=1e-3))
    run = _killed_after(monkeypatch, 7, other)
    (run / "quarantine.jsonl").write_text(
        json.dumps({"path": "a.mp4", "reason": "no video stream", "position": 3}) + '\n{"path": "b.mp4", "rea'
    )
    cli.main(["report", whole["directory"], str(run), "--json"])
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    page = Path(result["report"])
    assert page == Path(whole["directory"]) / "compared-with-other.html"
    table = cells(page)
    assert table["state"][0] == "finished"
    assert table["state"][1].startswith("not finished: epoch 3 of 6, last line written ")
    assert table["steps"] == ["12", "6"]
    assert table["optim.lr"] == ["0.003", "0.001"]
    assert "optim.min_lr" not in table
    assert table["top1"] == [f"{whole['validation']['top1']:.4g}", ""]
    assert table["validated"] == ["at the end", ""]
    assert table["files in quarantine"] == ["0", "1"]
    assert table["no video stream"] == ["1: a.mp4"]
    assert [r["quarantined"] for r in result["runs"]] == [0, 1]
    assert result["runs"][1]["loss"] == read_metrics(run / "metrics.jsonl")[-1]["loss"]
    assert page.read_text().count("data:image/png;base64,") == 2  # curves, confusion of the finished one


def test_curves_are_overlaid_by_step_or_where_batches_differ_by_clips():
    lines = [{"kind": "train", "step": s, "loss": 1.0 / s, "lr": 0.1, "seconds": float(s), "wait_s": 0.25} for s in (1, 2)]
    validations = [{"kind": "validation", "step": s, "top1": s / 4, "videos": 4} for s in (1, 2)]
    one, two = Curves("a", lines, validations, 8), Curves("b", lines[:1], [], 8)
    drawn = panels([one, two])
    assert drawn["training loss"] == [[(1.0, 1.0), (2.0, 0.5)], [(1.0, 1.0)]]
    assert drawn["share of time waiting for clips"] == [[(1.0, 0.25), (2.0, 0.25)], [(1.0, 0.25)]]
    assert drawn["validation top1"] == [[(1.0, 0.25), (2.0, 0.5)], []]
    assert set(drawn) == {"training loss", "learning rate", "share of time waiting for clips", "validation top1"}
    assert panels([one, two._replace(clips_per_step=2)])["training loss"] == [[(8.0, 1.0), (16.0, 0.5)], [(2.0, 1.0)]]


def test_a_run_that_has_logged_nothing_has_a_page(clips, tmp_path):
    run = RunDirectory.open(tiny.pretrain_config(clips, tmp_path), resume=True).path
    result = run_report.write_run_report([run], tmp_path / "page.html")
    assert result["runs"][0]["steps"] == 0
    assert cells(tmp_path / "page.html")["state"] == ["not finished, nothing logged yet"]


def test_every_kind_of_run_has_a_page(clips, tmp_path):
    ava = AvaConfig(name="ava", model=tiny.CLASSIFY_MODEL, data=AvaDataConfig(annotations="a.csv"))
    tad = TadConfig(
        name="tad", model=ModelConfig(name="vit_small_patch16_224"), detector=ActionFormerConfig(inputs=8),
        data=TadDataConfig(features="f", annotations="a.json"), train=TrainConfig(global_batch=2),
    )  # fmt: skip
    configs = [tiny.pretrain_config(clips, tmp_path), tiny.classify_config(clips, tmp_path),
               tiny.distill_config(clips, tmp_path, "random"), ava, tad]  # fmt: skip
    for config in configs:
        run = RunDirectory.open(dataclasses.replace(config, out=str(tmp_path)), resume=True)
        log = MetricsLog(run.metrics)
        for step in (10, 20):
            log.write(kind="train", step=step, epoch=step / 10, loss=9.0, clips_per_s=4.0, seconds=5.0, skipped=1, replaced=2)
        page = Path(run_report.write_run_report([run.path])["report"])
        assert page == run.path / "report.html"
        assert cells(page)["task"] == [run_report._TASKS[type(config).__name__]]
        assert (cells(page)["skipped steps"], cells(page)["replaced clips"]) == (["1"], ["2"])
    assert set(run_report._TASKS) == {type(config).__name__ for config in configs}


def test_a_progression_that_has_not_finished_has_the_pages_of_its_stages(clips, tmp_path, capsys):
    stages = (tiny.pretrain_config(clips, tmp_path, name="first"), tiny.classify_config(clips, tmp_path, name="second"))
    run_progression(Progression(name="tiny", stages=stages, out=str(tmp_path)), until="first")
    cli.main(["report", str(tmp_path), "--json"])
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["reports"] == [str(tmp_path / "first" / "report.html")]
    with pytest.raises(SystemExit):
        cli.main(["report", str(tmp_path), str(tmp_path / "first")])
    assert "name one of its stages" in capsys.readouterr().err
