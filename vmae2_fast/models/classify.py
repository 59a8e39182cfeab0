"""The classification ViT: all tokens of a clip -> class scores (the official fine-tuning model)."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..config import ModelConfig
from ..ops._half_block import statistics_dtype
from ..ops.drop_path import kept_samples
from .positions import PositionTable
from .sizes import output_norm_eps, resolve
from .vit import Linear, Mlp, PatchEmbed, Pending, add, fold, initialise, make_blocks, set_norm_eps, stack, stream

HEAD = ("pool.", "fc_norm.", "norm.", "head.")
"""Parameters behind the blocks."""


class AttentivePool(nn.Module):
    """One learned query attends to all tokens, then an MLP: tokens [B, N, D] -> [B, D].

    The head of an attentive probe (V-JEPA, Bardes et al. 2024, section 4: a cross-attention block with one query), which
    lets a frozen trunk be read without hoping that the mean of its tokens says it all.
    """

    def __init__(self, width: int, heads: int, eps: float) -> None:
        super().__init__()
        self.heads = heads
        self.query = nn.Parameter(torch.empty(1, 1, width))
        self.norm1 = nn.LayerNorm(width, eps=eps)
        self.q, self.kv = Linear(width, width), Linear(width, 2 * width)
        self.proj = Linear(width, width)
        self.norm2 = nn.LayerNorm(width, eps=eps)
        self.mlp = Mlp(width, 4 * width)

    def forward(self, tokens: Tensor) -> Tensor:
        def split(x: Tensor) -> Tensor:
            return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)

        query = self.query.expand(tokens.shape[0], -1, -1)
        key, value = self.kv(self.norm1(tokens)).chunk(2, dim=-1)
        mixed = F.scaled_dot_product_attention(split(self.q(query)), split(key), split(value))
        x = query + self.proj(mixed.transpose(1, 2).flatten(2))
        return (x + self.mlp.fc2(F.gelu(self.mlp.fc1(self.norm2(x)))))[:, 0]


class VisionTransformer(nn.Module):
    """`pooling="mean"`: mean over tokens, then `fc_norm` (the official default; no norm behind the blocks).
    `pooling="attentive"`: `pool` (`AttentivePool`) in place of the mean. `pooling="first"`: `norm` of the first token.
    Then dropout and `head`; without classes the features are the output.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        spec = resolve(config)
        if spec.kind != "classify":
            raise ValueError(f"{config.name!r} is a pre-training model; a classification name begins with vit_")
        self.config, self.spec = config, spec
        width = spec.encoder.width
        self.patch_embed = PatchEmbed(spec, config.pixel_mean, config.pixel_std)
        if config.learnable_positions:
            self.pos_embed = nn.Parameter(torch.empty(1, spec.tokens, width))
        else:
            self.positions = PositionTable(spec, width, config.positions)
        self.blocks = make_blocks(spec.encoder, config)
        if config.pooling == "attentive":
            self.pool = AttentivePool(width, spec.encoder.heads, config.norm_eps)
        if config.pooling != "first":
            self.fc_norm = nn.LayerNorm(width, eps=output_norm_eps(config))
        else:
            self.norm = nn.LayerNorm(width, eps=config.norm_eps)
        self.head_dropout = nn.Dropout(config.head_dropout)
        self.head = Linear(width, config.num_classes) if config.num_classes else nn.Identity()
        self.init_weights()

    def init_weights(self, only: Collection[str] | None = None) -> None:
        """Official initial values: matrices normal with std `config.init_std` (the official cut at +-2 lies at 100 of 0.02),
        torch's default for the patch embedding, the head scaled by `config.head_init_scale`. `only`: names to write."""
        scale = self.config.head_init_scale
        normal: Callable[[Tensor], Tensor] = partial(nn.init.normal_, std=self.config.init_std)
        special: dict[str, Callable[[Tensor], object]] = {
            "pos_embed": normal,
            "pool.query": normal,
            "head.weight": lambda w: normal(w).mul_(scale),
        }
        initialise(self, normal, special=special, only=only)

    @property
    def grid(self) -> tuple[int, int, int]:
        """Tokens along t, y, x; token id = (t H' + y) W' + x."""
        return self.spec.grid

    def set_norm_eps(self, norm_eps: float, output: float | None = None) -> None:
        """Compute all norms with another epsilon; `output`: that of `fc_norm` (None: the same)."""
        set_norm_eps(self, getattr(self, "fc_norm", None), norm_eps, output)

    def draw_kept(self, position: Tensor, view: Tensor, seed: int) -> list[Tensor]:
        """The samples that run each branch of each block, for `drop_path_skip`: see `ops.drop_path.kept_samples`."""
        probabilities = [float(block.drop_path) for block in self.blocks for _ in range(2)]  # type: ignore[arg-type]
        return kept_samples(position, view, seed=seed, probabilities=probabilities)

    def tokens(self, clip: Tensor, rows: slice | None = None, kept: Sequence[Tensor] | None = None) -> Tensor:
        """Tokens [B, N, width] behind the last block, before any norm (or only `rows` of them).

        clip: uint8 [B, T, H, W, C] or normalised float [B, C, T, H, W]. kept: as in `forward`."""
        return add(*self._stack(clip, rows, kept))

    def _stack(
        self, clip: Tensor, rows: slice | None, kept: Sequence[Tensor] | None
    ) -> tuple[Tensor, Pending | None]:
        position = self.pos_embed if self.config.learnable_positions else self.positions()
        return stack(self.blocks, stream(self.patch_embed(clip) + position, self.config), rows, kept)

    def freeze_trunk(self) -> None:
        """Take gradients away from all that stands before the pooling: patch embedding, positions and blocks."""
        for name, parameter in self.named_parameters():
            parameter.requires_grad_(name.startswith(HEAD))

    def forward_features(self, clip: Tensor, kept: Sequence[Tensor] | None = None) -> Tensor:
        """Pooled features [B, width]. kept: as in `forward`."""
        if self.config.pooling == "mean":
            tokens = self.tokens(clip, kept=kept)
            return self.fc_norm(tokens.mean(1, dtype=statistics_dtype(tokens.dtype)))
        if self.config.pooling == "attentive":
            return self.fc_norm(self.pool(self.tokens(clip, kept=kept)))
        return fold(*self._stack(clip, slice(0, 1), kept), self.norm)[:, 0]

    def forward(self, clip: Tensor, kept: Sequence[Tensor] | None = None) -> Tensor:
        """Class scores [B, num_classes], before softmax; [B, width] features if the model has no classes.

        kept: what `draw_kept` gave for these clips; while training with `drop_path_skip`, None draws it from torch's CPU
        generator. Otherwise it is not looked at."""
        return self.head(self.head_dropout(self.forward_features(clip, kept)))
