"""How long each rank works before it has to wait for others: which one holds the run up.

All ranks end a step together, so their whole steps take the same time. What differs is a rank's *own* time: waiting for its
clips, and the forward, up to where gradients are summed over ranks. With FSDP the forward gathers parameters from the other
ranks, so there only the waiting tells ranks apart clearly.
"""

from __future__ import annotations

import socket
import statistics
import time
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..data.loader import Batch
from .parallel import Loss


class Own(NamedTuple):
    """Seconds of one rank."""

    host: str
    forward: float
    waited: float


class ForwardClock:
    """Seconds spent in forwards. On a GPU by events on its stream, read only when the host has waited for later work."""

    def __init__(self, device: torch.device) -> None:
        self.cuda = device.type == "cuda"
        self.seconds = 0.0
        self.events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    def timed(self, loss: Loss) -> Loss:
        """The same loss function, timed."""

        def on_device(batch: Batch, last: bool) -> dict[str, Tensor]:
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            out = loss(batch, last)
            end.record()
            self.events.append((begin, end))
            return out

        def on_host(batch: Batch, last: bool) -> dict[str, Tensor]:
            begin = time.perf_counter()
            out = loss(batch, last)
            self.seconds += time.perf_counter() - begin
            return out

        return on_device if self.cuda else on_host

    def take(self, waited: float) -> Own:
        """This rank's time since the last call; the device must have finished these forwards."""
        seconds = self.seconds + sum(begin.elapsed_time(end) for begin, end in self.events) / 1000
        self.seconds = 0.0
        self.events.clear()
        return Own(socket.gethostname(), seconds, waited)


def compared(ranks: list[Own], steps: int) -> dict[str, Any]:
    """For the log: own seconds a step over all ranks, the slowest rank and its host, and the longest wait for clips."""
    own = [(one.forward + one.waited) / steps for one in ranks]
    slowest, starved = own.index(max(own)), max(range(len(ranks)), key=lambda r: ranks[r].waited)
    return {
        "min": round(min(own), 4), "median": round(statistics.median(own), 4), "max": round(max(own), 4),
        "slowest": slowest, "host": ranks[slowest].host,
        "wait_max": round(ranks[starved].waited / steps, 4), "wait_rank": starved,
    }  # fmt: skip
