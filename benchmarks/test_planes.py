"""Clips out of decoded frames: as YUV 4:2:0 planes into `resize_crop`, beside FFmpeg's conversion to RGB and the same resize.

`make bench` runs this file too. Both decode the same windows of the same files, H.264 with key frames 12 and 250 apart; one
thread, one pre-training window a view. `clips` in extra_info makes rates of the seconds.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from vmae2_fast.data import decode_video, decode_yuv420
from vmae2_fast.data.plan import Planner, cut_views
from vmae2_fast.data.synthetic import CLASSES, render_scene

FRAMES, SIZE, STRIDE, VIDEOS, LENGTH, HEIGHT, WIDTH = 16, 224, 4, 4, 150, 256, 340
ROUNDS = 7


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`VIDEOS` videos with grain, each with key frames 12 and 250 apart."""
    import av

    root = tmp_path_factory.mktemp("videos")
    for i in range(VIDEOS):
        rng = np.random.Generator(np.random.Philox(key=[0, i]))
        square = render_scene(CLASSES[i % len(CLASSES)], rng, frames=LENGTH, size=WIDTH, step=0.2)[:, :HEIGHT]
        grain = rng.integers(-12, 13, (LENGTH, HEIGHT, WIDTH, 1), dtype=np.int16)
        video = np.clip(square + grain, 0, 255).astype(np.uint8)
        for gop in (12, 250):
            (root / str(gop)).mkdir(exist_ok=True)
            with av.open(str(root / str(gop) / f"{i}.mp4"), "w") as out:
                options = {"crf": "23", "preset": "veryfast", "g": str(gop), "bf": "2", "sc_threshold": "0"}
                stream = out.add_stream("libx264", rate=25, options=options)
                stream.height, stream.width, stream.pix_fmt, stream.thread_count = HEIGHT, WIDTH, "yuv420p", 1
                for image in video:
                    out.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
                out.mux(stream.encode())
    return root


def _rgb(path: str, ids: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(decode_video(path, ids))


@pytest.mark.parametrize("variant", ["rgb", "yuv420"])
@pytest.mark.parametrize("views", [1, 4])
@pytest.mark.parametrize("gop", [12, 250])
def test_clips_of_decoded_frames(gop: int, views: int, variant: str, folder: Path, benchmark: Any) -> None:
    planner = Planner(frames=FRAMES, size=SIZE, sampling="pretrain", crop="multi_scale", flip=False, views=views, seed=0)
    decode: Callable[[str, np.ndarray], Any] = _rgb if variant == "rgb" else decode_yuv420
    out = torch.empty((views, FRAMES, SIZE, SIZE, 3), dtype=torch.uint8)

    def clips() -> None:
        for i in range(VIDEOS):
            frames = decode(str(folder / str(gop) / f"{i}.mp4"), planner.frame_ids(LENGTH, STRIDE, 0, i))
            cut_views(frames, planner.view_plans(HEIGHT, WIDTH, 0, i), SIZE, out=out, threads=1)

    benchmark.group = f"planes gop{gop} views{views}"
    benchmark.pedantic(clips, rounds=ROUNDS, warmup_rounds=1)
    benchmark.extra_info.update(
        variant=variant, clips=VIDEOS, views=views, frames=FRAMES, stride=STRIDE, video=[LENGTH, HEIGHT, WIDTH], size=SIZE
    )
