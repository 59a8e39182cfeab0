"""Weights of ActionFormer: our own files and the released checkpoints, whose names and shapes a table translates."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from .actionformer import ActionFormer
from .formats import read_checkpoint
from .weights import LoadReport

# Released name -> ours, tried in order on every key; channel-first LayerNorms and scales [1, C, 1] become [C], convolutions of
# one tap become matrices.
_NAMES = (
    (r"^backbone\.", ""),
    (r"^embd\.(\d+)\.conv\.", r"embed.\1.conv.conv."),
    (r"^embd_norm\.(\d+)\.", r"embed.\1.norm."),
    (r"\.ln([12])\.", r".norm\1."),
    (r"\.attn\.(query|key|value)_conv\.conv\.", r".\1.conv.conv."),
    (r"\.attn\.(query|key|value)_norm\.", r".\1.norm."),
    (r"\.attn\.(query|key|value)\.", r".\1.linear."),
    (r"\.attn\.proj\.", ".proj."),
    (r"\.mlp\.0\.", ".fc1."),
    (r"\.mlp\.3\.", ".fc2."),
    (r"\.drop_path_attn\.scale$", ".gamma_1"),
    (r"\.drop_path_mlp\.scale$", ".gamma_2"),
    (r"^neck\.fpn_norms\.", "neck."),
    (r"^cls_head\.cls_head\.", "class_head.last."),
    (r"^reg_head\.offset_head\.", "distance_head.last."),
    (r"^reg_head\.scale\.(\d+)\.scale$", r"distance_scale.\1"),
    (r"^cls_head\.(head|norm)\.(\d+)\.", r"class_head.layers.\2.\1."),
    (r"^reg_head\.(head|norm)\.(\d+)\.", r"distance_head.layers.\2.\1."),
    (r"\.layers\.(\d+)\.head\.conv\.", r".layers.\1.conv.conv."),
)
_CONSTANTS = ("point_generator.", "pos_embd", "backbone.pos_embd")
"""Tables the released code keeps with its weights and we compute."""


def from_released(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of a released checkpoint (or gradients under its names) under ours; computed tables are left out."""
    out = {}
    for key, value in state.items():
        if key.startswith(_CONSTANTS):
            continue
        for pattern, replacement in _NAMES:
            key = re.sub(pattern, replacement, key)
        if value.dim() == 3 and value.shape[0] == value.shape[2] == 1:
            value = value.flatten()
        elif value.dim() == 3 and value.shape[2] == 1 and ".conv." not in key:
            value = value.squeeze(2)
        out[key] = value
    scales = {int(key.rpartition(".")[2]): key for key in out if key.startswith("distance_scale.")}
    if scales:  # a scalar for each level there, one tensor of all levels here
        out["distance_scale"] = torch.stack([out.pop(scales[level]) for level in sorted(scales)])
    return out


def load_actionformer(model: ActionFormer, source: str | Path) -> LoadReport:
    """Load a detector's weights: a run directory or file of ours, or a checkpoint of the released code (its averaged weights,
    where it has them). A class head of another number of classes keeps its initial values.

    Raises ValueError naming the file and keys for missing, unexpected or misshapen tensors; the model is unchanged then.
    """
    checkpoint = read_checkpoint(source)
    released = any(key.startswith("cls_head.") for key in checkpoint.state)
    state = from_released(checkpoint.state) if released else dict(checkpoint.state)
    wanted = model.state_dict()
    dropped: list[str] = []
    initialised = ["normalizer"] if "normalizer" not in state else []
    notes: list[str] = []
    last = [f"class_head.last.conv.{name}" for name in ("weight", "bias")]
    if all(key in state for key in last) and len(state[last[1]]) != model.config.classes:
        notes.append(f"class head: {len(state[last[1]])} classes dropped, the model has {model.config.classes}")
        for key in last:
            del state[key]
        dropped += last
        initialised += last
    faults = {
        "missing": [key for key in wanted if key not in state and key not in initialised],
        "unexpected": [key for key in state if key not in wanted],
        "other shape": [
            f"{key} {list(value.shape)} (the model has {list(wanted[key].shape)})"
            for key, value in state.items()
            if key in wanted and value.shape != wanted[key].shape
        ],
    }
    told = [f"{what}: {', '.join(keys[:5])}" + (" ..." if len(keys) > 5 else "") for what, keys in faults.items() if keys]
    if told:
        raise ValueError(f"{checkpoint.path} does not fit this detector: {'; '.join(told)}")
    with torch.no_grad():
        for key, value in state.items():
            wanted[key].copy_(value)
    return LoadReport(checkpoint.path, {key: key for key in state}, tuple(dropped), tuple(initialised), tuple(notes))
