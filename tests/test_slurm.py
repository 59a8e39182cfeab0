"""Launches as Slurm jobs: what sbatch is told, and a real preemption under submitit's local executor."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest

from tests import tiny_runs as tiny
from vmae2_fast import cli
from vmae2_fast.cli import slurm
from vmae2_fast.train import train
from vmae2_fast.train.log import read_metrics

pytest.importorskip("submitit")

RECIPE = """
import os, signal
from pathlib import Path
from tests import tiny_runs
from vmae2_fast.config import PretrainConfig
from vmae2_fast.train.optim import Optimizer

original, warned = Optimizer.step, Path({out!r}) / "warned"
def stepping(self, number, loss):
    if number == 5 and os.environ.get("RANK") == "1" and not warned.exists():
        warned.touch()
        os.kill(os.getpid(), signal.SIGUSR2)
    return original(self, number, loss)
Optimizer.step = stepping

def tiny() -> PretrainConfig:
    '''Mine.'''
    return tiny_runs.pretrain_config(Path({clips!r}), Path({out!r}))
"""


@pytest.fixture
def slurm_commands(tmp_path, monkeypatch) -> Path:
    """A folder of sbatch and srun that only remember; returns where the script goes."""
    bin_, script = tmp_path / "bin", tmp_path / "script"
    bin_.mkdir()
    (bin_ / "sbatch").write_text(f'#!/bin/sh\ncp "$1" {script}\necho "Submitted batch job 12"\n')
    (bin_ / "srun").write_text("#!/bin/sh\n")
    for command in bin_.iterdir():
        command.chmod(0o755)
    monkeypatch.setenv("PATH", f"{bin_}:{os.environ['PATH']}")
    return script


def test_sbatch_is_told_what_the_launch_says(tmp_path, slurm_commands, capsys):
    out = tmp_path / "runs"
    command = ["launch", "vit_base_hybrid", "--out", str(out), "--slurm", "gpu", "--nodes", "4", "--gpus", "8"]
    cli.main([*command, "--hours", "36", "--cpus", "12", "--sbatch", "account=vision", "qos=high", "--json"])
    said = capsys.readouterr()
    assert json.loads(said.out.splitlines()[-1]) == {"job": "12", "logs": f"{out}/slurm/%j"}
    assert "job 12" in said.err
    options = dict(
        line.removeprefix("#SBATCH --").partition("=")[::2]
        for line in slurm_commands.read_text().splitlines()
        if line.startswith("#SBATCH")
    )
    wanted = {
        "partition": "gpu", "nodes": "4", "ntasks-per-node": "8", "gpus-per-node": "8", "cpus-per-task": "12", "time": "2160",
        "signal": "USR2@300", "requeue": "", "account": "vision", "qos": "high", "open-mode": "append",
    }  # fmt: skip
    assert {key: options.get(key) for key in wanted} == wanted


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["--nodes", "2"], "--slurm needs --gpus, the GPUs of each machine"),
        (["--gpus", "8", "--nodes", "0"], "--nodes 0: must be above 0"),
        (["--gpus", "8", "--restarts", "1"], "queues again by itself"),
        (["--gpus", "8", "--sbatch", "account"], "--sbatch account: must be KEY=VALUE"),
        (["--gpus", "7"], "train.global_batch"),
    ],
)
def test_a_job_that_cannot_be_is_refused_before_it_queues(changes, message, tmp_path, slurm_commands, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["launch", "vit_base_hybrid", "--out", str(tmp_path / "runs"), "--slurm", "gpu", *changes])
    assert stop.value.code == 2
    assert message in capsys.readouterr().err.splitlines()[-1]
    assert not slurm_commands.exists()


def test_a_machine_without_slurm_or_submitit_says_so(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(slurm.shutil, "which", lambda name: None)
    command = ["launch", "vit_base_hybrid", "--out", str(tmp_path), "--slurm", "gpu", "--gpus", "8"]
    with pytest.raises(SystemExit):
        cli.main(command)
    assert "no sbatch here" in capsys.readouterr().err
    monkeypatch.setattr(slurm.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit):
        cli.main(command)
    assert "pip install 'vmae2_fast[slurm]'" in capsys.readouterr().err


def test_a_preempted_job_saves_queues_again_and_ends_as_if_nothing_had_been(tmp_path, monkeypatch):
    """Two processes; the warning reaches one of them, as its own SIGUSR2 in the middle of step 6."""
    clips, out, logs = tiny.write_clips(tmp_path / "clips"), tmp_path / "out", tmp_path / "logs"
    out.mkdir()
    (tmp_path / "mine.py").write_text(RECIPE.format(clips=str(clips), out=str(out)))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(p for p in sys.path if p))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    made = slurm.executor(
        logs, partition="none", name="tiny", nodes=1, gpus=2, cpus=None, hours=1, requeues=1, options=(), cluster="local"
    )
    job = made.submit(slurm.Job([f"{tmp_path / 'mine.py'}:tiny"]))
    job._process.wait()
    said = "\n".join(path.read_text() for path in sorted(logs.iterdir()) if path.suffix in (".out", ".err"))
    assert (out / "tiny_pretrain" / "done.json").exists(), said
    done = json.loads((out / "tiny_pretrain" / "done.json").read_text())
    assert (out / "warned").exists()
    assert "saved step 6" in said, said
    assert f"Requeued job {job.job_id}" in said
    assert "Calling checkpoint method" in said
    lines = read_metrics(out / "tiny_pretrain" / "metrics.jsonl")
    assert [line["ranks"] for line in lines] == [2] * len(lines)
    assert {line["rank_s"]["slowest"] for line in lines} <= {0, 1}
    single = read_metrics(Path(train(tiny.pretrain_config(clips, tmp_path / "single"))["directory"]) / "metrics.jsonl")
    assert [line["loss"] for line in lines] == pytest.approx([line["loss"] for line in single], rel=1e-5)
    assert done["steps"] == 12
