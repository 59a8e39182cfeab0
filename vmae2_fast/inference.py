"""One trained model on one video: what `vmae2 classify` and `vmae2 reconstruct` do, for scripts as well."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .config import ModelConfig, from_dict
from .data.decode import decode_video, probe
from .data.plan import cut_test_views
from .data.sampling import dense_test_views
from .models import build_model, load_weights
from .models.formats import read_checkpoint


class Loaded(NamedTuple):
    model: Any
    classes: tuple[str, ...] | None
    """Class names stored with the weights."""


class Prediction(NamedTuple):
    label: str
    probability: float


def load_model(weights: str, model: str | None = None, *, kind: str | None = None) -> Loaded:
    """The model a weights file was saved from, in evaluation mode.

    weights: a run directory, a file of ours (it says which model it holds), or with `model=NAME` any official or Hugging
    Face file. kind: "pretrain" or "classify" where the caller needs that one. Raises ValueError if the file does not say
    what it holds and `model` is not given, or if it holds another kind.
    """
    path = weights
    checkpoint = read_checkpoint(path)
    if model is not None:
        config = ModelConfig(name=model)
        head = checkpoint.state.get("head.weight")
        if head is not None:
            config = dataclasses.replace(config, num_classes=len(head))
    elif "config" in checkpoint.metadata:
        config = from_dict(json.loads(checkpoint.metadata["config"]), ModelConfig)
    else:
        raise ValueError(f"{path} does not say which model it holds; name it with --model, for example vit_base_patch16_224")
    found = "pretrain" if config.name.startswith("pretrain") else "classify"
    if kind is not None and found != kind:
        raise ValueError(
            f"{path} holds {config.name}; this needs a {'pre-training' if kind == 'pretrain' else 'classification'} model"
        )
    if found == "classify" and kind == "classify" and not config.num_classes:
        raise ValueError(f"{path} holds a trunk without a head; fine-tune it first")
    with torch.device("meta"):
        built = build_model(config)
    load_weights(built, path)
    names = json.loads(checkpoint.metadata.get("meta", "{}")).get("classes")
    return Loaded(built.eval(), tuple(names) if names else None)


def read_views(path: str | Path, *, frames: int, size: int, stride: int = 4, segments: int = 1, crops: int = 1) -> Tensor:
    """Views of one video, uint8 [segments * crops, frames, size, size, 3], segment-major; one decode for all.

    Dense windows of `frames` frames `stride` apart, crops along the long side. Raises DecodeError naming the file.
    """
    wanted = dense_test_views(probe(str(path)).num_frames, frames, stride, segments)
    video = torch.from_numpy(decode_video(str(path), wanted.reshape(-1)))
    return cut_test_views(video, segments=segments, size=size, crops=crops)


@torch.no_grad()
def classify(
    loaded: Loaded, path: str | Path, *, segments: int = 5, crops: int = 3, stride: int = 4, topk: int = 5
) -> list[Prediction]:
    """The `topk` most probable classes of a video: softmax of every view, averaged (paper, section 4)."""
    config = loaded.model.config
    views = read_views(path, frames=config.frames, size=config.size, stride=stride, segments=segments, crops=crops)
    scores = torch.cat([loaded.model(chunk).float().softmax(-1) for chunk in views.split(8)]).mean(0)
    values, order = scores.topk(min(topk, len(scores)))
    names = loaded.classes or tuple(str(i) for i in range(len(scores)))
    return [Prediction(names[i], v) for v, i in zip(values.tolist(), order.tolist())]
