"""Official state dicts: every key, in order, with its shape; parameter counts to the unit. Built on the meta device."""

from __future__ import annotations

import json

import pytest
import torch

from tests.golden.support import golden_root
from vmae2_fast.models import create_model

FILES = sorted((golden_root() / "parity" / "meta").glob("model_shapes*.json"))
SHAPES = {name: entry for file in FILES for name, entry in json.loads(file.read_text()).items()}


@pytest.mark.parametrize("name", SHAPES)
def test_state_dict(name):
    entry = SHAPES[name]
    build = {{"all_frames": "frames"}.get(key, key): value for key, value in entry["build"].items()}
    with torch.device("meta"):
        model = create_model(name, **build)
    assert {key: list(value.shape) for key, value in model.state_dict().items()} == entry["state_dict"]
    assert list(model.state_dict()) == list(entry["state_dict"])
    parts = {
        "n_params": model.parameters(),
        "n_encoder": getattr(model, "encoder", model).parameters(),
        "n_decoder": getattr(model, "decoder", model).parameters(),
        "n_params_without_head": (p for key, p in model.named_parameters() if not key.startswith("head.")),
    }
    counts = {key: sum(p.numel() for p in parameters) for key, parameters in parts.items() if key in entry}
    assert counts == {key: entry[key] for key in counts}
    t, y, x = model.grid
    assert t * y * x == entry["num_patches"]
