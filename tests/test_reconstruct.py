"""Pictures show what they say: seen patches as they are, hidden ones as predicted."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.tiny_runs import PRETRAIN_MODEL
from vmae2_fast.models import build_model
from vmae2_fast.ops import dual_mask, gather_patches
from vmae2_fast.ops.reconstruction import patch_statistics
from vmae2_fast.tasks.reconstruct import paint, reconstruct, sheet


def clip() -> torch.Tensor:
    return torch.randint(256, (8, 32, 32, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


def test_perfect_predictions_paint_the_original() -> None:
    model = build_model(PRETRAIN_MODEL)
    video, zero = clip()[None], torch.zeros(1, dtype=torch.int64)
    mask = dual_mask(zero, zero, grid=model.grid, seed=3, encoder_ratio=0.75, decoder="none")
    index = mask.loss_index
    rows = gather_patches(video, index, patch=8, mean=(0.0,) * 3, std=(1.0,) * 3).unflatten(-1, (3, -1)).transpose(-1, -2)
    mean, deviation = patch_statistics(video, index, patch=8, tubelet=2)
    parts = paint(video, ((rows - mean) / deviation).flatten(-2), mask, model.grid)
    assert np.abs(parts.predicted.astype(int) - parts.original).max() <= 1
    hidden = (parts.visible == 128).all(-1)
    assert hidden.mean() == pytest.approx(0.75, abs=0.01)
    assert np.array_equal(parts.visible[~hidden], parts.original[~hidden])
    assert np.array_equal(parts.means[~hidden], parts.original[~hidden])
    block = parts.means[:2, hidden[0].any(1).argmax() // 8 * 8 :, :][:, :8]
    assert len(np.unique(block.reshape(-1, 3), axis=0)) < block.size / 3  # flat patches


def test_mode_is_restored_and_input_checked() -> None:
    model = build_model(PRETRAIN_MODEL).train()
    parts = reconstruct(model, clip(), encoder_ratio=0.75)
    assert model.training
    assert sheet([parts, parts, parts], frames=2, scale=1).dtype == np.uint8
    with pytest.raises(ValueError, match=r"uint8 \[T,H,W,3\]"):
        reconstruct(model, clip().float())
