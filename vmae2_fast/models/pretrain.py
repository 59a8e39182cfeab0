"""The dual-masked video autoencoder (VideoMAE V2 paper, section 3.2, figure 2).

The encoder sees the visible tokens only (10 % by default), the decoder reconstructs the kept half of all tokens, and
the loss counts those of them that the encoder did not see. Masks are index lists (`ops.masks.DualMask`): nothing here
reads a value back to the host, so a step can be captured as a CUDA graph.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Collection
from typing import Literal

import torch
from torch import Tensor, nn

from ..config import ModelConfig
from ..ops.decoder_tokens import decoder_tokens
from ..ops.masks import DualMask
from .positions import PositionTable
from .sizes import ModelSpec, StackSpec, output_norm_eps, resolve
from .vit import Linear, PatchEmbed, fold, initialise, make_blocks, set_norm_eps, stack, stream, truncated_normal


class Encoder(nn.Module):
    """Patch embedding, blocks and final norm of the pre-training encoder, over visible tokens."""

    def __init__(self, spec: ModelSpec, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.patch_embed = PatchEmbed(spec, config.pixel_mean, config.pixel_std)
        self.positions = PositionTable(spec, spec.encoder.width, config.positions)
        self.blocks = make_blocks(spec.encoder, config)
        self.norm = nn.LayerNorm(spec.encoder.width, eps=config.norm_eps)

    def forward(self, clip: Tensor, visible_index: Tensor) -> Tensor:
        """Encoder tokens [B, Nv, width], normed."""
        tokens = self.patch_embed(clip, visible_index) + self.positions(visible_index)
        return fold(*stack(self.blocks, stream(tokens, self.config)), self.norm)


class Decoder(nn.Module):
    """Blocks, norm and pixel head; only `rows` of the sequence leave the last block's attention."""

    def __init__(self, spec: StackSpec, outputs: int, config: ModelConfig) -> None:
        super().__init__()
        self.config = dataclasses.replace(config, residual_dtype="float32") if config.decoder_fp32 else config
        self.blocks = make_blocks(spec, config)
        self.norm = nn.LayerNorm(spec.width, eps=output_norm_eps(config))
        self.head = Linear(spec.width, outputs)

    def forward(self, tokens: Tensor, rows: Tensor | slice) -> Tensor:
        """tokens [B, V + Nd, width] -> predictions [B, K, outputs] of the K tokens in `rows`."""
        return self.head(fold(*stack(self.blocks, stream(tokens, self.config), rows), self.norm))


class PretrainViT(nn.Module):
    """Encoder, linear projection, mask token and decoder under the official names.

    `grid` is (T', H', W'); token id = (t H' + y) W' + x. `mean`, `std`: what uint8 clips are normalised with (None:
    ImageNet). `config.positions` chooses both position tables.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        spec = resolve(config)
        if spec.decoder is None:
            raise ValueError(f"{config.name!r} is a classification model; a pre-training name begins with pretrain_videomae_")
        self.config, self.spec = config, spec
        self.encoder = Encoder(spec, config)
        self.decoder = Decoder(spec.decoder, spec.decoder_outputs, config)
        self.encoder_to_decoder = Linear(spec.encoder.width, spec.decoder.width, bias=False)
        self.mask_token = nn.Parameter(torch.empty(1, 1, spec.decoder.width))
        self.decoder_positions = PositionTable(spec, spec.decoder.width, config.positions)
        self.init_weights()

    def init_weights(self, only: Collection[str] | None = None) -> None:
        """Official initial values: Xavier-uniform matrices in encoder and decoder, torch's default for the patch embedding
        and `encoder_to_decoder`, mask token normal with std 0.02 cut at one std. `only`: parameter names to write."""
        bound = self.spec.encoder.width**-0.5
        initialise(
            self,
            special={
                "mask_token": truncated_normal,
                "encoder_to_decoder.weight": lambda weight: nn.init.uniform_(weight, -bound, bound),
            },
            only=only,
        )

    @property
    def grid(self) -> tuple[int, int, int]:
        return self.spec.grid

    def set_norm_eps(self, norm_eps: float, output: float | None = None) -> None:
        """Compute all norms with another epsilon; `output`: the one in front of the head (None: the same)."""
        set_norm_eps(self, self.decoder.norm, norm_eps, output)

    @property
    def mean(self) -> tuple[float, ...] | None:
        return self.config.pixel_mean

    @property
    def std(self) -> tuple[float, ...] | None:
        return self.config.pixel_std

    def encode(self, clip: Tensor, visible_index: Tensor) -> Tensor:
        """Encoder tokens after `encoder.norm` [B, Nv, width] of the visible tokens.

        clip: uint8 [B, T, H, W, C] or normalised float [B, C, T, H, W]. visible_index: [B, Nv] ascending token ids."""
        return self.encoder(clip, visible_index)

    def forward(self, clip: Tensor, mask: DualMask, tokens: Literal["loss", "decode"] = "loss") -> Tensor:
        """Predicted pixels [B, K, tubelet * patch * patch * C], ordered (t, y, x, c) within a patch; with
        `config.decoder_outputs` that many values [B, K, decoder_outputs] of another target.

        tokens="loss": K = Nl, those of `mask.loss_index` (a padded place predicts garbage that the loss leaves out).
        The others are dropped behind the last attention, where they can no longer change anything that counts: loss
        and gradients are exactly those of decoding all. tokens="decode": K = Nd, those of `mask.decode_index`."""
        if tokens not in ("loss", "decode"):
            raise ValueError(f'tokens must be "loss" or "decode", got {tokens!r}')
        encoded = self.encode(clip, mask.visible_index)
        first = mask.visible_index.shape[1]
        rows: Tensor | slice = mask.loss_slot.long() + first if tokens == "loss" else slice(first, None)
        with torch.autocast(clip.device.type, enabled=False) if self.config.decoder_fp32 else contextlib.nullcontext():
            visible = self.encoder_to_decoder(encoded)
            table = self.decoder_positions()
            sequence = decoder_tokens(visible, self.mask_token, table, mask.visible_index, mask.decode_index)
            return self.decoder(sequence, rows)
