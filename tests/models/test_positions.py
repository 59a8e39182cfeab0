"""Position tables of any clip, and their life as a buffer."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from tests.models.tiny import classify, pretrain
from vmae2_fast.config import ModelConfig
from vmae2_fast.models.positions import position_table, resize_table, sincos_table
from vmae2_fast.models.sizes import resolve


def test_formula_of_single_entries():
    table = sincos_table(50, 6)
    for n, column, function in ((0, 0, np.sin), (7, 0, np.sin), (7, 1, np.cos), (49, 4, np.sin), (49, 5, np.cos)):
        assert table[n, column] == np.float32(function(n / 10000 ** (2 * (column // 2) / 6)))


@pytest.mark.parametrize(
    ("mode", "new"), [("cubic", (4, 7, 7)), ("cubic", (4, 3, 3)), ("linear", (4, 7, 3)), ("linear", (9, 5, 5))]
)
def test_resizing_equals_torch_interpolate(mode, new):
    old = (4, 5, 5)
    table = torch.randn(100, 3).double()
    channels = table.T.reshape(3, *old)
    if mode == "cubic":
        expected = F.interpolate(channels.transpose(0, 1), size=new[1:], mode="bicubic").transpose(0, 1)
    else:
        expected = F.interpolate(channels[None], size=new, mode="trilinear")[0]
    resized = resize_table(table.numpy(), old, new, mode)
    torch.testing.assert_close(torch.from_numpy(resized), expected.flatten(1).T.float(), rtol=0, atol=1e-6)


def test_interpolated_table_keeps_the_place_of_a_token():
    native, wide = ModelConfig(name="vit_base_patch16_224"), ModelConfig(name="vit_base_patch16_224", frames=32, size=448)
    table = position_table(resolve(native), 64, "interpolate")
    assert np.array_equal(table, sincos_table(1568, 64))
    # Twice the tokens along every axis: the mean of 8 neighbours inside is the mean around the old token's place.
    large = position_table(resolve(wide), 64, "interpolate").reshape(16, 28, 28, 64)
    small = table.reshape(8, 14, 14, 64)
    assert np.abs(large[2:4, 2:4, 2:4].mean((0, 1, 2)) - small[1, 1, 1]).max() < np.abs(small[1, 1, 2] - small[1, 1, 1]).max()


def test_official_table_of_the_64x266_run_is_its_own_table_read_as_8_steps():
    spec = resolve(ModelConfig(name="vit_giant_patch14_224", frames=64, size=266, width=16))
    own = torch.from_numpy(sincos_table(32 * 19 * 19, 16))
    space = F.interpolate(own.reshape(8, 38, 38, 16).permute(0, 3, 1, 2), size=(19, 19), mode="bicubic")
    time = F.interpolate(space.permute(2, 3, 1, 0).reshape(361, 16, 8), size=32, mode="linear")
    expected = time.reshape(19, 19, 16, 32).permute(3, 0, 1, 2).reshape(-1, 16)
    table = position_table(spec, 16, "official")
    torch.testing.assert_close(torch.from_numpy(table), expected, rtol=0, atol=2e-6)
    assert np.abs(table - own.numpy()).max() > 0.5


@pytest.mark.parametrize(("frames", "size"), [(16, 224), (16, 384)])
def test_official_table_where_the_script_changes_nothing(frames, size):
    spec = resolve(ModelConfig(name="vit_base_patch16_224", frames=frames, size=size))
    assert np.array_equal(position_table(spec, 8, "official"), position_table(spec, 8, "exact"))


@pytest.mark.parametrize(
    ("frames", "message"), [(8, "cannot fine-tune"), (32, "cannot fine-tune"), (64, "25088 positions for 6272 tokens")]
)
def test_official_tables_that_fit_no_clip_are_errors(frames, message):
    with pytest.raises(ValueError, match=message):
        classify(frames=frames, size=224, patch=16, positions="official")


def test_tables_are_not_in_the_state_dict_and_have_no_gradient():
    model = pretrain()
    assert not [key for key in model.state_dict() if "position" in key or "table" in key]
    assert not model.encoder.positions.table.requires_grad


def test_table_is_right_after_every_kind_of_move():
    expected = torch.from_numpy(sincos_table(64, 16))
    with torch.device("meta"):
        model = pretrain()
    assert model.encoder.positions.table.is_meta
    model.to_empty(device="cpu")
    assert torch.equal(model.encoder.positions.table, expected)
    assert torch.equal(model.to(torch.bfloat16).encoder.positions.table, expected.bfloat16())
    # Through bfloat16 and back the values would be rounded; they are written anew.
    assert torch.equal(model.float().encoder.positions.table, expected)
    assert torch.equal(copy.deepcopy(model).encoder.positions.table, expected)
