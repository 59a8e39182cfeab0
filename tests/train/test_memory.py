"""Micro-batches chosen from the free memory, and errors that say what to try."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests import tiny_runs as tiny
from vmae2_fast.config import MixConfig
from vmae2_fast.tasks.pretrain import PretrainTask
from vmae2_fast.train import memory, train
from vmae2_fast.train.batch import micro_batches, split_batch
from vmae2_fast.train.budget import rank_bytes, sized
from vmae2_fast.train.optim import Optimizer
from vmae2_fast.train.parallel import World


def _bytes(config: Any, ranks: int, micro: int) -> int:
    return rank_bytes(tiny.with_train(config, micro_batch=micro), ranks)["total"]


def test_the_largest_micro_batch_that_fits_is_chosen(clips, tmp_path):
    config = tiny.with_train(tiny.pretrain_config(clips, tmp_path), global_batch=24, micro_batch=0)
    assert micro_batches(config, 2) == [1, 2, 3, 4, 6, 12]
    for micro, next_one in ((1, 2), (4, 6), (12, 24)):
        room = _bytes(config, 2, micro)
        assert sized(config, 2, room).train.micro_batch == micro
        if next_one <= 12:
            assert sized(config, 2, _bytes(config, 2, next_one) - 1).train.micro_batch == micro
    assert sized(config, 2, 0).train.micro_batch == 1  # nothing fits: the least there is
    own = tiny.with_train(config, micro_batch=3)
    assert sized(own, 2, 0) is own


def test_every_rank_holds_whole_groups_of_mixed_clips(clips, tmp_path):
    config = dataclasses.replace(
        tiny.with_train(tiny.classify_config(clips, tmp_path), global_batch=16), mix=MixConfig(mixup=0.8, clips=4)
    )
    assert split_batch(config, 2) == (8, 1)
    assert micro_batches(config, 2) == [4, 8]
    ways = r"take 4 ranks \(--gpus, --nodes\); or --mix.clips 2; or, .* train.global_batch 32$"
    with pytest.raises(ValueError, match=rf"=16 is not divisible by ranks x mix.clips x data.views=8 x 4; {ways}"):
        split_batch(config, 8)  # two clips a rank
    with pytest.raises(ValueError, match=r"ranks x train.micro_batch=4 x 8; .* 2 ranks .*; or --train.micro-batch 4, or 0"):
        split_batch(tiny.with_train(config, micro_batch=8), 4)


def test_all_ranks_take_what_fits_the_fullest(clips, tmp_path, monkeypatch, capsys):
    config = tiny.with_train(tiny.pretrain_config(clips, tmp_path), global_batch=24, micro_batch=0)
    world, roomy, full = World(0, 2), _bytes(config, 2, 12), _bytes(config, 2, 4)
    monkeypatch.setattr(World, "gather", lambda self, mine: [mine, full / memory.SHARE + 1])
    monkeypatch.setattr(World, "on_first", lambda self, action: action())
    monkeypatch.setattr(memory, "available_bytes", lambda *_: roomy / memory.SHARE + 1)
    plan = tmp_path / "plan.json"
    assert memory.with_micro_batch(config, plan, torch.device("cpu"), world).train.micro_batch == 4
    assert "3 x 4 clips a rank and step" in capsys.readouterr().err
    entry = json.loads(plan.read_text())
    assert (entry["ranks"], entry["micro_batch"], entry["micro_batches"], entry["ledger_bytes"]) == (2, 4, 3, full)
    monkeypatch.setattr(World, "gather", lambda self, mine: [0, 0])
    plan.unlink()
    memory.with_micro_batch(config, plan, torch.device("cpu"), world)
    assert "WARNING: tiny_pretrain: that may not fit; try --train.precision bfloat16" in capsys.readouterr().err


def test_the_host_has_some_memory_left():
    whole = memory.available_bytes(torch.device("cpu"), World())
    assert 2**20 < memory.available_bytes(torch.device("cpu"), World(0, 2, 0, 2)) < whole


class Stopped(Exception):
    pass


def test_a_run_keeps_its_micro_batch_whatever_memory_is_left_later(clips, tmp_path, monkeypatch):
    config = tiny.with_train(tiny.pretrain_config(clips, tmp_path / "chosen"), micro_batch=0)
    monkeypatch.setattr(memory, "available_bytes", lambda *_: _bytes(config, 1, 2) / memory.SHARE + 1)
    step = Optimizer.step

    def stepping(self, number, loss):
        if number == 6:
            raise Stopped
        return step(self, number, loss)

    with monkeypatch.context() as patch:
        patch.setattr(Optimizer, "step", stepping)
        with pytest.raises(Stopped):
            train(config, device="cpu")
    plan = json.loads((tmp_path / "chosen" / "tiny_pretrain" / "plan.json").read_text())
    assert (plan["micro_batch"], plan["micro_batches"]) == (2, 2)
    monkeypatch.setattr(memory, "available_bytes", lambda *_: 2**50)
    ours = train(config, device="cpu")
    theirs = train(tiny.with_train(tiny.pretrain_config(clips, tmp_path / "given"), micro_batch=2), device="cpu")
    a, b = load_file(ours["weights"]), load_file(theirs["weights"])
    assert all(torch.equal(a[name], b[name]) for name in b)


def _run_out(batch: Any) -> Any:
    return torch.empty(2**58)  # the allocator's own refusal


def _refuse(batch: Any) -> Any:
    raise MemoryError


@pytest.mark.parametrize("fail", [_run_out, _refuse])
def test_out_of_memory_on_the_host_names_the_knobs(clips, tmp_path, monkeypatch, fail):
    monkeypatch.setattr(PretrainTask, "loss", lambda self, batch: fail(batch))
    knobs = r"micro-batch .*residual-dtype bfloat16, --train.parallel fsdp .*--model.activation-checkpoint block"
    with pytest.raises(ValueError, match=rf"out of memory on cpu with 4 clips a forward and rank \(.+\); try .*{knobs}"):
        train(tiny.pretrain_config(clips, tmp_path), device="cpu")


def test_another_runtime_error_is_left_alone(clips, tmp_path, monkeypatch):
    def broken(self, batch):
        raise RuntimeError("shapes differ")

    monkeypatch.setattr(PretrainTask, "loss", broken)
    with pytest.raises(RuntimeError, match=r"^shapes differ$"):
        train(tiny.pretrain_config(clips, tmp_path), device="cpu")
