"""Lists as long as UnlabeledHybrid's 1.35 million clips: first indexing, opening again, looking up, shuffling an epoch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from vmae2_fast.data import Manifest, Mixture
from vmae2_fast.data.lists import read_list

CLIPS = 1_348_253
SOURCES = (658_340, 168_913, 21_000, 250_000, 250_000)
LOOKED_UP = 10_000


@pytest.fixture(scope="module")
def long_list(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("lists") / "train.csv"
    with open(path, "w") as file:
        file.writelines(f"k710/train/class_{i % 710:03}/clip_{i:011}_{i % 600:06}.mp4 0 -1\n" for i in range(CLIPS))
    Manifest.read(path, "pretrain")  # makes the index
    return path


def _resident_mb() -> float:
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.is_file() else []
    return next((int(line.split()[1]) / 1024 for line in lines if line.startswith("VmRSS")), float("nan"))


def test_first_indexing(long_list: Path, benchmark: Any) -> None:
    table = benchmark.pedantic(read_list, (long_list, "pretrain"), rounds=3)
    assert len(table.rows) == CLIPS


def test_opening(long_list: Path, benchmark: Any) -> None:
    before = _resident_mb()
    manifest = benchmark.pedantic(Manifest.read, (long_list, "pretrain"), rounds=5)
    benchmark.extra_info["resident_mb"] = round(_resident_mb() - before, 1)
    assert len(manifest) == CLIPS


def test_looking_up(long_list: Path, benchmark: Any) -> None:
    manifest = Manifest.read(long_list, "pretrain")
    numbers = np.random.default_rng(0).integers(CLIPS, size=LOOKED_UP).tolist()
    records = benchmark.pedantic(lambda: [manifest[i] for i in numbers], rounds=5, warmup_rounds=1)
    assert len(records) == LOOKED_UP


@pytest.mark.parametrize("sizes", [(CLIPS,), SOURCES], ids=["one source", "five sources"])
def test_shuffle_of_an_epoch(sizes: tuple[int, ...], benchmark: Any) -> None:
    mixtures = iter([Mixture(sizes) for _ in range(5)])
    _, indices = benchmark.pedantic(lambda: next(mixtures).order(0), rounds=5)
    assert len(indices) == CLIPS
