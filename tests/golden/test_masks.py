"""Recorded official masks: running cell maps, tubes and dual masks drawn from one numpy stream."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch

from tests.golden.support import golden_root
from vmae2_fast.ops.masks import dual_mask_from_masks, mask_sizes, masks_from_rng

FILE = golden_root() / "parity" / "meta" / "masks.npz"
RECORDED: dict[str, np.ndarray] = dict(np.load(FILE)) if FILE.is_file() else {}


def matching(pattern: str) -> list[re.Match[str]]:
    return [m for m in (re.fullmatch(pattern, name) for name in RECORDED) if m]


def unpacked(name: str, tokens: int) -> np.ndarray:
    return np.unpackbits(RECORDED[name], axis=1)[:, :tokens].astype(bool)


def sizes(text: str) -> tuple[int, int, int]:
    t, h, w = map(int, text.split("x"))
    return t, h, w


class Phases:
    """A stand-in for RandomState: every tube in order, then the given phases."""

    def __init__(self) -> None:
        self.phase = -1

    def shuffle(self, values: np.ndarray) -> None:
        pass

    def randint(self, n: int) -> int:
        self.phase += 1
        return self.phase % n


@pytest.mark.parametrize("case", matching(r"runcell_(\d+x\d+x\d+)_r([\d.]+)"), ids=lambda m: m[0])
def test_running_cell_maps(case: re.Match[str]) -> None:
    grid, ratio = sizes(case[1]), float(case[2])
    recorded = unpacked(case[0], grid[0] * grid[1] * grid[2])
    masks = masks_from_rng(Phases(), len(recorded), grid=grid, decoder_ratio=ratio)[1]
    np.testing.assert_array_equal(masks, recorded)


@pytest.mark.parametrize("case", matching(r"tube_(\d+x\d+x\d+)_r([\d.]+)_seed(\d+)_firstframe"), ids=lambda m: m[0])
def test_tubes(case: re.Match[str]) -> None:
    grid, ratio = sizes(case[1]), float(case[2])
    frame = grid[1] * grid[2]
    recorded = unpacked(case[0], frame)
    masks = masks_from_rng(np.random.RandomState(int(case[3])), len(recorded), grid=grid, encoder_ratio=ratio, decoder="none")[
        0
    ]
    np.testing.assert_array_equal(masks[:, :frame], recorded)
    np.testing.assert_array_equal(masks, np.tile(recorded, grid[0]))


@pytest.mark.parametrize("case", matching(r"dual_(\d+x\d+x\d+)_seed(\d+)_enc"), ids=lambda m: m[0])
def test_dual_masks(case: re.Match[str]) -> None:
    grid = sizes(case[1])
    tokens = grid[0] * grid[1] * grid[2]
    encoder, decoder = unpacked(case[0], tokens), unpacked(case[0].removesuffix("enc") + "dec", tokens)
    drawn = masks_from_rng(np.random.RandomState(int(case[2])), len(encoder), grid=grid)
    np.testing.assert_array_equal(drawn[0], encoder)
    np.testing.assert_array_equal(drawn[1], decoder)
    mask = dual_mask_from_masks(encoder, decoder)
    assert (mask.visible_index.shape[1], mask.decode_index.shape[1], mask.loss_index.shape[1]) == mask_sizes(grid)
    assert bool((mask.loss_index >= 0).all())
    assert torch.equal(mask.decode_index.gather(1, mask.loss_slot.long()), mask.loss_index)
