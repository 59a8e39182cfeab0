"""Clocks and ceilings: how long a call takes, how fast this machine copies and multiplies.

Timings of a shared machine swing by a factor of two, so everything that is compared is measured in turns, another call first
in each round, and read as the ratio of medians.
"""

from __future__ import annotations

import contextlib
import ctypes
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from statistics import median
from typing import Any

import torch

BACKLOG_CYCLES = 2_000_000  # about a millisecond: longer than the host needs to queue one call


def stopwatch(call: Callable[[], Any], device: torch.device, backlog: bool = False) -> float:
    """Seconds from before to after `call`, on the device's own clock where it has one.

    `backlog`: keep the GPU busy while the host queues the call, so that a kernel of microseconds is not timed as the launch
    that is slower than it. A call that waits for the device pays for that, as it would in a step.
    """
    if device.type != "cuda":
        begin = time.perf_counter()
        call()
        return time.perf_counter() - begin
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    if backlog:
        torch.cuda._sleep(BACKLOG_CYCLES)
    start.record()
    call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def timed(calls: list[Callable[[], Any]], device: torch.device, repeats: int) -> float:
    """Median seconds of one call, each launch timed by itself; the calls take turns."""
    for call in calls * 2:
        call()
    return median(stopwatch(calls[i % len(calls)], device, backlog=True) for i in range(repeats))


def turns(names: list[str], rounds: int) -> Iterator[list[str]]:
    """The names in each round's order: another one first each time, forwards and backwards, so that none always follows the
    same one and finds what that left in the caches."""
    for i in range(rounds):
        yield [names[(i + k * (-1) ** i) % len(names)] for k in range(len(names))]


def in_turns(watches: Mapping[str, Callable[[int], float]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each by round. A watch takes the round's number, runs its call once and returns the seconds."""
    seconds: dict[str, list[float]] = {name: [] for name in watches}
    for i, order in enumerate(turns(list(watches), rounds)):
        for name in order:
            seconds[name].append(watches[name](i))
    return seconds


_MMAP_MAX, _TRIM_THRESHOLD = -4, -1  # of mallopt(3)


@contextlib.contextmanager
def held_memory() -> Iterator[bool]:
    """Have malloc keep what is freed, so that every variant writes into memory this process already has, as the copy does.

    Otherwise glibc gives large tensors back to the operating system, or not, depending on what lies beside them: a variant
    that gets fresh pages, cleared one by one as they are first written, then takes twice as long as one that does not.
    False where there is no such malloc; nothing is changed there.
    """
    try:
        libc = ctypes.CDLL(None)
        mallopt, trim = libc.mallopt, libc.malloc_trim
    except (AttributeError, OSError, TypeError):
        yield False
        return
    mallopt(_MMAP_MAX, 0)
    mallopt(_TRIM_THRESHOLD, 2**31 - 1)
    try:
        yield True
    finally:
        mallopt(_MMAP_MAX, 1 << 16)
        mallopt(_TRIM_THRESHOLD, 1 << 17)
        trim(0)


class Copy:
    """A copy of `count` bytes, far more than any cache holds, on torch's threads into memory that is in use: the rate nothing
    that reads and writes memory can beat. What is read and what is written both count."""

    def __init__(self, device: torch.device, count: int) -> None:
        self.count = count
        self.source = torch.randint(0, 255, (count,), dtype=torch.uint8, device=device)
        self.target = torch.empty_like(self.source)

    def __call__(self) -> None:
        self.target.copy_(self.source)

    def rate(self, seconds: float) -> float:
        """GB/s, read + written."""
        return 2 * self.count / seconds / 1e9


def products(device: torch.device, shape: tuple[int, int, int], dtype: torch.dtype) -> list[Callable[[], Any]]:
    """[M, K] x [K, N] twice, to be called in turn: one set of operands alone could live in the cache. Random data: zeros
    run faster than any real data would."""
    m, k, n = shape
    left, right = (torch.randn(2, *size, device=device).to(dtype) for size in ((m, k), (k, n)))
    return [partial(torch.mm, left[i], right[i]) for i in (0, 1)]


def cpu_ceilings() -> dict[str, float]:
    """Copy rate (GB/s) and float32 matrix product rate (GFLOP/s) of this processor with torch's threads, now."""
    device, copy, side = torch.device("cpu"), Copy(torch.device("cpu"), 64 << 20), 1024
    seconds = timed(products(device, (side, side, side), torch.float32), device, 5)
    return {"copy_gb_per_s": copy.rate(timed([copy], device, 9)), "gemm_gflops": 2 * side**3 / seconds / 1e9}
