"""Dual-masked pre-training (paper section 3.2): reconstruct the normalised pixels of hidden, decoded patches."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..config import PretrainConfig
from ..data.evaluation_loader import VideoViews
from ..data.loader import Batch
from ..models import PretrainViT, build_model
from ..ops.masks import DualMask, dual_mask, mask_sizes
from ..ops.patches import gather_patches
from ..ops.reconstruction import reconstruction_loss
from .base import Task, view_batches


class PretrainTask(Task[PretrainConfig]):
    """Masks are drawn on the device from each clip's position and view; clips stay uint8 up to the kernels."""

    def __init__(self, config: PretrainConfig, device: torch.device | str = "cpu", *, on_meta: bool = False) -> None:
        super().__init__(config, device, on_meta=on_meta)
        model = self.place(lambda: build_model(config.model))
        if not isinstance(model, PretrainViT):
            raise ValueError(
                f"{config.name}: pre-training needs a pretrain_videomae_* model, got model.name={config.model.name}"
            )
        self.model = model
        self.grid: tuple[int, int, int] = model.grid
        self.patch = config.model.size // self.grid[1]
        self.tubelet = config.model.frames // self.grid[0]
        mask = config.mask
        self.masking: dict[str, Any] = {
            "encoder_ratio": mask.encoder_ratio, "decoder": mask.decoder, "decoder_ratio": mask.decoder_ratio
        }  # fmt: skip
        _, self.decoded, self.loss_tokens = mask_sizes(self.grid, **self.masking)

    def masks(self, position: Tensor, view: Tensor) -> DualMask:
        """Masks of the clips at `position` [B], `view` [B] int64, drawn on this task's device."""
        position, view = (t.to(self.device, non_blocking=True) for t in (position, view))
        return dual_mask(position, view, grid=self.grid, seed=self.config.seed, **self.masking)

    def static_count(self, clips: int) -> float | None:
        """Loss tokens ("code") or decoded tokens ("paper") of `clips` clips, where the mask makes that a constant."""
        if self.config.train.loss_denominator == "paper":
            return float(clips * self.decoded)
        decoder = self.config.mask.decoder
        # The running cell has period 4 in time: with T' % 4 == 0 every tube is decoded equally often.
        constant = decoder == "none" or (decoder == "running_cell" and self.grid[0] % 4 == 0)
        return float(clips * self.loss_tokens) if constant else None

    def count(self, batches: Sequence[Batch]) -> Tensor:
        return torch.stack([(self.masks(b.position, b.view).loss_index >= 0).sum() for b in batches]).sum().float()

    def loss(self, batch: Batch) -> dict[str, Tensor]:
        mask = self.masks(batch.position, batch.view)
        clip = batch.clip.to(self.device, non_blocking=True)
        with self.autocast():
            pred = self.model(clip, mask)
            return {"loss_sum": self._sum(pred, clip, mask)}

    def _sum(self, pred: Tensor, clip: Tensor, mask: DualMask) -> Tensor:
        total, _ = reconstruction_loss(
            pred, clip, mask.loss_index, patch=self.patch, tubelet=self.tubelet,
            normalize=self.config.normalize_target, reduction="sum",
        )  # fmt: skip
        return total

    @torch.no_grad()
    def evaluate(self, views: Iterable[VideoViews]) -> dict[str, Any]:
        """Mean loss per loss token on fixed clips and masks, beside two predictors that need no learning.

        `zero_predictor` predicts 0 everywhere: the mean of each patch, when targets are normalised.
        `copy_nearest` predicts, for each loss patch, the pixels of the visible patch nearest in (t, y, x) (ties: lower
        id), normalised by that patch's own statistics when targets are. All three are over the same loss tokens.
        Masks depend on the video's place in the set and the view, so every call sees the same ones.
        """
        self.model.eval()
        sums = torch.zeros(3, dtype=torch.float64, device=self.device)
        tokens = torch.zeros((), dtype=torch.int64, device=self.device)
        clips = 0
        for batch in view_batches(views, self.config.train.micro_batch or self.config.train.global_batch):
            clip = batch.clip.to(self.device, non_blocking=True)
            mask = self.masks(torch.tensor(batch.video), torch.tensor(batch.view))
            with self.autocast():
                pred = self.model(clip, mask)
            guesses = (pred, torch.zeros_like(pred, dtype=torch.float32), self.copy_nearest(clip, mask))
            sums += torch.stack([self._sum(guess, clip, mask) for guess in guesses])
            tokens += (mask.loss_index >= 0).sum()
            clips += len(clip)
        clips, counted, *totals = (sum(values) for values in zip(*self.gather((clips, tokens.item(), *sums.tolist()))))
        if not clips:
            raise ValueError(f"{self.config.name}: the validation set gave no decodable video")
        loss, zero, copied = (total / counted for total in totals)
        return {
            "clips": clips,
            "loss": loss,
            "zero_predictor": zero,
            "copy_nearest": copied,
            "ratio_to_zero_predictor": loss / zero,
            "ratio_to_copy_nearest": loss / copied,
        }

    def copy_nearest(self, clip: Tensor, mask: DualMask) -> Tensor:
        """Predictions [B, Nl, K] fp32 of the copying baseline for clip uint8 [B,T,H,W,C], in target order (t,y,x,c)."""
        channels = clip.shape[-1]
        rows = gather_patches(
            clip, mask.visible_index, patch=self.patch, tubelet=self.tubelet, mean=(0.0,) * channels, std=(1.0,) * channels
        ).unflatten(-1, (channels, -1))
        if self.config.normalize_target:
            std = rows.var(dim=-1, keepdim=True, unbiased=True).sqrt() + 1e-6
            rows = (rows - rows.mean(dim=-1, keepdim=True)) / std
        pixels = rows.transpose(-1, -2).flatten(-2)
        nearest = nearest_visible(mask.visible_index, mask.loss_index, self.grid)
        return pixels.gather(1, nearest[..., None].expand(-1, -1, pixels.shape[-1]))


def nearest_visible(visible_index: Tensor, loss_index: Tensor, grid: tuple[int, int, int]) -> Tensor:
    """For each loss token, the slot in `visible_index` of the nearest visible token: int64 [B, Nl].

    Squared distance in (t, y, x) grid units, ties to the lower token id. Padded loss tokens (-1) get some valid slot.
    """

    def coordinates(index: Tensor) -> Tensor:
        index = index.long().clamp(min=0)
        return torch.stack((index // (grid[1] * grid[2]), index // grid[2] % grid[1], index % grid[2]), dim=-1)

    squared = (coordinates(loss_index)[:, :, None] - coordinates(visible_index)[:, None]).square().sum(-1)
    # argmin does not promise which of several minima it returns: make them distinct by the (ascending) slot.
    slots = visible_index.shape[1]
    return (squared * slots + torch.arange(slots, device=squared.device)).argmin(dim=-1)
