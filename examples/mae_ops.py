"""Patch embedding of visible tokens and the pixel loss in plain PyTorch, the way many people write them."""

import torch
from mae_data import GRID, PATCH, TUBELET
from torch import Tensor, nn

MEAN, STD = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])


def embed_visible(clip: Tensor, visible: Tensor, embed: nn.Conv3d) -> Tensor:
    """uint8 [B, T, H, W, 3] -> embedded visible tokens [B, V, D]: normalise, convolve everything, keep what is visible."""
    video = ((clip.to(embed.weight.dtype) / 255 - MEAN.to(embed.weight)) / STD.to(embed.weight)).permute(0, 4, 1, 2, 3)
    tokens = embed(video).flatten(2).transpose(1, 2)
    return tokens.gather(1, visible[..., None].expand(-1, -1, tokens.shape[2]))


def pixel_loss(pred: Tensor, clip: Tensor, hidden: Tensor) -> Tensor:
    """Mean squared error of predicted patches [B, L, K] against the pixels of the hidden ones, normalised patch by patch."""
    t, h, w = GRID
    pixels = (clip.to(pred.dtype) / 255).view(len(clip), t, TUBELET, h, PATCH, w, PATCH, 3).permute(0, 1, 3, 5, 2, 4, 6, 7)
    pixels = pixels.reshape(len(clip), t * h * w, -1, 3)
    target = (pixels - pixels.mean(2, keepdim=True)) / (pixels.var(2, keepdim=True).sqrt() + 1e-6)
    target = target.flatten(2).gather(1, hidden[..., None].expand(-1, -1, pred.shape[2]))
    return (pred - target).pow(2).mean()
