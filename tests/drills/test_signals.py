"""A scheduler's signals to `vmae2 launch` on several ranks with decoder processes: saved, told by exit code, nothing left."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
import uuid
from pathlib import Path

import pytest

from tests.drills import ranks
from tests.drills.judge import done, full, same_bits

RECIPE = '''
import dataclasses, os, signal
from pathlib import Path
import torch
from tests import tiny_runs as tiny
from vmae2_fast.config import PretrainConfig
from vmae2_fast.train.optim import Optimizer

torch.set_num_threads(1)
rank = int(os.environ.get("RANK", 0))

def tiny_run() -> PretrainConfig:
    """Decoded by processes of their own."""
    config = tiny.pretrain_config(Path("{clips}"), Path("{out}"))
    return dataclasses.replace(config, data=dataclasses.replace(config.data, workers=2))
'''

# Sends the signal and goes on once as many as are expected came back.
SEND = """
if number == 5 and rank == 1:
    read, write = os.pipe()
    os.set_blocking(write, False)
    signal.set_wakeup_fd(write)
    {send}
    for _ in range({times}):
        os.read(read, 1)
    signal.set_wakeup_fd(-1)
"""
# The whole job in a /dev/shm of its own, which is listed when it has ended.
OWN_SHM = 'mount -t tmpfs none /dev/shm && "$@"; code=$?; ls -A /dev/shm | sed "s/^/left in shared memory: /"; exit $code'
PRIVATE = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", OWN_SHM, "sh"]


def _marked(mark: str) -> list[int]:
    """Processes that have `mark` in the environment they were started with."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdigit() and mark.encode() in (entry / "environ").read_bytes():
                found.append(int(entry.name))
        except OSError:  # ended while we looked, or another user's
            continue
    return found


def _all_end(pids: list[int]) -> bool:
    for pid in pids:
        try:
            handle = os.pidfd_open(pid)
        except ProcessLookupError:
            continue
        with os.fdopen(handle):
            if not select.select([handle], [], [], 60)[0]:
                return False
    return True


@pytest.fixture(scope="module")
def two_ranks(clips, forks, tmp_path_factory):
    out = tmp_path_factory.mktemp("two_ranks")
    codes, log = forks.run(clips, out, ranks=2)
    assert codes == [0, 0], log
    return done(out)


TO_AGENT, TO_ALL = "os.kill(os.getppid(), number_of)", "os.kill(os.getpid(), number_of); os.kill(os.getppid(), number_of)"


@pytest.mark.skipif(not hasattr(os, "pidfd_open"), reason="watches processes through Linux's pidfd")
@pytest.mark.parametrize(
    ("name", "send", "times"),
    [
        pytest.param("SIGTERM", TO_AGENT, 1, id="SIGTERM"),
        pytest.param("SIGUSR1", TO_AGENT, 1, id="SIGUSR1", marks=full),
        pytest.param("SIGTERM", TO_ALL, 2, id="SIGTERM_to_all", marks=full),
    ],
)
def test_a_signal_to_launch_saves_and_leaves_nothing(clips, forks, two_ranks, tmp_path, name, send, times):
    recipe, mark, out = tmp_path / "recipe.py", f"drill-{uuid.uuid4()}", tmp_path / "out"
    hook = SEND.format(send=send.replace("number_of", f"signal.{name}"), times=times).strip()
    recipe.write_text(RECIPE.format(clips=clips, out=out) + ranks.at_step(hook))
    command = [sys.executable, "-m", "vmae2_fast", "launch", f"{recipe}:tiny_run", "--gpus", "2"]
    private = PRIVATE if ranks.allowed(PRIVATE) else []
    job = subprocess.run(
        [*private, *command], cwd=ranks.ROOT, env={**os.environ, **ranks.ENVIRONMENT, "VMAE2_DRILL": mark},
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert job.returncode == 128 + getattr(signal, name), job.stderr
    assert "tiny_pretrain: saved step 6; run the same command again" in job.stderr
    assert _all_end(_marked(mark))
    assert "left in shared memory" not in job.stdout
    codes, log = forks.run(clips, out, ranks=2)
    assert codes == [0, 0], log
    assert same_bits(done(out)["weights"], two_ranks["weights"])
    assert done(out)["last_loss"] == two_ranks["last_loss"]


@full
def test_the_exit_code_is_that_of_the_rank_that_failed(clips, tmp_path):
    """Three: no step is finite any more."""
    recipe = tmp_path / "recipe.py"
    poison = "next(iter(self.params.values())).grad.mul_(float('nan'))"
    recipe.write_text(RECIPE.format(clips=clips, out=tmp_path / "out") + ranks.at_step(poison))
    command = ["launch", f"{recipe}:tiny_run", "--gpus", "2", "--train.max-skipped", "3"]
    job = subprocess.run(
        [sys.executable, "-m", "vmae2_fast", *command], cwd=ranks.ROOT, env={**os.environ, **ranks.ENVIRONMENT},
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert job.returncode == 3, job.stderr
    assert "not finite for" in job.stderr
