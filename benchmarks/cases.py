"""The ops beside their honest alternatives: what is computed, on which inputs, and how few bytes it takes.

One function a case. `make bench` (`test_ops.py`), `vmae2 bench ops` and `make gpu-check` measure the same cases:

- ours, once for every backend that can run there,
- plain, the official way (`plain.py`),
- strong, index-first torch (`strong.py`) in several forms, eager and through torch.compile; the fastest counts.

Before anything is timed `Bench.check` compares every result with ours: a fast wrong answer is no alternative.
"""

from __future__ import annotations

import functools
import importlib.util
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from vmae2_fast import backend
from vmae2_fast.config import ModelConfig
from vmae2_fast.models.positions import PositionTable
from vmae2_fast.models.sizes import StackSpec, resolve
from vmae2_fast.models.vit import Block, PatchEmbed
from vmae2_fast.ops.attention import attention as our_attention
from vmae2_fast.ops.decoder_tokens import decoder_tokens as our_decoder_tokens
from vmae2_fast.ops.masks import dual_mask as our_dual_mask
from vmae2_fast.ops.masks import mask_sizes, masks_from_rng
from vmae2_fast.ops.nms import nms_1d as our_nms_1d
from vmae2_fast.ops.norm import residual_norm as our_residual_norm
from vmae2_fast.ops.optim import adamw as our_adamw
from vmae2_fast.ops.patches import gather_patches as our_gather_patches
from vmae2_fast.ops.patches import scatter_patches as our_scatter_patches
from vmae2_fast.ops.reconstruction import reconstruction_loss as our_reconstruction_loss
from vmae2_fast.ops.resize import Window
from vmae2_fast.ops.resize import resize_crop as our_resize_crop
from vmae2_fast.ops.roi_align import roi_align_max as our_roi_align_max

from . import baselines, plain, strong

MODELS = {
    "vit_s": ModelConfig(name="pretrain_videomae_small_patch16_224"),
    "vit_b": ModelConfig(name="pretrain_videomae_base_patch16_224"),
    "vit_l": ModelConfig(name="pretrain_videomae_large_patch16_224"),
    "vit_h": ModelConfig(name="pretrain_videomae_huge_patch16_224"),
    "vit_g": ModelConfig(name="pretrain_videomae_giant_patch14_224"),
    "toy": ModelConfig(name="pretrain_videomae_small_patch16_224", frames=8, size=64, width=32, depth=1, heads=2,
                       decoder_width=32, decoder_depth=1, decoder_heads=2),
}  # fmt: skip
CPU_BATCH = {"vit_s": 4, "vit_b": 4, "vit_l": 4, "vit_h": 4, "vit_g": 2, "toy": 2}  # clips
GPU_BATCH = {"vit_s": 64, "vit_b": 64, "vit_l": 64, "vit_h": 64, "vit_g": 32, "toy": 2}
BOXES = 6  # people of a clip, of `roi_align_max`
RESIZE_FRAMES = 4  # of each clip, of `resize_crop`
MASKS = 1024  # samples of `dual_mask`: what a loader draws for a global batch
SEGMENTS, KEPT = 2000, 200  # of `nms_1d`: candidates of a level of a temporal detector, and what is left of a video

Call = Callable[["Batch"], Any]


def code_generator(device: torch.device) -> str | None:
    """The torch.compile backend to compare with: None on a CPU without a C++ compiler, where Inductor cannot run."""
    return "inductor" if device.type != "cpu" or any(map(shutil.which, ("c++", "g++", "clang++"))) else None


def backends(op: str, device: torch.device) -> list[str]:
    """Our implementations to measure, first the one that runs by default or by request. On a CPU not those that only an
    interpreter or an emulator runs there: they exist for tests. Raises BackendError for a request nothing can serve."""
    first, names = backend.pick(op, device), backend.available(op, device)
    slow = ("triton", "emulated") if device.type == "cpu" else ()
    return [first, *(name for name in names if name != first and name not in slow)]


class Batch:
    """Random uint8 clips with their masks, what the official way would hold of them, and parameters to go with them.

    Everything is made when first asked for. Batches of another `number` hold other values in other memory.
    """

    def __init__(self, size: str, clips: int, device: torch.device, dtype: torch.dtype, number: int = 0) -> None:
        self.spec = resolve(MODELS[size])
        self.clips, self.device, self.dtype = clips, device, dtype
        self.generator = torch.Generator(device).manual_seed(number)
        self.position = torch.arange(number * clips, (number + 1) * clips, device=device)
        self.view = torch.zeros_like(self.position)
        self.mask = our_dual_mask(self.position, self.view, grid=self.spec.grid, seed=0)
        self.cube: dict[str, Any] = {"patch": self.spec.patch, "tubelet": self.spec.tubelet}
        self.colour = strong.row_colour(self.spec, baselines.MEAN, baselines.STD, device)

    def random(self, *shape: int, scale: float = 1.0) -> Tensor:
        """Normal values in the dtype of the measurement, a leaf that takes gradients."""
        drawn = torch.randn(shape, generator=self.generator, device=self.device) * scale
        return drawn.to(self.dtype).requires_grad_()

    @functools.cached_property
    def clip(self) -> Tensor:
        spec = self.spec
        shape = (self.clips, spec.frames, spec.size, spec.size, spec.channels)
        return torch.randint(0, 256, shape, dtype=torch.uint8, device=self.device, generator=self.generator)

    @functools.cached_property
    def decoded(self) -> tuple[list[Tensor], list[list[Window]]]:
        """Frames of two sizes as decoders give them, uint8 [T, H, W, C], and a multi-scale crop of each clip. Few frames: the
        reference counts in whole numbers and takes its time."""
        spec = self.spec
        short, long = spec.size * 8 // 7, spec.size * 8 // 7 * 4 // 3
        sizes = [(short, long) if i % 2 == 0 else (long, short) for i in range(self.clips)]
        frames = [
            torch.randint(0, 256, (RESIZE_FRAMES, *hw, spec.channels), dtype=torch.uint8, device=self.device,
                          generator=self.generator)
            for hw in sizes
        ]  # fmt: skip
        sides = short, short * 3 // 4
        windows = [[Window(0, 0, sides[i % 2], sides[i % 2], flip=i % 2 == 1)] for i in range(self.clips)]
        return frames, windows

    @functools.cached_property
    def video(self) -> Tensor:
        """The fp32 normalised clip [B, C, T, H, W] a loader of the official code delivers."""
        return plain.normalised(self.clip, baselines.MEAN, baselines.STD)

    @functools.cached_property
    def hidden(self) -> Tensor:
        return hidden_mask(self.mask.visible_index, self.spec.tokens)

    @functools.cached_property
    def left_out(self) -> Tensor:
        return hidden_mask(self.mask.decode_index, self.spec.tokens)

    @functools.cached_property
    def rows(self) -> Tensor:
        return self.random(*self.mask.visible_index.shape, self.spec.patch_values)

    @functools.cached_property
    def pred(self) -> Tensor:
        return self.random(*self.mask.loss_index.shape, self.spec.patch_values)

    @functools.cached_property
    def embedding(self) -> tuple[PatchEmbed, PositionTable]:
        """The encoder's first layer and its positions; parameters are fp32, as in training."""
        width = self.spec.encoder.width
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            embed = PatchEmbed(self.spec, None, None)
            nn.init.normal_(embed.proj.weight, std=self.spec.patch_values**-0.5)
            nn.init.normal_(embed.proj.bias)  # type: ignore[arg-type]
        return embed.to(self.device), PositionTable(self.spec, width).to(self.device)

    @functools.cached_property
    def decoder(self) -> tuple[Tensor, Tensor, Tensor]:
        """Projected tokens, the mask token (fp32, a parameter) and the decoder's table [1, N, width]."""
        assert self.spec.decoder is not None
        width = self.spec.decoder.width
        token = self.random(1, 1, width).detach().float().requires_grad_()
        table = baselines.sinusoid(self.spec.tokens, width).to(self.device)
        return self.random(*self.mask.visible_index.shape, width), token, table

    @functools.cached_property
    def stream(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Residual stream and branch [B, V, width] of the encoder, weight and bias of its norm (fp32 parameters)."""
        shape = (*self.mask.visible_index.shape, self.spec.encoder.width)
        norm = (torch.ones(shape[2:], device=self.device), torch.zeros(shape[2:], device=self.device))
        return self.random(*shape), self.random(*shape), norm[0].requires_grad_(), norm[1].requires_grad_()

    @functools.cached_property
    def parameters(self) -> list[list[Any]]:
        """Parameters with gradients, both moments and step counts of four blocks of the encoder, all fp32."""
        spec = self.spec.encoder
        block = Block(spec.width, spec.heads, spec.mlp_hidden).to(self.device)
        params = [nn.Parameter(p.detach().clone()) for _ in range(4) for p in block.parameters()]
        for p in params:
            p.grad = torch.randn(p.shape, generator=self.generator, device=self.device)
        zeros = [[torch.zeros_like(p) for p in params] for _ in range(2)]
        return [params, *zeros, [torch.zeros((), device=self.device) for _ in params]]

    @functools.cached_property
    def people(self) -> tuple[Tensor, Tensor]:
        """Features [B, h, w, width] of 256 x 448 clips, averaged over time, and boxes [n, 5] of all sizes."""
        patch = self.spec.patch
        h, w = -(-256 // patch), -(-448 // patch)
        count = self.clips * BOXES
        draws = torch.rand(4, count, generator=self.generator, device=self.device)
        height, width = 25 + 225 * draws[0], 20 + 160 * draws[1]
        x, y = draws[2] * (448 - width), draws[3] * (256 - height)
        clip = torch.arange(count, device=self.device) // BOXES
        return self.random(self.clips, h, w, self.spec.encoder.width), torch.stack([clip, x, y, x + width, y + height], 1)

    @functools.cached_property
    def segments(self) -> tuple[Tensor, Tensor]:
        """Segments [N, 2] that crowd together, and their scores [N]."""
        draws = torch.rand(3, SEGMENTS, generator=self.generator, device=self.device)
        start, length = 900 * draws[0], 10 + 40 * draws[1]
        return torch.stack((start, start + length), dim=1), draws[2]

    def _qkv(self, stack: StackSpec | None, tokens: int, share: int = 1) -> Tensor:
        assert stack is not None
        clips = 1 if self.device.type == "cpu" else max(1, self.clips // share)  # attention of one clip keeps a CPU busy
        return self.random(clips, tokens, 3, stack.heads, stack.width // stack.heads)

    @functools.cached_property
    def encoder_qkv(self) -> Tensor:
        """Packed qkv [B, N, 3, H, D] of the encoder's attention, on visible tokens."""
        return self._qkv(self.spec.encoder, mask_sizes(self.spec.grid)[0])

    @functools.cached_property
    def decoder_qkv(self) -> Tensor:
        """The same of the decoder's, on visible and decoded tokens."""
        return self._qkv(self.spec.decoder, sum(mask_sizes(self.spec.grid)[:2]))

    @functools.cached_property
    def full_qkv(self) -> Tensor:
        """The same of the encoder's on all tokens, as in fine-tuning. Fewer clips: plain keeps the scores of all pairs."""
        return self._qkv(self.spec.encoder, self.spec.tokens, share=8)


def hidden_mask(index: Tensor, tokens: int) -> Tensor:
    """Bool [B, tokens], True where `index` [B, K] does not point."""
    return torch.ones(index.shape[0], tokens, dtype=torch.bool, device=index.device).scatter_(1, index.long(), False)


@dataclass
class Case:
    """One op on the inputs of a batch. Calls take the batch, so that several batches can take turns."""

    ours: Call
    plain: Call
    strong: dict[str, Call]
    """Forms of the strong alternative by name: what torch.compile makes of one begins with `compiled`."""
    bytes: int
    """Every input that must be read once and every output once; `backward_bytes` come on top."""
    shapes: dict[str, Any]
    flops: int = 0
    """Of the matrix products only; `backward_flops` come on top."""
    gradient: Callable[[Batch], tuple[Tensor, ...]] = lambda batch: ()
    """Leaves whose gradients are measured in direction "forward_backward"."""
    backward_bytes: int = 0
    backward_flops: int = 0
    levels: int = 0
    """By how much whole-numbered results of the alternatives may differ: uint8 pixels rounded another way."""
    random: bool = False
    """Alternatives draw other numbers: strong agrees in shapes, plain not even in those."""
    arrange: Callable[[Any], Any] = lambda result: result
    """Brings strong's result into the order of ours, to be compared."""


def each(forms: dict[str, Any], call: Callable[[Any, Batch], Any]) -> dict[str, Call]:
    """Forms of one function, each called with what it takes from the batch."""
    return {name: functools.partial(call, form) for name, form in forms.items()}


@dataclass(frozen=True)
class Entry:
    make: Callable[[Batch, Callable[[Callable], Callable]], Case]
    op: str
    """Whose backends are measured (`vmae2_fast.backend`)."""
    directions: tuple[str, ...]


CASES: dict[str, Entry] = {}


def case(op: str, *directions: str) -> Callable[[Callable], Callable]:
    """Register a function `(batch, compiled) -> Case` under its name. `compiled(function)` is torch.compile's version."""

    def register(make: Callable) -> Callable:
        CASES[make.__name__] = Entry(make, op, directions or ("forward",))
        return make

    return register


@case("dual_mask")
def dual_mask(x: Batch, compiled: Callable) -> Case:
    """Index lists of many samples. Plain draws the official bool masks in numpy on the host, without lists."""
    grid, sizes = x.spec.grid, mask_sizes(x.spec.grid)
    position = torch.arange(MASKS, device=x.device)
    view = torch.zeros_like(position)
    rng = np.random.RandomState(0)
    time, row, column = (axis.flatten() for axis in torch.meshgrid(*map(torch.arange, grid), indexing="ij"))
    place = 2 * (row % 2) + column % 2 + 1 + time
    phases = torch.stack([((place + phase) % 4 >= 2).nonzero()[:, 0] for phase in range(4)]).to(x.device)
    return Case(
        ours=lambda b: tuple(our_dual_mask(position, view, grid=grid, seed=0)),
        plain=lambda b: masks_from_rng(rng, MASKS, grid=grid),
        strong=each({n: n for n in ("argsort", "topk")}, lambda sort, b: strong.masks(MASKS, grid, sizes, phases, sort)),
        bytes=MASKS * (16 + 4 * (sizes[0] + sizes[1] + 2 * sizes[2])), random=True,
        shapes={"samples": MASKS, "grid": list(grid)},
    )  # fmt: skip


@case("gather_patches")
def gather_patches(x: Batch, compiled: Callable) -> Case:
    """Bytes of a clip to normalised rows of the visible tokens."""
    spec, index = x.spec, x.mask.visible_index
    strong_rows = functools.partial(strong.rows, spec=spec, dtype=x.dtype)
    forms = {f"compiled {cut}": compiled(functools.partial(strong_rows, cut=cut)) for cut in strong.CUTS}
    forms["eager lines"] = strong_rows

    def plain_rows(b: Batch) -> Tensor:
        return plain.gather(plain.normalised(b.clip, baselines.MEAN, baselines.STD), b.hidden, spec)

    def to_conv_order(rows: Tensor) -> Tensor:
        return rows.unflatten(2, (-1, spec.channels)).transpose(2, 3).flatten(2)

    return Case(
        ours=lambda b: our_gather_patches(b.clip, b.mask.visible_index, **b.cube, dtype=b.dtype), plain=plain_rows,
        strong=each(forms, lambda form, b: form(b.clip, b.mask.visible_index, scale=b.colour[0], shift=b.colour[1])),
        bytes=index.numel() * (spec.patch_values * (1 + x.dtype.itemsize) + 4), arrange=to_conv_order,
        shapes={"clip": list(x.clip.shape), "index": list(index.shape)},
    )  # fmt: skip


@case("gather_patches", "forward", "forward_backward")
def embed(x: Batch, compiled: Callable) -> Case:
    """Clip to embedded visible tokens with their positions: normalise, gather and one matrix product (plain: Conv3d of
    everything on the normalised clip)."""
    spec, index, width = x.spec, x.mask.visible_index, x.spec.encoder.width

    def ours(b: Batch) -> Tensor:
        layer, positions = b.embedding
        return layer(b.clip, b.mask.visible_index) + positions(b.mask.visible_index)

    def plain_tokens(b: Batch) -> Tensor:
        layer, positions = b.embedding
        video = plain.normalised(b.clip, baselines.MEAN, baselines.STD)
        return plain.embed(video, b.hidden, layer.proj.weight, layer.proj.bias, positions.table[None])  # type: ignore[arg-type]

    def strong_tokens(clip: Tensor, index: Tensor, scale: Tensor, shift: Tensor, *layer: Tensor) -> Tensor:
        return strong.embed(strong.rows(clip, index, spec, scale, shift, x.dtype), index, *layer)

    def bound(form: Callable, b: Batch) -> Tensor:
        layer, positions = b.embedding
        return form(b.clip, b.mask.visible_index, *b.colour, layer.proj.weight, layer.proj.bias, positions.table[None])

    weight, element, table = width * spec.patch_values, x.dtype.itemsize, min(index.numel(), spec.tokens)
    return Case(
        ours=ours, plain=plain_tokens, strong=each({"eager": strong_tokens, "compiled": compiled(strong_tokens)}, bound),
        bytes=index.numel() * (spec.patch_values + 4 + element * width) + 4 * (weight + width * table),
        flops=2 * index.numel() * weight, gradient=lambda b: tuple(b.embedding[0].parameters()),
        backward_bytes=index.numel() * element * (spec.patch_values + width) + 4 * weight,
        backward_flops=2 * index.numel() * weight,
        shapes={"clip": list(x.clip.shape), "index": list(index.shape), "width": width},
    )  # fmt: skip


@case("scatter_patches", "forward", "forward_backward")
def scatter_patches(x: Batch, compiled: Callable) -> Case:
    """Rows to a clip with zeros elsewhere; the backward gathers them from the clip's gradient."""
    spec, grid = x.spec, x.spec.grid
    forms = {"eager": strong.scatter, "compiled": compiled(strong.scatter)}
    moved = x.rows.numel() * x.dtype.itemsize + 4 * x.mask.visible_index.numel()
    return Case(
        ours=lambda b: our_scatter_patches(b.rows, b.mask.visible_index, grid=grid, channels=spec.channels, **b.cube),
        plain=lambda b: plain.scatter(b.rows, b.hidden, spec),
        strong=each(forms, lambda form, b: form(b.rows, b.mask.visible_index, spec)),
        bytes=moved + x.clip.numel() * x.dtype.itemsize, gradient=lambda b: (b.rows,),
        backward_bytes=2 * x.rows.numel() * x.dtype.itemsize + 4 * x.mask.visible_index.numel(),
        shapes={"rows": list(x.rows.shape), "grid": list(grid)},
    )  # fmt: skip


@case("reconstruction_loss", "forward", "forward_backward")
def reconstruction_loss(x: Batch, compiled: Callable) -> Case:
    """`pred` of the loss tokens and the clip to the loss and its gradient. Plain builds the targets of all tokens."""
    spec, index = x.spec, x.mask.loss_index
    forms = {"eager": strong.loss, "compiled by channel": compiled(strong.loss_by_channel)}
    if x.device.type != "cpu":  # what Inductor makes of it for a CPU is slower than eager
        forms["compiled"] = compiled(strong.loss)

    def plain_loss(b: Batch) -> Tensor:
        counted = b.hidden & ~b.left_out
        target = plain.targets(b.video, ~counted, spec, baselines.MEAN, baselines.STD)
        return (b.pred - target).pow(2).mean(dim=-1).mean()

    patch, element = spec.patch_values, x.dtype.itemsize
    return Case(
        ours=lambda b: our_reconstruction_loss(b.pred, b.clip, b.mask.loss_index, **b.cube), plain=plain_loss,
        strong=each(forms, lambda form, b: form(b.pred, b.clip, b.mask.loss_index, spec)),
        bytes=index.numel() * (patch * (1 + element) + 4), gradient=lambda b: (b.pred,),
        # The floor is one pass that writes the gradient too; ours reads clip and prediction a second time.
        backward_bytes=index.numel() * patch * element,
        shapes={"clip": list(x.clip.shape), "pred": list(x.pred.shape)},
    )  # fmt: skip


@case("resize_crop")
def resize_crop(x: Batch, compiled: Callable) -> Case:
    """Decoded frames of mixed sizes to the clips of a batch, antialiased; torch's kernels have no form for a whole batch."""
    spec = x.spec
    frames, windows = x.decoded
    moved = sum(w.height * w.width + spec.size**2 for (w,) in windows) * RESIZE_FRAMES * spec.channels

    def into_the_batch(b: Batch) -> Tensor:  # as the loader does
        out = frames[0].new_empty(len(frames), RESIZE_FRAMES, spec.size, spec.size, spec.channels)
        for clip, window, target in zip(*b.decoded, out.split(1), strict=True):
            our_resize_crop(clip, window, spec.size, out=target)
        return out

    return Case(
        ours=into_the_batch, plain=lambda b: plain.resize_crop(*b.decoded, spec.size),
        strong={"eager": lambda b: strong.resize_crop(*b.decoded, spec.size)}, bytes=moved, levels=1,
        shapes={"frames": [list(f.shape) for f in frames], "windows": [list(w[:4]) for (w,) in windows], "size": spec.size},
    )  # fmt: skip


@case("decoder_tokens", "forward", "forward_backward")
def decoder_tokens(x: Batch, compiled: Callable) -> Case:
    """Visible tokens and mask tokens with their positions, in the decoder's order."""
    (tokens, _, table), mask = x.decoder, x.mask
    rows, width = mask.visible_index.numel() + mask.decode_index.numel(), table.shape[2]
    forms = {"eager": strong.decoder_tokens, "compiled": compiled(strong.decoder_tokens)}
    return Case(
        ours=lambda b: our_decoder_tokens(*b.decoder[:2], b.decoder[2][0], *b.mask[:2]),
        plain=lambda b: plain.decoder_tokens(*b.decoder, b.hidden, b.left_out),
        strong=each(forms, lambda form, b: form(*b.decoder, *b.mask[:2])),
        bytes=tokens.numel() * x.dtype.itemsize + rows * (4 + 4 * width) + 4 * table.numel(), gradient=lambda b: b.decoder[:2],
        backward_bytes=4 * rows * width + tokens.numel() * x.dtype.itemsize,
        shapes={"visible": list(tokens.shape), "rows": rows},
    )  # fmt: skip


def apex_residual_norm(x: Tensor, branch: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """`plain.residual_norm` with the LayerNorm of NVIDIA apex."""
    from apex.normalization.fused_layer_norm import fused_layer_norm_affine

    normed: Tensor = fused_layer_norm_affine((x + branch).float(), weight, bias, x.shape[-1:], 1e-6)
    return normed.to(x.dtype)


@case("residual_norm", "forward", "forward_backward")
def residual_norm(x: Batch, compiled: Callable) -> Case:
    """Residual add and LayerNorm between two half-blocks of the encoder, the stream in the dtype of the branch."""
    stream, form = x.stream[0], compiled(plain.residual_norm)
    moved = stream.numel() * stream.dtype.itemsize
    strong: dict[str, Call] = {
        "compiled": lambda b: form(*b.stream)[1], "eager": lambda b: plain.residual_norm(*b.stream)[1],
    }  # fmt: skip
    if x.device.type == "cuda" and importlib.util.find_spec("fused_layer_norm_cuda"):
        strong["apex"] = lambda b: apex_residual_norm(*b.stream)
    return Case(
        ours=lambda b: our_residual_norm(*b.stream[:2], None, None, *b.stream[2:], 1e-6)[1],
        plain=lambda b: plain.residual_norm(*b.stream)[1],
        strong=strong,
        # Two in and two out; then the gradient and the sum in, one gradient out: it is the branch's too.
        bytes=4 * moved, gradient=lambda b: b.stream, backward_bytes=3 * moved, shapes={"stream": list(stream.shape)},
    )  # fmt: skip


@case("roi_align_max", "forward", "forward_backward")
def roi_align_max(x: Batch, compiled: Callable) -> Case:
    """The largest of 7 x 7 RoIAlign bins of each box. Plain samples box by box and point by point, as the formula says; strong
    are the two matrix products, for all boxes at once and clip by clip."""
    features, boxes = x.people
    options: dict[str, Any] = {"size": 7, "scale": 1 / x.spec.patch}
    forms = {"matmul": strong.roi_align_max, "matmul by clip": strong.roi_align_max_by_clip}
    pooled, moved = len(boxes) * features.shape[3], features.numel() * x.dtype.itemsize
    return Case(
        ours=lambda b: our_roi_align_max(*b.people, **options), plain=lambda b: plain.roi_align_max(*b.people, **options),
        strong=each(forms, lambda form, b: form(*b.people, **options)), bytes=moved + pooled * x.dtype.itemsize,
        gradient=lambda b: (b.people[0],), backward_bytes=moved + pooled * (1 + x.dtype.itemsize),
        shapes={"features": list(features.shape), "boxes": len(boxes)},
    )  # fmt: skip


@case("adamw")
def adamw(x: Batch, compiled: Callable) -> Case:
    """A step of AdamW on the float32 parameters of four blocks of the encoder. Everybody has the same parameters and
    gradients; without memory (betas of 0), and at a rate that changes nothing, each call computes the same. On a GPU ours is
    torch's fused kernel, as in training."""
    params, *moments, steps = x.parameters
    settings: dict[str, Any] = {"lr": 1e-8, "betas": (0.0, 0.0), "eps": 1e-8, "weight_decay": 0.05}
    foreach, fused = (torch.optim.AdamW(params, **settings, **{form: True}) for form in ("foreach", "fused"))
    forms: dict[str, Any] = {"fused": fused}
    if x.device.type == "cuda" and importlib.util.find_spec("amp_C"):
        forms["apex"] = importlib.import_module("apex.optimizers").FusedAdam(params, adam_w_mode=True, **settings)

    def ours(b: Batch) -> tuple[Tensor, ...]:
        if b.device.type != "cpu":
            return theirs(fused, b)
        our_adamw(params, [p.grad for p in params], *moments, steps, **settings)  # type: ignore[misc]
        return moments[0][0], moments[1][0]

    def theirs(optimizer: Any, b: Batch) -> tuple[Tensor, ...]:
        optimizer.step()
        return optimizer.state[params[0]]["exp_avg"], optimizer.state[params[0]]["exp_avg_sq"]

    return Case(
        ours=ours, plain=functools.partial(theirs, foreach), strong=each(forms, theirs),
        bytes=28 * sum(p.numel() for p in params), shapes={"parameters": sum(p.numel() for p in params)},
    )  # fmt: skip


@case("nms_1d")
def nms_1d(x: Batch, compiled: Callable) -> Case:
    """Gaussian soft-NMS of one class; on a GPU the way to the host and back is in it. Strong decays all candidates at once."""
    options: dict[str, Any] = {"sigma": 0.5, "min_score": 0.001, "limit": KEPT}
    return Case(
        ours=lambda b: our_nms_1d(*b.segments, **options)[:2], plain=lambda b: plain.soft_nms_1d(*b.segments, **options),
        strong={"eager": lambda b: strong.soft_nms_1d(*b.segments, **options)}, bytes=SEGMENTS * 12 + KEPT * 20,
        shapes={"segments": SEGMENTS, "kept": KEPT},
    )  # fmt: skip


def _attention(x: Batch, qkv: Callable[[Batch], Tensor]) -> Case:
    """Packed qkv to attention's output; a backward has five products where the forward has two."""

    def split(b: Batch) -> Any:
        return qkv(b).permute(2, 0, 3, 1, 4)

    def sdpa(b: Batch) -> Tensor:
        return F.scaled_dot_product_attention(*split(b)).transpose(1, 2)

    def cudnn(b: Batch) -> Tensor:
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            return sdpa(b)

    def flash_attn(b: Batch) -> Tensor:
        from flash_attn import flash_attn_qkvpacked_func

        packed: Tensor = flash_attn_qkvpacked_func(qkv(b))
        return packed

    strong: dict[str, Call] = {"SDPA": sdpa}
    if x.device.type == "cuda" and x.dtype != torch.float32:
        parameters = torch.backends.cuda.SDPAParams(*split(x), None, 0.0, False, False)
        strong |= {"cuDNN": cudnn} if torch.backends.cuda.can_use_cudnn_attention(parameters) else {}
        strong |= {"flash-attn": flash_attn} if importlib.util.find_spec("flash_attn_2_cuda") else {}
    clips, tokens, _, heads, head_dim = qkv(x).shape
    product, moved = 2 * clips * heads * head_dim * tokens**2, qkv(x).numel() * x.dtype.itemsize
    return Case(
        ours=lambda b: our_attention(qkv(b)), plain=lambda b: plain.attention(*split(b)).transpose(1, 2),
        strong=strong, bytes=moved * 4 // 3, flops=2 * product, gradient=lambda b: (qkv(b),), backward_bytes=moved * 8 // 3,
        backward_flops=5 * product, shapes={"qkv": list(qkv(x).shape)},
    )  # fmt: skip


@case("attention", "forward", "forward_backward")
def encoder_attention(x: Batch, compiled: Callable) -> Case:
    return _attention(x, lambda b: b.encoder_qkv)


@case("attention", "forward", "forward_backward")
def decoder_attention(x: Batch, compiled: Callable) -> Case:
    return _attention(x, lambda b: b.decoder_qkv)


@case("attention", "forward", "forward_backward")
def full_attention(x: Batch, compiled: Callable) -> Case:
    return _attention(x, lambda b: b.full_qkv)
