"""Runs on several gloo ranks: real processes under torch.distributed.run, each training a tiny config of `tests.tiny_runs`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]

# Arguments: clips, out, JSON of {"kind", "train", "before"}; `before` is code run in every process ahead of the training.
WORKER = """
import json, os, signal, sys, time
from pathlib import Path
import torch
from tests import tiny_runs as tiny
from vmae2_fast.train import checkpoint, loop, parallel, train
from vmae2_fast.train.optim import Optimizer

clips, out, options = Path(sys.argv[1]), Path(sys.argv[2]), json.loads(sys.argv[3])
rank, attempt = int(os.environ["RANK"]), int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))
torch.set_num_threads(1)
config = tiny.with_train(getattr(tiny, options["kind"] + "_config")(clips, out), **options["train"])
exec(options["before"])
try:
    train(config, device="cpu")
finally:
    if options["leave"]:
        parallel.leave()
"""

STEPPING = """
original = Optimizer.step
def stepping(self, number, loss):
    {}
    return original(self, number, loss)
Optimizer.step = stepping
"""


def at_step(code: str) -> str:
    """Code for `before` that runs `code` in front of every optimiser step, with `number`, `rank` and `attempt` to look at."""
    return STEPPING.format(code.replace("\n", "\n    "))


def torchrun(ranks: int, *arguments: str) -> subprocess.Popen[str]:
    """`torch.distributed.run` of `ranks` processes; reads stdout and stderr together."""
    agent = ["--nnodes=1", f"--nproc-per-node={ranks}", "--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0"]
    return subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", *agent, *arguments], cwd=ROOT, text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip


def start(
    ranks: int, clips: Path, out: Path, *, kind: str = "pretrain", before: str = "", restarts: int = 0, **train: Any
) -> subprocess.Popen[str]:
    """`torchrun` of `ranks` workers."""
    script = out.parent / f"worker-{os.getpid()}.py"
    script.parent.mkdir(parents=True, exist_ok=True)
    script.write_text(WORKER)
    options = json.dumps({"kind": kind, "train": train, "before": before, "leave": True})
    return torchrun(ranks, f"--max-restarts={restarts}", str(script), str(clips), str(out), options)


def run(ranks: int, clips: Path, out: Path, **options: Any) -> tuple[int, str]:
    """Exit code and output of `start`."""
    process = start(ranks, clips, out, **options)
    output = process.communicate(timeout=300)[0]
    return process.returncode, output
