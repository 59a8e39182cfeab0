"""One rank, two ranks, sharded or not, in any order: the same samples, the same losses, and bits where bits are promised."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests import tiny_runs as tiny
from tests.drills import ranks
from vmae2_fast.train import train
from vmae2_fast.train.log import read_metrics


@pytest.fixture(scope="module")
def clips(tmp_path_factory) -> Path:
    return tiny.write_clips(tmp_path_factory.mktemp("clips"))


@pytest.fixture(scope="module")
def single(clips, tmp_path_factory):
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield train(tiny.pretrain_config(clips, tmp_path_factory.mktemp("single")))
    torch.set_num_threads(before)


def _done(out: Path, name: str = "tiny_pretrain") -> dict:
    return json.loads((out / name / "done.json").read_text())


def _losses(directory: str | Path) -> list[float]:
    return [line["loss"] for line in read_metrics(Path(directory) / "metrics.jsonl")]


def _same_bits(a: str | Path, b: str | Path) -> bool:
    ours, theirs = load_file(a), load_file(b)
    return ours.keys() == theirs.keys() and all(torch.equal(ours[n], theirs[n]) for n in ours)


@pytest.mark.parametrize(("mode", "micro"), [("ddp", 2), ("ddp", 1), ("fsdp", 1)])
def test_two_ranks_learn_what_one_learns(clips, single, tmp_path, mode, micro):
    code, output = ranks.run(2, clips, tmp_path / "out", parallel=mode, micro_batch=micro)
    assert code == 0, output
    assert _losses(tmp_path / "out" / "tiny_pretrain") == pytest.approx(_losses(single["directory"]), rel=1e-5)
    ours, theirs = load_file(_done(tmp_path / "out")["weights"]), load_file(single["weights"])
    assert ours.keys() == theirs.keys()
    worst = max(float((ours[n] - theirs[n]).norm() / theirs[n].norm().clamp(min=1e-3)) for n in ours)
    assert worst < 1e-3  # twelve steps of AdamW amplify the other order of summation
