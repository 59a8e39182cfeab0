"""Runs in processes of their own, on one gloo rank or several, each training a tiny config of `tests.tiny_runs`.

`start` and `run` go through torch.distributed.run; `Forks` forks ranks from a process that has imported everything, for
drills that need many of them.
"""

from __future__ import annotations

import itertools
import json
import os
import select
import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
# The last: what `parallel.join` asks for where torchrun may start ranks again, and `vmae2 launch` sets itself.
ENVIRONMENT = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}

_LONGEST_S = 300
"""Seconds after which ranks count as hanging."""

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


def _options(kind: str, before: str, data: dict[str, Any] | None, model: dict[str, Any] | None, train: dict[str, Any]) -> Any:
    return {"kind": kind, "before": before, "train": train, "data": data or {}, "model": model or {}}


def torchrun(ranks: int, *arguments: str) -> subprocess.Popen[str]:
    """`torch.distributed.run` of `ranks` processes; reads stdout and stderr together."""
    agent = ["--nnodes=1", f"--nproc-per-node={ranks}", "--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0"]
    return subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", *agent, *arguments], cwd=ROOT, text=True,
        env={**os.environ, **ENVIRONMENT}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip


def start(
    ranks: int, clips: Path, out: Path, *, kind: str = "pretrain", before: str = "", restarts: int = 0,
    data: dict[str, Any] | None = None, model: dict[str, Any] | None = None, **train: Any,
) -> subprocess.Popen[str]:  # fmt: skip
    """`torchrun` of `ranks` workers."""
    options = json.dumps(_options(kind, before, data, model, train))
    return torchrun(ranks, f"--max-restarts={restarts}", "--module", "tests.drills.worker", str(clips), str(out), options)


def run(ranks: int, clips: Path, out: Path, **options: Any) -> tuple[int, str]:
    """Exit code and output of `start`."""
    process = start(ranks, clips, out, **options)
    output = process.communicate(timeout=300)[0]
    return process.returncode, output


def without_privileges() -> list[str]:
    """Command prefix for a process that file permissions bind: root's do not bind root."""
    return [] if os.geteuid() else ["unshare", "--user"]


def mounting(path: Path, size: str) -> list[str]:
    """Command prefix for a process that has an empty file system of `size` of its own at `path`."""
    mount = 'mount -t tmpfs -o "size=$0" none "$1" && shift && exec "$@"'
    return ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", mount, size, str(path)]


def allowed(prefix: list[str]) -> bool:
    """Whether this machine lets us run a command behind `prefix`."""
    if not prefix:
        return True
    return shutil.which(prefix[0]) is not None and not subprocess.run([*prefix, "true"], capture_output=True).returncode


def needs(prefix: list[str]) -> pytest.MarkDecorator:
    """Skips a drill on machines that do not allow what `prefix` does."""
    return pytest.mark.skipif(not allowed(prefix), reason=f"not allowed here: {' '.join(prefix[:3])}")


class Forks:
    """Ranks forked by a server, a context manager: a run costs its own seconds, not those of importing torch.

    prefix: command in front of the server's, see `mounting` and `without_privileges`.
    """

    def __init__(self, prefix: Sequence[str] = ()) -> None:
        self._prefix = prefix

    @property
    def root(self) -> Path:
        """The file system as the ranks see it."""
        return Path(f"/proc/{self._server.pid}/root")

    def __enter__(self) -> Forks:
        self._numbers = itertools.count()
        self._server = subprocess.Popen(
            [*self._prefix, sys.executable, "-m", "tests.drills.worker"], cwd=ROOT, text=True,
            env={**os.environ, **ENVIRONMENT}, stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True,
        )  # fmt: skip
        return self

    def __exit__(self, *exc: object) -> None:
        self._server.communicate()

    def run(
        self, clips: Path, out: Path, *, ranks: int = 1, kind: str = "pretrain", before: str = "",
        data: dict[str, Any] | None = None, model: dict[str, Any] | None = None, **train: Any,
    ) -> tuple[list[int], str]:  # fmt: skip
        """Exit statuses of the ranks (negative: the signal that ended it) and what they printed."""
        out.parent.mkdir(parents=True, exist_ok=True)
        log, store = (out.parent / f"{out.name}-{next(self._numbers)}.{kind}" for kind in ("log", "store"))
        request = {"ranks": ranks, "clips": str(clips), "out": str(out), "log": str(log), "store": str(store)}
        assert self._server.stdin is not None
        assert self._server.stdout is not None
        self._server.stdin.write(json.dumps({**request, **_options(kind, before, data, model, train)}) + "\n")
        self._server.stdin.flush()
        if not select.select([self._server.stdout], [], [], _LONGEST_S)[0]:
            os.killpg(self._server.pid, signal.SIGKILL)
            raise AssertionError(f"ranks hang; they said: {log.read_text()}")
        codes = json.loads(self._server.stdout.readline())
        return codes, log.read_text()
