"""Small encoded clips and run configurations for tests of tasks, training and drills."""

from __future__ import annotations

import dataclasses
import json
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from vmae2_fast.config import (
    ActionFormerConfig,
    AvaConfig,
    AvaDataConfig,
    ClassifyConfig,
    DataConfig,
    DistillConfig,
    MaskConfig,
    ModelConfig,
    OptimConfig,
    PretrainConfig,
    SourceConfig,
    TadConfig,
    TadDataConfig,
    TrainConfig,
    ViewsConfig,
)  # fmt: skip

FRAMES, SIZE, CLASSES = 8, 32, 2

# T' = 4, H' = W' = 4
PRETRAIN_MODEL = ModelConfig(
    name="pretrain_videomae_small_patch16_224", frames=FRAMES, size=SIZE, patch=8, width=16, depth=1, heads=2,
    decoder_width=16, decoder_depth=1, decoder_heads=2,
)  # fmt: skip
CLASSIFY_MODEL = ModelConfig(
    name="vit_small_patch16_224", frames=FRAMES, size=SIZE, patch=8, width=16, depth=2, heads=2, num_classes=CLASSES,
    drop_path=0.2, head_dropout=0.1, head_init_scale=1.0,
)  # fmt: skip
AVA_MODEL = ModelConfig(
    name="vit_small_patch16_224", frames=4, size=48, patch=8, width=48, depth=2, heads=2, num_classes=80, pooling="first",
    init_std=0.1, head_init_scale=1.0,
)  # fmt: skip
TAD_TRUNK = ModelConfig(name="vit_small_patch16_224", width=16, depth=1, heads=2, frames=16, size=32)
TAD_DETECTOR = ActionFormerConfig(
    classes=3, width=32, windows=(9, 9, 9, 9), range_ends=(4.0, 8.0, 16.0), max_length=128, stem_blocks=1,
    initial_normalizer=20.0,
)  # fmt: skip


def write_clips(root: Path, per_class: int = 4, frames: int = 20) -> Path:
    """Folder tree `root/{left,right}/N.mp4`: a bright bar that moves left or right; returns `root`."""
    import av

    for label, direction in (("left", -1), ("right", 1)):
        (root / label).mkdir(parents=True, exist_ok=True)
        for n in range(per_class):
            with av.open(str(root / label / f"{n}.mp4"), "w") as container:
                stream = container.add_stream("mpeg4", rate=24)
                stream.width = stream.height = 48
                stream.pix_fmt = "yuv420p"
                for t in range(frames):
                    image = np.full((48, 48, 3), 40 + 10 * n, dtype=np.uint8)
                    x = (direction * 3 * t + 7 * n) % 48
                    image[:, np.arange(x, x + 12) % 48] = (200, 90, 30)
                    container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
                container.mux(stream.encode())
    return root


def write_untrimmed(path: Path, count: int, *, size: int = 32, rate: int = 25, moving: bool = True) -> Path:
    """A video of `count` frames whose grey ramp moves; without `moving` all its frames are black."""
    import av

    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=rate)
        stream.width, stream.height, stream.pix_fmt, stream.thread_count = size, size, "yuv420p", 1
        image = np.zeros((size, size, 3), np.uint8)
        frame = av.VideoFrame.from_ndarray(image, format="rgb24").reformat(format="yuv420p")
        for k in range(count):
            if moving:
                image[:] = (np.arange(size)[:, None, None] * 3 + 5 * k) % 256
                frame = av.VideoFrame.from_ndarray(image, format="rgb24").reformat(format="yuv420p")
            frame.pts, frame.time_base = k, Fraction(1, rate)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def official_windows(path: Path, step: int, frames: int, size: int) -> torch.Tensor:
    """As the released script takes them: every window decoded for itself, divided by 255, resized; [N, 3, T, size, size]."""
    from vmae2_fast.data import decode_video, probe

    count, out = probe(str(path)).num_frames, []
    for start in range(0, count - frames + 1, step):
        clip = torch.from_numpy(decode_video(str(path), np.arange(start, start + frames))).permute(3, 0, 1, 2).float() / 255
        out.append(F.interpolate(clip.transpose(0, 1), (size, size), mode="bilinear", align_corners=False).transpose(0, 1))
    return torch.stack(out)


def data(root: Path, **changes: Any) -> DataConfig:
    source = SourceConfig(name="tiny", root=str(root))
    return DataConfig(**{"sources": (source,), "stride": 2, "workers": 0, "prefetch": 2, **changes})  # type: ignore[arg-type]


def pretrain_config(clips: Path, out: Path, **changes: Any) -> PretrainConfig:
    """Twelve steps of four clips; a checkpoint every four, no pictures."""
    config = PretrainConfig(
        name="tiny_pretrain", model=PRETRAIN_MODEL, data=data(clips), out=str(out),
        mask=MaskConfig(encoder_ratio=0.75),
        optim=OptimConfig(lr=3e-3, lr_batch=0, min_lr=1e-4, warmup_epochs=1, clip_grad=1.0),
        train=TrainConfig(epochs=6, global_batch=4, checkpoint_every=4, log_every=2, picture_every=0),
    )  # fmt: skip
    return dataclasses.replace(config, **changes)


def classify_config(clips: Path, out: Path, **changes: Any) -> ClassifyConfig:
    config = ClassifyConfig(
        name="tiny_classify", model=CLASSIFY_MODEL, out=str(out), data=data(clips, sampling="dense"),
        validation=data(clips, sampling="dense", crop="center"), views=ViewsConfig(segments=2, crops=1, batch=4),
        optim=OptimConfig(lr=3e-3, lr_batch=0, min_lr=1e-4, betas=(0.9, 0.999), layer_decay=0.9),
        train=TrainConfig(epochs=6, global_batch=4, checkpoint_every=4, log_every=2, picture_every=0),
    )  # fmt: skip
    return dataclasses.replace(config, **changes)


def distill_config(clips: Path, out: Path, teacher_weights: str | None, **changes: Any) -> DistillConfig:
    config = DistillConfig(
        name="tiny_distill", model=dataclasses.replace(CLASSIFY_MODEL, depth=1, drop_path=0.0, head_dropout=0.0), out=str(out),
        teacher=dataclasses.replace(CLASSIFY_MODEL, drop_path=0.0, head_dropout=0.0), teacher_weights=teacher_weights,
        data=data(clips, sampling="dense"), validation=data(clips, sampling="dense", crop="center"),
        views=ViewsConfig(segments=1, crops=1, batch=4), optim=OptimConfig(lr=3e-3, lr_batch=0, min_lr=1e-4),
        train=TrainConfig(epochs=6, global_batch=4, checkpoint_every=4, log_every=2, picture_every=0),
    )  # fmt: skip
    return dataclasses.replace(config, **changes)


def ava_config(scenes: Path, out: Path, **changes: Any) -> AvaConfig:
    """On what `write_ava_scenes` wrote."""
    data = AvaDataConfig(
        videos=str(scenes / "videos"), annotations=str(scenes / "train.csv"), labels=str(scenes / "labels.pbtxt"),
        short_side=(48, 56), flip=True, workers=1, prefetch=2, cache_mb=64,
    )  # fmt: skip
    validation = dataclasses.replace(
        data, annotations=str(scenes / "val.csv"), boxes=str(scenes / "people.csv"), short_side=(48, 48), flip=False
    )
    config = AvaConfig(
        name="toy_ava", model=AVA_MODEL, data=data, validation=validation, out=str(out),
        optim=OptimConfig(lr=4e-3, lr_batch=0, min_lr=1e-5, warmup_epochs=2, betas=(0.9, 0.999)),
        train=TrainConfig(epochs=24, global_batch=8, threads=1, checkpoint_every=100, log_every=20),
    )  # fmt: skip
    return dataclasses.replace(config, **changes)


def tad_data(root: Path, subset: str = "validation", **changes: Any) -> TadDataConfig:
    """What `write_tad_features` wrote."""
    values: dict[str, Any] = {"features": str(root / "features"), "annotations": str(root / "annotations.json"), "workers": 1}
    return TadDataConfig(**{"subset": subset, **values, **changes})


def tad_config(root: Path, out: Path, epochs: int = 3, **changes: Any) -> TadConfig:
    config = TadConfig(
        name="toy", model=TAD_TRUNK, detector=TAD_DETECTOR, out=str(out), data=tad_data(root, crop_range=(0.9, 1.0)),
        validation=tad_data(root, "test"),
        optim=OptimConfig(
            lr=4e-3, lr_batch=0, min_lr=1e-6, warmup_epochs=0.1 * epochs, betas=(0.9, 0.999), clip_grad=1.0, ema_decay=0.95
        ),
        train=TrainConfig(epochs=epochs, global_batch=4, threads=1, checkpoint_every=8, log_every=4),
    )  # fmt: skip
    return dataclasses.replace(config, **changes)


def with_train(config: Any, **changes: Any) -> Any:
    return dataclasses.replace(config, train=dataclasses.replace(config.train, **changes))


def metrics_without_time(path: Path) -> list[dict[str, Any]]:
    """Lines of metrics.jsonl without what depends on the clock."""
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    timed = ("seconds", "clips_per_s", "wait_s", "decode_s", "rank_s")
    return [{k: v for k, v in line.items() if k not in timed} for line in lines]
