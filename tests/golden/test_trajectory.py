"""A recorded run of several AdamW steps through the training loop, on one process and two: losses, gradient norms and the
final parameters."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests.drills.ranks import torchrun
from tests.golden import recorded_run
from tests.golden.cases import MODELS, distance, named, of_kind, tensors
from vmae2_fast.train.log import read_metrics

CASES = [name for name in of_kind("trajectory") if MODELS[name]["start"] in MODELS]
EVEN = [name for name in CASES if recorded_run.clips_of(name) % 2 == 0]


def _check(name: str, out: Path) -> None:
    entry, done = MODELS[name], json.loads((out / name / "done.json").read_text())
    lines = read_metrics(out / name / "metrics.jsonl")
    assert [line["lr"] for line in lines] == pytest.approx(entry["lr"], rel=1e-9)
    assert [line["loss"] for line in lines] == pytest.approx(entry["losses"], rel=1e-5)
    assert [line["grad_norm"] for line in lines] == pytest.approx(entry["grad_norms_before_clip"], rel=1e-4)
    final, ours = named(tensors("models", name), "final."), load_file(done["weights"])
    assert set(final) == set(ours)
    floor = 1e-6 * max(float(value.norm()) for value in final.values())
    assert not {key: d for key, value in ours.items() if (d := distance(value, final[key], floor)) > 1e-4}


@pytest.mark.parametrize("micro_batch", [None, 1])
@pytest.mark.parametrize("name", CASES)
def test_trajectory_of_one_process(name, micro_batch, tmp_path):
    recorded_run.write_start(name, tmp_path)
    recorded_run.run(name, tmp_path, "ddp", micro_batch or recorded_run.clips_of(name))
    _check(name, tmp_path)


@pytest.mark.parametrize("mode", ["ddp", "fsdp"])
@pytest.mark.parametrize("name", EVEN)
def test_trajectory_of_two_ranks(name, mode, tmp_path):
    recorded_run.write_start(name, tmp_path)
    micro_batch = str(recorded_run.clips_of(name) // 2)
    process = torchrun(2, "--module", "tests.golden.recorded_run", name, str(tmp_path), mode, micro_batch)
    output = process.communicate(timeout=300)[0]
    assert process.returncode == 0, output
    _check(name, tmp_path)
