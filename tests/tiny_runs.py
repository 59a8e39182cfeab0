"""Small encoded clips and run configurations for tests of tasks, training and drills."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np

from vmae2_fast.config import (
    ClassifyConfig,
    DataConfig,
    DistillConfig,
    MaskConfig,
    ModelConfig,
    OptimConfig,
    PretrainConfig,
    SourceConfig,
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


def with_train(config: Any, **changes: Any) -> Any:
    return dataclasses.replace(config, train=dataclasses.replace(config.train, **changes))


def metrics_without_time(path: Path) -> list[dict[str, Any]]:
    """Lines of metrics.jsonl without what depends on the clock."""
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    timed = ("seconds", "clips_per_s", "wait_s", "decode_s", "rank_s")
    return [{k: v for k, v in line.items() if k not in timed} for line in lines]
