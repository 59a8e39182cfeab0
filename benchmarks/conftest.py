"""Settings of the microbenchmarks: one thread unless asked otherwise, and a measure that pairs every alternative with ours."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from statistics import median
from typing import Any

import pytest
import torch

# Threads that wait for each other on a busy machine make small baselines ten times slower than they are.
THREADS = int(os.environ.get("VMAE2_BENCH_THREADS", "1"))


def pytest_configure(config: pytest.Config) -> None:
    torch.set_num_threads(THREADS)


def pytest_report_header(config: pytest.Config) -> str:
    load = ", ".join(f"{value:.1f}" for value in os.getloadavg()) if hasattr(os, "getloadavg") else "unknown"
    return f"torch {torch.__version__}, {torch.get_num_threads()} thread(s), load {load}"


@pytest.fixture
def measure(benchmark: Any) -> Callable[..., None]:
    """measure(call, ours, rounds=..., **info): time `call`, each round right after one of `ours`.

    A machine that slows down slows both, so the ratio of the two within a round is the figure to read. `info` (bytes,
    flops, shapes) goes into the result beside `times_ours`, the median of those ratios (1 for ours itself).
    """

    def run(call: Callable[[], Any], ours: Callable[[], Any], *, rounds: int = 7, **info: Any) -> None:
        beside: list[float] = []

        def setup() -> None:
            begin = time.perf_counter()
            ours()
            beside.append(time.perf_counter() - begin)

        benchmark.pedantic(call, setup=None if call is ours else setup, rounds=rounds, warmup_rounds=1)
        benchmark.extra_info.update(info, threads=torch.get_num_threads(), device="cpu")
        if benchmark.stats is not None:
            seconds = benchmark.stats.stats.data
            pairs = zip(seconds, beside[-len(seconds) :] or seconds, strict=True)
            benchmark.extra_info["times_ours"] = median(s / o for s, o in pairs)

    return run
