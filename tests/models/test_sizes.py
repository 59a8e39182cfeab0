"""Names, defaults and the errors of a configuration that cannot be built."""

from __future__ import annotations

import pytest

from vmae2_fast.config import ModelConfig
from vmae2_fast.models import create_model, model_names, resolve
from vmae2_fast.models.sizes import StackSpec

BASE = "pretrain_videomae_base_patch16_224"


def test_ten_official_names():
    assert len(model_names()) == 10
    assert all(resolve(ModelConfig(name=name)).tokens in (1568, 2048) for name in model_names())


def test_the_giant_decoder_inherits_the_mlp_ratio_unless_told_otherwise():
    name = "pretrain_videomae_giant_patch14_224"
    assert resolve(ModelConfig(name=name)).decoder == StackSpec(512, 4, 8, 2234)
    assert resolve(ModelConfig(name=name, decoder_mlp_ratio=4.0)).decoder == StackSpec(512, 4, 8, 2048)
    assert resolve(ModelConfig(name=name)).encoder == StackSpec(1408, 40, 16, 6144)


def test_grid_and_patch_values_follow_the_clip():
    spec = resolve(ModelConfig(name=BASE, frames=12, size=96, in_chans=1, pixel_mean=(0.5,), pixel_std=(0.2,)))
    assert spec.grid == (6, 6, 6)
    assert spec.patch_values == 2 * 16 * 16


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"name": "pretrain_videomae_bas_patch16_224"}, "did you mean.*pretrain_videomae_base_patch16_224"),
        ({"size": 220}, r"size=220 is not divisible by model.patch=16; the nearest valid values of model.size are 208 or 224"),
        ({"size": 8}, r"nearest valid values of model.size are 16$"),
        ({"frames": 15}, "frames=15 is not divisible by model.tubelet=2"),
        ({"heads": 5}, "width=768 is not divisible by model.heads=5"),
        ({"decoder_heads": 5}, "decoder_width=384 is not divisible by model.decoder_heads=5"),
        ({"depth": 0}, "depth must be at least 1"),
        ({"mlp_ratio": 0.0}, "no hidden units"),
        ({"drop_path": 1.0}, r"drop_path must lie in \[0, 1\)"),
        ({"num_classes": -1}, "num_classes"),
        ({"in_chans": 5}, "pixel_mean must be given for 5 channels"),
        ({"pixel_std": (1.0,)}, "pixel_std needs 3 values"),
        ({"learnable_positions": True}, "learnable_positions is for classification"),
    ],
)
def test_impossible_configurations_name_the_key(change, message):
    with pytest.raises(ValueError, match=message):
        resolve(ModelConfig(**{"name": BASE} | change))


def test_create_model_names_an_unknown_option():
    with pytest.raises(ValueError, match="unknown model option 'frame'; did you mean frames"):
        create_model(BASE, frame=16)
