"""What a run shows while it goes on: pictures, TensorBoard, a trace, the clips of unusual steps, the slowest rank."""

from __future__ import annotations

import dataclasses
import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from tests import tiny_runs as tiny
from vmae2_fast.data.loader import VideoLoader
from vmae2_fast.train import pictures, train
from vmae2_fast.train.clock import Own, compared
from vmae2_fast.train.log import Board, read_metrics
from vmae2_fast.train.optim import Optimizer
from vmae2_fast.train.spikes import SpikeLog


@pytest.fixture(scope="module")
def plain(clips, tmp_path_factory) -> dict:
    """A run that shows nothing."""
    return train(tiny.pretrain_config(clips, tmp_path_factory.mktemp("plain")))


def _same_run(a: dict, b: dict) -> bool:
    ours, theirs = load_file(a["weights"]), load_file(b["weights"])
    lines = [tiny.metrics_without_time(Path(run["directory"]) / "metrics.jsonl") for run in (a, b)]
    return lines[0] == lines[1] and all(torch.equal(ours[name], theirs[name]) for name in theirs)


class Stopped(Exception):
    pass


def _before_steps(monkeypatch, action):
    original = Optimizer.step

    def stepping(self, number, loss):
        return original(self, number, action(self, number, loss))

    monkeypatch.setattr(Optimizer, "step", stepping)


def test_pictures_come_with_checkpoints_and_change_nothing(clips, plain, tmp_path):
    summary = train(tiny.with_train(tiny.pretrain_config(clips, tmp_path), picture_every=None))
    folder = Path(summary["directory"]) / "pictures"
    steps = (4, 8, 12)
    assert sorted(p.name for p in folder.iterdir()) == ["curves.png", *(f"reconstruction-{s:08d}.png" for s in steps)]
    drawn = [np.asarray(Image.open(folder / f"reconstruction-{s:08d}.png")) for s in steps]
    # two columns of clips, each four frames wide and four rows high, at three times 32 pixels and a frame of one
    assert {picture.shape for picture in drawn} == {(2 * 4 * 98 + 12, 2 * (4 * 98 + 12), 3)}
    originals = [picture[:98] for picture in drawn]
    assert all(np.array_equal(originals[0], other) for other in originals)  # the same clips each time
    assert not np.array_equal(drawn[0], drawn[-1])  # by another model
    assert _same_run(plain, summary)


def test_the_steps_of_pictures_can_be_chosen_and_other_tasks_have_curves(clips, tmp_path):
    config = tiny.with_train(tiny.classify_config(clips, tmp_path), picture_every=10, epochs=5)
    folder = Path(train(config)["directory"]) / "pictures"
    assert [p.name for p in folder.iterdir()] == ["curves.png"]


def test_old_pictures_are_thinned_out(tmp_path):
    class Run:
        path, pictures = tmp_path, tmp_path / "pictures"

    Run.pictures.mkdir()
    drawing = object.__new__(pictures.RunPictures)
    drawing.run = Run
    for step in range(1, 200):
        drawing._write(np.zeros((4, 4, 3), np.uint8), step)
    kept = [int(p.stem.split("-")[1]) for p in pictures.reconstructions(tmp_path)]
    assert len(kept) == pictures._KEPT
    assert (kept[0], kept[-1]) == (1, 199)
    assert max(b - a for a, b in itertools.pairwise(kept)) <= 2 * 199 / pictures._KEPT  # spread over the run


def test_pictures_that_cannot_be_drawn_are_said_once_and_do_not_end_the_run(clips, tmp_path, monkeypatch, capsys):
    config = tiny.with_train(tiny.pretrain_config(clips, tmp_path), picture_every=None, epochs=4)
    monkeypatch.setattr(pictures, "save_png", lambda *a: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    assert train(config)["steps"] == 8
    assert capsys.readouterr().err.count("no pictures: [Errno 28] No space left on device") == 1
    monkeypatch.setattr(pictures.importlib.util, "find_spec", lambda name: None)
    assert train(dataclasses.replace(config, name="without"))["steps"] == 8
    assert train(dataclasses.replace(config, name="again"))["steps"] == 8
    assert capsys.readouterr().err.count("matplotlib, jinja2, PIL not installed") == 1
    assert not (tmp_path / "without" / "pictures").exists()


def test_tensorboard_has_the_numbers_of_the_metrics(clips, plain, tmp_path, monkeypatch):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    def stop(self, number, loss):
        if number == 7:
            raise Stopped
        return loss

    config = tiny.with_train(tiny.pretrain_config(clips, tmp_path), tensorboard=True)
    with monkeypatch.context() as patch:
        _before_steps(patch, stop)
        with pytest.raises(Stopped):
            train(config)
    summary = train(config)  # steps 5 and 6 are done again
    events = EventAccumulator(str(Path(summary["directory"]) / "tensorboard")).Reload()
    lines = read_metrics(Path(summary["directory"]) / "metrics.jsonl")
    for name in ("loss", "lr", "grad_norm", "skipped"):
        written = [(e.step, e.value) for e in events.Scalars(f"train/{name}")]
        assert written == [(line["step"], pytest.approx(line[name], rel=1e-6)) for line in lines]
    assert _same_run(plain, summary)


def test_tensorboard_that_is_not_installed_is_an_error(clips, tmp_path, monkeypatch):
    monkeypatch.setattr("vmae2_fast.train.log.importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"tensorboard is not installed; pip install 'vmae2_fast\[report\]'"):
        train(tiny.with_train(tiny.pretrain_config(clips, tmp_path), tensorboard=True))
    assert not (tmp_path / "tiny_pretrain").exists()
    with pytest.raises(ValueError, match="not installed"):
        Board.check()


def test_a_profile_is_a_trace_of_three_steps_and_changes_nothing(clips, plain, tmp_path, capsys):
    summary = train(tiny.pretrain_config(clips, tmp_path), profile=True)
    (trace,) = (Path(summary["directory"]) / "profile").iterdir()
    assert trace.name == "rank0-steps-6-8.json"
    names = [event.get("name", "") for event in json.loads(trace.read_text())["traceEvents"]]
    assert len({name for name in names if name.startswith("ProfilerStep")}) == 3
    assert any("vmae2::reconstruction_loss" in name for name in names)
    lines = capsys.readouterr().err.splitlines()
    at = next(i for i, line in enumerate(lines) if line == f"trace of steps 6 to 8: {trace}")
    shares = [float(line.split()[-1]) for line in lines[at + 2 : at + 14]]
    assert shares == sorted(shares, reverse=True)
    assert 30 < sum(shares) <= 100.1
    assert _same_run(plain, summary)


def test_a_profile_of_a_short_sitting_takes_what_there_is(clips, tmp_path):
    summary = train(tiny.with_train(tiny.pretrain_config(clips, tmp_path), epochs=1, log_every=1), profile=True)
    assert [p.name for p in (Path(summary["directory"]) / "profile").iterdir()] == ["rank0-steps-2-2.json"]


def test_spikes_name_the_clips_of_every_micro_batch(clips, tmp_path, monkeypatch):
    """Step 20 (number 19) has ten times the loss, step 24 none that is finite; the sitting breaks off and is resumed."""

    def disturb(self, number, loss):
        if number == 26 and not disturb.stopped:
            disturb.stopped = True
            raise Stopped
        loss.mul_({19: 10.0, 23: float("nan")}.get(number, 1.0))
        return loss

    disturb.stopped = False
    _before_steps(monkeypatch, disturb)
    config = tiny.with_train(tiny.pretrain_config(clips, tmp_path), epochs=15, micro_batch=2, checkpoint_every=9, log_every=5)
    config = dataclasses.replace(config, data=tiny.data(clips, views=2))
    with pytest.raises(Stopped):
        train(config)
    run = Path(train(config)["directory"])
    spikes = [json.loads(line) for line in (run / "spikes.jsonl").read_text().splitlines()]
    assert [(s["step"], s["skipped"]) for s in spikes] == [(20, False), (24, True)]
    assert spikes[0]["loss"] == pytest.approx(10 * spikes[0]["median"], rel=0.2)
    assert spikes[1]["loss"] is None
    assert spikes[0]["grad_norm"] > 0
    loader = VideoLoader(config.data, frames=tiny.FRAMES, size=tiny.SIZE, clips_per_batch=1, seed=config.seed, steps=60)
    with loader:
        batches = list(loader)
    for spike in spikes:
        theirs = batches[2 * (spike["step"] - 1) : 2 * spike["step"]]
        assert spike["batches"] == [
            {"rank": 0, "micro_batch": m, "positions": [int(b.position[0])] * 2, "paths": [b.paths[0]]}
            for m, b in enumerate(theirs)
        ]


@pytest.mark.parametrize(("factor", "unusual"), [(2.0, {0: None, 17: 1.0, 18: 1.0}), (0.0, {0: None, 18: 1.0})])
def test_a_loss_is_unusual_beside_the_median_of_those_before(factor, unusual):
    log = object.__new__(SpikeLog)
    log.factor = factor
    losses = [float("nan"), *[1.0] * 15, 1.9, 2.1, float("inf"), 1.0]
    assert log.judge(losses, []) == ({0: None, 18: 1.0} if factor == 0 else unusual)
    assert log.judge([2.1], [1.0] * 15) == {}
    assert log.judge([2.1], [1.0] * 100 + [2.0] * 100) == {}


def test_the_slowest_rank_is_named_by_its_own_time_and_the_starved_one_by_its_wait():
    ranks = [Own("a", 4.0, 0.0), Own("a", 4.0, 1.0), Own("b", 9.0, 0.5)]
    assert compared(ranks, 2) == {
        "min": 2.0, "median": 2.5, "max": 4.75, "slowest": 2, "host": "b", "wait_max": 0.5, "wait_rank": 1
    }  # fmt: skip
