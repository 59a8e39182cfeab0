"""Each op as a good torch programmer writes it: index first, nothing touched that no index names. `baselines.Strong` is made
of these, and torch.compile gets them whole.

Some ops have several forms: which one is fastest depends on the machine and on the compiler, so all of them are measured and
the fastest counts. Indices are integer [B, .], ascending; `spec` is a `models.ModelSpec`; mean and std are per channel.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vmae2_fast.models.sizes import ModelSpec
from vmae2_fast.ops.roi_align import axis_weights, roi_align


def lines(clip: Tensor, index: Tensor, spec: ModelSpec) -> Tensor:
    """Bytes of the indexed patches [B, K, tubelet, p, p * C]: each line of a patch is one row of an `index_select`."""
    (b, count), (_, h, w), patch = index.shape, spec.grid, spec.patch
    index = index.long()
    clips = torch.arange(b, device=clip.device)[:, None]
    frame, y, x = index // (h * w) * spec.tubelet, index // w % h * patch, index % w
    first = ((clips * spec.frames + frame) * spec.size + y) * w + x
    inside = torch.arange(spec.tubelet, device=clip.device)[:, None] * spec.size + torch.arange(patch, device=clip.device)
    rows = clip.view(-1, patch * spec.channels).index_select(0, (first[..., None] + inside.flatten() * w).flatten())
    return rows.view(b, count, spec.tubelet, patch, patch * spec.channels)


def tiles(clip: Tensor, index: Tensor, spec: ModelSpec) -> Tensor:
    """The same as `lines`, by indexing a view of the clip as tiles."""
    (b, _), (t, h, w), patch = index.shape, spec.grid, spec.patch
    view = clip.view(b, t, spec.tubelet, h, patch, w, patch * spec.channels).permute(0, 1, 3, 5, 2, 4, 6)
    index = index.long()
    return view[torch.arange(b, device=clip.device)[:, None], index // (h * w), index // w % h, index % w]


CUTS = {"lines": lines, "tiles": tiles}


def values(clip: Tensor, index: Tensor, spec: ModelSpec, cut: str = "lines") -> Tensor:
    """The indexed patches as the clip holds them, [B, K, tubelet * p * p, C]: bytes, or floats of [B, C, T, H, W]."""
    if clip.dtype == torch.uint8:
        return CUTS[cut](clip, index, spec).reshape(*index.shape, -1, spec.channels)
    t, h, w = spec.grid
    cubes = clip.view(len(clip), spec.channels, t, spec.tubelet, h, spec.patch, w, spec.patch)
    index, clips = index.long(), torch.arange(len(clip), device=clip.device)[:, None]
    return cubes.permute(0, 2, 4, 6, 3, 5, 7, 1)[clips, index // (h * w), index // w % h, index % w].flatten(2, 4)


def row_colour(spec: ModelSpec, mean: Sequence[float], std: Sequence[float], device: torch.device) -> tuple[Tensor, Tensor]:
    """Scale and shift [K] that normalise a row of bytes: over the whole row, so that a compiler sees one contiguous loop."""
    pairs = [(1 / (255 * s), -m / s) for m, s in zip(mean, std, strict=True)]
    scale, shift = torch.tensor(pairs, device=device).repeat(spec.patch_values // len(pairs), 1).unbind(1)
    return scale.contiguous(), shift.contiguous()


def rows(
    clip: Tensor, index: Tensor, spec: ModelSpec, scale: Tensor, shift: Tensor, dtype: torch.dtype = torch.float32,
    cut: str = "lines",
) -> Tensor:  # fmt: skip
    """Normalised rows `dtype` [B, K, tubelet * p * p * C] in pixel order: the embedding permutes its small weight instead of
    the pixels. scale, shift: of `row_colour`, for uint8 clips; a float clip is normalised already."""
    raw = values(clip, index, spec, cut).flatten(2)
    return (raw.float() * scale + shift).to(dtype) if clip.dtype == torch.uint8 else raw


def embed(rows: Tensor, index: Tensor, weight: Tensor, bias: Tensor, positions: Tensor) -> Tensor:
    """Tokens [B, K, width] of rows in pixel order; `weight` is that of the Conv3d, positions [1, N, width]."""
    x = F.linear(rows, weight.permute(0, 2, 3, 4, 1).flatten(1), bias)
    return x + F.embedding(index.long(), positions[0])


def scatter(rows: Tensor, index: Tensor, spec: ModelSpec) -> Tensor:
    """Clip [B, C, T, H, W] of rows in Conv3d weight order, written through a view of the clip as tiles."""
    (t, h, w), b = spec.grid, len(rows)
    clip = rows.new_zeros(b, spec.channels, spec.frames, spec.size, spec.size)
    view = clip.view(b, spec.channels, t, spec.tubelet, h, spec.patch, w, spec.patch).permute(0, 2, 4, 6, 1, 3, 5, 7)
    index, clips = index.long(), torch.arange(b, device=rows.device)[:, None]
    view[clips, index // (h * w), index // w % h, index % w] = rows.view(b, index.shape[1], *view.shape[4:])
    return clip


def resize_crop(frames: Sequence[Tensor], windows: Sequence[Sequence[Any]], size: int) -> Tensor:
    """All frames of a clip at once by torch's uint8 kernel, channels last (on a GPU, which has none, in float32), written
    into the batch."""
    channels = frames[0].shape[3]
    out = frames[0].new_empty(len(frames), len(frames[0]), size, size, channels)
    for clip, (w,), target in zip(frames, windows, out, strict=True):
        cut = clip[:, w.top : w.top + w.height, w.left : w.left + w.width].permute(0, 3, 1, 2)
        if cut.device.type == "cpu":
            images = F.interpolate(cut, (size, size), mode="bilinear", antialias=True)
        else:
            images = F.interpolate(cut.float(), (size, size), mode="bilinear", antialias=True).round_().clamp_(0, 255)
        target.copy_((images.flip(3) if w.flip else images).permute(0, 2, 3, 1))
    return out


def roi_align_max(features: Tensor, boxes: Tensor, size: int, scale: float) -> Tensor:
    """[n, C] from features [B, H, W, C] and boxes [n, 5]: bins by two matrix products, then their maximum."""
    return roi_align(features, boxes, size=size, scale=scale).amax((1, 2)).to(features.dtype)


def roi_align_max_by_clip(features: Tensor, boxes: Tensor, size: int, scale: float) -> Tensor:
    """The same without a copy of the features for every box: one product for all boxes of a clip."""
    _, height, width, channels = features.shape
    axis: dict[str, Any] = {"size": size, "scale": scale, "sampling": 0, "aligned": False}
    rows = axis_weights(boxes[:, 2], boxes[:, 4], height, **axis)
    columns = axis_weights(boxes[:, 1], boxes[:, 3], width, **axis)
    pooled = []
    for clip, image in enumerate(features.float()):
        mine = boxes[:, 0] == clip
        lines = (rows[mine].flatten(0, 1) @ image.reshape(height, -1)).view(-1, size, width, channels)
        pooled.append((columns[mine][:, None] @ lines).amax((1, 2)))
    return torch.cat(pooled).to(features.dtype)


def targets(
    clip: Tensor, index: Tensor, spec: ModelSpec, mean: Sequence[float], std: Sequence[float], normalize: bool = True
) -> Tensor:
    """Targets [B, K, tubelet * p * p * C] fp32 of the indexed tokens; of a float clip after undoing its normalisation."""
    target = values(clip, index, spec).float()
    target = target / 255 if clip.dtype == torch.uint8 else target * target.new_tensor(std) + target.new_tensor(mean)
    if normalize:
        variance, centre = torch.var_mean(target, dim=-2, keepdim=True)
        target = (target - centre) / (variance.sqrt() + 1e-6)
    return target.flatten(2)


def loss(pred: Tensor, clip: Tensor, index: Tensor, spec: ModelSpec) -> Tensor:
    """Mean squared error against the normalised targets of a uint8 clip; every token of `index` counts."""
    return (pred.float() - targets(clip, index, spec, (), ())).pow(2).mean()


def loss_by_channel(pred: Tensor, clip: Tensor, index: Tensor, spec: ModelSpec) -> Tensor:
    """The same, one channel after the other: what a CPU compiler makes vector loops of."""
    cubes, guess = values(clip, index, spec), pred.unflatten(-1, (-1, spec.channels))
    total = pred.new_zeros((), dtype=torch.float32)
    for c in range(spec.channels):
        plane = cubes[..., c].float() / 255
        variance, centre = torch.var_mean(plane, dim=-1, keepdim=True)
        total = total + (guess[..., c].float() - (plane - centre) / (variance.sqrt() + 1e-6)).pow(2).sum()
    return total / pred.numel()


def decoder_tokens(x: Tensor, mask_token: Tensor, positions: Tensor, visible_index: Tensor, decode_index: Tensor) -> Tensor:
    """[B, V + Nd, width] from projected tokens `x` [B, V, width] and a table [1, N, width]."""
    visible, decoded = (F.embedding(index.long(), positions[0]) for index in (visible_index, decode_index))
    return torch.cat([x + visible, mask_token + decoded], dim=1)


def masks(
    batch: int, grid: tuple[int, int, int], sizes: tuple[int, int, int], phases: Tensor, sort: str = "argsort"
) -> tuple[Tensor, ...]:
    """Index lists of `batch` clips as in `DualMask`, vectorised: visible, decoded and loss tokens and their slots.

    sizes: (Nv, Nd, Nl); phases: decoded tokens of the running cell's four phases [4, Nd]; sort: `argsort` orders all random
    numbers of a frame, `topk` only looks for the smallest.
    """
    (t, h, w), (visible, _, counted), device = grid, sizes, phases.device
    drawn = torch.rand(batch, h * w, device=device)
    chosen = drawn.argsort(1)[:, : visible // t] if sort == "argsort" else drawn.topk(visible // t, sorted=False).indices
    sites = chosen.sort(1).values
    visible_index = (sites[:, None] + (torch.arange(t, device=device) * (h * w))[:, None]).flatten(1)
    decode_index = phases[torch.randint(4, (batch,), device=device)]
    seen = torch.zeros(batch, t * h * w, dtype=torch.bool, device=device).scatter_(1, visible_index, True)
    slot = seen.gather(1, decode_index).to(torch.int8).argsort(dim=1, stable=True)[:, :counted]
    return visible_index.int(), decode_index.int(), decode_index.gather(1, slot).int(), slot.int()


def soft_nms_1d(segments: Tensor, scores: Tensor, sigma: float, min_score: float, limit: int) -> tuple[Tensor, Tensor]:
    """Gaussian soft-NMS, all candidates at a time: segments [K, 2] and decayed scores [K]; what is dropped becomes zero."""
    values, kept, index = scores.clone(), [], []
    length = segments[:, 1] - segments[:, 0] + 1e-6
    for _ in range(min(limit, len(scores))):
        score, best = values.max(0)
        kept.append(score)
        index.append(best)
        start, end = segments[best].unbind()
        common = (torch.minimum(end, segments[:, 1]) - torch.maximum(start, segments[:, 0])).clamp(min=0)
        overlap = common / (length + length[best] - common)
        values = values * torch.exp(-overlap * overlap / sigma)
        values[best] = 0
        values = torch.where(values >= min_score, values, 0.0)
    found = torch.stack(kept)
    alive = found > 0
    return segments[torch.stack(index)][alive], found[alive]
