"""The loader on one decoder process beside bare decoding of the same windows, on H.264 with key frames 12 and 250 apart.

`make bench` runs this file too. bare: PyAV, seek, decode, `to_ndarray("rgb24")`, nothing else. torch: a plain `DataLoader`
with one worker around the same and torch's resize. decord: its reader around the same windows, where it is installed. Every
call is one epoch of the same clips; `clips` and `views` in extra_info make rates of the seconds; `peak_mib` is a decoder's.
"""

from __future__ import annotations

import importlib.util
import multiprocessing
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from vmae2_fast.benchmarks.decoding import encode, grainy_scene
from vmae2_fast.config import DataConfig, SourceConfig
from vmae2_fast.data import VideoLoader

FRAMES, SIZE, STRIDE, VIDEOS, LENGTH, SHORT = 16, 224, 4, 8, 150, 256
ROUNDS = 3


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`VIDEOS` videos of 256 x 256 with grain, each with key frames 12 and 250 apart."""
    root = tmp_path_factory.mktemp("videos")
    for i in range(VIDEOS):
        video = grainy_scene(i, LENGTH, SHORT)
        for gop in (12, 250):
            encode(root / str(gop) / f"{i}.mp4", video, gop=gop)
    return root


def _loader(folder: Path, gop: int, views: int = 1) -> VideoLoader:
    source = SourceConfig(name="bench", root=str(folder / str(gop)))
    data = DataConfig(sources=(source,), stride=STRIDE, views=views, backend="pyav", workers=1, prefetch=2)
    return VideoLoader(data, frames=FRAMES, size=SIZE, clips_per_batch=2)


def _windows(loader: VideoLoader) -> list[tuple[str, np.ndarray]]:
    """(path, frame ids) of the first epoch."""
    found = []
    for position in range(VIDEOS):
        _, index = loader.mixture.record(position)
        path = loader.sources[0].path(loader.sources[0].manifest[index])
        found.append((path, loader.planner.frame_ids(LENGTH, STRIDE, 0, position)))
    return found


def _bare(path: str, ids: np.ndarray) -> np.ndarray:
    import av

    wanted, last, found = set(ids.tolist()), int(ids.max()), []
    with av.open(path) as container:
        stream = container.streams.video[0]
        stream.thread_type, stream.codec_context.thread_count = "NONE", 1
        step = int(1 / (stream.average_rate * stream.time_base))
        container.seek(int(ids[0]) * step, stream=stream)
        for frame in container.decode(stream):
            number = frame.pts // step
            if number in wanted:
                found.append(frame.to_ndarray(format="rgb24", threads=1))
            if number >= last:
                break
    return np.stack(found)


class _Plain(torch.utils.data.Dataset):
    def __init__(self, windows: list[tuple[str, np.ndarray]]) -> None:
        self.windows = windows

    def __len__(self) -> int:
        return len(self.windows)

    def __getitem__(self, i: int) -> torch.Tensor:
        frames = torch.from_numpy(_bare(*self.windows[i])).permute(0, 3, 1, 2)
        small = F.interpolate(frames.float(), size=SIZE, mode="bilinear", antialias=True)
        return small.round().to(torch.uint8).permute(0, 2, 3, 1)


def _decord(windows: list[tuple[str, np.ndarray]]) -> None:
    import decord

    for path, ids in windows:
        decord.VideoReader(path, num_threads=1).get_batch(ids.tolist()).asnumpy()


def _plain(windows: list[tuple[str, np.ndarray]]) -> Callable[[], None]:
    batches = torch.utils.data.DataLoader(_Plain(windows), batch_size=2, num_workers=1, persistent_workers=True)
    return lambda: [None for _ in batches] and None


VARIANTS = ["bare", "loader", "loader 4 views", "torch", "decord"]


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("gop", [12, 250])
def test_loading(gop: int, variant: str, folder: Path, benchmark: Any) -> None:
    if variant == "decord" and importlib.util.find_spec("decord") is None:
        pytest.skip("decord is not installed")
    views = 4 if variant == "loader 4 views" else 1
    loader = _loader(folder, gop, views)
    windows = _windows(loader)
    call: Callable[[], Any]
    if variant == "bare":
        call = lambda: [_bare(*window) for window in windows]  # noqa: E731
    elif variant == "torch":
        call = _plain(windows)
    elif variant == "decord":
        call = lambda: _decord(windows)  # noqa: E731
    else:
        batches = iter(loader)
        call = lambda: [next(batches) for _ in range(VIDEOS // 2)]  # noqa: E731
    benchmark.group = f"data gop{gop}"
    benchmark.pedantic(call, rounds=ROUNDS, warmup_rounds=1)
    peaks = [_peak_mib(process.pid) for process in multiprocessing.active_children() if "pebble" in process.name]
    loader.close()
    benchmark.extra_info.update(
        variant=variant, clips=VIDEOS, views=VIDEOS * views, peak_mib=max(peaks, default=None), frames=FRAMES, stride=STRIDE,
        video=[LENGTH, SHORT, SHORT], size=SIZE,
    )  # fmt: skip


def _peak_mib(pid: int) -> float:
    """Most memory a process ever had resident, of which what the loader shares with it is a part."""
    found = re.search(r"VmHWM:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    return int(found[1]) / 1024 if found else 0.0
