"""`vmae2 launch --profile`: a trace of a few steps of a run that otherwise goes on as it would, in RUN/profile."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, schedule

from .parallel import World

_WAIT, _WARM_UP, _ACTIVE = 4, 1, 3  # steps: compilation and graph capture are over, the profiler's own start-up is too
_RANKS = 8
"""Ranks that write a trace: those of the first machine, as a rule."""
_OPS = 12


class StepProfile:
    """While entered, records steps 6 to 8 of this sitting (earlier ones where fewer are left) and writes them as a trace.

    folder: where `rankR-steps-A-B.json` goes (Chrome's format, for Perfetto); None: nothing is recorded. first: the step
    count the sitting begins at; left: steps it has.
    """

    def __init__(self, folder: Path | None, world: World, device: torch.device, *, first: int, left: int) -> None:
        self.folder, self.world, self.device = folder, world, device
        self.active = min(_ACTIVE, max(1, left - _WARM_UP))
        warm_up = min(_WARM_UP, left - self.active)
        wait = min(_WAIT, left - self.active - warm_up)
        self.begin, self.ended = first + wait + warm_up + 1, first
        self.profiler: Any = None
        if folder is not None and left and world.rank < _RANKS:
            activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device.type == "cuda")
            self.profiler = profile(
                activities=activities, on_trace_ready=self._write,
                schedule=schedule(wait=wait, warmup=warm_up, active=self.active, repeat=1),
            )  # fmt: skip

    def step(self) -> None:
        """A step has ended."""
        self.ended += 1
        if self.profiler is not None:
            self.profiler.step()

    def _write(self, done: Any) -> None:
        assert self.folder is not None
        last = min(self.begin + self.active - 1, self.ended)
        if last < self.begin:  # the sitting broke off before a whole step was recorded
            return
        path = self.folder / f"rank{self.world.rank}-steps-{self.begin}-{last}.json"
        try:
            self.folder.mkdir(exist_ok=True)
            temporary = path.with_name(f".{path.name}")
            done.export_chrome_trace(str(temporary))
            os.replace(temporary, path)
        except (OSError, RuntimeError) as error:
            print(f"WARNING: cannot write the trace {path}: {error}", file=sys.stderr)
            return
        if self.world.first:
            table = self._table(done.key_averages(), last + 1 - self.begin)
            print("\n".join([f"trace of steps {self.begin} to {last}: {path}", *table]), file=sys.stderr)

    def _table(self, averages: Any, steps: int) -> list[str]:
        """The ops that took most of the device's time themselves, per step."""
        on_gpu = self.device.type == "cuda"

        def seconds(event: Any) -> float:
            return (event.self_device_time_total if on_gpu else event.self_cpu_time_total) / 1e6

        ops = sorted((e for e in averages if not e.key.startswith("ProfilerStep")), key=seconds, reverse=True)
        total = sum(map(seconds, ops)) or 1.0
        rows = [
            f"  {e.key[:60]:<60} {e.count / steps:8.1f} {1e3 * seconds(e) / steps:10.3f} {100 * seconds(e) / total:6.1f}"
            for e in ops[:_OPS]
        ]
        where = "GPU" if on_gpu else "CPU"
        return [f"  {f'op (its own time on the {where})':<60} {'calls':>8} {'ms a step':>10} {'%':>6}", *rows]

    def __enter__(self) -> StepProfile:
        if self.profiler is not None:
            self.profiler.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: BaseException | TracebackType | None) -> None:
        if self.profiler is not None:
            self.profiler.stop()
