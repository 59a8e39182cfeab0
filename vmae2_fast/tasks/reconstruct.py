"""Pictures of what a pre-training model does: the clip, what the encoder saw, what the decoder predicted.

Predictions are normalised pixels; they become pictures with each patch's own mean and deviation taken from the clip, as
in the paper's figures. That alone already gives a coarse picture, so the patch means are shown beside: only what the
prediction adds to them is the model's. Patches the decoder did not predict keep the clip's pixels where the encoder saw
them and stay grey elsewhere.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..ops.masks import DualMask, dual_mask
from ..ops.patches import gather_patches, scatter_patches
from ..ops.reconstruction import patch_statistics

_GREY = 0.5


class Reconstruction(NamedTuple):
    """Four uint8 [T,H,W,3] videos."""

    original: np.ndarray
    visible: np.ndarray
    predicted: np.ndarray
    means: np.ndarray
    """Predicting zero: each hidden patch's mean colour."""


@torch.no_grad()
def reconstruct(model: Any, clip: Tensor, *, seed: int = 0, full: bool = True, **masking: Any) -> Reconstruction:
    """Reconstruct one clip, uint8 [T,H,W,3], with a `PretrainViT`.

    `masking` goes to `dual_mask` (encoder_ratio, decoder, decoder_ratio). `full` decodes every hidden patch
    (decoder="none", what the paper's figures show); otherwise only what the decoder mask keeps is predicted.
    """
    if clip.ndim != 4 or clip.dtype != torch.uint8 or clip.shape[-1] != 3:
        raise ValueError(f"reconstruct: clip must be uint8 [T,H,W,3], got {clip.dtype} {tuple(clip.shape)}")
    if full:
        masking = {**masking, "decoder": "none"}
    clip = clip[None]
    zero = torch.zeros(1, dtype=torch.int64, device=clip.device)
    mask = dual_mask(zero, zero, grid=model.grid, seed=seed, **masking)
    was_training = model.training
    model.eval()
    pred = model(clip, mask)
    model.train(was_training)
    return paint(clip, pred, mask, model.grid)


def paint(clip: Tensor, pred: Tensor, mask: DualMask, grid: tuple[int, int, int]) -> Reconstruction:
    """Pictures from normalised predictions [1,Nl,K] of the loss tokens of one clip uint8 [1,T,H,W,3]."""
    patch, tubelet = clip.shape[2] // grid[1], clip.shape[1] // grid[0]
    shape: dict[str, Any] = {"patch": patch, "tubelet": tubelet}
    loss_index = mask.loss_index[:, mask.loss_index[0] >= 0]
    pred = pred[:, : loss_index.shape[1]].float()
    mean, deviation = patch_statistics(clip, loss_index, **shape)
    pixels = (pred.unflatten(-1, (-1, clip.shape[-1])) * deviation + mean).flatten(-2)
    raw = gather_patches(clip, mask.visible_index, mean=(0.0,) * 3, std=(1.0,) * 3, **shape)

    def canvas(rows: Tensor, index: Tensor, order: str) -> tuple[Tensor, Tensor]:
        image = scatter_patches(rows, index, grid=grid, order=order, **shape)
        painted = scatter_patches(torch.ones_like(rows), index, grid=grid, order=order, **shape)
        return image, painted

    seen, where_seen = canvas(raw, mask.visible_index, "conv")
    guessed, where_guessed = canvas(pixels, loss_index, "pixel")
    means, _ = canvas(
        mean.expand(*pixels.shape[:2], -1, -1).flatten(-2).repeat(1, 1, pixels.shape[-1] // mean.shape[-1]),
        loss_index,
        "pixel",
    )
    visible = seen + _GREY * (1 - where_seen)
    rest = (1 - where_guessed) * visible
    return Reconstruction(clip[0].cpu().numpy(), _picture(visible), _picture(guessed + rest), _picture(means + rest))


def _picture(video: Tensor) -> np.ndarray:
    return (video[0].permute(1, 2, 3, 0).clamp(0, 1) * 255 + 0.5).to(torch.uint8).cpu().numpy()


def sheet(reconstructions: list[Reconstruction], *, frames: int = 4, scale: int = 2) -> np.ndarray:
    """One uint8 [h,w,3] picture: per clip four rows (original, visible, predicted, means) of `frames` frames in time."""
    blocks = []
    for parts in reconstructions:
        chosen = np.linspace(0, len(parts.original) - 1, frames).round().astype(int)
        rows = [np.concatenate([_framed(video[i], scale) for i in chosen], axis=1) for video in parts]
        blocks.append(np.concatenate(rows, axis=0))
    columns = 2 if len(blocks) > 1 else 1
    blocks += [np.full_like(blocks[0], 255)] * (-len(blocks) % columns)
    gap = np.full((12, columns * (blocks[0].shape[1] + 12), 3), 255, np.uint8)
    lines = []
    for i in range(0, len(blocks), columns):
        lines += [
            np.concatenate(
                [np.pad(b, ((0, 0), (6, 6), (0, 0)), constant_values=255) for b in blocks[i : i + columns]], axis=1
            ),
            gap,
        ]
    return np.concatenate(lines[:-1], axis=0)


def _framed(image: np.ndarray, scale: int) -> np.ndarray:
    big = image.repeat(scale, axis=0).repeat(scale, axis=1)
    return np.pad(big, ((1, 1), (1, 1), (0, 0)), constant_values=255)


def save_png(image: np.ndarray, path: str | Path) -> None:
    """A uint8 [h,w,3] picture as PNG. Needs Pillow (extra `report`)."""
    _pillow().fromarray(image).save(path)


def save_gif(parts: Reconstruction, path: str | Path, *, scale: int = 2, milliseconds: int = 125) -> None:
    """Original, visible, predicted and means side by side as an endless GIF. Needs Pillow (extra `report`)."""
    frames = [np.concatenate([_framed(video[i], scale) for video in parts], axis=1) for i in range(len(parts.original))]
    first, *rest = [_pillow().fromarray(f) for f in frames]
    first.save(path, save_all=True, append_images=rest, duration=milliseconds, loop=0)


def _pillow() -> Any:
    try:
        from PIL import Image
    except ImportError as error:
        raise ValueError("writing pictures needs Pillow: pip install 'vmae2_fast[report]'") from error
    return Image
