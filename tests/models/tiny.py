"""Small models and clips for the tests of this folder."""

from __future__ import annotations

import argparse
from typing import Any

import torch
from torch import Tensor

from vmae2_fast.models import PretrainViT, VisionTransformer, create_model
from vmae2_fast.ops.masks import DualMask, dual_mask

SHAPE: dict[str, Any] = {"frames": 8, "size": 32, "patch": 8, "width": 16, "depth": 2, "heads": 2}
DECODER: dict[str, Any] = {"decoder_width": 8, "decoder_depth": 2, "decoder_heads": 2}


def pretrain(**overrides: Any) -> PretrainViT:
    model = create_model("pretrain_videomae_base_patch16_224", **SHAPE | DECODER | overrides)
    assert isinstance(model, PretrainViT)
    return model


def classify(**overrides: Any) -> VisionTransformer:
    model = create_model("vit_base_patch16_224", **SHAPE | {"num_classes": 5} | overrides)
    assert isinstance(model, VisionTransformer)
    return model


def clips(batch: int = 2, frames: int = 8, size: int = 32, channels: int = 3) -> Tensor:
    """Random uint8 clips [B, T, H, W, C]."""
    return torch.randint(0, 256, (batch, frames, size, size, channels), dtype=torch.uint8)


def mask(model: PretrainViT, batch: int = 2, **arguments: Any) -> DualMask:
    position = torch.arange(batch)
    return dual_mask(position, torch.zeros_like(position), grid=model.grid, seed=0, **{"encoder_ratio": 0.75} | arguments)


def state_of(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {key: value.clone() for key, value in model.state_dict().items()}


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def official(model: torch.nn.Module, path, **more) -> None:
    """A file as the official scripts write it: optimiser state, epoch, the command line as a Namespace."""
    content = {
        "model": model.state_dict(),
        "optimizer": {"state": {0: {"step": torch.tensor(3.0)}}, "param_groups": [{"lr": 0.1}]},
    }
    torch.save({**content, "epoch": 3, "args": argparse.Namespace(lr=0.1, betas=(0.9, 0.95)), **more}, path)
