"""Models and their weights: `create_model(name, weights=..., **overrides)`."""

from __future__ import annotations

import dataclasses
import sys
from typing import Any

import torch

from ..config import ModelConfig, unknown
from .classify import VisionTransformer
from .detect import Detector
from .pretrain import PretrainViT
from .sizes import model_names, resolve
from .vit import Block
from .weights import LoadReport, convert_weights, load_weights, save_weights

__all__ = [
    "Block",
    "Detector",
    "LoadReport",
    "PretrainViT",
    "VisionTransformer",
    "build_model",
    "convert_weights",
    "create_model",
    "load_weights",
    "model_names",
    "resolve",
    "save_weights",
]


def build_model(config: ModelConfig) -> PretrainViT | VisionTransformer:
    """The model of `config` with initial weights, on torch's default device (`with torch.device("meta")` costs nothing).
    Raises ValueError as `resolve` does."""
    return PretrainViT(config) if resolve(config).kind == "pretrain" else VisionTransformer(config)


def create_model(name: str, weights: str | None = None, **overrides: Any) -> PretrainViT | VisionTransformer:
    """A model by its official name; `overrides` are fields of `ModelConfig`.

    weights: a file, a folder or `hf:OWNER/NAME[@REV]` (see `load_weights`); its report goes to stderr. Raises ValueError
    for an unknown name or key (with close matches) and for weights that do not fit."""
    fields = [f.name for f in dataclasses.fields(ModelConfig)]
    for key in overrides:
        if key not in fields:
            raise ValueError(unknown("model option", key, fields))
    config = ModelConfig(name=name, **overrides)
    if weights is None:
        return build_model(config)
    with torch.device("meta"):
        model = build_model(config)
    print(load_weights(model, weights), file=sys.stderr)
    return model
