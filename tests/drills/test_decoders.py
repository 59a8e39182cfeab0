"""What may happen to decoder processes, and to the process they work for: batches stay the same and nothing is left."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import select
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests import tiny_runs as tiny
from vmae2_fast.config import DataConfig, SourceConfig
from vmae2_fast.data import EvaluationLoader, VideoLoader

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.skipif(not hasattr(os, "pidfd_open"), reason="watches processes through Linux's pidfd")


def _data(clips: Path, **values) -> DataConfig:
    return DataConfig(**{"sources": tiny.data(clips).sources, "datasets": tiny.data(clips).datasets, "stride": 2, **values})


def _loader(clips: Path, **values) -> VideoLoader:
    names = ("steps", "start", "quarantine")
    given = {name: values.pop(name) for name in names if name in values}
    return VideoLoader(_data(clips, **values), frames=4, size=32, clips_per_batch=3, seed=3, **{"steps": 4, **given})


def _same(a, b) -> bool:
    return torch.equal(a.clip, b.clip) and torch.equal(a.position, b.position) and a.paths == b.paths


def _ended(pids: list[int], within_s: float = 60) -> bool:
    """Whether all of these processes end; waits for those that still run."""
    for pid in pids:
        try:
            handle = os.pidfd_open(pid)
        except ProcessLookupError:
            continue
        with os.fdopen(handle):
            if not select.select([handle], [], [], within_s)[0]:
                return False
    return True


@pytest.mark.parametrize("all_of_them", [False, True], ids=["one", "all"])
def test_killed_decoders_are_replaced_and_their_clips_decoded_again(clips, all_of_them):
    expected = list(_loader(clips, workers=0))
    seen, killed = [], 0
    with _loader(clips, workers=2, prefetch=2) as loader:
        for batch in loader:
            seen.append(batch)
            for process in multiprocessing.active_children()[: None if all_of_them else 1]:
                with contextlib.suppress(ProcessLookupError):  # one killed before, which the loader buried meanwhile
                    os.kill(process.pid, signal.SIGKILL)
                    killed += 1
    assert killed >= len(expected) // 2
    assert all(_same(a, b) for a, b in zip(expected, seen, strict=True))
    assert not any(batch.replaced for batch in seen)
    assert not multiprocessing.active_children()


def test_a_file_that_hangs_is_ended_named_and_replaced(clips, tmp_path):
    """A pipe nobody writes into: opening it waits for ever."""
    good = sorted(clips.rglob("*.mp4"))[:3]
    lines = []
    for path in good:
        (tmp_path / path.name).write_bytes(path.read_bytes())
        lines.append(f"{path.name} 0")
    os.mkfifo(tmp_path / "hangs.mp4")
    (tmp_path / "list.csv").write_text("\n".join([*lines, "hangs.mp4 0"]))
    log = tmp_path / "quarantine.jsonl"
    source = SourceConfig(name="x", root=str(tmp_path), list="list.csv")
    data = DataConfig(sources=(source,), stride=2, timeout_s=1.0, workers=2)
    loader = VideoLoader(data, frames=4, size=32, clips_per_batch=4, seed=3, steps=2, quarantine=log)
    batches = list(loader)
    replaced = [failure for batch in batches for failure in batch.replaced]
    # a machine that stands still for a second ends good clips as well
    assert str(tmp_path / "hangs.mp4") in {failure.path for failure in replaced}
    assert all(failure.reason == "no result within data.timeout_s=1 seconds" for failure in replaced)
    assert "hangs.mp4" in log.read_text()
    assert all(not path.endswith("hangs.mp4") for batch in batches for path in batch.paths)
    with EvaluationLoader(data, frames=4, size=32) as views:
        assert len(list(views)) + views.stats["replaced"] == 4
        assert views.stats["bad"][str(tmp_path / "hangs.mp4")] == 1
    assert not multiprocessing.active_children()


# Prints its helpers' process ids once a batch is there, and goes on for ever.
ENDLESS = """
import multiprocessing, os, signal, sys
from pathlib import Path
from multiprocessing.forkserver import _forkserver
from multiprocessing.resource_tracker import _resource_tracker
from tests.drills.test_decoders import _loader

signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs are started without
batches = iter(_loader(Path(sys.argv[1]), workers=2, steps=None))
while True:
    batch = next(batches)
    children = [process.pid for process in multiprocessing.active_children()]
    print(*children, _forkserver._forkserver_pid, _resource_tracker._pid, "after", int(batch.position[-1]) + 1, flush=True)
"""


def _endless(clips: Path) -> tuple[subprocess.Popen, list[int], int]:
    """A process that loads batches, those that work for it, and the clips it has consumed."""
    child = subprocess.Popen(
        [sys.executable, "-c", ENDLESS, str(clips)], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        start_new_session=True,
    )  # fmt: skip
    pids, _, consumed = child.stdout.readline().partition("after")
    return child, [int(pid) for pid in pids.split()], int(consumed)


def _shared_memory(pids: list[int]) -> set[Path]:
    """Files of /dev/shm that these processes have mapped."""
    lines = [line for pid in pids for line in Path(f"/proc/{pid}/maps").read_text().splitlines()]
    return {Path(line.split(maxsplit=5)[5]) for line in lines if " /dev/shm/" in line}


@pytest.mark.parametrize("how", ["kill", "interrupt"])
def test_nothing_is_left_of_a_killed_or_interrupted_loader(clips, how):
    child, pids, consumed = _endless(clips)
    assert len(pids) == 4
    shared = _shared_memory([child.pid, *pids])
    if how == "kill":
        os.kill(child.pid, signal.SIGKILL)
    else:
        os.killpg(child.pid, signal.SIGINT)  # as a terminal does: to all of them
    assert _ended(pids)
    _, errors = child.communicate(timeout=60)
    assert child.returncode == -signal.SIGKILL if how == "kill" else "KeyboardInterrupt" in errors
    assert how == "kill" or "leaked" not in errors  # of a killed process the locks are cleaned up by multiprocessing's tracker
    assert not [path for path in shared if path.exists()]
    # the next sample is the next one, with another number of decoders
    whole = list(_loader(clips, workers=0, steps=consumed // 3 + 2))
    resumed = list(_loader(clips, workers=1, start=consumed, steps=2))
    assert all(_same(a, b) for a, b in zip(whole[consumed // 3:], resumed, strict=True))
