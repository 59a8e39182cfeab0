"""The fused ops beside their honest alternatives, on sizes of ViT-B and ViT-g that a CPU does in milliseconds.

`make bench` runs this file and prints the ratios. Variants: `ours` (the backend that runs by default), `plain` (the official
way: the whole clip in fp32, boolean masks, materialised attention), `strong` (index-first eager torch, SDPA) and
`compiled` (the same through torch.compile, where there is a C++ compiler). Before a variant is timed its result is
compared with ours: a fast wrong answer is no alternative.
"""

from __future__ import annotations

import functools
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from vmae2_fast.benchmarks import baselines
from vmae2_fast.benchmarks.steps import hidden_mask
from vmae2_fast.config import ModelConfig
from vmae2_fast.models import resolve
from vmae2_fast.ops.attention import attention
from vmae2_fast.ops.masks import dual_mask, mask_sizes, masks_from_rng
from vmae2_fast.ops.patches import gather_patches
from vmae2_fast.ops.reconstruction import reconstruction_loss

SIZES = {"base": ("pretrain_videomae_base_patch16_224", 4), "giant": ("pretrain_videomae_giant_patch14_224", 2)}  # clips
CAN_COMPILE = any(map(shutil.which, ("c++", "g++", "clang++")))
VARIANTS = {
    "gather_patches": ("ours", "plain", "strong", "compiled"),
    "embed": ("ours", "plain", "strong"),
    "reconstruction_loss": ("ours", "plain", "strong", "compiled"),
    "dual_mask": ("ours", "plain", "strong"),
    "encoder_attention": ("ours", "plain", "strong"),
    "decoder_attention": ("ours", "plain", "strong"),
}
CASES = [
    pytest.param(op, size, variant, id=f"{op}-{size}-{variant}")
    for op, variants in VARIANTS.items() for size in SIZES for variant in variants
    if variant != "compiled" or CAN_COMPILE
]


@dataclass
class Case:
    """One op at one size. `bytes`: every input read once, every output written once; `flops`: of the products."""

    calls: dict[str, Callable[[], Any]]
    bytes: int
    flops: int
    shapes: dict[str, Any]
    exact: bool = True
    """False: random results, which only agree in shape."""
    arrange: Callable[[Any], Any] = lambda result: result
    """Brings an index-first result into the order of ours, to be compared."""


class Inputs:
    """A batch of random uint8 clips with its masks, and what the official way would hold of it."""

    def __init__(self, size: str) -> None:
        name, self.batch = SIZES[size]
        self.spec = spec = resolve(ModelConfig(name=name))
        generator = torch.Generator().manual_seed(0)
        shape = (self.batch, spec.frames, spec.size, spec.size, spec.channels)
        self.clip = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
        self.mask = dual_mask(torch.arange(self.batch), torch.zeros(self.batch, dtype=torch.int64), grid=spec.grid, seed=0)
        self.hidden, self.left_out = (hidden_mask(index, spec.tokens) for index in self.mask[:2])
        self.colour = torch.tensor(baselines.MEAN), torch.tensor(baselines.STD)
        self.cube: dict[str, Any] = {"patch": spec.patch, "tubelet": spec.tubelet}
        with torch.device("meta"):
            self.strong = baselines.Strong(ModelConfig(name=name, depth=1, decoder_depth=1))  # for its `patches`
        weight = torch.randn(spec.encoder.width, spec.patch_values, generator=generator) / spec.patch_values**0.5
        self.weight = weight.requires_grad_()

    def video(self) -> Tensor:
        """The fp32 normalised clip [B, C, T, H, W] a loader of the official code delivers."""
        mean, std = self.colour
        return ((self.clip / 255 - mean) / std).permute(0, 4, 1, 2, 3).contiguous()

    def rows(self, index: Tensor) -> Tensor:
        """Normalised rows of some patches, index-first, in pixel order: [B, K, tubelet * p * p * C]."""
        mean, std = self.colour
        return ((self.strong.patches(self.clip, index) - mean) / std).flatten(2)


@functools.cache
def inputs(size: str) -> Inputs:
    return Inputs(size)


def gather_case(size: str) -> Case:
    x = inputs(size)
    spec, index = x.spec, x.mask.visible_index
    t, h, w = spec.grid

    def plain() -> Tensor:
        tiles = x.video().view(x.batch, 3, t, spec.tubelet, h, spec.patch, w, spec.patch).permute(0, 2, 4, 6, 1, 3, 5, 7)
        return tiles.reshape(x.batch, spec.tokens, -1)[~x.hidden].view(x.batch, -1, spec.patch_values)

    compiled = torch.compile(x.rows, dynamic=False)
    calls = {
        "ours": lambda: gather_patches(x.clip, index, **x.cube), "plain": plain,
        "strong": lambda: x.rows(index), "compiled": lambda: compiled(index),
    }

    def arrange(rows: Tensor) -> Tensor:
        return rows.view(*index.shape, -1, spec.channels).transpose(2, 3).flatten(2)

    shapes = {"clip": [*x.clip.shape], "index": [*index.shape]}
    return Case(calls, index.numel() * (spec.patch_values * (1 + 4) + 4), 0, shapes, arrange=arrange)


def embed_case(size: str) -> Case:
    """Clip to embedded visible tokens: the gather and the one product behind it (Conv3d of everything in plain)."""
    x = inputs(size)
    spec, index, width = x.spec, x.mask.visible_index, x.spec.encoder.width
    kernel = (spec.tubelet, spec.patch, spec.patch)
    weight = x.weight.detach().view(width, spec.channels, *kernel)

    def plain() -> Tensor:
        tokens = F.conv3d(x.video(), weight, stride=kernel).flatten(2).transpose(1, 2)
        return tokens[~x.hidden].view(x.batch, -1, width)

    calls = {
        "ours": lambda: F.linear(gather_patches(x.clip, index, **x.cube), weight.flatten(1)), "plain": plain,
        "strong": lambda: F.linear(x.rows(index), weight.permute(0, 2, 3, 4, 1).flatten(1)),
    }
    moved = index.numel() * (spec.patch_values + 4 * width) + 4 * weight.numel()
    shapes = {"clip": [*x.clip.shape], "index": [*index.shape], "width": width}
    return Case(calls, moved, 2 * index.numel() * weight.numel(), shapes)


def loss_case(size: str) -> Case:
    """Forward and backward. `pred` of the loss tokens; plain builds the targets of all tokens from the fp32 clip."""
    x = inputs(size)
    spec, index = x.spec, x.mask.loss_index
    pred = torch.randn(*index.shape, spec.patch_values, generator=torch.Generator().manual_seed(1)).requires_grad_()
    video, t, (_, h, w) = x.video(), spec.grid[0], spec.grid  # the loader's work, not the loss's
    counted = x.hidden & ~x.left_out

    def both(loss: Any) -> tuple[Tensor, Tensor]:
        return loss.detach(), torch.autograd.grad(loss, pred)[0]

    def plain() -> tuple[Tensor, Tensor]:
        mean, std = (value.view(1, 3, 1, 1, 1) for value in x.colour)
        pixels = (video * std + mean).view(x.batch, 3, t, spec.tubelet, h, spec.patch, w, spec.patch)
        target = pixels.permute(0, 2, 4, 6, 3, 5, 7, 1).reshape(x.batch, spec.tokens, -1, 3)
        target = (target - target.mean(-2, keepdim=True)) / (target.var(-2, keepdim=True).sqrt() + 1e-6)
        return both((pred.flatten(0, 1) - target.flatten(2)[counted]).pow(2).mean(-1).mean())

    def index_first() -> Tensor:
        target = x.strong.patches(x.clip, index).flatten(2, 4)
        target = (target - target.mean(-2, keepdim=True)) / (target.var(-2, keepdim=True).sqrt() + 1e-6)
        return (pred - target.flatten(2)).pow(2).mean(-1).mean()

    compiled = torch.compile(index_first, dynamic=False)
    calls = {
        "ours": lambda: both(reconstruction_loss(pred, x.clip, index, **x.cube)), "plain": plain,
        "strong": lambda: both(index_first()), "compiled": lambda: both(compiled()),
    }
    shapes = {"clip": [*x.clip.shape], "pred": [*pred.shape]}
    return Case(calls, index.numel() * (spec.patch_values * (1 + 4 + 4) + 4), 0, shapes)


def mask_case(size: str) -> Case:
    """Index lists of 32 clips. Plain draws the official bool masks in numpy (no lists), strong sorts random numbers."""
    grid, batch = inputs(size).spec.grid, 32
    position, view = torch.arange(batch), torch.zeros(batch, dtype=torch.int64)
    rng, (visible, decoded, counted) = np.random.RandomState(0), mask_sizes(grid)
    t, h, w = grid
    time, y, x = (axis.flatten() for axis in torch.meshgrid(*map(torch.arange, grid), indexing="ij"))
    cell = (2 * (y % 2) + x % 2 + 1 + time) % 4
    phases = torch.stack([((cell + phase) % 4 >= 2).nonzero()[:, 0] for phase in range(4)])

    def strong() -> tuple[Tensor, ...]:
        sites = torch.rand(batch, h * w).argsort(1)[:, : visible // t].sort(1).values
        visible_index = (sites[:, None] + (torch.arange(t) * (h * w))[:, None]).flatten(1)
        decode_index = phases[torch.randint(4, (batch,))]
        seen = torch.zeros(batch, t * h * w, dtype=torch.bool).scatter_(1, visible_index, True)
        slot = seen.gather(1, decode_index).to(torch.int8).argsort(dim=1, stable=True)[:, :counted]
        return visible_index.int(), decode_index.int(), decode_index.gather(1, slot).int(), slot.int()

    calls = {
        "ours": lambda: tuple(dual_mask(position, view, grid=grid, seed=0)), "strong": strong,
        "plain": lambda: masks_from_rng(rng, batch, grid=grid),
    }
    return Case(calls, 4 * batch * (visible + decoded + 2 * counted), 0, {"grid": list(grid), "batch": batch}, exact=False)


def attention_case(size: str, part: str) -> Case:
    """Forward and backward on packed fp32 qkv; a backward has five products where the forward has two."""
    spec = inputs(size).spec
    sizes = mask_sizes(spec.grid)
    stack, tokens = (spec.encoder, sizes[0]) if part == "encoder" else (spec.decoder, sizes[0] + sizes[1])
    assert stack is not None
    shape = (1, tokens, 3, stack.heads, stack.width // stack.heads)
    qkv = torch.randn(shape, generator=torch.Generator().manual_seed(2)).requires_grad_()
    grad = torch.randn(1, tokens, *shape[3:], generator=torch.Generator().manual_seed(3))

    def both(out: Tensor) -> tuple[Tensor, Tensor]:
        return out.detach(), torch.autograd.grad(out, qkv, grad)[0]

    def plain() -> Tensor:
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        return ((q * shape[-1] ** -0.5 @ k.transpose(-2, -1)).softmax(-1) @ v).transpose(1, 2)

    def strong() -> Tensor:
        return F.scaled_dot_product_attention(*qkv.permute(2, 0, 3, 1, 4)).transpose(1, 2)

    calls = {"ours": lambda: both(attention(qkv)), "plain": lambda: both(plain()), "strong": lambda: both(strong())}
    return Case(calls, 4 * (2 * qkv.numel() + 2 * grad.numel()), 7 * 2 * stack.width * tokens**2, {"qkv": list(shape)})


MAKERS: dict[str, Callable[[str], Case]] = {
    "gather_patches": gather_case,
    "embed": embed_case,
    "reconstruction_loss": loss_case,
    "dual_mask": mask_case,
    "encoder_attention": functools.partial(attention_case, part="encoder"),
    "decoder_attention": functools.partial(attention_case, part="decoder"),
}


@functools.cache
def case(op: str, size: str) -> Case:
    return MAKERS[op](size)


@pytest.mark.parametrize(("op", "size", "variant"), CASES)
def test_op(op: str, size: str, variant: str, measure: Callable[..., None], benchmark: Any) -> None:
    it = case(op, size)
    ours, call = it.calls["ours"], it.calls[variant]
    want, got = ours(), call()
    if variant in ("strong", "compiled"):
        got = it.arrange(got)
    if it.exact:
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    elif variant == "strong":
        assert [g.shape for g in got] == [w.shape for w in want]
    benchmark.group = f"{op} {size}"
    measure(call, ours, rounds=5, op=op, size=size, variant=variant, bytes=it.bytes, flops=it.flops, shapes=it.shapes)
