"""RandAugment for clips: the official policy strings, drawn as a plan and carried out as batched torch ops.

`rand-m7-n4-mstd0.5-inc1` of the released fine-tuning scripts: n = 4 operations out of 15, each applied with probability
1/2, its magnitude drawn from N(m, mstd) and clipped to 0..10; `inc1` takes the forms that grow stronger with the
magnitude. All frames of a clip get the same operations (Cubuk et al., "RandAugment", and timm's auto-augment, whose ranges
these are). Results are the bits Pillow gives: sums, truncations and border rules are Pillow's. Only rotation, shear and
shift may differ by one level where the filter's sum is a whole level but for rounding.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..config import require

OPERATIONS = (
    "AutoContrast", "Equalize", "Invert", "Rotate", "Posterize", "Solarize", "SolarizeAdd", "Color", "Contrast", "Brightness",
    "Sharpness", "ShearX", "ShearY", "TranslateXRel", "TranslateYRel",
)  # fmt: skip
"""In the order in which they are drawn by number."""
_WEIGHTS = (
    # w0: geometry first, no Posterize and Invert
    (0.025, 0.005, 0.0, 0.3, 0.0, 0.005, 0.005, 0.025, 0.005, 0.005, 0.025, 0.2, 0.2, 0.1, 0.1),
)
MAX_MAGNITUDE = 10.0
TRANSLATE = 0.45
"""Largest shift as a share of the side."""
_FILL = 128.0
_ROUNDED = 1e-9
"""Added before truncation, so that a sum of weights a rounding below 1 does not lower a flat area by a level."""


class Operation(NamedTuple):
    """One operation of a plan with its argument in the operation's own unit (degrees, pixels shares, factors, bits)."""

    name: str
    argument: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Policy:
    """What a policy string says."""

    magnitude: float = MAX_MAGNITUDE
    layers: int = 2
    deviation: float = 0.0
    increasing: bool = False
    probability: float = 0.5
    weights: tuple[float, ...] | None = None
    """Of drawing each operation, without repetition; None: evenly, with repetition."""


@functools.lru_cache(maxsize=64)
def parse_policy(text: str) -> Policy:
    """`rand-m7-n4-mstd0.5-inc1` and the like: m magnitude 0..10 (10), n operations (2), mstd deviation (0), inc 0 or 1 (0),
    p probability of each (0.5), w0 weighted choice. Raises ValueError naming the part it does not know."""
    head, *parts = text.split("-")
    require(head == "rand", f"policy {text!r}: must begin with rand, as in rand-m7-n4-mstd0.5-inc1")
    values: dict[str, float] = {}
    for part in parts:
        found = re.fullmatch(r"(mstd|inc|m|n|p|w)(\d+(?:\.\d+)?)", part)
        if found is None or found[1] in values:
            wrong = "there twice" if found else "unknown"
            raise ValueError(
                f"policy {text!r}: {part!r} is {wrong}; parts are mNUMBER, nCOUNT, mstdNUMBER, inc0 or inc1, pNUMBER and w0"
            )
        values[found[1]] = float(found[2])
    layers, weighted = values.get("n", 2.0), values.get("w")
    require(layers.is_integer() and layers >= 1, f"policy {text!r}: n must be a whole number of at least 1")
    require(values.get("inc", 0) in (0, 1), f"policy {text!r}: inc must be 0 or 1")
    require(weighted in (None, 0), f"policy {text!r}: there is one set of weights, w0")
    require(0 <= values.get("m", 10) <= MAX_MAGNITUDE, f"policy {text!r}: m must lie in 0..10")
    require(0 <= values.get("p", 0.5) <= 1, f"policy {text!r}: p must lie in 0..1")
    weights = None if weighted is None else _WEIGHTS[0]
    if weights is not None:
        drawable = sum(w > 0 for w in weights)
        require(layers <= drawable, f"policy {text!r}: w0 has {drawable} operations to draw without repetition")
    return Policy(
        magnitude=values.get("m", MAX_MAGNITUDE), layers=int(layers), deviation=values.get("mstd", 0.0),
        increasing=bool(values.get("inc", 0)), probability=values.get("p", 0.5), weights=weights,
    )  # fmt: skip


def draw_operations(policy: Policy, rng: Any) -> tuple[Operation, ...]:
    """The operations of one view, in order; those that came out as not applied are left out.

    rng: anything with `choice`, `random_sample` and `normal` of `numpy.random.RandomState`.
    """
    drawn = rng.choice(len(OPERATIONS), policy.layers, replace=policy.weights is None, p=policy.weights)
    operations = []
    for number in drawn:
        if policy.probability < 1 and rng.random_sample() > policy.probability:
            continue
        magnitude = rng.normal(policy.magnitude, policy.deviation) if policy.deviation > 0 else policy.magnitude
        level = min(MAX_MAGNITUDE, max(0.0, float(magnitude))) / MAX_MAGNITUDE
        name = OPERATIONS[int(number)]
        operations.append(Operation(name, _argument(name, level, policy.increasing, rng)))
    return tuple(operations)


def _argument(name: str, level: float, increasing: bool, rng: Any) -> float:
    """The argument of an operation for a level in 0..1."""

    def signed(value: float) -> float:
        return -value if rng.random_sample() > 0.5 else value

    if name in ("Color", "Contrast", "Brightness", "Sharpness"):
        return 1.0 + signed(0.9 * level) if increasing else 1.8 * level + 0.1
    if name == "Posterize":
        return float(4 - int(4 * level) if increasing else int(4 * level))
    if name == "Solarize":
        return float(256 - int(256 * level) if increasing else int(256 * level))
    return {
        "Rotate": lambda: signed(30.0 * level),
        "SolarizeAdd": lambda: float(int(110 * level)),
        "ShearX": lambda: signed(0.3 * level),
        "ShearY": lambda: signed(0.3 * level),
        "TranslateXRel": lambda: signed(TRANSLATE * level),
        "TranslateYRel": lambda: signed(TRANSLATE * level),
    }.get(name, lambda: 0.0)()


def randaugment(clips: Tensor, plans: Sequence[Sequence[Operation]]) -> Tensor:
    """Clips with their operations carried out, frames of a clip alike.

    Args:
        clips: uint8 [B, T, H, W, 3], on any device.
        plans: the operations of each clip, in order.
    Returns: a new uint8 tensor of the same shape. Raises ValueError for other dtypes, shapes or counts.
    """
    ok = clips.dtype == torch.uint8 and clips.ndim == 5 and clips.shape[-1] == 3 and len(plans) == len(clips)
    require(ok, f"randaugment: {len(plans)} plans need uint8 [B, T, H, W, 3], got {clips.dtype} {tuple(clips.shape)}")
    out = clips.clone()
    for layer in range(max(map(len, plans), default=0)):
        groups: dict[str, list[int]] = {}
        for row, plan in enumerate(plans):
            if layer < len(plan):
                groups.setdefault(plan[layer].name, []).append(row)
        for name, rows in groups.items():
            arguments = [plans[row][layer].argument for row in rows]
            index = torch.tensor(rows, device=clips.device)
            out[index] = _CARRY_OUT[name](out[index], arguments)
    return out


def _column(values: Sequence[float], x: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.tensor(values, dtype=dtype, device=x.device).view(-1, 1, 1, 1, 1)


def _histogram(x: Tensor) -> Tensor:
    """int64 [B, T, C, 256]: how often each value occurs in each channel of each frame."""
    planes = x.permute(0, 1, 4, 2, 3).flatten(3)
    flat = planes.reshape(-1, planes.shape[-1]).long()
    flat = flat + 256 * torch.arange(len(flat), device=x.device)[:, None]
    return torch.bincount(flat.flatten(), minlength=256 * len(flat)).view(*planes.shape[:3], 256)


def _look_up(x: Tensor, table: Tensor) -> Tensor:
    """x [B, T, H, W, C] through a table [B, T, C, 256] of its own frame and channel."""
    planes = x.permute(0, 1, 4, 2, 3)
    found = table.gather(3, planes.flatten(3).long()).view(planes.shape)
    return found.permute(0, 1, 3, 4, 2).to(torch.uint8)


def _autocontrast(x: Tensor, _: Sequence[float]) -> Tensor:
    low = x.amin((2, 3)).double()[..., None]
    high = x.amax((2, 3)).double()[..., None]
    values = torch.arange(256, device=x.device, dtype=torch.float64)
    scale = torch.full_like(low, 255.0) / (high - low).clamp(min=1)  # 255 / tensor would be rounded twice
    stretched = (values * scale + -low * scale).trunc().clamp(0, 255)
    return _look_up(x, torch.where(high > low, stretched, values))


def _equalize(x: Tensor, _: Sequence[float]) -> Tensor:
    counts = _histogram(x)
    total = counts.sum(-1, keepdim=True)
    last = counts.gather(-1, (x.amax((2, 3)).long())[..., None])
    step = (total - last) // 255
    before = counts.cumsum(-1) - counts
    spread = ((step // 2 + before) // step.clamp(min=1)).clamp(max=255)
    single = (counts > 0).sum(-1, keepdim=True) <= 1
    return _look_up(x, torch.where(single | (step == 0), torch.arange(256, device=x.device), spread))


def _posterize(x: Tensor, bits: Sequence[float]) -> Tensor:
    mask = _column([256 - 2 ** (8 - int(b)) for b in bits], x, torch.int32)
    return (x.int() & mask).to(torch.uint8)


def _solarize(x: Tensor, thresholds: Sequence[float]) -> Tensor:
    return torch.where(x.int() < _column(thresholds, x, torch.int32), x, 255 - x)


def _solarize_add(x: Tensor, added: Sequence[float]) -> Tensor:
    lifted = (x.int() + _column(added, x, torch.int32)).clamp(max=255)
    return torch.where(x < 128, lifted, x.int()).to(torch.uint8)


def _luma(x: Tensor) -> Tensor:
    """Rec. 601 luma of [..., 3], int32 [..., 1], in the 16-bit fixed point of Pillow."""
    r, g, b = x.int().unbind(-1)
    return ((19595 * r + 38470 * g + 7471 * b + 0x8000) >> 16)[..., None]


def _blend(plain: Tensor, x: Tensor, factors: Sequence[float]) -> Tensor:
    """plain + factor * (x - plain) in fp32, truncated to 0..255."""
    base = plain.float()
    change = _column(factors, x, torch.float32) * (x.float() - base)  # two roundings as Pillow has them: no addcmul
    return (base + change).clamp(0, 255).to(torch.uint8)


def _color(x: Tensor, factors: Sequence[float]) -> Tensor:
    return _blend(_luma(x), x, factors)


def _contrast(x: Tensor, factors: Sequence[float]) -> Tensor:
    gray = _luma(x).double().mean((2, 3, 4), keepdim=True)
    return _blend((gray + 0.5).floor(), x, factors)


def _brightness(x: Tensor, factors: Sequence[float]) -> Tensor:
    return _blend(torch.zeros_like(x), x, factors)


def _sharpness(x: Tensor, factors: Sequence[float]) -> Tensor:
    smooth = x.clone()
    if min(x.shape[2:4]) >= 3:
        rows = x.int()
        lines = rows[:, :, :-2] + rows[:, :, 1:-1] + rows[:, :, 2:]
        total = lines[..., :-2, :] + lines[..., 1:-1, :] + lines[..., 2:, :] + 4 * rows[:, :, 1:-1, 1:-1]
        smooth[:, :, 1:-1, 1:-1] = ((2 * total + 13) // 26).to(torch.uint8)
    return _blend(smooth, x, factors)


def _affine(x: Tensor, matrix: tuple[float, ...]) -> Tensor:
    """One clip [T, H, W, C] by x' = a x + b y + c, y' = d x + e y + f of pixel centres; bicubic; 128 outside."""
    a, b, c, d, e, f = matrix
    frames, height, width, channels = x.shape
    ys = (torch.arange(height, dtype=torch.float64, device=x.device) + 0.5)[:, None]
    xs = (torch.arange(width, dtype=torch.float64, device=x.device) + 0.5)[None]
    u, v = (a * xs + b * ys + c).flatten(), (d * xs + e * ys + f).flatten()
    inside = (u >= 0) & (u < width) & (v >= 0) & (v < height)
    u, v = u - 0.5, v - 0.5
    column, row = u.floor(), v.floor()
    # along an axis that stays as it is the filter is the pixel itself
    across = _cubic_taps(u - column) if (a, b, c) != (1, 0, 0) else [(0, torch.ones_like(u))]
    down = _cubic_taps(v - row) if (d, e, f) != (0, 1, 0) else [(0, torch.ones_like(v))]
    column, row = column.long(), row.long()
    taps = [(j, i, q * p) for j, q in down for i, p in across]
    index = torch.stack([(row + j).clamp(0, height - 1) * width + (column + i).clamp(0, width - 1) for j, i, _ in taps], 1)
    weight = torch.stack([w for _, _, w in taps], 1)
    pixels = x.permute(1, 2, 0, 3).reshape(height * width, frames * channels).double()
    # a weighted gather in one pass: an embedding bag whose bags are the taps of a pixel
    value = F.embedding_bag(index, pixels, mode="sum", per_sample_weights=weight)
    value = (value + _ROUNDED).clamp(0, 255)
    value = torch.where(inside[:, None], value, _FILL).to(torch.uint8)
    return value.view(height, width, frames, channels).permute(2, 0, 1, 3)


def _cubic_taps(d: Tensor) -> list[tuple[int, Tensor]]:
    """Offsets and weights of cubic convolution with a = -1, d in [0, 1) behind the pixel of offset 0."""
    square, cube = d * d, d * d * d
    return [(-1, 2 * square - cube - d), (0, 1 - 2 * square + cube), (1, d + square - cube), (2, cube - square)]


def _rotation(degrees: float, width: int, height: int) -> tuple[float, ...]:
    angle = -math.radians(degrees % 360.0)
    cos, sin = round(math.cos(angle), 15), round(math.sin(angle), 15)
    x, y = width / 2.0, height / 2.0
    return cos, sin, cos * -x + sin * -y + x, -sin, cos, -sin * -x + cos * -y + y


def _geometric(matrix: Callable[[float, int, int], tuple[float, ...]]) -> Callable[[Tensor, Sequence[float]], Tensor]:
    def carry_out(x: Tensor, arguments: Sequence[float]) -> Tensor:
        height, width = x.shape[2:4]
        return torch.stack([_affine(clip, matrix(a, width, height)) for clip, a in zip(x, arguments, strict=True)])

    return carry_out


_CARRY_OUT: dict[str, Callable[[Tensor, Sequence[float]], Tensor]] = {
    "AutoContrast": _autocontrast,
    "Equalize": _equalize,
    "Invert": lambda x, _: 255 - x,
    "Rotate": _geometric(_rotation),
    "Posterize": _posterize,
    "Solarize": _solarize,
    "SolarizeAdd": _solarize_add,
    "Color": _color,
    "Contrast": _contrast,
    "Brightness": _brightness,
    "Sharpness": _sharpness,
    "ShearX": _geometric(lambda s, w, h: (1.0, s, 0.0, 0.0, 1.0, 0.0)),
    "ShearY": _geometric(lambda s, w, h: (1.0, 0.0, 0.0, s, 1.0, 0.0)),
    "TranslateXRel": _geometric(lambda s, w, h: (1.0, 0.0, s * w, 0.0, 1.0, 0.0)),
    "TranslateYRel": _geometric(lambda s, w, h: (1.0, 0.0, 0.0, 0.0, 1.0, s * h)),
}
