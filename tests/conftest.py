"""Settings of all tests: poisoned memory, few threads, GPU tests only where there is a GPU."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator

# Before torch starts its pools: tests are small, and threads waiting for each other cost more than they give.
os.environ.setdefault("OMP_NUM_THREADS", "2")
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # asked for by deterministic algorithms on CUDA

import pytest
import torch

# Without a GPU Triton kernels run in Triton's interpreter; it is chosen when a kernel is defined.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

from tests.cuda_emulator import emulated
from vmae2_fast import backend, ops

assert ops  # all ops are known before a backend is added to some
emulated.register()
if os.environ.get(emulated.SANITIZE):
    sys.modules["vmae2_fast._C"] = emulated.module()


def pytest_configure(config: pytest.Config) -> None:
    backend.native()  # VMAE2_NATIVE=require: a missing extension is an error before the first test


def pytest_report_header(config: pytest.Config) -> str:
    extension = backend.native()
    # Instruction sets that this processor lacks are not tested here: the header says which are.
    info = extension and extension.build_info()
    built = f"{info['compiler']} for {', '.join(extension.supported_cpu_isas())}" if info else "not built"
    return f"torch {torch.__version__}, native extension: {built}, cuda: {torch.cuda.is_available()}"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("cuda"):
                item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@pytest.fixture(autouse=True)
def _settings() -> None:
    # Fills every uninitialised tensor with NaN or the largest integer: an op that forgets to write is seen.
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.manual_seed(0)


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Tiny models are faster so, and sums come in one order."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
