"""Products of the transformer blocks in float8 through torchao: `train.float8`.

qkv, projection, fc1 and fc2 of every block become torchao's `Float8Linear`: forward in e4m3, gradients in e5m2, each operand
with one scale that is found anew from its largest value; parameters, checkpoints and all around the products stay as they are.
The fused half-blocks hold their products inside, so blocks with other layers run them one by one (`models.vit.Block`), which
keeps LayerNorm and GELU outputs for the backward.
"""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import nn

from ..models.vit import Block, Linear

CAPABILITY = (8, 9)
"""Compute capability from which GPUs multiply float8: Ada, Hopper and later."""
_UNIT = 16
"""What the float8 products of GPUs want both sides of a weight to be multiples of."""


def _torchao() -> Any:
    try:
        return importlib.import_module("torchao.float8")
    except ImportError as error:
        raise ValueError(
            f"train.float8: torchao.float8 cannot be imported ({error}); pip install 'vmae2_fast[fp8]', or set "
            "train.float8=False"
        ) from error


def check_float8(device: torch.device) -> None:
    """Raises ValueError naming what is missing for float8: torchao, or a GPU that multiplies it."""
    _torchao()
    if device.type != "cuda":
        raise ValueError(f"train.float8 needs a GPU, and this run is on {device}; set train.float8=False")
    found = torch.cuda.get_device_capability(device)
    if found < CAPABILITY:
        raise ValueError(
            f"train.float8: {torch.cuda.get_device_name(device)} (compute capability {found[0]}.{found[1]}) has no float8 "
            f"products, {CAPABILITY[0]}.{CAPABILITY[1]} has; set train.float8=False"
        )


def use_float8(model: nn.Module, *, emulate: bool = False) -> None:
    """Give the blocks of `model` products in float8, in place; a decoder that is to stay float32 keeps its own.

    Before it is compiled and split over ranks; it may be on the meta device. emulate: round to float8 and multiply in float32,
    which every device can. Raises ValueError where torchao is missing, there is no block, or a width is no multiple of 16.
    """
    chosen: set[Linear] = set()
    exact = getattr(getattr(model, "config", None), "decoder_fp32", False)
    for name, block in model.named_modules():
        if isinstance(block, Block) and not (exact and name.startswith("decoder.")):
            chosen |= {part for part in block.modules() if isinstance(part, Linear)}
    if not chosen:
        raise ValueError(f"train.float8: {type(model).__name__} has no transformer block; set train.float8=False")
    for part in chosen:
        if part.in_features % _UNIT or part.out_features % _UNIT:
            raise ValueError(
                f"train.float8: a product of {part.in_features} by {part.out_features} features, but both must be multiples "
                f"of {_UNIT}; set train.float8=False"
            )
    torchao = _torchao()
    # Tokens are the inner side of a weight's gradient; their number need not be a multiple of 16.
    config = torchao.Float8LinearConfig(emulate=emulate, pad_inner_dim=True)
    torchao.convert_to_float8_training(model, module_filter_fn=lambda part, name: part in chosen, config=config)
