"""One trained model on one video: what `vmae2 classify` and `vmae2 reconstruct` do, for scripts as well."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from .config import ModelConfig, Stage, from_dict, load
from .data.plan import cut_test_views
from .data.planes import decode_yuv420
from .data.probing import probe
from .data.sampling import dense_test_views, segment_test_views
from .models import build_model, load_weights
from .models.formats import read_checkpoint
from .models.kinetics import class_names


class Loaded(NamedTuple):
    model: Any
    classes: tuple[str, ...] | None
    """Class names stored with the weights, or those of Kinetics where the number of classes is one of theirs."""
    run: Stage | None = None
    """The configuration of the run, where the weights are a run directory."""

    @property
    def stride(self) -> int:
        """Frames between two sampled frames, as the run had it; 4 where nothing is known (paper, Kinetics)."""
        if self.run is None:
            return 4
        strides = {source.stride for source in self.run.data.sources}
        return (strides.pop() if len(strides) == 1 else None) or self.run.data.stride

    @property
    def sampling(self) -> Literal["dense", "segment"]:
        return "segment" if self.run is not None and self.run.data.sampling == "segment" else "dense"


class Prediction(NamedTuple):
    label: str
    probability: float


def load_model(
    weights: str, model: str | None = None, *, kind: str | None = None, head_needed: bool = True, **changes: Any
) -> Loaded:
    """The model a weights file was saved from, in evaluation mode.

    weights: a run directory, a file of ours (it says which model it holds), or with `model=NAME` any official or Hugging
    Face file. kind: "pretrain" or "classify" where the caller needs that one. head_needed: whether a classification model
    must come with a head. changes: fields of `ModelConfig` to have otherwise, as frames and size. Raises ValueError if the
    file does not say what it holds and `model` is not given, or if it holds another kind.
    """
    path = weights
    checkpoint = read_checkpoint(path)
    head = checkpoint.state.get("head.weight")
    if model is not None:
        config = ModelConfig(name=model)
        if head is not None:
            config = dataclasses.replace(config, num_classes=len(head))
    elif "config" in checkpoint.metadata:
        config = from_dict(json.loads(checkpoint.metadata["config"]), ModelConfig)
    else:
        raise ValueError(f"{path} does not say which model it holds; name it with --model, for example vit_base_patch16_224")
    if changes:
        config = dataclasses.replace(config, **changes)
    found = "pretrain" if config.name.startswith("pretrain") else "classify"
    if kind is not None and found != kind:
        raise ValueError(
            f"{path} holds {config.name}; this needs a {'pre-training' if kind == 'pretrain' else 'classification'} model"
        )
    with torch.device("meta"):
        built = build_model(config)
    load_weights(built, path)
    if head_needed and found == "classify" and (not config.num_classes or head is None):
        raise ValueError(f"{path} holds a trunk without a head; fine-tune it first")
    names = json.loads(checkpoint.metadata.get("meta", "{}")).get("classes")
    run_file = Path(path) / "config.json"
    run = load(run_file) if found == "classify" and Path(path).is_dir() and _is_run(run_file) else None
    return Loaded(built.eval(), tuple(names) if names else class_names(config.num_classes), run)


def _is_run(file: Path) -> bool:
    """Whether a config.json is a run's, not that of a Hugging Face model."""
    return file.is_file() and "kind" in json.loads(file.read_text())


def read_views(
    path: str | Path,
    *,
    frames: int,
    size: int,
    stride: int = 4,
    segments: int = 1,
    crops: int = 1,
    sampling: Literal["dense", "segment"] = "dense",
) -> Tensor:
    """Views of one video, uint8 [segments * crops, frames, size, size, 3], segment-major; one decode for all.

    Dense windows of `frames` frames `stride` apart, or interleaved segments of the whole video; crops along the long side.
    Raises DecodeError naming the file.
    """
    length = probe(str(path)).num_frames
    if sampling == "segment":
        wanted = segment_test_views(length, frames, segments)
    else:
        wanted = dense_test_views(length, frames, stride, segments)
    video = decode_yuv420(str(path), wanted.reshape(-1))
    return cut_test_views(video, segments=segments, size=size, crops=crops)


@torch.no_grad()
def classify(
    loaded: Loaded,
    path: str | Path,
    *,
    segments: int = 5,
    crops: int = 3,
    stride: int | None = None,
    topk: int = 5,
    label_map: Sequence[int] | None = None,
    names: Sequence[str] | None = None,
    batch: int = 8,
) -> list[Prediction]:
    """The `topk` most probable classes of a video: softmax of every view, averaged (paper, section 4).

    stride: None takes the run's. label_map: for each class wanted, the index of its output. names: of the classes; None:
    those known with the weights. batch: views of one forward.
    """
    model = loaded.model
    config, device = model.config, next(model.parameters()).device
    views = read_views(
        path, frames=config.frames, size=config.size, stride=stride or loaded.stride, segments=segments, crops=crops,
        sampling=loaded.sampling,
    )  # fmt: skip
    logits = torch.cat([model(chunk.to(device)).float() for chunk in views.split(batch)])
    if label_map is not None:
        logits = logits[:, list(label_map)]
    scores = logits.softmax(-1).mean(0)
    if names is None:
        names = (loaded.classes if label_map is None else class_names(len(scores))) or [str(i) for i in range(len(scores))]
    if len(names) != len(scores):
        raise ValueError(f"{len(names)} class names for {len(scores)} classes")
    values, order = scores.topk(min(topk, len(scores)))
    return [Prediction(names[i], v) for v, i in zip(values.tolist(), order.tolist())]
