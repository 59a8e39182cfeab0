"""What drills share: clips, a run that nothing happened to, processes to do things to."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests import tiny_runs as tiny
from tests.drills import ranks
from vmae2_fast.train import train


@pytest.fixture(scope="session")
def clips(tmp_path_factory) -> Path:
    return tiny.write_clips(tmp_path_factory.mktemp("clips"))


@pytest.fixture(scope="session")
def whole(clips, tmp_path_factory) -> dict[str, Any]:
    """Summary of a run in this process that was not disturbed."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    summary = train(tiny.pretrain_config(clips, tmp_path_factory.mktemp("whole")))
    torch.set_num_threads(before)
    return summary


@pytest.fixture(scope="session")
def forks() -> Iterator[ranks.Forks]:
    with ranks.Forks() as server:
        yield server
