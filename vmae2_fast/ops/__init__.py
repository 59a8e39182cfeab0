"""Differentiable, registered ops: a plain torch reference each, native and other implementations behind `backend.pick`."""

from __future__ import annotations

from .attention import attention, cosine_attention
from .decoder_tokens import decoder_tokens
from .masks import DualMask, dual_mask, dual_mask_from_masks, mask_sizes, masks_from_rng
from .mlp import norm_mlp
from .nms import nms_1d, vote_1d
from .norm import norm_qkv, residual_norm
from .patches import IMAGENET_MEAN, IMAGENET_STD, gather_patches, scatter_patches
from .reconstruction import patch_statistics, reconstruction_loss
from .resize import Window, resize_crop, resize_crop_packed
from .roi_align import roi_align, roi_align_max
from .yuv import Yuv420

__all__ = [
    "IMAGENET_MEAN",
    "IMAGENET_STD",
    "DualMask",
    "Window",
    "Yuv420",
    "attention",
    "cosine_attention",
    "decoder_tokens",
    "dual_mask",
    "dual_mask_from_masks",
    "gather_patches",
    "mask_sizes",
    "masks_from_rng",
    "nms_1d",
    "norm_mlp",
    "norm_qkv",
    "patch_statistics",
    "reconstruction_loss",
    "residual_norm",
    "resize_crop",
    "resize_crop_packed",
    "roi_align",
    "roi_align_max",
    "scatter_patches",
    "vote_1d",
]
