"""The report of a progression says what the runs say."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from matplotlib.figure import Figure

from tests import tiny_runs as tiny
from vmae2_fast import pictures, report
from vmae2_fast.config import Progression
from vmae2_fast.tasks import ClassifyTask
from vmae2_fast.train.log import read_metrics
from vmae2_fast.train.progression import run_progression


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A progression of two tiny stages, one of them validated, and its results."""
    root = tmp_path_factory.mktemp("report")
    clips, out = tiny.write_clips(root / "clips", per_class=2), root / "out"
    stages = (
        tiny.with_train(tiny.pretrain_config(clips, out, name="pretrain"), epochs=4),
        tiny.with_train(tiny.classify_config(clips, out, name="finetune"), epochs=6),
    )
    progression = Progression(name="tiny", stages=stages, out=str(out))
    return progression, run_progression(progression)


def test_shuffled_accuracy_comes_from_shuffled_frames(finished, monkeypatch):
    def evaluate(self, views, *, shuffled=False):
        assert len(views) == 4
        return {"top1": 0.25 if shuffled else 0.75}

    monkeypatch.setattr(ClassifyTask, "evaluate", evaluate)
    progression, results = finished
    finetune = report.summarise(progression, results)["finetune"]
    assert finetune["top1_shuffled"] == 0.25
    assert finetune["top1"] == results["finetune"]["validation"]["top1"]


def test_pictures_show_what_was_recorded(finished, monkeypatch):
    progression, results = finished
    pyplot, figures = pictures.pyplot(), list[Figure]()
    monkeypatch.setattr(pyplot, "close", figures.append)
    summary = report.write_report(progression, results)
    monkeypatch.undo()
    curves, confusion = figures
    out = Path(progression.out)
    assert [axes.get_title() for axes in curves.axes] == ["pretrain", "finetune"]
    for axes in curves.axes:
        lines = read_metrics(out / axes.get_title() / "metrics.jsonl")
        assert len(lines) >= 2
        (line,) = axes.lines
        assert line.get_xydata().tolist() == [[e["step"], e["loss"]] for e in lines]
    assert confusion.axes[0].images[0].get_array().tolist() == results["finetune"]["validation"]["confusion"]
    for figure in figures:
        pyplot.close(figure)
    assert json.loads((out / "summary.json").read_text()) == summary
    assert "data:image/png;base64," in (out / "report.html").read_text()
