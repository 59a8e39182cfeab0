"""What the official fine-tuning script takes from a checkpoint, key by key, and where it fails."""

from __future__ import annotations

import json
import math
import re

import pytest
import torch
from safetensors.torch import load_file

from tests.golden.support import golden_root
from vmae2_fast.config import ModelConfig
from vmae2_fast.models import build_model, load_weights
from vmae2_fast.models.positions import official_table, sincos_table

META = golden_root() / "parity" / "meta"
CASES = json.loads((META / "finetune_init.json").read_text()) if (META / "finetune_init.json").is_file() else {}
PATCH, TUBELET = 8, 2
CLASSES = {"Kinetics-400": 400, "Kinetics-600": 600, "Kinetics-700": 700, "Kinetics-710": 710, "SSV2": 174, "UCF101": 101}
CHANGES_LENGTH = {name for name, case in CASES.items() if case["args"]["num_frames"] != 16}


def recorded_tensors() -> dict[str, torch.Tensor]:
    file = META / "finetune_init.safetensors"
    return load_file(file) if file.is_file() else {}


def bare(key: str) -> str:
    return re.sub(r"^(backbone\.|encoder\.)+", "", key.replace("_orig_mod.", ""))


def build(case: dict):
    """A tiny model and a random checkpoint with exactly the recorded keys."""
    keys = case["checkpoint_keys"]
    destinations = {*case["loaded_from"], *case["left_at_init"]}
    width, tokens = case["pos_embed_shape"][2], case["pos_embed_shape"][1]
    steps = case["args"]["num_frames"] // TUBELET
    size = math.isqrt(tokens // steps) * PATCH
    depth = 1 + max(int(key.split(".")[1]) for key in destinations if key.startswith("blocks."))
    common = {"frames": case["args"]["num_frames"], "size": size, "patch": PATCH, "width": width, "heads": 2, "depth": depth}
    classes = CLASSES[case["args"]["data_set"]]
    model = build_model(
        ModelConfig(
            name="vit_base_patch16_224",
            num_classes=classes,
            pooling="mean" if "fc_norm.weight" in destinations else "first",
            learnable_positions="pos_embed" in destinations,
            **common,
        )
    )
    decoder_depth = 1 + max((int(m[1]) for key in keys if (m := re.search(r"decoder\.blocks\.(\d+)", key))), default=0)
    with torch.device("meta"):
        pretrain = build_model(
            ModelConfig(
                name="pretrain_videomae_base_patch16_224",
                decoder_width=8,
                decoder_heads=2,
                decoder_depth=decoder_depth,
                **common,
            )
        )
    shapes = {bare(k): v.shape for k, v in [*pretrain.state_dict().items(), *model.state_dict().items()]}
    data, own_head = recorded_tensors(), case["loaded_from"].get("head.weight") not in (None, "derived")
    generator = torch.Generator().manual_seed(0)

    def value(key: str) -> torch.Tensor:
        if key == "pos_embed" and "learnable_pos.src" in data:
            return data["learnable_pos.src"]
        if key in ("head.weight", "head.bias") and not own_head:
            return data.get(f"k710.{key}", torch.randn(710, *shapes[key][1:], generator=generator))
        return torch.randn(shapes[key], generator=generator)

    return model, {key: value(bare(key)) for key in keys}


@pytest.mark.parametrize("name", [name for name in CASES if name not in CHANGES_LENGTH])
def test_loaded_keys(name, tmp_path):
    case, data = CASES[name], recorded_tensors()
    assert case["error"] is None
    model, checkpoint = build(case)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    content: dict = checkpoint
    for wrapper in case["wrapper"]:
        content = {wrapper: content, "epoch": 3}
    torch.save(content, tmp_path / "checkpoint.pth")

    report = load_weights(model, tmp_path / "checkpoint.pth")

    derived = {key for key, source in case["loaded_from"].items() if source == "derived"}
    plain = {key: source for key, source in case["loaded_from"].items() if source != "derived"}
    assert {key: bare(source) for key, source in report.loaded.items() if key not in derived} == {
        key: bare(source) for key, source in plain.items()
    }
    assert set(report.loaded) == set(case["loaded_from"])
    assert set(report.initialised) == set(case["left_at_init"])
    assert {bare(key) for key in report.dropped} == {bare(key) for key in checkpoint} - {
        bare(k) for k in report.loaded.values()
    }
    after = model.state_dict()
    for key, source in plain.items():
        assert torch.equal(after[key], checkpoint[source]), key
    for key in case["left_at_init"]:
        assert torch.equal(after[key], before[key]), key
    for key in derived:
        if key == "pos_embed" and "learnable_pos.dst" in data:
            torch.testing.assert_close(after[key], data["learnable_pos.dst"], rtol=0, atol=1e-6)
        elif f"{name}.{key}" in data:
            assert torch.equal(after[key], data[f"{name}.{key}"]), key


@pytest.mark.parametrize("name", sorted(CHANGES_LENGTH))
def test_official_positions_of_another_length(name):
    """The script's own table arithmetic: it fails, or ends with a number of positions that fits no clip. Ours by default
    rebuilds the table for the new grid."""
    case, frames = CASES[name], CASES[name]["args"]["num_frames"]
    side = next(
        math.isqrt(c["pos_embed_shape"][1] // 8)
        for n, c in CASES.items()
        if n not in CHANGES_LENGTH and c["args"]["input_size"] == 224 and "pos_embed" not in c["loaded_from"]
    )
    width, tokens = case["pos_embed_shape"][2], frames // TUBELET * side**2
    table = sincos_table(tokens, width)
    if case["error"] is not None:
        with pytest.raises(ValueError, match="cannot fine-tune"):
            official_table(table, frames, case["args"]["input_size"], PATCH, TUBELET)
    else:
        ended = official_table(table, frames, case["args"]["input_size"], PATCH, TUBELET)
        assert ended.shape == tuple(case["pos_embed_shape"][1:])
    config = ModelConfig(
        name="vit_base_patch16_224", frames=frames, size=side * PATCH, patch=PATCH, width=width, heads=2, depth=1
    )
    assert build_model(config).positions().numpy().tolist() == table.tolist()
