"""Clips per second of a loader over DALI by its number of pipelines, and over PyAV in the same run."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from vmae2_fast.config import DataConfig, SourceConfig
from vmae2_fast.data import VideoLoader
from vmae2_fast.data.dali import why_not_dali
from vmae2_fast.data.synthetic import CLASSES, render_scene

_OPTIONS = {
    "libx264": {"preset": "veryfast", "bf": "2", "sc_threshold": "0"},
    "libvpx-vp9": {"deadline": "realtime", "cpu-used": "8"},
}


def grainy_scene(number: int, frames: int, side: int) -> np.ndarray:
    """A moving scene with grain, which is what makes real video cost what it does: uint8 [frames, side, side, 3]."""
    rng = np.random.Generator(np.random.Philox(key=[0, number]))
    video = render_scene(CLASSES[number % len(CLASSES)], rng, frames=frames, size=side, step=0.2)
    grain = rng.integers(-12, 13, (frames, side, side, 1), dtype=np.int16)
    return np.clip(video + grain, 0, 255).astype(np.uint8)


def encode(path: Path, video: np.ndarray, *, gop: int, codec: str = "libx264") -> None:
    """Write a video uint8 [T, H, W, 3] at 25 fps with key frames `gop` apart."""
    import av

    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as out:
        stream = out.add_stream(codec, rate=25, options={"crf": "23", "g": str(gop), **_OPTIONS[codec]})
        stream.height, stream.width = video.shape[1:3]
        stream.pix_fmt, stream.thread_count = "yuv420p", 1
        for image in video:
            out.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        out.mux(stream.encode())


def clips_per_s(folder: Path, *, clips: int, warm: int, batches: int, size: int, **data: Any) -> dict[str, Any]:
    """Rate of an endless loader between two of its batches, so that as many are under way at the end as at the beginning."""
    source = SourceConfig(name="bench", root=str(folder))
    with VideoLoader(DataConfig(sources=(source,), **data), frames=16, size=size, clips_per_batch=clips) as loader:
        iteration = iter(loader)
        for _ in range(warm):
            next(iteration)
        begin = time.perf_counter()
        for _ in range(batches):
            batch = next(iteration)
        if batch.clip.is_cuda:
            torch.cuda.synchronize()
        seconds = time.perf_counter() - begin
        return {"clips_per_s": clips * batches / seconds, "on": batch.clip.device.type, "fallback": loader.stats["fallback"]}


def _dali_version() -> str:
    import nvidia.dali

    return nvidia.dali.__version__


def measure_decoders(
    folder: Path, *, dry_run: bool, workers: int, left: Callable[[], float], report: Callable[[dict[str, Any]], None]
) -> dict[str, Any]:
    """H.264 of 256 x 256, 250 frames, windows of 16 x 4 cut to 224, key frames 12 and 250 apart; the rehearsal: VP9, tiny.

    Raises RuntimeError if on a GPU PyAV had to decode what DALI was measured by.
    """
    why = why_not_dali()
    videos, length, side, size, clips, warm, batches = (2, 70, 64, 32, 2, 1, 2) if dry_run else (16, 250, 256, 224, 32, 4, 16)
    pipelines, codec, suffix = ((1, 2), "libvpx-vp9", "webm") if dry_run else ((1, 2, 4, 8, 16), "libx264", "mp4")
    gops = (12,) if dry_run else (12, 250)
    shape = {"clips": clips, "warm": warm, "batches": batches, "size": size}
    result: dict[str, Any] = {"dali": why or _dali_version(), "codec": codec, "side": side, "length": length}
    result["pyav_workers"] = workers
    for gop in gops:
        for i in range(videos):
            encode(folder / str(gop) / f"{i}.{suffix}", grainy_scene(i, length, side), gop=gop, codec=codec)
        rates = result[f"gop{gop}"] = {"pyav": clips_per_s(folder / str(gop), backend="pyav", workers=workers, **shape)}
        report(result)
        for number in pipelines if why is None else ():
            if left() < 0:
                raise TimeoutError(f"the time box ended before {number} pipelines, key frames {gop} apart")
            rate = clips_per_s(folder / str(gop), backend="dali", pipelines=number, workers=1, **shape)
            rates[f"dali_{number}"] = rate
            report(result)
            if rate["fallback"]:
                raise RuntimeError(f"PyAV decoded in DALI's place: {rate['fallback']}")
    return result
