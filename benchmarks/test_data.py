"""The loader's cost of a clip beside that of others, in seconds of processor time, on H.264 with key frames 12 and 250 apart.

`make bench` runs this file too. In each of `ROUNDS` turns every variant makes the clips of the same epoch, one after another,
so that a busy machine is busy for all of them; the first turn is not counted. Processor time is that of this process and of
a variant's own worker, so a rate is per core.

    bare             PyAV: seek, decode, `to_ndarray("rgb24")` of the windows, nothing else
    rgb / yuv420     our frames as RGB / as planes, then the clips; in this process
    loader           `VideoLoader` with one decoder process, and with four views of each decode
    torch            a plain `DataLoader` with one worker around `bare` and torch's antialiased resize
    decord, torchcodec   their frames of the windows, where they can be imported
    work             all but decoding of a pre-training clip on the CPU: plan, clip, mask, patches of the encoder and targets
"""

from __future__ import annotations

import multiprocessing
import os
import re
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from vmae2_fast.benchmarks.decoding import encode, grainy_scene
from vmae2_fast.config import DataConfig, SourceConfig
from vmae2_fast.data import VideoLoader, decode_video, decode_yuv420
from vmae2_fast.data.plan import cut_views
from vmae2_fast.ops import dual_mask, gather_patches

FRAMES, SIZE, STRIDE, VIDEOS, LENGTH, SHORT = 16, 224, 4, 8, 150, 256
PATCH, GRID = 16, (8, 14, 14)  # of ViT-B
ROUNDS = 5

Windows = list[tuple[str, int, np.ndarray]]
"""(path, position, frame ids) of each clip of an epoch."""


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


def _windows(loader: VideoLoader, epoch: int) -> Windows:
    found = []
    for position in range(epoch * VIDEOS, (epoch + 1) * VIDEOS):
        _, index = loader.mixture.record(position)
        path = loader.sources[0].path(loader.sources[0].manifest[index])
        found.append((path, position, loader.planner.frame_ids(LENGTH, STRIDE, epoch, position)))
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
    def __init__(self, windows: Windows) -> None:
        self.windows = windows

    def __len__(self) -> int:
        return len(self.windows)

    def __getitem__(self, i: int) -> torch.Tensor:
        frames = torch.from_numpy(_bare(self.windows[i][0], self.windows[i][2])).permute(0, 3, 1, 2)
        small = F.interpolate(frames.float(), size=SIZE, mode="bilinear", antialias=True)
        return small.round().to(torch.uint8).permute(0, 2, 3, 1)


class _Variant:
    """What makes the clips of an epoch, and the processor time it took in each turn."""

    def __init__(self, run: Callable[[Windows], Any]) -> None:
        self.run = run
        self.seconds: list[float] = []
        self.peak_mib: float | None = None
        """Most memory a worker of it ever had resident, what the loader shares with it included."""
        self._workers: set[int] | None = None
        self._used = 0.0

    def turn(self, windows: Windows) -> None:
        before, own = _children(), time.process_time()
        self.run(windows)
        spent = time.process_time() - own
        if self._workers is None:
            self._workers = _children() - before
        used = sum(map(_processor_s, self._workers))
        self.seconds.append(spent + used - self._used)  # of a worker since the last turn: it works ahead
        self._used = used
        self.peak_mib = max(map(_peak_mib, self._workers), default=None)

    def ms(self) -> float:
        """Processor time of a clip."""
        return 1e3 * median(self.seconds[1:]) / VIDEOS


def _children() -> set[int]:
    return {process.pid for process in multiprocessing.active_children() if process.pid is not None}


def _processor_s(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _peak_mib(pid: int) -> float:
    found = re.search(r"VmHWM:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    return int(found[1]) / 1024 if found else 0.0


def _others() -> tuple[dict[str, _Variant], dict[str, str]]:
    """Other decoders that can be imported, and why the rest cannot."""
    found, absent = {}, {}
    try:
        import decord

        found["decord"] = _Variant(
            lambda windows: [decord.VideoReader(p, num_threads=1).get_batch(ids.tolist()).asnumpy() for p, _, ids in windows]
        )
    except (ImportError, OSError, RuntimeError) as error:
        absent["decord"] = str(error).strip().splitlines()[0]
    try:
        from torchcodec.decoders import VideoDecoder

        found["torchcodec"] = _Variant(
            lambda windows: [VideoDecoder(p, num_ffmpeg_threads=1).get_frames_at(ids.tolist()).data for p, _, ids in windows]
        )
    except (ImportError, OSError, RuntimeError) as error:
        absent["torchcodec"] = str(error).strip().splitlines()[0]
    return found, absent


def _in_this_process(one: VideoLoader) -> dict[str, _Variant]:
    out = torch.empty((1, FRAMES, SIZE, SIZE, 3), dtype=torch.uint8)
    kept = {path: decode_yuv420(path, ids) for path, _, ids in _windows(one, 0)}

    def clips(decode: Callable[[str, np.ndarray], Any], windows: Windows) -> None:
        for path, position, ids in windows:
            plans = one.planner.view_plans(SHORT, SHORT, position // VIDEOS, position)
            cut_views(decode(path, ids), plans, SIZE, out=out, threads=1)

    def work(windows: Windows) -> None:
        for path, position, _ in windows:
            plan = one.planner.plan(LENGTH, SHORT, SHORT, STRIDE, epoch=position // VIDEOS, position=position)
            cut_views(kept[path], plan.views, SIZE, out=out, threads=1)
            mask = dual_mask(torch.tensor([position]), torch.tensor([0]), grid=GRID, seed=0)
            for index in (mask.visible_index, mask.loss_index):
                gather_patches(out, index, patch=PATCH)

    return {
        "bare": _Variant(lambda windows: [_bare(path, ids) for path, _, ids in windows]),
        "rgb": _Variant(lambda windows: clips(lambda path, ids: torch.from_numpy(decode_video(path, ids)), windows)),
        "yuv420": _Variant(lambda windows: clips(decode_yuv420, windows)),
        "work": _Variant(work),
    }


def _with_a_worker(one: VideoLoader, four: VideoLoader) -> dict[str, _Variant]:
    every = [window for epoch in range(ROUNDS + 1) for window in _windows(one, epoch)]
    order = list(range(VIDEOS))
    plain = torch.utils.data.DataLoader(_Plain(every), batch_size=2, sampler=order, num_workers=1, persistent_workers=True)
    batches, four_views = iter(one), iter(four)

    def torch_turn(windows: Windows) -> None:
        order[:] = range(windows[0][1], windows[0][1] + VIDEOS)
        for _ in plain:
            pass

    return {
        "loader": _Variant(lambda _: [next(batches) for _ in range(VIDEOS // 2)]),
        "loader, 4 views": _Variant(lambda _: [next(four_views) for _ in range(VIDEOS // 2)]),
        "torch": _Variant(torch_turn),
    }


@pytest.mark.parametrize("gop", [12, 250])
def test_loading(gop: int, folder: Path, benchmark: Any, capsys: pytest.CaptureFixture[str]) -> None:
    others, absent = _others()
    with _loader(folder, gop) as one, _loader(folder, gop, views=4) as four:
        variants = {**_in_this_process(one), **_with_a_worker(one, four), **others}
        epochs = iter(range(ROUNDS + 1))

        def turn() -> None:
            windows = _windows(one, next(epochs))
            for variant in variants.values():
                variant.turn(windows)

        benchmark.group = f"data gop{gop}"
        benchmark.pedantic(turn, rounds=ROUNDS, warmup_rounds=1)
    ms = {name: variant.ms() for name, variant in variants.items()}
    found = {
        "clips_per_core_s": {name: 1e3 / value for name, value in ms.items() if name != "work"},
        "loader_to_bare": ms["bare"] / ms["loader"],
        "views_4_to_1": 4 * ms["loader"] / ms["loader, 4 views"],
        "work_to_decoding": ms["work"] / ms["bare"],
        "peak_mib": {name: variant.peak_mib for name, variant in variants.items() if variant.peak_mib is not None},
        "absent": absent,
    }
    benchmark.extra_info.update(found, frames=FRAMES, stride=STRIDE, video=[LENGTH, SHORT, SHORT], size=SIZE, gop=gop)
    with capsys.disabled():
        print(f"\nkey frames {gop} apart: " + ", ".join(f"{name} {value:.1f} ms" for name, value in ms.items()))
        print(", ".join(f"{name} {value:.3f}" for name, value in found.items() if isinstance(value, float)))
        print(f"peak MiB of a worker: {found['peak_mib']}; absent: {absent or 'none'}")
