"""Settings of the microbenchmarks: one thread unless asked otherwise, and the ceilings of this machine in the same run."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch

from vmae2_fast.benchmarks.measure import cpu_ceilings, held_memory

# Threads that wait for each other on a busy machine make small baselines ten times slower than they are.
THREADS = int(os.environ.get("VMAE2_BENCH_THREADS", "1"))


def pytest_configure(config: pytest.Config) -> None:
    torch.set_num_threads(THREADS)


def pytest_report_header(config: pytest.Config) -> str:
    load = ", ".join(f"{value:.1f}" for value in os.getloadavg()) if hasattr(os, "getloadavg") else "unknown"
    return f"torch {torch.__version__}, {torch.get_num_threads()} thread(s), load {load}"


@pytest.fixture(scope="session", autouse=True)
def _held_memory() -> Iterator[None]:
    with held_memory():
        yield


@pytest.fixture(scope="session")
def ceilings() -> dict[str, float]:
    """Copy and matrix product rates, the floors' measure."""
    return cpu_ceilings()
