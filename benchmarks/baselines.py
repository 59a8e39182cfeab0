"""The honest alternatives: a pre-training step written the official way (plain) and a well-written torch one (strong).

What each op is in either way stands in `plain.py` and `strong.py`; here are the models and the step. Both models carry the
state-dict keys of `vmae2_fast.models.PretrainViT`, so weights move between the three and `tie` lets them
share one set of parameters, and both are checked against recorded numbers of the official code
(`tests/benchmarks/test_baselines.py`).

- `Plain`: what the released VideoMAE V2 does. Fp32 normalised clip, Conv3d over every tubelet, positions added to every
  token, boolean-mask indexing, materialised softmax attention, targets of all tokens in fp32. Run it in fp32 or under
  bf16 autocast, with or without activation checkpointing of each block, and with `AdamW(foreach=True)`.
- `Strong`: index-first everywhere, SDPA, uint8 clips; meant for bf16 autocast, `AdamW(fused=True)` and, when that is
  faster, `torch.compile`.

Shapes: B clips, N tokens of the grid (T', H', W'), V visible, Nd decoded, K = tubelet * patch * patch * channels.
Masks are bool [B, N], True = hidden. Indices are integer [B, .], ascending.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from vmae2_fast.config import ModelConfig
from vmae2_fast.models.sizes import StackSpec, resolve

from . import plain, strong

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
MAX_LOG_SCALE = 4.6052  # as printed in the official code, not log(100): the difference is 3e-5 of the scale


def sinusoid(tokens: int, width: int) -> Tensor:
    """Position table [1, tokens, width] fp32 over the flattened token id: sine on even channels, cosine on odd."""
    channel = torch.arange(width, dtype=torch.float64)
    angle = torch.arange(tokens, dtype=torch.float64)[:, None] / 10000.0 ** (2 * (channel // 2) / width)
    return torch.where(channel % 2 == 0, angle.sin(), angle.cos()).float()[None]


class Attention(nn.Module):
    def __init__(self, width: int, heads: int, cosine: bool, materialised: bool) -> None:
        super().__init__()
        self.heads, self.materialised = heads, materialised
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.q_bias, self.v_bias = nn.Parameter(torch.zeros(width)), nn.Parameter(torch.zeros(width))
        self.proj = nn.Linear(width, width)
        self.scale = nn.Parameter(torch.full((heads, 1, 1), math.log(10.0))) if cosine else None

    def forward(self, x: Tensor) -> Tensor:
        bias = torch.cat([self.q_bias, torch.zeros_like(self.v_bias), self.v_bias])
        qkv = F.linear(x, self.qkv.weight, bias)
        q, k, v = qkv.unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        if self.scale is not None:
            q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
            factor = self.scale.clamp(max=MAX_LOG_SCALE).exp()
        if self.materialised:
            out = plain.attention(q, k, v, None if self.scale is None else factor)
        elif self.scale is None:
            out = F.scaled_dot_product_attention(q, k, v)
        else:
            out = F.scaled_dot_product_attention((q * factor).to(v.dtype), k.to(v.dtype), v, scale=1.0)
        return self.proj(out.transpose(1, 2).flatten(2))


class Mlp(nn.Module):
    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    def __init__(self, config: ModelConfig, stack: StackSpec, materialised: bool) -> None:
        super().__init__()
        width, scale = stack.width, config.layer_scale
        self.norm1, self.norm2 = nn.LayerNorm(width, eps=config.norm_eps), nn.LayerNorm(width, eps=config.norm_eps)
        self.attn = Attention(width, stack.heads, config.cosine_attention, materialised)
        self.mlp = Mlp(width, stack.mlp_hidden)
        self.gamma_1 = nn.Parameter(torch.full((width,), scale)) if scale else None
        self.gamma_2 = nn.Parameter(torch.full((width,), scale)) if scale else None

    def forward(self, x: Tensor) -> Tensor:
        a = self.attn(self.norm1(x))
        x = x + (a if self.gamma_1 is None else self.gamma_1 * a)
        m = self.mlp(self.norm2(x))
        return x + (m if self.gamma_2 is None else self.gamma_2 * m)


class _Embed(nn.Module):
    def __init__(self, channels: int, width: int, kernel: tuple[int, int, int]) -> None:
        super().__init__()
        self.proj = nn.Conv3d(channels, width, kernel, stride=kernel)

    def forward(self, video: Tensor) -> Tensor:
        """Tokens [B, N, width] of every tubelet of a clip [B, C, T, H, W]."""
        return self.proj(video).flatten(2).transpose(1, 2)


class _Stack(nn.Module):
    """Blocks and the final norm; `run` applies the blocks, recomputing each in the backward if asked to."""

    def __init__(self, config: ModelConfig, stack: StackSpec, materialised: bool) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(config, stack, materialised) for _ in range(stack.depth))
        self.norm = nn.LayerNorm(stack.width, eps=config.norm_eps)

    def run(self, x: Tensor, recompute: bool) -> Tensor:
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False) if recompute else block(x)
        return x


class _Pretrain(nn.Module):
    """Parameters of a pre-training model under the official names; the two baselines differ in `forward` and `loss`."""

    materialised: bool
    encoder: Any
    decoder: Any
    enc_positions: Tensor
    dec_positions: Tensor
    row_scale: Tensor
    row_shift: Tensor

    def __init__(self, config: ModelConfig, activation_checkpoint: bool = False) -> None:
        super().__init__()
        spec = resolve(config)
        if spec.decoder is None:
            raise ValueError(f"{config.name} is not a pre-training model")
        width, decoder_width = spec.encoder.width, spec.decoder.width
        self.spec, self.activation_checkpoint = spec, activation_checkpoint
        self.mean, self.std = config.pixel_mean or MEAN, config.pixel_std or STD
        self.encoder = _Stack(config, spec.encoder, self.materialised)
        self.encoder.patch_embed = _Embed(spec.channels, width, (spec.tubelet, spec.patch, spec.patch))
        self.encoder_to_decoder = nn.Linear(width, decoder_width, bias=False)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, decoder_width))
        self.decoder = _Stack(config, spec.decoder, self.materialised)
        self.decoder.head = nn.Linear(decoder_width, spec.patch_values)
        with torch.device("cpu"):  # real also in a model built on the meta device: `tie` brings parameters only
            self.register_buffer("enc_positions", sinusoid(spec.tokens, width), persistent=False)
            self.register_buffer("dec_positions", sinusoid(spec.tokens, decoder_width), persistent=False)
            scale, shift = strong.row_colour(spec, self.mean, self.std, torch.device("cpu"))
            self.register_buffer("row_scale", scale, persistent=False)
            self.register_buffer("row_shift", shift, persistent=False)


class Plain(_Pretrain):
    """The official way. `clip` fp32 [B, C, T, H, W], normalised; masks bool [B, N]."""

    materialised = True

    def forward(self, clip: Tensor, encoder_mask: Tensor, decoder_mask: Tensor) -> Tensor:
        """Predictions [B, Nd, K] of the decoded tokens (decoder_mask False), ascending."""
        embed = self.encoder.patch_embed.proj
        x = plain.embed(clip, encoder_mask, embed.weight, embed.bias, self.enc_positions)
        x = self.encoder_to_decoder(self.encoder.norm(self.encoder.run(x, self.activation_checkpoint)))
        visible = x.shape[1]
        x = plain.decoder_tokens(x, self.mask_token, self.dec_positions, encoder_mask, decoder_mask)
        x = self.decoder.run(x, self.activation_checkpoint)[:, visible:]
        return self.decoder.head(self.decoder.norm(x))

    def loss(self, clip: Tensor, encoder_mask: Tensor, decoder_mask: Tensor, normalize: bool = True) -> Tensor:
        """Mean squared error over tokens that are decoded and hidden from the encoder; targets are built for all tokens."""
        with torch.no_grad():
            target = plain.targets(clip, decoder_mask, self.spec, self.mean, self.std, normalize)
        error = (self(clip, encoder_mask, decoder_mask) - target).pow(2).mean(dim=-1)
        counted = encoder_mask[~decoder_mask].reshape(len(clip), -1)
        return (error * counted).sum() / counted.sum()


class PlainClassifier(nn.Module):
    """The official fine-tuning model with mean pooling: all tokens, materialised attention. `clip` as in `Plain`."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        spec = resolve(config)
        width = spec.encoder.width
        self.patch_embed = _Embed(spec.channels, width, (spec.tubelet, spec.patch, spec.patch))
        self.stack = _Stack(config, spec.encoder, materialised=True)
        self.head = nn.Linear(width, config.num_classes)
        self.register_buffer("positions", sinusoid(spec.tokens, width), persistent=False)

    def forward(self, clip: Tensor) -> Tensor:
        """Class scores [B, num_classes]."""
        x = self.stack.run(self.patch_embed(clip) + self.positions, recompute=False)
        return self.head(self.stack.norm(x.mean(1)))


class Strong(_Pretrain):
    """Index-first torch. `clip` uint8 [B, T, H, W, C], or float [B, C, T, H, W] normalised; indices as `DualMask` has them."""

    materialised = False

    def rows(self, clip: Tensor, index: Tensor) -> Tensor:
        """Normalised rows [B, V, K] of the encoder's tokens."""
        return strong.rows(clip, index, self.spec, self.row_scale, self.row_shift)

    def targets(self, clip: Tensor, index: Tensor, normalize: bool = True) -> Tensor:
        """Targets [B, Nl, K] of the loss tokens; of token 0 where the index is padded."""
        return strong.targets(clip, index.clamp(min=0), self.spec, self.mean, self.std, normalize)

    def forward(self, clip: Tensor, visible_index: Tensor, decode_index: Tensor, loss_slot: Tensor | None = None) -> Tensor:
        """Predictions [B, Nd, K] of the decoded tokens, or [B, Nl, K] of those at `loss_slot`: what the norm and the head
        cost is paid for tokens that count only."""
        rows = self.rows(clip, visible_index)
        embed = self.encoder.patch_embed.proj
        x = strong.embed(rows, visible_index, embed.weight, embed.bias, self.enc_positions)
        x = self.encoder_to_decoder(self.encoder.norm(self.encoder.run(x, self.activation_checkpoint)))
        x = strong.decoder_tokens(x, self.mask_token, self.dec_positions, visible_index, decode_index)
        x = self.decoder.run(x, self.activation_checkpoint)[:, visible_index.shape[1] :]
        if loss_slot is not None:
            x = x.gather(1, loss_slot.long()[..., None].expand(-1, -1, x.shape[2]))
        return self.decoder.head(self.decoder.norm(x))

    def loss(self, clip: Tensor, visible_index: Tensor, decode_index: Tensor, loss_index: Tensor, loss_slot: Tensor,
             normalize: bool = True) -> Tensor:
        """Mean squared error over the loss tokens; only their targets are built. `loss_index` is -1 where padded."""
        counted = loss_index >= 0
        with torch.no_grad():
            target = self.targets(clip, loss_index, normalize)
        pred = self(clip, visible_index, decode_index, loss_slot)
        error = (pred.float() - target).pow(2).mean(dim=-1)
        return (error * counted).sum() / counted.sum()


def tie(model: nn.Module, owner: nn.Module) -> None:
    """Make `model` (built on any device, meta included) use `owner`'s very parameters; its buffers move to their device.

    Raises ValueError when the two do not have the same parameters.
    """
    theirs = dict(owner.named_parameters())
    names = [name for name, _ in model.named_parameters()]
    odd = sorted(set(names) ^ set(theirs))
    if odd:
        raise ValueError(f"the two models differ in {len(odd)} parameters: {', '.join(odd[:4])}")
    for name in names:
        path, _, leaf = name.rpartition(".")
        module = model.get_submodule(path)
        shape = getattr(module, leaf).shape
        if shape != theirs[name].shape:
            raise ValueError(f"{name} is {tuple(shape)} in one model and {tuple(theirs[name].shape)} in the other")
        setattr(module, leaf, theirs[name])
    device = next(owner.parameters()).device
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            module.register_buffer(name, buffer.to(device), persistent=False)


def groups(model: nn.Module, weight_decay: float = 0.05) -> list[dict]:
    """AdamW parameter groups as the official code makes them: no decay for vectors and the mask token."""
    plain = [p for n, p in model.named_parameters() if p.ndim == 1 or n.endswith(("mask_token", ".scale"))]
    skip = {id(p) for p in plain}
    decayed = [p for p in model.parameters() if id(p) not in skip]
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": plain, "weight_decay": 0.0}]


def step(loss: Callable[[], Tensor], optimizer: Any, autocast: torch.dtype | None,
         check: bool = False) -> Tensor:
    """One optimiser step; returns the detached loss. `check`: look at it on the host first, as the official loop does."""
    optimizer.zero_grad(set_to_none=True)
    device = optimizer.param_groups[0]["params"][0].device.type
    with torch.autocast(device, autocast or torch.bfloat16, enabled=autocast is not None):
        value = loss()
    if check and not math.isfinite(value.item()):
        raise FloatingPointError(f"loss is {value.item()}")
    value.backward()
    optimizer.step()
    return value.detach()
