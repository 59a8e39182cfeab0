"""The action detector: a ViT over clips of any height and width, and a head that looks at the boxes of people.

    clip [B, T, H, W, C] -> tokens -> blocks -> norm -> mean over time [B, h, w, D] -> roi_align_max (7 x 7) -> head [n, 80]

Clips that are no whole number of patches are padded with zeros (after normalisation) on the right and below: to multiples of
14 for ViT-g, of 16 for the others. Positions are the 224-pixel sin-cos table, resized per size by bicubic interpolation of
each time slice, as the released detection code does it; the table of the native grid is used as it is.
"""

from __future__ import annotations

from collections import OrderedDict

import torch
import torch.nn.functional as F
from torch import Tensor

from ..config import ModelConfig
from ..ops.patches import channel_statistics, gather_patches
from ..ops.roi_align import roi_align_max
from .classify import VisionTransformer
from .positions import resize_table, sincos_table
from .sizes import NATIVE_SIZE
from .vit import fold, stack, stream

_SIZES_KEPT = 32


class Detector(VisionTransformer):
    """Class scores of boxes. Parameters are those of a classifier with `pooling="first"`: patch_embed, blocks, norm, head.

    bins, aligned: of RoIAlign. norm_from_head: let `load_weights` take the norm of a fine-tuned classifier's pooled features
    (`fc_norm`) for `norm`, which otherwise keeps its initial values.
    Raises ValueError for a pre-training model, a trained position table, or no classes.
    """

    def __init__(self, config: ModelConfig, *, bins: int = 7, aligned: bool = False, norm_from_head: bool = False) -> None:
        if config.num_classes < 1 or config.learnable_positions or config.pooling != "first":
            raise ValueError(
                f"{config.name}: a detector needs num_classes (80 for AVA), pooling='first' (a norm on every token) and the "
                f"sin-cos positions, got num_classes={config.num_classes}, pooling={config.pooling!r}, "
                f"learnable_positions={config.learnable_positions}"
            )
        super().__init__(config)
        self.bins, self.aligned, self.norm_from_head = bins, aligned, norm_from_head
        self._tables: OrderedDict[tuple[int, int, torch.device], Tensor] = OrderedDict()

    def position_table(self, height: int, width: int, device: torch.device) -> Tensor:
        """Positions [T' h w, D] of a grid of height x width tokens, float32."""
        key = height, width, device
        if key not in self._tables:
            steps, side = self.grid[0], NATIVE_SIZE // self.spec.patch
            native = sincos_table(steps * side * side, self.spec.encoder.width)
            table = resize_table(native, (steps, side, side), (steps, height, width), "cubic")
            self._tables[key] = torch.from_numpy(table).to(device)
            while len(self._tables) > _SIZES_KEPT:
                self._tables.popitem(last=False)
        self._tables.move_to_end(key)
        return self._tables[key]

    def features(self, clip: Tensor) -> Tensor:
        """Normalised features, mean over time: [B, h, w, D].

        clip: uint8 [B, T, H, W, C] or normalised float [B, C, T, H, W], any H and W of at least a pixel.
        """
        clip = self._padded(clip)
        patch, tubelet = self.spec.patch, self.spec.tubelet
        h, w = (side // patch for side in (clip.shape[2:4] if clip.dtype == torch.uint8 else clip.shape[3:5]))
        kind, weight = clip.device.type, self.patch_embed.proj.weight
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weight.dtype
        index = torch.arange(self.grid[0] * h * w, dtype=torch.int32, device=clip.device).repeat(len(clip), 1)
        mean, std = self.patch_embed.mean, self.patch_embed.std
        rows = gather_patches(clip, index, patch=patch, tubelet=tubelet, mean=mean, std=std, dtype=dtype)
        tokens = F.linear(rows, weight.flatten(1), self.patch_embed.proj.bias)
        positions = self.position_table(h, w, clip.device)
        x = fold(*stack(self.blocks, stream(tokens + positions, self.config)), self.norm)
        return x.unflatten(1, (self.grid[0], h, w)).mean(1)

    def _padded(self, clip: Tensor) -> Tensor:
        byte = clip.dtype == torch.uint8
        frames, channels, patch = self.spec.frames, self.spec.channels, self.spec.patch
        shape = tuple(clip.shape)
        if clip.ndim != 5 or (shape[1], shape[4]) != (frames, channels) if byte else shape[1:3] != (channels, frames):
            raise ValueError(
                f"clip is {clip.dtype} {list(shape)}; this detector takes uint8 [B, {frames}, H, W, {channels}] or "
                f"float [B, {channels}, {frames}, H, W]"
            )
        height, width = shape[2:4] if byte else shape[3:5]
        down, right = -height % patch, -width % patch
        if not (down or right):
            return clip
        if byte:
            mean, std = channel_statistics(channels, self.patch_embed.mean, self.patch_embed.std, "detector")
            view = (1, channels, 1, 1, 1)
            centre, spread = (torch.tensor(v, device=clip.device).view(view) for v in (mean, std))
            clip = (clip.permute(0, 4, 1, 2, 3).float() / 255 - centre) / spread
        return F.pad(clip, (0, right, 0, down))

    def forward(self, clip: Tensor, boxes: Tensor | None = None) -> Tensor:  # type: ignore[override]
        """Action scores [n, num_classes] before the sigmoid. clip: as in `features`; boxes: float32 [n, 5] rows (clip, x1,
        y1, x2, y2) in pixels of the clip."""
        if boxes is None:
            raise TypeError("a detector needs boxes: float32 [n, 5] rows (clip, x1, y1, x2, y2)")
        features = self.features(clip)
        pooled = roi_align_max(features, boxes, size=self.bins, scale=1 / self.spec.patch, aligned=self.aligned)
        return self.head(pooled)
