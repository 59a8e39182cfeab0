"""The parts of a video ViT: patch embedding, transformer block, a stack of blocks, initial values.

A block is two half-blocks, each `x <- x + scale * drop * branch(LN(x))`. The fused ops add a branch at the *start* of
the next half-block, together with its LayerNorm, so between two blocks travels a pair: the residual stream x and the
branch that still has to be added (`Pending`). The norm behind the last block folds the last one:

    x, pending = stack(blocks, tokens)
    x, h = fold(x, pending, norm)

Parameter names are the official ones: norm1, attn.{q_bias,v_bias,qkv.weight,proj.*}, norm2, mlp.{fc1,fc2}.*,
gamma_1/gamma_2 with layer scale, attn.scale with cosine attention.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..config import ModelConfig
from ..ops._half_block import statistics_dtype
from ..ops.attention import attention, cosine_attention
from ..ops.linear import linear
from ..ops.mlp import norm_mlp
from ..ops.norm import norm_qkv, residual_norm
from ..ops.patches import gather_patches
from ..sharded import is_sharded
from .sizes import ModelSpec, StackSpec

ActivationCheckpoint = Literal["none", "mlp", "block"]


class Pending(NamedTuple):
    """A branch [B, N, D] not yet added to the residual stream, its channel scale [D] and its drop-path scale [B]."""

    branch: Tensor
    gamma: Tensor | None
    drop: Tensor | None


class Linear(nn.Linear):
    """`nn.Linear` that keeps no cast copy of its weight, and whose values are left to `initialise`: drawing torch's default
    first doubles the time of a build."""

    def reset_parameters(self) -> None:
        pass

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


class Conv3d(nn.Conv3d):
    """`nn.Conv3d` whose values are left to `initialise`."""

    def reset_parameters(self) -> None:
        pass


class PatchEmbed(nn.Module):
    """Chosen tubelet patches of a clip -> tokens. `proj` is a Conv3d with stride = kernel, run as one matrix product on
    the gathered rows, so patches nobody asks for are never read.

    clip: uint8 [B, T, H, W, C] (normalised inside by `mean`, `std`), or float [B, C, T, H, W], normalised already.
    """

    def __init__(self, spec: ModelSpec, mean: tuple[float, ...] | None, std: tuple[float, ...] | None) -> None:
        super().__init__()
        cube = (spec.tubelet, spec.patch, spec.patch)
        self.spec, self.mean, self.std = spec, mean, std
        self.proj = Conv3d(spec.channels, spec.encoder.width, kernel_size=cube, stride=cube)

    def forward(self, clip: Tensor, index: Tensor | None = None) -> Tensor:
        """Tokens [B, K, D] of the patches `index` [B, K] (ascending token ids), or of all. Raises ValueError for a clip
        of another shape than the model was built for."""
        spec = self.spec
        check_clip(clip, spec)
        if index is None:
            index = torch.arange(spec.tokens, dtype=torch.int32, device=clip.device).repeat(clip.shape[0], 1)
        kind, weight = clip.device.type, self.proj.weight
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weight.dtype
        rows = gather_patches(clip, index, patch=spec.patch, tubelet=spec.tubelet, mean=self.mean, std=self.std, dtype=dtype)
        return linear(rows, weight.flatten(1), self.proj.bias)


def check_clip(clip: Tensor, spec: ModelSpec) -> None:
    """Raise ValueError unless `clip` is uint8 [B, T, H, W, C] or float [B, C, T, H, W] of the model's size."""
    frames, side, channels = spec.frames, spec.size, spec.channels
    want: tuple[int, ...] = (frames, side, side, channels) if clip.dtype == torch.uint8 else (channels, frames, side, side)
    if clip.dim() != 5 or tuple(clip.shape[1:]) != want or not (clip.dtype == torch.uint8 or clip.is_floating_point()):
        raise ValueError(
            f"clip is {clip.dtype} {list(clip.shape)}; this model takes uint8 [B, {frames}, {side}, {side}, {channels}] or "
            f"float [B, {channels}, {frames}, {side}, {side}]; build it with frames=, size=, in_chans= for other clips"
        )


class Attention(nn.Module):
    """The parameters of multi-head self-attention; keys have no bias. `scale`: log of the cosine attention's scale."""

    def __init__(self, width: int, heads: int, qkv_bias: bool, cosine: bool) -> None:
        super().__init__()
        self.heads, self.cosine = heads, cosine
        if cosine:
            self.scale = nn.Parameter(torch.empty(heads, 1, 1))
        self.q_bias = nn.Parameter(torch.empty(width)) if qkv_bias else None
        self.v_bias = nn.Parameter(torch.empty(width)) if qkv_bias else None
        self.qkv = Linear(width, 3 * width, bias=False)
        self.proj = Linear(width, width)

    def with_bias(self, qkv: Tensor) -> Tensor:
        """qkv [B, N, 3C] with the biases of queries and values added; for a `qkv` layer that is called by itself."""
        if self.q_bias is None or self.v_bias is None:
            return qkv
        return qkv + torch.cat((self.q_bias, torch.zeros_like(self.q_bias), self.v_bias)).to(qkv.dtype)

    def forward(self, qkv: Tensor) -> Tensor:
        """Packed [B, N, 3C] -> mixed values [B, N, C], before `proj`."""
        qkv = qkv.unflatten(2, (3, self.heads, -1))
        mixed = cosine_attention(qkv, self.scale) if self.cosine else attention(qkv)
        return mixed.flatten(2)


class Mlp(nn.Module):
    """The parameters of the two-layer MLP with GELU (erf)."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = Linear(width, hidden)
        self.fc2 = Linear(hidden, width)


class Block(nn.Module):
    """A pre-norm transformer block on the fused half-blocks; `Block(768, 12)` works in any ViT. Where a layer of `attn` or
    `mlp` was replaced by one of another kind (`train.float8`), that layer is called, and its half-block runs unfused.

    `block(x)` maps [B, N, width] to [B, N, width]. With `defer=True` it takes and returns the pending branch of the
    head of this file. `rows` keeps only some tokens behind the attention: token positions [B, K] or a slice; what
    the dropped ones would have become is not computed. drop_path: probability of dropping each branch of a sample
    while training (torch's random numbers). skip_dropped: dropped samples are left out of the branch's work, not
    multiplied by 0; `kept` then names those that run the attention and the MLP (int64 indices on the host, see
    `ops.drop_path`; None: drawn from torch's CPU generator). Shapes vary from call to call: no CUDA graph holds them.
    `initial=False` leaves the values unset, for a model that sets them all.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        mlp_hidden: int | None = None,
        *,
        qkv_bias: bool = True,
        norm_eps: float = 1e-6,
        layer_scale: float = 0.0,
        drop_path: float = 0.0,
        skip_dropped: bool = False,
        cosine_attention: bool = False,
        activation_checkpoint: ActivationCheckpoint = "none",
        initial: bool = True,
    ) -> None:
        super().__init__()
        self.layer_scale, self.drop_path, self.activation_checkpoint = layer_scale, drop_path, activation_checkpoint
        self.skip_dropped = skip_dropped
        self.gamma_1 = nn.Parameter(torch.empty(width)) if layer_scale > 0 else None
        self.gamma_2 = nn.Parameter(torch.empty(width)) if layer_scale > 0 else None
        self.norm1 = nn.LayerNorm(width, eps=norm_eps)
        self.attn = Attention(width, heads, qkv_bias, cosine_attention)
        self.norm2 = nn.LayerNorm(width, eps=norm_eps)
        self.mlp = Mlp(width, 4 * width if mlp_hidden is None else mlp_hidden)
        if initial:
            initialise(self)

    def forward(
        self,
        x: Tensor,
        pending: Pending | None = None,
        *,
        defer: bool = False,
        rows: Tensor | slice | None = None,
        kept: Sequence[Tensor] | None = None,
    ) -> Tensor | tuple[Tensor, Pending | None]:
        run: Callable[..., tuple[Tensor, Pending | None]] = self._run
        drop, batch = None, x.shape[0]
        if self.training and self.drop_path > 0:
            # Drawn outside the checkpointed part, which therefore has no random state to keep.
            keep = 1 - self.drop_path
            if not self.skip_dropped:
                drop = (torch.rand(2, batch, device=x.device) < keep).float() / keep
            else:
                kept = kept or [drawn.nonzero()[:, 0] for drawn in torch.rand(2, batch) < keep]
                if all(len(samples) == batch for samples in kept):
                    drop = torch.full((2, batch), 1 / keep, dtype=statistics_dtype(x.dtype), device=x.device)
                else:
                    mixing, expanding = (samples.to(x.device, non_blocking=True) for samples in kept)
                    run = functools.partial(self._run_kept, mixing, expanding)
        if self.activation_checkpoint == "block" and torch.is_grad_enabled():
            # Tensors one by one, not in a tuple: so they count as saved, and saved-tensor hooks can move them.
            run = functools.partial(checkpoint, run, use_reentrant=False, preserve_rng_state=False)
        x, left = run(x, *(pending or (None, None, None)), drop, rows)
        return (x, left) if defer else add(x, left)

    def _run(
        self,
        x: Tensor,
        branch: Tensor | None,
        gamma: Tensor | None,
        branch_drop: Tensor | None,
        drop: Tensor | None,
        rows: Tensor | slice | None,
    ) -> tuple[Tensor, Pending]:
        x, mixed = self._mix(x, branch, gamma, branch_drop)
        if rows is not None:
            x, mixed = take_rows(x, rows), take_rows(mixed, rows)
        drop_1, drop_2 = (None, None) if drop is None else (drop[0], drop[1])
        x, out = self._expand(x, self.attn.proj(mixed), self.gamma_1, drop_1)
        return x, Pending(out, self.gamma_2, drop_2)

    def _run_kept(
        self,
        mixing: Tensor,
        expanding: Tensor,
        x: Tensor,
        branch: Tensor | None,
        gamma: Tensor | None,
        branch_drop: Tensor | None,
        drop: None,
        rows: Tensor | slice | None,
    ) -> tuple[Tensor, None]:
        """`_run` with each branch on its own samples alone; they are added at once, so nothing is pending."""
        if branch is not None:
            x = add(x, Pending(branch, gamma, branch_drop))
        whole, keep = x, 1 - self.drop_path
        if rows is not None:
            x = take_rows(x, rows)
        # A branch that nobody runs is still run, on nothing: its parameters get a gradient of 0, as by multiplication.
        mixed = self._mix(whole.index_select(0, mixing))[1]
        if rows is not None:
            mixed = take_rows(mixed, rows if isinstance(rows, slice) else rows.index_select(0, mixing))
        x = add_kept(x, mixing, self.attn.proj(mixed), self.gamma_1, keep)
        return add_kept(x, expanding, self._expand(x.index_select(0, expanding))[1], self.gamma_2, keep), None

    def _mix(
        self, x: Tensor, branch: Tensor | None = None, gamma: Tensor | None = None, drop: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """The stream with `branch` added, and what attention makes of it, before `proj`."""
        norm, attn = self.norm1, self.attn
        if not isinstance(attn.qkv, Linear):
            x, h = residual_norm(x, branch, gamma, drop, norm.weight, norm.bias, norm.eps)
            return x, attn(attn.with_bias(attn.qkv(h)))
        x, qkv = norm_qkv(
            x, branch, gamma, drop, norm.weight, norm.bias, norm.eps, attn.qkv.weight, attn.q_bias, attn.v_bias
        )
        return x, attn(qkv)

    def _expand(
        self, x: Tensor, branch: Tensor | None = None, gamma: Tensor | None = None, drop: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """The stream with `branch` added, and what the MLP makes of it."""
        norm, fc1, fc2 = self.norm2, self.mlp.fc1, self.mlp.fc2
        if isinstance(fc1, Linear) and isinstance(fc2, Linear):
            run: Callable[..., tuple[Tensor, Tensor]] = norm_mlp
            layers = (fc1.weight, fc1.bias, fc2.weight, fc2.bias)
        else:
            run, layers = self._norm_mlp_of_layers, ()
        if self.activation_checkpoint == "mlp" and torch.is_grad_enabled():
            run = functools.partial(checkpoint, run, use_reentrant=False, preserve_rng_state=False)
        x, out = run(x, branch, gamma, drop, norm.weight, norm.bias, norm.eps, *layers)
        return x, out

    def _norm_mlp_of_layers(self, *stream: Any) -> tuple[Tensor, Tensor]:
        """`norm_mlp` with layers that are not ours (see `train.float8`): they are called, so nothing is fused."""
        x, h = residual_norm(*stream)
        return x, self.mlp.fc2(nn.functional.gelu(self.mlp.fc1(h)))


def autocast_weights(model: nn.Module) -> list[Tensor]:
    """The weights that products under autocast cast: those of every `Linear`, but with `decoder_fp32` of none behind the
    encoder. That of the patch embedding, which is viewed as a matrix first, is not among them."""
    exact = getattr(getattr(model, "config", None), "decoder_fp32", False)
    return [
        module.weight
        for name, module in model.named_modules()
        if isinstance(module, Linear) and not (exact and name.startswith(("decoder.", "encoder_to_decoder")))
    ]


def take_rows(x: Tensor, rows: Tensor | slice) -> Tensor:
    """Tokens of x [B, N, D] at a slice, or at positions [B, K] of each sample: [B, K, D]."""
    if isinstance(rows, slice):
        return x[:, rows]
    return x.gather(1, rows.long().unsqueeze(-1).expand(-1, -1, x.shape[-1]))


def add(x: Tensor, pending: Pending | None) -> Tensor:
    """x + gamma * drop * branch, in x's dtype."""
    if pending is None:
        return x
    branch = pending.branch
    if pending.gamma is not None:
        branch = branch * pending.gamma
    if pending.drop is not None:
        branch = branch * pending.drop[:, None, None]
    return x + branch.to(x.dtype)


def add_kept(x: Tensor, samples: Tensor, branch: Tensor, gamma: Tensor | None, keep: float) -> Tensor:
    """x with gamma / keep * branch added to its `samples` [K]; branch [K, N, D]."""
    if gamma is not None:
        branch = branch * gamma
    return x.index_add(0, samples, branch.to(x.dtype), alpha=1 / keep)


def fold(x: Tensor, pending: Pending | None, norm: nn.LayerNorm) -> Tensor:
    """LN(x + gamma * drop * branch): what the norm behind the last block gives."""
    branch, gamma, drop = pending or (None, None, None)
    return residual_norm(x, branch, gamma, drop, norm.weight, norm.bias, norm.eps)[1]


def make_blocks(spec: StackSpec, config: ModelConfig) -> nn.ModuleList:
    """The blocks of a stack, values unset; the drop-path probability grows linearly from 0 to `config.drop_path`."""
    return nn.ModuleList(
        Block(
            spec.width,
            spec.heads,
            spec.mlp_hidden,
            qkv_bias=config.qkv_bias,
            norm_eps=config.norm_eps,
            layer_scale=config.layer_scale,
            drop_path=config.drop_path * i / max(spec.depth - 1, 1),
            skip_dropped=config.drop_path_skip,
            cosine_attention=config.cosine_attention,
            activation_checkpoint=config.activation_checkpoint,
            initial=False,
        )
        for i in range(spec.depth)
    )


def stream(tokens: Tensor, config: ModelConfig) -> Tensor:
    """Tokens as the residual stream: in bfloat16 if `config.residual_dtype` says so, else as they are."""
    return tokens.to(torch.bfloat16) if config.residual_dtype == "bfloat16" else tokens


def set_norm_eps(model: Any, output_norm: nn.Module | None, norm_eps: float, output: float | None) -> None:
    """Give every LayerNorm of `model` another epsilon, `output_norm` its own, and note both in `model.config`."""
    model.config = dataclasses.replace(model.config, norm_eps=norm_eps, output_norm_eps=output)
    for part in model.modules():
        if isinstance(part, nn.LayerNorm):
            part.eps = output if part is output_norm and output is not None else norm_eps


def stack(
    blocks: Iterable[nn.Module], x: Tensor, rows: Tensor | slice | None = None, kept: Sequence[Tensor] | None = None
) -> tuple[Tensor, Pending | None]:
    """Run the blocks on tokens x [B, N, D]; the last one keeps only `rows`. `kept`: the samples that run each branch, two
    branches a block, for blocks that skip dropped ones. Returns the stream and what is pending."""
    blocks = list(blocks)
    pending = None
    for i, block in enumerate(blocks):
        chosen = None if kept is None else kept[2 * i : 2 * i + 2]
        x, pending = block(x, pending, defer=True, rows=rows if i == len(blocks) - 1 else None, kept=chosen)
    return x, pending


@torch.no_grad()
def fill(parameter: Tensor, value: Tensor) -> None:
    """Write the whole tensor `value` into a parameter; into one that is sharded, this rank's slice of it."""
    if is_sharded(parameter):
        from torch.distributed.tensor import distribute_tensor

        placed = distribute_tensor(
            value.to(parameter.device, parameter.dtype), parameter.device_mesh, parameter.placements, src_data_rank=None
        )
        parameter.to_local().copy_(placed.to_local())
    else:
        parameter.copy_(value)


def truncated_normal(tensor: Tensor) -> Tensor:
    """Normal values of std 0.02, cut at one std: the inverse of the distribution function, which draws a fixed number of
    values and never looks at them (torch's own rejects and draws again)."""
    inside = math.erf(2**-0.5)  # probability within one std
    return nn.init.uniform_(tensor, -inside, inside).erfinv_().mul_(0.02 * 2**0.5).clamp_(-0.02, 0.02)


@torch.no_grad()
def initialise(
    module: nn.Module,
    weight: Callable[[Tensor], Tensor] = nn.init.xavier_uniform_,
    *,
    special: Mapping[str, Callable[[Tensor], object]] | None = None,
    only: Collection[str] | None = None,
) -> None:
    """Write the official initial values: `weight` for matrices, 0 for biases, 1 for norm weights, torch's own rule for
    the patch embedding, log 10 for cosine scales, the layer scale for gammas. `special` overrides by parameter name;
    `only` limits the parameters written (default: all). Of a sharded parameter the whole is drawn on the host, one at a time,
    so that every rank keeps its slice of what one process would have drawn."""
    for prefix, part in module.named_modules():
        for name, value in part.named_parameters(recurse=False):
            key = f"{prefix}.{name}" if prefix else name
            if only is not None and key not in only:
                continue
            rule: Callable[[Tensor], object] = nn.init.zeros_
            if special and key in special:
                rule = special[key]
            elif isinstance(part, nn.Conv3d):
                bound = 1 / math.sqrt(math.prod(part.weight.shape[1:]))
                rule = functools.partial(nn.init.uniform_, a=-bound, b=bound)
            elif isinstance(part, nn.Linear) and name == "weight":
                rule = weight
            elif isinstance(part, nn.LayerNorm) and name == "weight":
                rule = nn.init.ones_
            elif isinstance(part, Block):
                rule = functools.partial(nn.init.constant_, val=part.layer_scale)
            elif isinstance(part, Attention) and name == "scale":
                rule = functools.partial(nn.init.constant_, val=math.log(10))
            if is_sharded(value):
                whole = torch.empty(value.shape, dtype=value.dtype)
                rule(whole)
                fill(value, whole)
            else:
                rule(value)
