"""Checkpoints written beside the training: the same files, never lost, and errors that arrive in the loop."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest
import torch
from torch import nn

from tests import tiny_runs as tiny
from vmae2_fast.config import OptimConfig
from vmae2_fast.train import checkpoint as ck
from vmae2_fast.train import train
from vmae2_fast.train.optim import Optimizer
from vmae2_fast.train.parallel import World
from vmae2_fast.train.saver import Saver


class Training:
    def __init__(self) -> None:
        torch.manual_seed(1)
        self.model = nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.5), nn.Linear(4, 2))
        config = OptimConfig(lr=0.1, lr_batch=0)
        self.optimizer = Optimizer(self.model, config, global_batch=1, total_steps=100, steps_per_epoch=10)
        self.number = 0

    def step(self) -> None:
        self.optimizer.zero_grad()
        loss = self.model(torch.ones(4, 3)).square().mean()
        loss.backward()
        self.optimizer.step(self.number, loss)
        self.number += 1

    def save(self, saver: Saver) -> None:
        saver.save(self.number, self.model, self.optimizer, {"position": 7 * self.number})


@pytest.fixture
def gate(monkeypatch) -> threading.Event:
    """Files are only written once it is set."""
    event, save_file = threading.Event(), ck.save_file

    def waiting(tensors, path):
        event.wait(60)
        save_file(tensors, path)

    monkeypatch.setattr(ck, "save_file", waiting)
    return event


def _files(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def test_what_is_written_is_the_moment_of_the_save_to_the_bit(tmp_path, gate):
    """Training goes on before a byte is on disk; twice, as the second save reuses the memory of the first."""
    training = Training()
    with Saver(tmp_path / "beside", World(), keep=9) as saver:
        for earlier in range(2):
            gate.clear()
            training.step()
            training.save(saver)
            written = len(ck.committed(tmp_path / "beside"))
            training.step()  # the writer stands at the gate
            gate.set()
            saver.wait()
            assert written == earlier
    again, step = Training(), 0
    for step in (1, 3):
        while again.number < step:
            again.step()
        ck.save_checkpoint(tmp_path / "at once", step, again.model, again.optimizer, {"position": 7 * step}, keep=9)
        name = f"step-{step:08d}"
        assert _files(tmp_path / "beside" / name) == _files(tmp_path / "at once" / name)


def test_one_save_at_a_time_and_superfluous_ones_go(tmp_path):
    training = Training()
    with Saver(tmp_path, World(), keep=1, keep_every=2) as saver:
        for _ in range(5):
            training.step()
            training.save(saver)
    assert sorted(os.listdir(tmp_path)) == [f"step-{step:08d}" for step in (2, 4, 5)]


def _break_off(saver: Saver, gate: threading.Event | None = None) -> None:
    with saver:
        Training().save(saver)
        if gate is not None:
            gate.set()
        raise ZeroDivisionError


def test_an_error_of_the_training_does_not_lose_the_save_under_way(tmp_path, gate):
    with pytest.raises(ZeroDivisionError):
        _break_off(Saver(tmp_path, World()), gate)
    ck.verify(tmp_path / "step-00000000")


def test_a_save_that_fails_under_another_error_is_told(tmp_path, monkeypatch, capsys):
    _fill_the_disk(monkeypatch, after=0)
    with pytest.raises(ZeroDivisionError):
        _break_off(Saver(tmp_path, World()))
    assert "No space left on device" in capsys.readouterr().err
    assert not os.listdir(tmp_path)


def _fill_the_disk(monkeypatch, after: int) -> None:
    """From the save number `after` on, counted from 0, no file fits any more."""
    save_file, files = ck.save_file, []

    def full(tensors, path):
        files.append(path)
        if len(files) > after * len(ck.TENSOR_FILES):
            path.write_bytes(b"half")
            raise OSError(28, "No space left on device")
        save_file(tensors, path)

    monkeypatch.setattr(ck, "save_file", full)


@pytest.mark.parametrize("background", [True, False])
def test_a_full_disk_ends_the_run_with_the_path_and_leaves_the_last_commit(clips, tmp_path, monkeypatch, background):
    _fill_the_disk(monkeypatch, after=1)
    config = tiny.with_train(tiny.pretrain_config(clips, tmp_path), async_checkpoint=background)
    with pytest.raises(ck.CheckpointError, match=r"checkpoints/step-00000008: .*No space left on device"):
        train(config)
    checkpoints = tmp_path / "tiny_pretrain" / "checkpoints"
    assert os.listdir(checkpoints) == ["step-00000004"]
    assert ck.newest_intact(checkpoints) is not None
    monkeypatch.undo()
    assert train(config)["steps"] == 12
