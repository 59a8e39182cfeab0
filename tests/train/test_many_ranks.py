"""What more machines than there are here would read: the loaders of all ranks of a large run, without decoding."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch

from tests import tiny_runs as tiny
from vmae2_fast.data import VideoLoader, workers
from vmae2_fast.train.batch import split_batch
from vmae2_fast.train.parallel import World, placement


@pytest.fixture(scope="module")
def clips(tmp_path_factory) -> Path:
    return tiny.write_clips(tmp_path_factory.mktemp("clips"), per_class=1)


def _positions(config, ranks: int, steps: int, start: int, monkeypatch) -> list[list[int]]:
    """Positions of every step, in the order of micro-batch and rank."""
    monkeypatch.setattr(workers, "run_job", lambda job, out, video: workers.Done(np.zeros(2, np.int64), 0.0, None, None))
    data = dataclasses.replace(config.data, workers=0)
    micro, batches = split_batch(config, ranks)
    rows: list[list[list[int]]] = []
    for rank in range(ranks):
        with VideoLoader(
            data, frames=2, size=8, clips_per_batch=micro, start=start, steps=steps * batches, rank=rank, world=ranks
        ) as loader:
            rows.append([batch.position.tolist() for batch in loader])
    return [
        [p for b in range(step * batches, (step + 1) * batches) for rank in range(ranks) for p in rows[rank][b]]
        for step in range(steps)
    ]


def test_1024_ranks_read_every_position_once_and_96_go_on_from_there(clips, tmp_path, monkeypatch):
    config = tiny.with_train(tiny.pretrain_config(clips, tmp_path), global_batch=6144, micro_batch=2)
    first = _positions(config, 1024, 1, 0, monkeypatch)
    second = _positions(config, 96, 1, 6144, monkeypatch)
    assert first == [list(range(6144))]
    assert second == [list(range(6144, 2 * 6144))]


def test_a_global_batch_that_cannot_be_cut_names_its_neighbours(clips, tmp_path):
    config = tiny.with_train(tiny.pretrain_config(clips, tmp_path), global_batch=12)
    assert split_batch(config, 3) == (4, 1)
    assert split_batch(tiny.with_train(config, micro_batch=2), 3) == (2, 2)
    both = r"global_batch=12 is not divisible by ranks x data.views=5 x 1; take 4 or 6 ranks .* train.global_batch 10 or 15"
    with pytest.raises(ValueError, match=both):
        split_batch(config, 5)
    with pytest.raises(ValueError, match=r"ranks x train.micro_batch=2 x 4; .* --train.micro-batch 3 or 6.* 8 or 16"):
        split_batch(tiny.with_train(config, micro_batch=4), 2)


def test_where_a_process_stands(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "SLURM_STEP_ID", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    assert placement() == World()
    step = {"STEP_ID": "0", "STEP_NUM_TASKS": "16", "STEP_TASKS_PER_NODE": "8(x2)", "PROCID": "9", "LOCALID": "1"}
    for name, value in step.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    with pytest.raises(ValueError, match="no MASTER_ADDR and MASTER_PORT"):
        placement()
    monkeypatch.setenv("MASTER_ADDR", "node0")
    monkeypatch.setenv("MASTER_PORT", "29500")
    assert placement() == World(9, 16, 1, 8)
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert placement() == World(3, 4, 3, 4)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert placement().local_size == 2


def test_alone_nothing_is_communicated():
    world = World()
    assert world.sum(torch.tensor(3.0)) == 3
    assert world.highest(15) == 15
    assert world.gather("a") == ["a"]
    with pytest.raises(ValueError, match="told"):
        world.on_first(lambda: (_ for _ in ()).throw(ValueError("told")))
    assert dataclasses.astuple(world) == (0, 1, 0, 1)
