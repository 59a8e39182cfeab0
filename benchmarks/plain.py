"""Each op the official way: the whole fp32 clip, boolean masks, everything materialised. `baselines.Plain` is made of these.

Masks are bool [B, N], True = hidden, as in the official code. `spec` is a `models.ModelSpec`; mean and std are per channel.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vmae2_fast.models.sizes import ModelSpec


def colour(like: Tensor, mean: Sequence[float], std: Sequence[float]) -> tuple[Tensor, Tensor]:
    """Mean and std, to be broadcast over a clip [B, C, T, H, W]."""
    return like.new_tensor(mean).view(1, -1, 1, 1, 1), like.new_tensor(std).view(1, -1, 1, 1, 1)


def normalised(clip: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """What the official loader sends: fp32 [B, C, T, H, W] from uint8 [B, T, H, W, C]."""
    pixels = clip.permute(0, 4, 1, 2, 3).float() / 255
    centre, spread = colour(pixels, mean, std)
    return ((pixels - centre) / spread).contiguous()


def tiles(video: Tensor, spec: ModelSpec) -> Tensor:
    """View [B, C, T', tubelet, H', p, W', p] of a clip [B, C, T, H, W]."""
    t, h, w = spec.grid
    return video.reshape(len(video), spec.channels, t, spec.tubelet, h, spec.patch, w, spec.patch)


def gather(video: Tensor, hidden: Tensor, spec: ModelSpec) -> Tensor:
    """Rows [B, V, K] in Conv3d weight order of the tokens that are not hidden, out of those of all tokens."""
    rows = tiles(video, spec).permute(0, 2, 4, 6, 1, 3, 5, 7).reshape(len(video), spec.tokens, -1)
    return rows[~hidden].reshape(len(video), -1, spec.patch_values)


def embed(video: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor, positions: Tensor) -> Tensor:
    """Tokens [B, V, width]: Conv3d over every tubelet, positions [1, N, width] on every token, then the boolean mask."""
    tokens = F.conv3d(video, weight, bias, stride=weight.shape[2:]).flatten(2).transpose(1, 2)
    tokens = tokens + positions.to(tokens.dtype)
    return tokens[~hidden].reshape(len(video), -1, tokens.shape[-1])


def scatter(rows: Tensor, hidden: Tensor, spec: ModelSpec) -> Tensor:
    """Clip [B, C, T, H, W] of the rows in Conv3d weight order, by way of a row for every token."""
    everything = rows.new_zeros(len(rows), spec.tokens, spec.patch_values)
    everything[~hidden] = rows.flatten(0, 1)
    t, h, w = spec.grid
    cubes = everything.view(len(rows), t, h, w, spec.channels, spec.tubelet, spec.patch, spec.patch)
    return cubes.permute(0, 4, 1, 5, 2, 6, 3, 7).reshape(len(rows), spec.channels, spec.frames, spec.size, spec.size)


def resize_crop(frames: Sequence[Tensor], windows: Sequence[Sequence[Any]], size: int) -> Tensor:
    """Frame by frame, as the official transforms go: cut, resize with an antialiased bilinear filter, mirror, stack."""
    clips = []
    for clip, (w,) in zip(frames, windows, strict=True):
        images = []
        for frame in clip:
            cut = frame[w.top : w.top + w.height, w.left : w.left + w.width].permute(2, 0, 1).float()[None]
            image = F.interpolate(cut, (size, size), mode="bilinear", antialias=True).round().clamp(0, 255).byte()[0]
            images.append((image.flip(2) if w.flip else image).permute(1, 2, 0))
        clips.append(torch.stack(images))
    return torch.stack(clips)


def targets(
    video: Tensor, left_out: Tensor, spec: ModelSpec, mean: Sequence[float], std: Sequence[float], normalize: bool = True
) -> Tensor:
    """Targets [B, K, tubelet * p * p * C] fp32 of the tokens not left out; those of all tokens are built first."""
    centre, spread = colour(video, mean, std)
    pixels = tiles(video * spread + centre, spec)
    target = pixels.permute(0, 2, 4, 6, 3, 5, 7, 1).reshape(len(video), spec.tokens, -1, spec.channels)
    if normalize:
        deviation = target.var(dim=-2, unbiased=True, keepdim=True).sqrt() + 1e-6
        target = (target - target.mean(dim=-2, keepdim=True)) / deviation
    return target.flatten(2)[~left_out].reshape(len(video), -1, spec.patch_values)


def decoder_tokens(x: Tensor, mask_token: Tensor, positions: Tensor, hidden: Tensor, left_out: Tensor) -> Tensor:
    """[B, V + Nd, width] from projected tokens `x` [B, V, width] and a table [1, N, width], by boolean masks."""
    b, _, width = x.shape
    table = positions.to(x.dtype).expand(b, -1, -1)
    visible, decoded = (table[~mask].reshape(b, -1, width) for mask in (hidden, left_out))
    return torch.cat([x + visible, mask_token + decoded], dim=1)


def residual_norm(x: Tensor, branch: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """The sum of a residual stream and a branch [B, N, width], and its LayerNorm in fp32."""
    x = x + branch
    return x, F.layer_norm(x.float(), x.shape[-1:], weight, bias, 1e-6).to(x.dtype)


def roi_align_max(features: Tensor, boxes: Tensor, size: int, scale: float) -> Tensor:
    """[n, C] from features [B, H, W, C] and boxes [n, 5]: every sample point of a box by its four neighbours, then the mean
    over the points of a bin and the maximum over the bins."""
    _, height, width, _ = features.shape
    pooled = []
    for clip, *edges in boxes.tolist():
        x1, y1, x2, y2 = (edge * scale for edge in edges)
        points = []
        for low, high, cells in ((y1, y2, height), (x1, x2, width)):
            step = max(high - low, 1.0) / size
            count = math.ceil(step)
            place = low + (torch.arange(size * count, device=features.device) + 0.5) * step / count
            used = (place >= -1) & (place <= cells)
            place = place.clamp(0, cells - 1)
            first = place.long()
            points.append((first, (first + 1).clamp(max=cells - 1), place - first, used, count))
        (top, bottom, down, use_y, rows), (left, right, along, use_x, columns) = points
        image, down, along = features[int(clip)].float(), down[:, None, None], along[:, None]
        upper = image[top][:, left] * (1 - along) + image[top][:, right] * along
        lower = image[bottom][:, left] * (1 - along) + image[bottom][:, right] * along
        sampled = (upper * (1 - down) + lower * down) * (use_y[:, None] & use_x)[..., None]
        bins = sampled.unflatten(1, (size, columns)).unflatten(0, (size, rows)).mean((1, 3))
        pooled.append(bins.amax((0, 1)))
    return torch.stack(pooled).to(features.dtype)


def attention(q: Tensor, k: Tensor, v: Tensor, factor: Any = None) -> Tensor:
    """Scores materialised: [B, H, N, D]. `factor`: of the scores, D**-0.5 on q when None."""
    scores = q * q.shape[-1] ** -0.5 @ k.transpose(-2, -1) if factor is None else q @ k.transpose(-2, -1) * factor
    return scores.softmax(-1).to(v.dtype) @ v


def soft_nms_1d(segments: Tensor, scores: Tensor, sigma: float, min_score: float, limit: int) -> tuple[Tensor, Tensor]:
    """Gaussian soft-NMS, candidate by candidate: segments [K, 2] and decayed scores [K]."""
    places, values = segments.tolist(), scores.tolist()
    left = [i for i, value in enumerate(values) if value >= min_score]
    kept = []
    while left and len(kept) < limit:
        best = max(left, key=lambda i: values[i])
        kept.append(best)
        (a, b), rest = places[best], []
        for i in left:
            if i == best:
                continue
            c, d = places[i]
            common = max(0.0, min(b, d) - max(a, c))
            overlap = common / (b - a + 1e-6 + d - c + 1e-6 - common)
            values[i] *= math.exp(-overlap * overlap / sigma)
            if values[i] >= min_score:
                rest.append(i)
        left = rest
    return segments[kept], scores.new_tensor([values[i] for i in kept])
