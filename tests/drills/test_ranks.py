"""One rank, two ranks, sharded or not, in any order: the same samples, the same losses, and bits where bits are promised."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests import tiny_runs as tiny
from tests.drills import ranks
from vmae2_fast.train import train
from vmae2_fast.train.log import read_metrics

full = pytest.mark.skipif(os.environ.get("VMAE2_DRILLS") != "full", reason="in make drills")


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


@pytest.mark.parametrize(
    ("mode", "micro"), [pytest.param("ddp", 2, marks=full), pytest.param("ddp", 1, marks=full), ("fsdp", 1)]
)
def test_two_ranks_learn_what_one_learns(clips, single, tmp_path, mode, micro):
    code, output = ranks.run(2, clips, tmp_path / "out", parallel=mode, micro_batch=micro)
    assert code == 0, output
    assert _losses(tmp_path / "out" / "tiny_pretrain") == pytest.approx(_losses(single["directory"]), rel=1e-5)
    ours, theirs = load_file(_done(tmp_path / "out")["weights"]), load_file(single["weights"])
    assert ours.keys() == theirs.keys()
    worst = max(float((ours[n] - theirs[n]).norm() / theirs[n].norm().clamp(min=1e-3)) for n in ours)
    assert worst < 1e-3  # twelve steps of AdamW amplify the other order of summation


@full
def test_sharded_ranks_start_from_the_weights_one_starts_from(clips, single, tmp_path):
    init = single["weights"]
    alone = train(dataclasses.replace(tiny.pretrain_config(clips, tmp_path / "alone"), init=init))
    before = f"import dataclasses; config = dataclasses.replace(config, init={init!r})"
    code, output = ranks.run(2, clips, tmp_path / "out", before=before, parallel="fsdp")
    assert code == 0, output
    losses = _losses(tmp_path / "out" / "tiny_pretrain")
    assert losses == pytest.approx(_losses(alone["directory"]), rel=1e-5)
    assert losses[0] < _losses(single["directory"])[0]


@full
def test_two_copies_of_two_shards_learn_what_one_rank_learns(clips, single, tmp_path):
    """Four ranks as two machines of two; stopped, they are followed by one process."""
    stop = ranks.at_step("if number == 6 and rank == 3: os.kill(os.getpid(), signal.SIGUSR1)")
    split = {"parallel": "hsdp", "shard_within": 2}
    code, output = ranks.run(4, clips, tmp_path / "out", before=stop, **split)
    assert "saved step 7" in output
    code, output = ranks.run(4, clips, tmp_path / "whole", **split)
    assert code == 0, output
    assert train(tiny.pretrain_config(clips, tmp_path / "out"))["steps"] == 12
    theirs = read_metrics(Path(single["directory"]) / "metrics.jsonl")
    lines = read_metrics(tmp_path / "whole" / "tiny_pretrain" / "metrics.jsonl")
    for name in ("loss", "grad_norm"):
        assert [line[name] for line in lines] == pytest.approx([line[name] for line in theirs], rel=1e-5)
    resumed = read_metrics(tmp_path / "out" / "tiny_pretrain" / "metrics.jsonl")
    assert resumed[-1]["loss"] == pytest.approx(theirs[-1]["loss"], rel=1e-5)


@full
def test_a_crashed_rank_is_started_again_and_the_end_has_the_same_bits(clips, tmp_path):
    code, output = ranks.run(2, clips, tmp_path / "whole", parallel="fsdp")
    assert code == 0, output
    crash = ranks.at_step("if number == 9 and rank == 1 and attempt == 0: os._exit(7)")
    code, output = ranks.run(2, clips, tmp_path / "out", parallel="fsdp", before=crash, restarts=1)
    assert code == 0, output
    assert _same_bits(_done(tmp_path / "out")["weights"], _done(tmp_path / "whole")["weights"])
    assert _done(tmp_path / "out")["last_loss"] == _done(tmp_path / "whole")["last_loss"]


@full
def test_two_ranks_then_one_then_two_see_the_same_samples(clips, single, tmp_path):
    """SIGUSR1 to one rank alone stops both after the same step; one process goes on, then two end it."""
    stop = ranks.at_step("if number == 4 and rank == 1: os.kill(os.getpid(), signal.SIGUSR1)")
    code, output = ranks.run(2, clips, tmp_path / "out", before=stop)
    assert code != 0
    assert "saved step 5" in output
    stop = ranks.at_step("if number == 7: os.kill(os.getpid(), signal.SIGUSR1)")
    code, output = ranks.run(1, clips, tmp_path / "out", before=stop)
    assert "saved step 8" in output
    code, output = ranks.run(2, clips, tmp_path / "out", parallel="fsdp")
    assert code == 0, output
    lines = read_metrics(Path(_done(tmp_path / "out")["directory"]) / "metrics.jsonl")
    theirs = {line["step"]: line["loss"] for line in read_metrics(Path(single["directory"]) / "metrics.jsonl")}
    shared = [line["step"] for line in lines if line["step"] in theirs]
    assert shared[-1] == 12
    assert [line["loss"] for line in lines if line["step"] in theirs][-1] == pytest.approx(theirs[12], rel=1e-5)


def test_two_ranks_sharded_in_float16_stay_in_the_band_of_one(clips, single, tmp_path):
    """Blocks gathered in float16, gradients summed in float32, one loss scale."""
    alone = train(tiny.with_train(tiny.pretrain_config(clips, tmp_path / "alone"), precision="float16"))
    code, output = ranks.run(2, clips, tmp_path / "out", parallel="fsdp", micro_batch=1, precision="float16")
    assert code == 0, output
    exact, band, ours = (_losses(d) for d in (single["directory"], alone["directory"], tmp_path / "out" / "tiny_pretrain"))
    assert max(abs(a - e) for a, e in zip(ours, exact)) <= 2 * max(abs(b - e) for b, e in zip(band, exact))
    assert _done(tmp_path / "out")["skipped_steps"] == 0


@pytest.mark.parametrize(
    ("mode", "precision"), [("ddp", "float32"), pytest.param("fsdp", "float32", marks=full), ("fsdp", "float16")]
)
def test_nan_on_one_rank_skips_the_step_on_both(clips, tmp_path, mode, precision):
    poison = """
original_loss = Task.loss
def poisoned(self, batch):
    out = original_loss(self, batch)
    poisoned.calls += 1
    if rank == 1 and poisoned.calls == 6:
        out["loss_sum"] = out["loss_sum"] * float("nan")
    return out
poisoned.calls = 0
Task.loss = poisoned
"""
    before = "from vmae2_fast.tasks.pretrain import PretrainTask as Task\n" + poison
    code, output = ranks.run(2, clips, tmp_path / "out", parallel=mode, before=before, precision=precision)
    assert code == 0, output
    last = read_metrics(tmp_path / "out" / "tiny_pretrain" / "metrics.jsonl")[-1]
    assert last.get("loss_scale") == (2.0**15 if precision == "float16" else None)
    done = _done(tmp_path / "out")
    assert done["skipped_steps"] == 1
    assert done["steps"] == 12
    assert all(t.isfinite().all() for t in load_file(done["weights"]).values())


@full
def test_a_hanging_rank_is_named(clips, tmp_path):
    # rank 1 waits for its own report, so that the drill needs no other clock
    hang = ranks.at_step(
        "report = out / config.name / 'stuck-rank1.txt'\n"
        "while number == 3 and rank == 1 and 'most recent call' not in (report.exists() and report.read_text() or ''):\n"
        "    time.sleep(0.05)"
    )
    code, output = ranks.run(2, clips, tmp_path / "out", before=hang, stuck_after=5)
    assert code == 0, output
    stacks = (tmp_path / "out" / "tiny_pretrain" / "stuck-rank1.txt").read_text()
    assert "after step 3" in stacks
    assert "in stepping" in stacks  # where it hangs
    assert "stuck-rank1.txt" in output


@full
def test_launch_starts_the_ranks_itself(tmp_path):
    command = ["launch", "pretrain:vit_base_hybrid", "--smoke", "--gpus", "2", "--restarts", "1", "--out", str(tmp_path)]
    done = subprocess.run(
        [sys.executable, "-m", "vmae2_fast", *command, "--json"], cwd=ranks.ROOT, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("{")]  # one result, not one a rank
    assert json.loads(line)["pretrain_vit_base_hybrid"]["steps"] == 20
