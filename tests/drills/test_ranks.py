"""One rank, two ranks, sharded or not, in any order: the same samples, the same losses, and bits where bits are promised."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests import tiny_runs as tiny
from tests.drills import ranks
from tests.drills.judge import done, full, same_bits
from vmae2_fast.train import train
from vmae2_fast.train.log import read_metrics


def _losses(directory: str | Path) -> list[float]:
    return [line["loss"] for line in read_metrics(Path(directory) / "metrics.jsonl")]


@pytest.mark.parametrize(
    ("mode", "micro"), [pytest.param("ddp", 2, marks=full), pytest.param("ddp", 1, marks=full), ("fsdp", 1)]
)
def test_two_ranks_learn_what_one_learns(clips, whole, forks, tmp_path, mode, micro):
    codes, log = forks.run(clips, tmp_path, ranks=2, parallel=mode, micro_batch=micro)
    assert codes == [0, 0], log
    assert _losses(tmp_path / "tiny_pretrain") == pytest.approx(_losses(whole["directory"]), rel=1e-5)
    ours, theirs = load_file(done(tmp_path)["weights"]), load_file(whole["weights"])
    assert ours.keys() == theirs.keys()
    worst = max(float((ours[n] - theirs[n]).norm() / theirs[n].norm().clamp(min=1e-3)) for n in ours)
    assert worst < 1e-3  # twelve steps of AdamW amplify the other order of summation


@full
def test_sharded_ranks_start_from_the_weights_one_starts_from(clips, whole, forks, tmp_path):
    init = whole["weights"]
    alone = train(dataclasses.replace(tiny.pretrain_config(clips, tmp_path / "alone"), init=init))
    before = f"import dataclasses; config = dataclasses.replace(config, init={init!r})"
    codes, log = forks.run(clips, tmp_path / "out", ranks=2, before=before, parallel="fsdp")
    assert codes == [0, 0], log
    losses = _losses(tmp_path / "out" / "tiny_pretrain")
    assert losses == pytest.approx(_losses(alone["directory"]), rel=1e-5)
    assert losses[0] < _losses(whole["directory"])[0]


@full
def test_two_copies_of_two_shards_learn_what_one_rank_learns(clips, whole, forks, tmp_path):
    """Four ranks as two machines of two; stopped, they are followed by one process."""
    stop = ranks.at_step("if number == 6 and rank == 3: os.kill(os.getpid(), signal.SIGUSR1)")
    split = {"parallel": "hsdp", "shard_within": 2}
    codes, log = forks.run(clips, tmp_path / "out", ranks=4, before=stop, **split)
    assert codes == [138] * 4, log
    assert "saved step 7" in log
    codes, log = forks.run(clips, tmp_path / "undisturbed", ranks=4, **split)
    assert codes == [0] * 4, log
    codes, log = forks.run(clips, tmp_path / "out")
    assert codes == [0], log
    theirs = read_metrics(Path(whole["directory"]) / "metrics.jsonl")
    lines = read_metrics(tmp_path / "undisturbed" / "tiny_pretrain" / "metrics.jsonl")
    for name in ("loss", "grad_norm"):
        assert [line[name] for line in lines] == pytest.approx([line[name] for line in theirs], rel=1e-5)
    resumed = read_metrics(tmp_path / "out" / "tiny_pretrain" / "metrics.jsonl")
    assert resumed[-1]["loss"] == pytest.approx(theirs[-1]["loss"], rel=1e-5)


@full
def test_a_crashed_rank_is_started_again_and_the_end_has_the_same_bits(clips, forks, tmp_path):
    codes, log = forks.run(clips, tmp_path / "whole", ranks=2, parallel="fsdp")
    assert codes == [0, 0], log
    crash = ranks.at_step("if number == 9 and rank == 1 and attempt == 0: os._exit(7)")
    code, output = ranks.run(2, clips, tmp_path / "out", parallel="fsdp", before=crash, restarts=1)
    assert code == 0, output
    assert same_bits(done(tmp_path / "out")["weights"], done(tmp_path / "whole")["weights"])
    assert done(tmp_path / "out")["last_loss"] == done(tmp_path / "whole")["last_loss"]


# Every rank notes what it is given, before it trains on it.
SEEN = """
original_loss = Task.loss
def seeing(self, batch):
    with (out / f"seen-{rank}").open("a") as file:
        file.writelines(json.dumps([position, path]) + "\\n" for position, path in zip(batch.position.tolist(), batch.paths))
    return original_loss(self, batch)
Task.loss = seeing
"""


def _seen(out: Path) -> list[list]:
    """[position, path] of every sample all ranks were given, by position."""
    return sorted(json.loads(line) for file in out.glob("seen-*") for line in file.read_text().splitlines())


def test_two_ranks_then_one_then_two_see_the_same_samples(clips, forks, tmp_path):
    """SIGUSR1 to one rank alone stops both after the same step; one process goes on, then two end it."""
    single, out = tmp_path / "single", tmp_path / "out"
    codes, log = forks.run(clips, single, before=SEEN)
    assert codes == [0], log
    stop = "if number == {} and rank == {}: os.kill(os.getpid(), signal.SIGUSR1)"
    codes, log = forks.run(clips, out, ranks=2, before=SEEN + ranks.at_step(stop.format(4, 1)))
    assert codes == [138, 138], log
    assert "saved step 5" in log
    codes, log = forks.run(clips, out, before=SEEN + ranks.at_step(stop.format(7, 0)))
    assert codes == [138], log
    assert "saved step 8" in log
    codes, log = forks.run(clips, out, ranks=2, before=SEEN, parallel="fsdp")
    assert codes == [0, 0], log
    assert [position for position, _ in _seen(out)] == list(range(48))  # each once, on some rank
    assert _seen(out) == _seen(single)
    lines = {line["step"]: line["loss"] for line in read_metrics(out / "tiny_pretrain" / "metrics.jsonl")}
    theirs = {line["step"]: line["loss"] for line in read_metrics(single / "tiny_pretrain" / "metrics.jsonl")}
    assert lines[12] == pytest.approx(theirs[12], rel=1e-5)


def test_two_ranks_sharded_in_float16_stay_in_the_band_of_one(clips, whole, forks, tmp_path):
    """Blocks gathered in float16, gradients summed in float32, one loss scale."""
    alone = train(tiny.with_train(tiny.pretrain_config(clips, tmp_path / "alone"), precision="float16"))
    codes, log = forks.run(clips, tmp_path / "out", ranks=2, parallel="fsdp", micro_batch=1, precision="float16")
    assert codes == [0, 0], log
    exact, band, ours = (_losses(d) for d in (whole["directory"], alone["directory"], tmp_path / "out" / "tiny_pretrain"))
    assert max(abs(a - e) for a, e in zip(ours, exact)) <= 2 * max(abs(b - e) for b, e in zip(band, exact))
    assert done(tmp_path / "out")["skipped_steps"] == 0


FLOAT8 = """
import functools
loop.check_float8 = lambda device: None
loop.use_float8 = functools.partial(loop.use_float8, emulate=True)
"""


@full
def test_two_ranks_sharded_in_float8_learn_what_copies_learn(clips, whole, forks, tmp_path):
    """Scales are found on each rank for its own clips, so that one rank's losses are others."""
    pytest.importorskip("torchao.float8")
    for mode in ("ddp", "fsdp"):
        split = {"parallel": mode, "precision": "bfloat16", "float8": True}
        codes, log = forks.run(clips, tmp_path / mode, ranks=2, before=FLOAT8, **split)
        assert codes == [0, 0], log
    sharded, copied = (_losses(tmp_path / mode / "tiny_pretrain") for mode in ("fsdp", "ddp"))
    exact = _losses(whole["directory"])
    assert max(abs(a - b) for a, b in zip(sharded, copied)) < 0.1 * max(abs(a - b) for a, b in zip(copied, exact))
    assert done(tmp_path / "fsdp")["skipped_steps"] == 0


# One rank's sixth loss is not a number; in the end every rank tells the digest of its parameters.
POISON = """
import hashlib

original_loss = Task.loss
def poisoned(self, batch):
    found = original_loss(self, batch)
    poisoned.calls += 1
    if rank == 1 and poisoned.calls == 6:
        found["loss_sum"] = found["loss_sum"] * float("nan")
    return found
poisoned.calls = 0
Task.loss = poisoned

finish = loop.Trainer.finish
def finishing(self):
    digest = hashlib.sha256()
    for tensor in self.task.model.state_dict().values():
        whole = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
        digest.update(whole.numpy().tobytes())
    (out / f"digest-{rank}").write_text(digest.hexdigest())
    return finish(self)
loop.Trainer.finish = finishing
"""


@pytest.mark.parametrize(
    ("mode", "precision"), [("ddp", "float32"), pytest.param("fsdp", "float32", marks=full), ("fsdp", "float16")]
)
def test_nan_on_one_rank_skips_the_step_on_both(clips, forks, tmp_path, mode, precision):
    codes, log = forks.run(clips, tmp_path, ranks=2, parallel=mode, before=POISON, precision=precision)
    assert codes == [0, 0], log
    last = read_metrics(tmp_path / "tiny_pretrain" / "metrics.jsonl")[-1]
    assert last.get("loss_scale") == (2.0**15 if precision == "float16" else None)
    summary = done(tmp_path)
    assert summary["skipped_steps"] == 1
    assert summary["steps"] == 12
    assert all(t.isfinite().all() for t in load_file(summary["weights"]).values())
    assert (tmp_path / "digest-0").read_text() == (tmp_path / "digest-1").read_text()


# Positions 20 to 31, the sixth to eighth step, have no finite loss on rank 1, which has the second half of each.
BAD_CLIPS = """
original_loss = Task.loss
def poisoned(self, batch):
    found = original_loss(self, batch)
    if any(p % 4 >= 2 and 20 <= p < 32 for p in batch.position.tolist()):
        found["loss_sum"] = found["loss_sum"] * float("nan")
    return found
Task.loss = poisoned
"""


@pytest.mark.parametrize("mode", [pytest.param("ddp", marks=full), "fsdp"])
def test_both_ranks_go_back_and_on_behind_the_bad_clips(clips, forks, tmp_path, mode):
    train_changes = {"max_skipped": 3, "max_rollbacks": 1}
    codes, log = forks.run(clips, tmp_path / "one", before=BAD_CLIPS, **train_changes)
    assert codes == [0], log
    codes, log = forks.run(clips, tmp_path / "two", ranks=2, parallel=mode, before=BAD_CLIPS, **train_changes)
    assert codes == [0, 0], log
    assert log.count("Gone back to") == 1  # said by one rank
    alone, both = (read_metrics(tmp_path / out / "tiny_pretrain" / "metrics.jsonl") for out in ("one", "two"))
    assert [(line["step"], line["rollbacks"]) for line in both] == [(2, 0), (4, 0), (6, 1), (8, 1), (10, 1), (12, 1)]
    assert [line["loss"] for line in both] == pytest.approx([line["loss"] for line in alone], rel=1e-5)
    assert done(tmp_path / "two")["rollbacks"] == 1


# Rank 1 waits for the report on itself, so that the drill needs no other clock.
HANG = """
import threading
from vmae2_fast.train.watchdog import Watchdog

reported, entered, report = threading.Event(), [], Watchdog._report
enter = Watchdog.__enter__

def entering(self):
    entered.append(self)
    return enter(self)

def reporting(self):
    report(self)
    reported.set()

Watchdog.__enter__, Watchdog._report = entering, reporting
"""


def test_a_hanging_rank_is_named(clips, forks, tmp_path):
    hang = ranks.at_step("if number == 3 and rank == 1:\n    entered[0].beat(3)\n    reported.clear()\n    reported.wait()")
    codes, log = forks.run(clips, tmp_path, ranks=2, before=HANG + hang, stuck_after=3)
    assert codes == [0, 0], log
    stacks = (tmp_path / "tiny_pretrain" / "stuck-rank1.txt").read_text()
    assert "after step 3" in stacks
    assert "in stepping" in stacks  # where it hangs
    assert "stuck-rank1.txt" in log


@full
def test_launch_starts_the_ranks_itself(tmp_path):
    command = ["launch", "pretrain:vit_base_hybrid", "--smoke", "--gpus", "2", "--restarts", "1", "--out", str(tmp_path)]
    job = subprocess.run(
        [sys.executable, "-m", "vmae2_fast", *command, "--json"], cwd=ranks.ROOT, capture_output=True, text=True, timeout=300
    )
    assert job.returncode == 0, job.stderr
    (line,) = [line for line in job.stdout.splitlines() if line.startswith("{")]  # one result, not one a rank
    assert json.loads(line)["pretrain_vit_base_hybrid"]["steps"] == 20
