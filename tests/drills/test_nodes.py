"""Two machines, played by two torchrun agents: `vmae2 launch` joins them, one is lost with its ranks and comes back."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import torch.distributed as dist

from tests.drills import ranks
from tests.drills.judge import done, full, same_bits

RECIPE = '''
import os, signal
from pathlib import Path
import torch
from tests import tiny_runs as tiny
from vmae2_fast.config import PretrainConfig
from vmae2_fast.train.optim import Optimizer

torch.set_num_threads(1)

def tiny_run() -> PretrainConfig:
    """One rank a machine."""
    return tiny.pretrain_config(Path("{clips}"), Path("{out}"))
'''
LOST = """
if number == 9 and os.environ["DRILL_NODE"] == "doomed":
    os.kill(os.getppid(), signal.SIGKILL)
    os.kill(os.getpid(), signal.SIGKILL)
"""


@full
def test_a_machine_is_lost_and_comes_back_and_the_end_has_the_same_bits(clips, forks, tmp_path):
    recipe, out = tmp_path / "recipe.py", tmp_path / "out"
    recipe.write_text(RECIPE.format(clips=clips, out=out) + ranks.at_step(LOST.strip()))
    codes, log = forks.run(clips, tmp_path / "whole", ranks=2)
    assert codes == [0, 0], log
    # The rendezvous is held by neither of the two, as on a cluster with a node of its own for it; its port is its own choice.
    store = dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    rendezvous = [f"--rdzv-endpoint=localhost:{store.port}", "--rdzv-backend=c10d", "--rdzv-id=drill", "--rdzv-conf=is_host=0"]
    agent = ["-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=1", *rendezvous, "--max-restarts=3"]
    command = [sys.executable, *agent, "--module", "vmae2_fast", "launch", f"{recipe}:tiny_run"]

    def machine(name: str) -> subprocess.Popen[str]:
        environment = {**os.environ, **ranks.ENVIRONMENT, "DRILL_NODE": name}
        said = open(tmp_path / f"{name}.log", "w")  # noqa: SIM115  a pipe nobody reads could fill
        with said:
            return subprocess.Popen(command, cwd=ranks.ROOT, env=environment, stdout=said, stderr=said, text=True)

    def ends(process: subprocess.Popen[str]) -> int:
        try:
            return process.wait(timeout=240)
        finally:
            process.kill()

    stays, doomed = machine("stays"), machine("doomed")
    try:
        assert ends(doomed) == -signal.SIGKILL, (tmp_path / "doomed.log").read_text()
        assert [path.name for path in sorted((out / "tiny_pretrain" / "checkpoints").glob("step-*"))][-1] == "step-00000008"
        back = machine("back")
        assert ends(back) == 0, (tmp_path / "back.log").read_text()
        assert ends(stays) == 0, (tmp_path / "stays.log").read_text()
    finally:
        stays.kill()
    assert same_bits(done(out)["weights"], done(tmp_path / "whole")["weights"])
    assert done(out)["last_loss"] == done(tmp_path / "whole")["last_loss"]
