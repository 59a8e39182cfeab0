"""kill -9 in the middle of a step and in the middle of a save: the rerun ends with the bits of an undisturbed run."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests import tiny_runs as tiny
from vmae2_fast.train import train

ROOT = Path(__file__).parents[2]

# Runs `train` in its own process, which kills itself without any chance to clean up.
CHILD = """
import os, signal, sys
from pathlib import Path
import torch
from tests import tiny_runs as tiny
from vmae2_fast.train import checkpoint, train
from vmae2_fast.train.optim import Optimizer

where, clips, out = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])
torch.set_num_threads(1)

def kill():
    os.kill(os.getpid(), signal.SIGKILL)

step, replace, save_file = Optimizer.step, os.replace, checkpoint.save_file

def stepping(self, number, loss):
    result = step(self, number, loss)
    if where == "step" and number == 9:
        kill()
    return result

def replacing(source, target):
    second = str(target).endswith("step-00000008")
    if where == "before commit" and second:
        kill()
    replace(source, target)
    if where == "after commit" and second:
        kill()

def saving(tensors, path):
    save_file(tensors, path)
    if where == "half a save" and path.name.startswith("optimizer") and list(path.parent.parent.glob("step-*")):
        path.write_bytes(path.read_bytes()[:100])
        kill()

Optimizer.step, os.replace, checkpoint.save_file = stepping, replacing, saving
train(tiny.pretrain_config(clips, out))
"""


@pytest.fixture(scope="module")
def clips(tmp_path_factory) -> Path:
    return tiny.write_clips(tmp_path_factory.mktemp("clips"))


@pytest.fixture(scope="module")
def whole(clips, tmp_path_factory):
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield train(tiny.pretrain_config(clips, tmp_path_factory.mktemp("whole")))
    torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("where", "left"),
    # killed in a step, the save before it may still be on its way to the disk
    [("step", (4, 8)), ("half a save", (4,)), ("before commit", (4,)), ("after commit", (8,))],
    ids=lambda v: v.replace(" ", "_") if isinstance(v, str) else "",
)
def test_killed_and_run_again_ends_with_the_same_bits(clips, whole, tmp_path, where, left):
    child = subprocess.run([sys.executable, "-c", CHILD, where, str(clips), str(tmp_path)], cwd=ROOT, timeout=120)
    assert child.returncode == -signal.SIGKILL
    run = tmp_path / "tiny_pretrain"
    assert not (run / "done.json").exists()
    assert max(run.glob("checkpoints/step-*")).name in [f"step-{step:08d}" for step in left]
    summary = train(tiny.pretrain_config(clips, tmp_path))
    ours, theirs = load_file(summary["weights"]), load_file(whole["weights"])
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[n], theirs[n]) for n in ours)
    assert tiny.metrics_without_time(run / "metrics.jsonl") == tiny.metrics_without_time(
        Path(whole["directory"]) / "metrics.jsonl"
    )
    assert not list((run / "checkpoints").glob(".tmp-*"))
