"""Sin-cos position tables: the official formula over the flattened token index, and other grids.

    table[n, 2i] = sin(n / 10000^(2i/D)),  table[n, 2i+1] = cos(n / 10000^(2i/D)),   n = (t H' + y) W' + x

This is one dimension over all tokens, not three. It is computed in float64 and rounded to float32 once, so the values
equal the released code's bit for bit. For a clip that is not 16x224 there are three choices (`ModelConfig.positions`):

exact        the formula on the clip's own grid;
interpolate  the 16x224 table, resized linearly along t, y and x: a token keeps the position pre-training gave its place;
official     what the released fine-tuning script does with `--num_frames` and `--input_size`. It takes every table for
             one of 8 time steps, which scrambles the positions of 64x266 (the 90.0 % Kinetics-400 run) and fails for
             most other lengths; those are ValueErrors here. Needed only to reproduce such checkpoints.
"""

from __future__ import annotations

import functools
import math
from typing import Any, Literal

import numpy as np
import torch
from torch import nn

from .sizes import NATIVE_FRAMES, NATIVE_SIZE, ModelSpec

Positions = Literal["exact", "official", "interpolate"]


def sincos_table(tokens: int, width: int) -> np.ndarray:
    """The table [tokens, width], float32, of the formula above (width odd: the last column is a sine)."""
    column = np.arange(width)
    angle = np.arange(tokens)[:, None] / np.power(10000, 2 * (column // 2) / width)
    angle[:, 0::2] = np.sin(angle[:, 0::2])
    angle[:, 1::2] = np.cos(angle[:, 1::2])
    return angle.astype(np.float32)


def resize_weights(old: int, new: int, mode: Literal["linear", "cubic"]) -> np.ndarray:
    """The matrix [new, old] that resizes one axis: pixel centres at half integers, edges repeated (the convention of
    `torch.nn.functional.interpolate(align_corners=False)`; cubic: Keys' kernel with a = -0.75)."""
    place = (np.arange(new) + 0.5) * old / new - 0.5
    first = np.floor(place)
    distance = place - first
    weights = np.zeros((new, old))
    if mode == "linear":
        taps = {0: 1 - distance, 1: distance}
    else:
        a = -0.75

        def near(x: np.ndarray) -> np.ndarray:
            return ((a + 2) * x - (a + 3)) * x * x + 1

        def far(x: np.ndarray) -> np.ndarray:
            return ((a * x - 5 * a) * x + 8 * a) * x - 4 * a

        taps = {-1: far(distance + 1), 0: near(distance), 1: near(1 - distance), 2: far(2 - distance)}
    for offset, weight in taps.items():
        source = np.clip(first + offset, 0, old - 1).astype(int)
        np.add.at(weights, (np.arange(new), source), weight)
    return weights


def resize_table(
    table: np.ndarray, old: tuple[int, int, int], new: tuple[int, int, int], space: Literal["linear", "cubic"]
) -> np.ndarray:
    """Resize a table [T'H'W', D] from grid `old` to grid `new`: linear along t, `space` along y and x. Float32 out."""
    values = table.reshape(*old, -1)
    for axis, mode in ((2, space), (1, space), (0, "linear")):
        if old[axis] != new[axis]:
            weights = resize_weights(old[axis], new[axis], mode)
            values = np.moveaxis(np.tensordot(weights, values, axes=(1, axis)), 0, axis)
    return values.reshape(math.prod(new), -1).astype(np.float32)


def official_table(table: np.ndarray, frames: int, size: int, patch: int, tubelet: int) -> np.ndarray:
    """What the released fine-tuning script turns a model's own `table` [N, D] into under `--num_frames frames --input_size
    size`; the number of rows may change. Raises ValueError where that script fails."""
    steps = NATIVE_FRAMES // tubelet

    def square() -> int:
        side = math.isqrt(len(table) // steps)
        if steps * side * side != len(table):
            raise ValueError(
                f'positions="official": the released script cannot fine-tune {frames}x{size} with patch {patch}; '
                'use "exact" or "interpolate"'
            )
        return side

    if size != NATIVE_SIZE:
        side, new = square(), size // patch
        table = resize_table(table, (steps, side, side), (steps, new, new), "cubic")
    if frames != NATIVE_FRAMES:
        side = square()
        table = resize_table(table, (steps, side, side), (frames // tubelet, side, side), "linear")
    return table


@functools.lru_cache(maxsize=8)
def position_table(spec: ModelSpec, width: int, positions: Positions) -> np.ndarray:
    """The table [T'H'W', width], float32, of a model: see the head of this file."""
    if positions == "official":
        table = official_table(sincos_table(spec.tokens, width), spec.frames, spec.size, spec.patch, spec.tubelet)
        if len(table) != spec.tokens:
            raise ValueError(
                f'positions="official": the released script ends with {len(table)} positions for '
                f'{spec.tokens} tokens at {spec.frames}x{spec.size} with patch {spec.patch}; use "exact" or "interpolate"'
            )
        return table
    native = (NATIVE_FRAMES // spec.tubelet, NATIVE_SIZE // spec.patch, NATIVE_SIZE // spec.patch)
    if positions == "exact" or spec.grid == native:
        return sincos_table(spec.tokens, width)
    return resize_table(sincos_table(math.prod(native), width), native, spec.grid, "linear")


class PositionTable(nn.Module):
    """Holds `table` [T'H'W', width], a non-persistent buffer without gradient.

    The values are a function of the arguments, so every move (`to`, `to_empty` of a model built on the meta device)
    writes them anew instead of carrying bytes along.
    """

    table: torch.Tensor

    def __init__(self, spec: ModelSpec, width: int, positions: Positions = "exact") -> None:
        super().__init__()
        self.arguments = (spec, width, positions)
        self.register_buffer("table", torch.tensor(position_table(*self.arguments)), persistent=False)

    def _apply(self, fn: Any, recurse: bool = True) -> PositionTable:
        super()._apply(fn, recurse)
        if not self.table.is_meta:
            with torch.no_grad(), torch.device(self.table.device):
                self.table.copy_(torch.tensor(position_table(*self.arguments)))
        return self

    def forward(self, index: torch.Tensor | None = None) -> torch.Tensor:
        """All rows [N, D], or those of token ids `index` [B, K]: [B, K, D]."""
        return self.table if index is None else nn.functional.embedding(index, self.table)
