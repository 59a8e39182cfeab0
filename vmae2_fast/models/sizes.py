"""The official model sizes in one table, and what a `ModelConfig` means once every default is filled in.

Sizes: VideoMAE V2 paper, Table "architectures of VideoMAE V2" (ViT-g: width 1408, depth 40, 16 heads, MLP 6144, cube
2x14x14) and the released code. The decoder does not grow with the encoder; its MLP inherits the encoder's ratio, so
the released ViT-g decoder has 2234 hidden units where the paper prints 2048 (`decoder_mlp_ratio=4.0` gives those).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ..config import ModelConfig, divisible, require, unknown


@dataclass(frozen=True)
class Size:
    """One row of the table. Widths in channels, patch in pixels."""

    width: int
    depth: int
    heads: int
    patch: int
    mlp_ratio: float
    decoder_width: int
    decoder_heads: int


SIZES: dict[str, Size] = {
    "small": Size(384, 12, 6, 16, 4.0, 192, 3),
    "base": Size(768, 12, 12, 16, 4.0, 384, 6),
    "large": Size(1024, 24, 16, 16, 4.0, 512, 8),
    "huge": Size(1280, 32, 16, 16, 4.0, 512, 8),
    "giant": Size(1408, 40, 16, 14, 48 / 11, 512, 8),
}
NATIVE_FRAMES, NATIVE_SIZE = 16, 224

_NAMES: dict[str, tuple[Literal["pretrain", "classify"], Size]] = {}
for _size, _row in SIZES.items():
    _NAMES[f"pretrain_videomae_{_size}_patch{_row.patch}_224"] = ("pretrain", _row)
    _NAMES[f"vit_{_size}_patch{_row.patch}_224"] = ("classify", _row)


def output_norm_eps(config: ModelConfig) -> float:
    """Epsilon of the norm in front of the head."""
    return config.norm_eps if config.output_norm_eps is None else config.output_norm_eps


@dataclass(frozen=True)
class StackSpec:
    """A stack of transformer blocks."""

    width: int
    depth: int
    heads: int
    mlp_hidden: int


@dataclass(frozen=True)
class ModelSpec:
    """A `ModelConfig` with nothing left open."""

    kind: Literal["pretrain", "classify"]
    frames: int
    size: int
    patch: int
    tubelet: int
    channels: int
    encoder: StackSpec
    decoder: StackSpec | None
    """None for classification models."""
    decoder_outputs: int
    """Values the decoder predicts for a token."""

    @property
    def grid(self) -> tuple[int, int, int]:
        """Tokens along t, y, x: (T', H', W')."""
        return self.frames // self.tubelet, self.size // self.patch, self.size // self.patch

    @property
    def tokens(self) -> int:
        t, y, x = self.grid
        return t * y * x

    @property
    def patch_values(self) -> int:
        """Values of one tubelet patch over all channels: C * tubelet * patch * patch."""
        return self.channels * self.tubelet * self.patch * self.patch


def model_names() -> list[str]:
    """The official names `create_model` knows."""
    return list(_NAMES)


def resolve(config: ModelConfig) -> ModelSpec:
    """Fill in what the name implies. Raises ValueError naming the key for an unknown name (with close matches), a clip
    that is not a whole number of tubelets or patches, a width the heads do not divide, or a value out of range."""
    if config.name not in _NAMES:
        raise ValueError(unknown("model", config.name, model_names()))
    kind, row = _NAMES[config.name]

    def given(value: int | None, default: int) -> int:
        return default if value is None else value

    patch = given(config.patch, row.patch)
    ratio = row.mlp_ratio if config.mlp_ratio is None else config.mlp_ratio
    decoder_ratio = ratio if config.decoder_mlp_ratio is None else config.decoder_mlp_ratio
    width, heads = given(config.width, row.width), given(config.heads, row.heads)
    counts = {
        "frames": config.frames,
        "size": config.size,
        "patch": patch,
        "tubelet": config.tubelet,
        "in_chans": config.in_chans,
        "width": width,
        "depth": given(config.depth, row.depth),
        "heads": heads,
    }
    outputs = given(config.decoder_outputs, config.in_chans * config.tubelet * patch * patch)
    decoder = None
    if kind == "pretrain":
        decoder_width = given(config.decoder_width, row.decoder_width)
        decoder_heads = given(config.decoder_heads, row.decoder_heads)
        counts |= {"decoder_width": decoder_width, "decoder_depth": config.decoder_depth, "decoder_heads": decoder_heads}
        counts["decoder_outputs"] = outputs
        decoder = StackSpec(decoder_width, config.decoder_depth, decoder_heads, int(decoder_width * decoder_ratio))
    for key, value in counts.items():
        require(value >= 1, f"model.{key} must be at least 1, got {value}")
    require(
        int(width * ratio) >= 1 and (decoder is None or decoder.mlp_hidden >= 1),
        f"model.mlp_ratio={ratio} leaves no hidden units at width {width}",
    )

    divisible("model.frames", config.frames, "model.tubelet", config.tubelet)
    divisible("model.size", config.size, "model.patch", patch)
    divisible("model.width", width, "model.heads", heads)
    if decoder is not None:
        divisible("model.decoder_width", decoder.width, "model.decoder_heads", decoder.heads)
    require(config.num_classes >= 0, f"model.num_classes must not be negative, got {config.num_classes}")
    for key, rate in (("drop_path", config.drop_path), ("head_dropout", config.head_dropout)):
        require(0 <= rate < 1, f"model.{key} must lie in [0, 1), got {rate}")
    for key, values in (("pixel_mean", config.pixel_mean), ("pixel_std", config.pixel_std)):
        require(
            values is None or len(values) == config.in_chans,
            f"model.{key} needs {config.in_chans} values (model.in_chans), got {values}",
        )
        require(
            values is not None or config.in_chans == 3,
            f"model.{key} must be given for {config.in_chans} channels: the ImageNet default has 3",
        )
    require(
        not (config.learnable_positions and kind == "pretrain"),
        "model.learnable_positions is for classification models; pre-training uses the sin-cos table",
    )
    return ModelSpec(
        kind=kind,
        frames=config.frames,
        size=config.size,
        patch=patch,
        tubelet=config.tubelet,
        channels=config.in_chans,
        encoder=StackSpec(width, counts["depth"], heads, int(width * ratio)),
        decoder=decoder,
        decoder_outputs=outputs if decoder is not None else 0,
    )
