"""ActionFormer (arXiv 2202.07925): a pyramid of transformer blocks over the features of a whole video, and two heads that
say at every point of every level which actions it lies in, and how far away their ends are.

    features [B, T, C_in] --masked convolutions--> [B, T, C] --stem blocks, then blocks of stride 2--> levels l of T / 2^l
    level --LayerNorm (neck)--> class head: logits [B, T_l, classes]    regression head: distances [B, T_l, 2] / 2^l

A block attends within a band of `window` tokens of its level. Videos of different length share a batch: `valid` [B, T] is
False on the padding at their end, which nobody attends to and which every convolution leaves zero.

Parameters have names of this package; `models.actionformer_weights` reads the released checkpoints.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..config import ActionFormerConfig
from ..ops.attention import attention


class Level(NamedTuple):
    """What the heads say about one level of the pyramid."""

    logits: Tensor
    """[B, T_l, classes]."""
    distances: Tensor
    """[B, T_l, 2], at least 0: to the start and to the end, in units of the level's stride."""
    valid: Tensor
    """bool [B, T_l]."""
    stride: int
    """Points of the input between two of the level."""


class MaskedConv(nn.Module):
    """A convolution along time of [B, T, C] that gives zero on padding; a stride keeps every stride-th entry of the mask."""

    def __init__(self, inputs: int, outputs: int, size: int, *, stride: int = 1, groups: int = 1, bias: bool = False) -> None:
        super().__init__()
        self.stride = stride
        self.conv = nn.Conv1d(inputs, outputs, size, stride=stride, padding=size // 2, groups=groups, bias=bias)
        if bias:
            nn.init.zeros_(self.conv.bias)  # type: ignore[arg-type]

    def forward(self, x: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
        valid = valid[:, :: self.stride]
        out = self.conv(x.transpose(1, 2)).transpose(1, 2)
        return out * valid.unsqueeze(-1).to(out.dtype), valid


class ConvLayer(nn.Module):
    """Masked convolution, LayerNorm, ReLU."""

    def __init__(self, inputs: int, outputs: int, size: int) -> None:
        super().__init__()
        self.conv = MaskedConv(inputs, outputs, size)
        self.norm = nn.LayerNorm(outputs)

    def forward(self, x: Tensor, valid: Tensor) -> Tensor:
        return F.relu(self.norm(self.conv(x, valid)[0]))


class Projection(nn.Module):
    """Queries, keys or values: a depthwise convolution (which does the striding), LayerNorm, linear."""

    def __init__(self, width: int, stride: int) -> None:
        super().__init__()
        self.conv = MaskedConv(width, width, stride + 1 if stride > 1 else 3, stride=stride, groups=width)
        self.norm = nn.LayerNorm(width)
        self.linear = nn.Linear(width, width)

    def forward(self, x: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
        x, valid = self.conv(x, valid)
        return self.linear(self.norm(x)), valid


class Block(nn.Module):
    """Pre-norm transformer block with local attention; `stride` 2 halves the sequence, the skip by maximum pooling.

    window: tokens of the band (odd, the token itself in the middle), 0 for attention over all. With `layer_scale` above 0 a
    learned scale per channel on both branches.
    """

    def __init__(
        self, width: int, heads: int, *, stride: int, window: int, drop_path: float = 0.0, layer_scale: float = 0.0
    ) -> None:
        super().__init__()
        self.heads, self.stride, self.reach, self.drop_path = heads, stride, window // 2, drop_path
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.query, self.key, self.value = (Projection(width, stride) for _ in range(3))
        self.proj = nn.Linear(width, width)
        self.fc1, self.fc2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        scaled = layer_scale > 0
        self.gamma_1 = nn.Parameter(torch.full((width,), layer_scale)) if scaled else None
        self.gamma_2 = nn.Parameter(torch.full((width,), layer_scale)) if scaled else None

    def forward(self, x: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
        """x [B, T, C], valid bool [B, T] -> the same at T / stride."""
        h = self.norm1(x)
        (q, inside), (k, _), (v, _) = (p(h, valid) for p in (self.query, self.key, self.value))
        qkv = torch.stack((q, k, v), dim=2).unflatten(3, (self.heads, -1))
        mixed = attention(qkv, window=self.reach or None, lengths=inside.sum(1))
        keep = inside.unsqueeze(-1).to(x.dtype)
        branch = self.proj(mixed.flatten(2)) * keep
        x = self._skip(x) * keep + self._branch(branch, self.gamma_1)
        branch = self.fc2(F.gelu(self.fc1(self.norm2(x)))) * keep
        return x + self._branch(branch, self.gamma_2), inside

    def _skip(self, x: Tensor) -> Tensor:
        if self.stride == 1:
            return x
        size = self.stride + 1
        return F.max_pool1d(x.transpose(1, 2), size, self.stride, padding=size // 2).transpose(1, 2)

    def _branch(self, x: Tensor, gamma: Tensor | None) -> Tensor:
        if gamma is not None:
            x = x * gamma
        if not self.training or self.drop_path == 0:
            return x
        keep = 1 - self.drop_path
        return x * ((torch.rand(x.shape[0], 1, 1, device=x.device) < keep).to(x.dtype) / keep)


class Head(nn.Module):
    """Convolution layers and a last convolution, shared by all levels."""

    def __init__(self, inputs: int, width: int, outputs: int, layers: int, size: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(ConvLayer(inputs if i == 0 else width, width, size) for i in range(layers - 1))
        self.last = MaskedConv(width, outputs, size, bias=True)

    def forward(self, x: Tensor, valid: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x, valid)
        return self.last(x, valid)[0]


class ActionFormer(nn.Module):
    """The detector on features of `config.inputs` channels; see the head of this file.

    `normalizer` is the moving average of the number of positive points that the losses are divided by; it is kept with the
    weights, so that a resumed run goes on with it.
    """

    normalizer: Tensor

    def __init__(self, config: ActionFormerConfig) -> None:
        super().__init__()
        self.config = config
        width, windows = config.width, config.windows
        self.embed = nn.ModuleList(
            ConvLayer(config.inputs if i == 0 else width, width, 3) for i in range(config.embed_layers)
        )
        options = {"drop_path": config.drop_path, "layer_scale": config.layer_scale}
        self.stem = nn.ModuleList(
            Block(width, config.heads, stride=1, window=windows[0], **options) for _ in range(config.stem_blocks)
        )
        self.branch = nn.ModuleList(
            Block(width, config.heads, stride=2, window=window, **options) for window in windows[1:]
        )
        self.neck = nn.ModuleList(nn.LayerNorm(width) for _ in windows)
        self.class_head = Head(width, width, config.classes, config.head_layers, 3)
        self.distance_head = Head(width, width, 2, config.head_layers, 3)
        # One tensor for all levels: parameters that are scalars cannot be split over ranks.
        self.distance_scale = nn.Parameter(torch.ones(len(windows)))
        for layer in (self.class_head.last, *(m for m in self.modules() if isinstance(m, nn.Linear))):
            bias = layer.conv.bias if isinstance(layer, MaskedConv) else layer.bias
            # every point starts as background with this probability, or the first losses would be all negatives
            value = -math.log((1 - config.prior) / config.prior) if isinstance(layer, MaskedConv) else 0.0
            nn.init.constant_(bias, value)  # type: ignore[arg-type]
        self.register_buffer("normalizer", torch.tensor(float(config.initial_normalizer)))
        table = position_table(config.max_length, width) if config.positions else None
        self.register_buffer("positions", table, persistent=False)

    @property
    def strides(self) -> list[int]:
        """Points of the input between two of each level."""
        return [2**level for level in range(len(self.neck))]

    def padded_length(self, length: int) -> int:
        """Length a sequence is padded to: `max_length`, and beyond it the next length that all levels can take."""
        return self.config.padded_length(length)

    def forward(self, features: Tensor, valid: Tensor) -> list[Level]:
        """features: [B, T, C_in], T a multiple of the last level's stride; valid: bool [B, T], one run from the start.

        Raises ValueError for other shapes.
        """
        config, stride = self.config, self.strides[-1]
        if features.dim() != 3 or features.shape[2] != config.inputs or features.shape[1] % stride:
            raise ValueError(
                f"features are {list(features.shape)}; this detector takes [B, T, {config.inputs}] with T a multiple of "
                f"{stride}: pad with padded_length()"
            )
        if valid.shape != features.shape[:2] or valid.dtype != torch.bool:
            raise ValueError(f"valid is {valid.dtype} {list(valid.shape)}; it must be bool {list(features.shape[:2])}")
        x = features
        for layer in self.embed:
            x = layer(x, valid)
        if self.positions is not None:
            x = x + self._positions(x.shape[1]).to(x.dtype) * valid.unsqueeze(-1).to(x.dtype)
        for block in self.stem:
            x, valid = block(x, valid)
        levels = [(x, valid)]
        for block in self.branch:
            levels.append(block(*levels[-1]))
        out = []
        for (x, inside), norm, scale, stride in zip(levels, self.neck, self.distance_scale.unbind(), self.strides):
            x = norm(x)
            distances = F.relu(scale * self.distance_head(x, inside))
            out.append(Level(self.class_head(x, inside), distances, inside, stride))
        return out

    def _positions(self, length: int) -> Tensor:
        table: Tensor = self.positions  # type: ignore[assignment]
        if length <= len(table):
            return table[:length]
        return F.interpolate(table.T[None], length, mode="linear", align_corners=False)[0].T


def position_table(length: int, width: int) -> Tensor:
    """Sine and cosine of positions [length, width], divided by sqrt(width): what features of unit size can bear."""
    channel = torch.arange(width, dtype=torch.float64)
    angle = torch.arange(length, dtype=torch.float64)[:, None] / 10000 ** (2 * (channel // 2) / width)
    table = torch.where(channel % 2 == 0, angle.sin(), angle.cos())
    return (table / math.sqrt(width)).float()
