"""Frames as video codecs store them: a plane of luma and two of chroma at half the resolution (YUV 4:2:0, planar, "I420").

A pixel becomes RGB in whole numbers, with the coefficients of ITU-R BT.601 or BT.709 in units of 1/8192 and the chroma sample
that covers it (the nearest one):

    R = clamp((y (Y - black) + rv (V - 128) + 4096) >> 13)
    G = clamp((y (Y - black) + gu (U - 128) + gv (V - 128) + 4096) >> 13)
    B = clamp((y (Y - black) + bu (U - 128) + 4096) >> 13)

which is the exact conversion rounded to the nearest level but where that is within 0.03 of a half.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

SHIFT = 13
"""Bits of a coefficient's fraction: with them every coefficient is below 2^15, as vector instructions multiply."""

_LUMA_SHARES = {"bt601": (0.299, 0.114), "bt709": (0.2126, 0.0722)}
_RANGES = ("limited", "full")


class Coefficients(NamedTuple):
    """What the formula above needs; all zero for frames that are not YUV."""

    black: int
    y: int
    rv: int
    gu: int
    gv: int
    bu: int


NOT_YUV = Coefficients(0, 0, 0, 0, 0, 0)


def coefficients(matrix: str, value_range: str) -> Coefficients:
    """Coefficients for `matrix` ("bt601", "bt709") and `value_range` ("limited": 16..235 and 16..240; "full": 0..255)."""
    if matrix not in _LUMA_SHARES:
        raise ValueError(f'resize_crop: matrix must be one of {", ".join(_LUMA_SHARES)}, got {matrix!r}')
    if value_range not in _RANGES:
        raise ValueError(f'resize_crop: value_range must be one of {", ".join(_RANGES)}, got {value_range!r}')
    red, blue = _LUMA_SHARES[matrix]
    green = 1 - red - blue
    limited = value_range == "limited"
    luma, chroma = ((255 / 219, 255 / 224) if limited else (1.0, 1.0))
    exact = (
        luma,
        2 * (1 - red) * chroma,
        -2 * blue * (1 - blue) / green * chroma,
        -2 * red * (1 - red) / green * chroma,
        2 * (1 - blue) * chroma,
    )
    return Coefficients(16 if limited else 0, *(round(value * (1 << SHIFT)) for value in exact))


def frame_bytes(height: int, width: int) -> int:
    """Bytes of one frame whose planes follow one another without gaps; odd sides of chroma are rounded up."""
    return height * width + 2 * ((height + 1) // 2) * ((width + 1) // 2)


@dataclass(frozen=True)
class Yuv420:
    """Frames in YUV 4:2:0. Raises ValueError for planes of another size or names that are not known."""

    planes: Tensor
    """uint8 [T, bytes], or [N, T, bytes] for N clips: of every frame the planes Y [height, width], U and V
    [ceil(height / 2), ceil(width / 2)], one behind the other (`frame_bytes`)."""
    height: int
    width: int
    matrix: str = "bt601"
    """"bt601" (also what files mean that name none) or "bt709"."""
    value_range: str = "limited"
    """"limited" or "full"."""

    def __post_init__(self) -> None:
        coefficients(self.matrix, self.value_range)
        if min(self.height, self.width) < 1:
            raise ValueError(f"resize_crop: YUV 4:2:0 frames must have a pixel, got {self.height} x {self.width}")
        size = frame_bytes(self.height, self.width)
        if self.planes.dtype != torch.uint8 or self.planes.ndim not in (2, 3) or self.planes.shape[-1] != size:
            raise ValueError(
                f"resize_crop: YUV 4:2:0 frames of {self.height} x {self.width} pixels must be uint8 [T, {size}] or "
                f"[N, T, {size}], got {self.planes.dtype} {tuple(self.planes.shape)}"
            )


def frame_size(frames: Tensor | Yuv420) -> tuple[int, int]:
    """Height and width in pixels of frames [..., H, W, C] or in YUV 4:2:0."""
    return (frames.height, frames.width) if isinstance(frames, Yuv420) else (frames.shape[-3], frames.shape[-2])


def rgb_reference(luma: Tensor, u: Tensor, v: Tensor, row: Coefficients) -> Tensor:
    """The specification: int64 [H, W, 3] of luma and the chroma of every pixel, each uint8 [H, W]."""
    y, u, v = row.y * (luma.long() - row.black) + (1 << SHIFT - 1), u.long() - 128, v.long() - 128
    return (torch.stack([y + row.rv * v, y + row.gu * u + row.gv * v, y + row.bu * u], dim=-1) >> SHIFT).clamp_(0, 255)
