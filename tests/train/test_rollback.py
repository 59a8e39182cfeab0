"""Many steps in a row that are not finite: back to the checkpoint from before them, and on with the clips behind them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests import tiny_runs as tiny
from tests.drills.judge import same_bits, same_run
from vmae2_fast.tasks.pretrain import PretrainTask
from vmae2_fast.train import loop, train
from vmae2_fast.train.log import read_lines, read_metrics
from vmae2_fast.train.optim import Optimizer

BAD = range(20, 32)
"""Positions whose loss is not a number: steps 6, 7 and 8."""


pytestmark = pytest.mark.usefixtures("one_thread")


class Stopped(Exception):
    pass


def _poison(monkeypatch, bad) -> list[int]:
    """Make the losses of positions `bad` NaN; returns the list that every batch's first position will be appended to."""
    original, seen = PretrainTask.loss, []

    def poisoned(self, batch):
        found = original(self, batch)
        seen.append(int(batch.position[0]))
        if any(position in bad for position in batch.position.tolist()):
            found["loss_sum"] = found["loss_sum"] * float("nan")
        return found

    monkeypatch.setattr(PretrainTask, "loss", poisoned)
    return seen


def _config(clips, out, **changes):
    return tiny.with_train(tiny.pretrain_config(clips, out), **{"max_skipped": 3, "max_rollbacks": 2, **changes})


def test_a_run_goes_back_and_on_behind_the_bad_clips(clips, tmp_path, monkeypatch, capsys):
    seen = _poison(monkeypatch, BAD)
    summary = train(_config(clips, tmp_path / "out"))
    assert seen == [*range(0, 32, 4), *range(32, 64, 4)]
    assert (summary["steps"], summary["rollbacks"], summary["skipped_steps"]) == (12, 1, 3)
    run = Path(summary["directory"])
    said = capsys.readouterr().err
    assert f"not finite for 3 steps in a row, last at step 8. Gone back to {run}/checkpoints/step-00000004 (1 of" in said
    lines = read_metrics(run / "metrics.jsonl")
    assert [line["step"] for line in lines] == [2, 4, 6, 8, 10, 12]
    assert [line["rollbacks"] for line in lines] == [0, 0, 1, 1, 1, 1]
    (marker,) = read_metrics(run / "metrics.jsonl", "rollback")
    assert marker == {"kind": "rollback", "step": 4, "lost_step": 8, "position": 32, "rollbacks": 1}
    spikes = read_lines(run / "spikes.jsonl")
    assert [(s["lost_step"], s["batches"][0]["positions"]) for s in spikes] == [(6, [20, 23]), (7, [24, 27]), (8, [28, 31])]

    # the same as a run whose checkpoint of step 4 goes on at position 32
    reference = _config(clips, tmp_path / "reference")
    original = loop.load_checkpoint
    with monkeypatch.context() as patch:
        _stop_at(patch, 5)
        with pytest.raises(Stopped):
            train(reference)
    monkeypatch.setattr(loop, "load_checkpoint", lambda *a, **k: {**original(*a, **k), "position": 32})
    assert same_bits(train(reference)["weights"], summary["weights"])


def _stop_at(monkeypatch, step: int, visit: int = 1) -> None:
    """Break off in front of step number `step`, the `visit`-th time it comes."""
    original, visits = Optimizer.step, []

    def stepping(self, number, loss):
        visits.append(number)
        if visits.count(step) == visit:
            raise Stopped
        return original(self, number, loss)

    monkeypatch.setattr(Optimizer, "step", stepping)


@pytest.mark.parametrize(("step", "visit"), [(7, 1), (4, 2), (6, 2), (9, 1)])
def test_a_run_that_is_broken_off_around_it_ends_with_the_same_bits(clips, tmp_path, monkeypatch, step, visit):
    """Inside the bad steps, just behind the way back, in front of the next checkpoint, and after it."""
    _poison(monkeypatch, BAD)
    whole = train(_config(clips, tmp_path / "whole"))
    with monkeypatch.context() as patch:
        _stop_at(patch, step, visit)
        with pytest.raises(Stopped):
            train(_config(clips, tmp_path / "parts"))
    parts = train(_config(clips, tmp_path / "parts"))
    assert same_run(parts, whole)
    spikes = [read_lines(Path(run["directory"]) / "spikes.jsonl") for run in (parts, whole)]
    assert spikes[0] == spikes[1]


def test_checkpoints_among_the_bad_steps_are_left_out_and_the_one_before_is_kept(clips, tmp_path, monkeypatch):
    """Saved after every step, the newest two kept: all of them are from among the five bad steps."""
    _poison(monkeypatch, range(20, 40))
    original, there = loop.load_checkpoint, []

    def loading(directory, *args, **keywords):
        there.append(sorted(os.listdir(directory.parent)))
        return original(directory, *args, **keywords)

    monkeypatch.setattr(loop, "load_checkpoint", loading)
    config = _config(clips, tmp_path, max_skipped=5, checkpoint_every=1, log_every=1)
    summary = train(config)
    assert there == [["step-00000005", "step-00000008", "step-00000009"]]
    assert (summary["steps"], summary["rollbacks"]) == (12, 1)
    (marker,) = read_metrics(Path(summary["directory"]) / "metrics.jsonl", "rollback")
    assert (marker["step"], marker["lost_step"]) == (5, 10)
    assert sorted(os.listdir(Path(summary["directory"]) / "checkpoints")) == ["step-00000011", "step-00000012"]


def test_a_run_goes_back_so_often_and_then_ends(clips, tmp_path, monkeypatch, capsys):
    _poison(monkeypatch, range(20, 10**6))
    with pytest.raises(SystemExit) as stop:
        train(_config(clips, tmp_path, epochs=40))
    assert stop.value.code == loop.NOT_FINITE
    said = capsys.readouterr().err
    assert said.count("Gone back to") == 2
    assert "(gone back 2 times). Run again with" in said
    weights = load_file(tmp_path / "tiny_pretrain" / "checkpoints" / "step-00000004" / "model.safetensors")
    assert all(t.isfinite().all() for t in weights.values())


def test_a_run_that_is_bad_from_its_start_ends(clips, tmp_path, monkeypatch, capsys):
    _poison(monkeypatch, range(10**6))
    with pytest.raises(SystemExit) as stop:
        train(_config(clips, tmp_path))
    assert stop.value.code == loop.NOT_FINITE
    assert "Gone back" not in capsys.readouterr().err
