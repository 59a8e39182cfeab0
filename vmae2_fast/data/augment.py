"""Random erasing of clips, and mixing clips with each other: drawn as plans, carried out as batched torch ops.

Erasing (official: probability 0.25, mode "pixel"): one rectangle for all frames of a view, filled with normal noise that is
new for every frame and pixel. Clips are uint8, so noise is clipped to what a pixel can show.

Mixing (official: mixup 0.8, cutmix 1.0, switched with probability 1/2): clip i of a group of consecutive clips is mixed
with the group's clip n-1-i, as in timm's batch mode, all rows of a group in the same way. Groups are a fixed number of
clips and their draws a function of (seed, position), so a clip is mixed with the same partner in the same way whatever the
micro-batch and the number of devices.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..config import AugmentConfig, MixConfig, require
from ..ops.patches import IMAGENET_MEAN, IMAGENET_STD
from .sampling import Purpose, counter_rng

OFFICIAL = AugmentConfig(randaugment="rand-m7-n4-mstd0.5-inc1", erase=0.25)
PAPER = AugmentConfig(randaugment="rand-m0-n4-mstd0.5-inc1", erase=0.25)
"""The paper's table of fine-tuning settings prints RandAug (0, 0.5), magnitude and deviation, where the scripts have 7; number
of operations and erasing, which it does not print, are the scripts'."""
OFFICIAL_MIX = MixConfig(mixup=0.8, cutmix=1.0)
"""Of every released fine-tuning script."""
ERASED_AREA = (0.02, 1 / 3)
"""Of a frame; log-uniform aspect between 0.3 and its inverse."""
_ERASED_ASPECT = 0.3


class Erasure(NamedTuple):
    """Noise in [top:top+height, left:left+width] of every frame of a view."""

    top: int
    left: int
    height: int
    width: int
    key: int
    """Of the noise."""


def draw_erasure(probability: float, size: int, rng: Any) -> Erasure | None:
    """A rectangle within size x size frames, drawn up to 10 times until it fits; None where nothing is erased.

    rng: anything with `random_sample`, `uniform` and `randint` of `numpy.random.RandomState`.
    """
    if rng.random_sample() >= probability:
        return None
    for _ in range(10):
        area = rng.uniform(*ERASED_AREA) * size * size
        aspect = math.exp(rng.uniform(math.log(_ERASED_ASPECT), -math.log(_ERASED_ASPECT)))
        height, width = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < height < size and 0 < width < size:
            top, left = int(rng.randint(size - height + 1)), int(rng.randint(size - width + 1))
            return Erasure(top, left, height, width, int(rng.randint(1 << 31)))
    return None


def erase_(clips: Tensor, plans: Sequence[Erasure | None]) -> None:
    """Fill the rectangle of each clip with its noise, in place.

    clips: uint8 [B, T, H, W, 3], on any device: the noise has the same bits on all. Raises ValueError for another form.
    """
    ok = clips.dtype == torch.uint8 and clips.ndim == 5 and clips.shape[-1] == 3 and len(plans) == len(clips)
    require(ok, f"erase_: {len(plans)} plans need uint8 [B, T, H, W, 3], got {clips.dtype} {tuple(clips.shape)}")
    for clip, plan in zip(clips, plans, strict=True):
        if plan is not None:
            patch = clip[:, plan.top : plan.top + plan.height, plan.left : plan.left + plan.width]
            patch.copy_(pixel_noise(plan.key, tuple(patch.shape), clip.device))


def pixel_noise(key: int, shape: tuple[int, ...], device: torch.device) -> Tensor:
    """uint8 [..., 3]: pixels whose normalised values are N(0, 1), clipped to 0..255; a pure function of the key.

    The i-th value is a 16-bit hash of (key, i) looked up in the normal's quantiles, which is the same on every device.
    """
    index = torch.arange(math.prod(shape), device=device).view(shape)
    state = index + ((key * 0x9E3779B9) & 0x7FFFFFFFFFFF)
    for multiplier in (0x45D9F3B, 0x119DE1F3):  # xor-shift and multiply, within 32 bits so that no shift sees a sign
        state = ((state ^ (state >> 16)) & 0xFFFFFFFF) * multiplier
    channel = torch.arange(3, device=device)
    return _quantiles(device)[channel, ((state ^ (state >> 16)) >> 8) & 0xFFFF]


@functools.lru_cache(maxsize=8)
def _quantiles(device: torch.device) -> Tensor:
    """Pixel value of every 16-bit quantile of N(0, 1): uint8 [3, 65536]."""
    normal = torch.special.ndtri((torch.arange(1 << 16, dtype=torch.float64) + 0.5) / (1 << 16))
    mean, std = (torch.tensor(v, dtype=torch.float64)[:, None] for v in (IMAGENET_MEAN, IMAGENET_STD))
    return (255 * (normal * std + mean)).round().clamp(0, 255).to(torch.uint8).to(device)


class Mix(NamedTuple):
    """How the clips of one group are mixed with their partners."""

    share: float
    """Of a clip itself; 1 - share is its partner's."""
    box: tuple[int, int, int, int] | None
    """cutmix: (top, left, height, width) that comes from the partner in every frame; None: mixup, a weighted sum."""


def draw_mix(mix: MixConfig, size: int, rng: Any) -> Mix:
    """The mix of one group of clips of size x size pixels.

    rng: anything with `random_sample`, `beta` and `randint` of `numpy.random.RandomState`.
    """
    if rng.random_sample() >= mix.probability:
        return Mix(1.0, None)
    cut = mix.cutmix > 0 and (mix.mixup == 0 or rng.random_sample() < mix.switch_probability)
    alpha = mix.cutmix if cut else mix.mixup
    share = float(rng.beta(alpha, alpha))
    if not cut:
        return Mix(share, None)
    side = int(size * math.sqrt(1 - share))
    y, x = int(rng.randint(size)), int(rng.randint(size))
    top, bottom = max(y - side // 2, 0), min(y + side // 2, size)
    left, right = max(x - side // 2, 0), min(x + side // 2, size)
    box = (top, left, bottom - top, right - left)
    return Mix(1 - box[2] * box[3] / (size * size), box)


class BatchMix(NamedTuple):
    """The mixes of a batch, one for each group of rows in turn; without groups nothing is mixed."""

    rows: int
    """Of a group."""
    groups: tuple[Mix, ...]


def plan_mix(mix: MixConfig, position: Tensor, size: int, seed: int) -> BatchMix:
    """The mixes of a batch of clips of size x size pixels.

    position: int64 [B] on the host, each clip's views next to each other, ascending. Raises ValueError where it cuts a group
    of `mix.clips` positions.
    """
    if not mix.enabled or not len(position):
        return BatchMix(1, ())
    places = position.unique().tolist()
    starts = places[:: mix.clips]
    whole = [start + k for start in starts for k in range(mix.clips)]
    require(
        places == whole and all(start % mix.clips == 0 for start in starts),
        f"mix.clips={mix.clips}: a batch must hold whole groups of that many clips; make the micro-batch a multiple of it",
    )
    drawn = tuple(draw_mix(mix, size, counter_rng(seed, 0, start, 0, Purpose.MIX)) for start in starts)
    return BatchMix(len(position) // len(drawn), drawn)


def mix_clips(clips: Tensor, plan: BatchMix) -> Tensor:
    """Clips uint8 [B, T, H, W, C], on any device, mixed; sums are rounded to whole levels."""
    if not plan.groups:
        return clips
    out = clips.clone()
    for mix, own, mixed in zip(plan.groups, clips.split(plan.rows), out.split(plan.rows), strict=True):
        partners = own.flip(0)
        if mix.box is not None:
            top, left, height, width = mix.box
            window = (slice(None), slice(None), slice(top, top + height), slice(left, left + width))
            mixed[window] = partners[window]
        elif mix.share < 1:
            mixed.copy_((mix.share * own.float() + (1 - mix.share) * partners.float()).round_())
    return out


def mix_targets(target: Tensor, plan: BatchMix) -> Tensor:
    """Targets fp32 [B, classes] mixed by the shares of their clips."""
    if not plan.groups:
        return target
    share = torch.tensor([mix.share for mix in plan.groups], dtype=target.dtype, device=target.device)
    share, own = share[:, None, None], target.unflatten(0, (-1, plan.rows))
    return (share * own + (1 - share) * own.flip(1)).flatten(0, 1)


def smooth_targets(label: Tensor, classes: int, smoothing: float) -> Tensor:
    """One-hot targets with `smoothing` spread evenly over all classes: fp32 [B, classes] of int64 [B]."""
    return F.one_hot(label, classes).float() * (1 - smoothing) + smoothing / classes
