"""RoIAlign of boxes and the maximum over its bins, in one pass: the head of a detector in space and time.

A box is cut into size x size bins; a bin's value is the mean of n x n bilinear samples. Along one axis, in cells of the
feature map (length L, `start` and `end` the box's edges times `scale`, less 1/2 with `aligned`):

    extent = end - start, at least 1 unless aligned          bin = extent / size
    n      = sampling, or ceil(bin) where sampling is 0      sample i of bin p lies at start + p*bin + (i + 1/2)*bin/n
    sample -> 0 outside [-1, L], else linear between the two cells around it, clamped to [0, L-1]

The two axes are independent, so a box's pooled cells are two small matrix products, A_y [size, H] @ features @ A_x [size, W]^T
(`roi_align`), and the maximum follows. The fused kernels never write the size x size cells: of a box leaves one row of
channels, and for the backward the bin each channel's maximum came from (uint8 [n, C]; the first of equal ones).
Features are channels last, as a ViT's tokens lie. Mask R-CNN (He et al. 2017, section 3) defines RoIAlign; the maximum over
7 x 7 bins is the AVA head of VideoMAE.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from .. import backend
from . import _native
from ._register import check, define, kernel, register_backends

MOST_BINS = 16
"""Bins along an axis: the maximum's place is one byte."""


def axis_weights(
    low: Tensor, high: Tensor, length: int, *, size: int, scale: float, sampling: int, aligned: bool
) -> Tensor:
    """Weights [n, size, length] of the cells of one axis in each bin; low, high: [n] edges in pixels, float32 or float64."""
    offset = 0.5 if aligned else 0.0
    start = low * scale - offset
    extent = high * scale - offset - start
    if not aligned:
        extent = extent.clamp(min=1.0)
    bins = extent / size
    count = torch.full_like(bins, sampling) if sampling > 0 else bins.ceil().clamp(min=0)
    most = max(int(count.max()), 1) if len(count) else 1
    number = torch.arange(most, dtype=low.dtype, device=low.device)
    bin_number = torch.arange(size, dtype=low.dtype, device=low.device)
    step = (number + 0.5) * bins[:, None] / count.clamp(min=1)[:, None]
    place = start[:, None, None] + bin_number[:, None] * bins[:, None, None] + step[:, None]
    used = (number < count[:, None])[:, None] & (place >= -1) & (place <= length)
    cells = torch.arange(length, dtype=low.dtype, device=low.device)
    tent = (1 - (place.clamp(0, length - 1)[..., None] - cells).abs()).clamp(min=0)
    return (tent * used[..., None]).sum(2) / count.clamp(min=1)[:, None, None]


def _weights(boxes: Tensor, height: int, width: int, **axis: Any) -> tuple[Tensor, Tensor]:
    _, left, top, right, bottom = boxes.unbind(1)
    return axis_weights(top, bottom, height, **axis), axis_weights(left, right, width, **axis)


def images_of(boxes: Tensor, batch: int) -> Tensor:
    """Clip of each box, int64 [n]. Raises IndexError for one outside the batch, where looking costs no synchronisation."""
    images = boxes[:, 0].long()
    if boxes.device.type == "cpu" and len(images) and not (int(images.min()) >= 0 and int(images.max()) < batch):
        worst = int(images.min()) if int(images.min()) < 0 else int(images.max())
        raise IndexError(f"roi_align_max: a box names clip {worst} of a batch of {batch}")
    return images


def roi_align(
    features: Tensor, boxes: Tensor, *, size: int = 7, scale: float, sampling: int = 0, aligned: bool = False
) -> Tensor:
    """The pooled cells [n, size, size, C] of boxes, as two matrix products in plain torch; differentiable in `features`.

    Arguments as in `roi_align_max`, which gives their maximum without making them. float32 (float64) inside and out.
    """
    _check(features, boxes, size, sampling)
    compute = torch.float64 if features.dtype == torch.float64 else torch.float32
    batch, height, width, channels = features.shape
    rows, columns = _weights(boxes.to(compute), height, width, size=size, scale=scale, sampling=sampling, aligned=aligned)
    picked = features.to(compute)[images_of(boxes, batch)]
    lines = torch.bmm(rows, picked.reshape(len(boxes), height, width * channels)).view(-1, size, width, channels)
    return torch.matmul(columns[:, None], lines)


def roi_align_max_reference(
    features: Tensor, boxes: Tensor, size: int, scale: float, sampling: int, aligned: bool
) -> tuple[Tensor, Tensor]:
    """The specification: (pooled [n, C] in the dtype of `features`, bin of each maximum, uint8 [n, C])."""
    cells = roi_align(features, boxes, size=size, scale=scale, sampling=sampling, aligned=aligned).flatten(1, 2)
    where = cells.argmax(1)
    return cells.gather(1, where[:, None])[:, 0].to(features.dtype), where.to(torch.uint8)


def roi_align_max_backward_reference(
    grad: Tensor, boxes: Tensor, where: Tensor, batch: int, height: int, width: int, size: int, scale: float, sampling: int,
    aligned: bool,
) -> Tensor:  # fmt: skip
    """The specification: each channel's gradient goes to the cells under its bin, with their weights."""
    compute = torch.float64 if grad.dtype == torch.float64 else torch.float32
    rows, columns = _weights(boxes.to(compute), height, width, size=size, scale=scale, sampling=sampling, aligned=aligned)
    bins, channels = where.long(), grad.shape[1]
    row = rows.gather(1, (bins // size)[..., None].expand(-1, -1, height))
    column = columns.gather(1, (bins % size)[..., None].expand(-1, -1, width))
    out, images = grad.new_zeros((batch, height, width, channels), dtype=compute), images_of(boxes, batch)
    for image in range(batch):
        mine = grad.to(compute) * (images == image)[:, None]
        out[image] = torch.einsum("kc,kch,kcw->hwc", mine, row, column)
    return out.to(grad.dtype)


def _native_forward(
    features: Tensor, boxes: Tensor, size: int, scale: float, sampling: int, aligned: bool
) -> tuple[Tensor, Tensor]:
    features, boxes = features.contiguous(), boxes.contiguous()
    pooled = features.new_empty(len(boxes), features.shape[3])
    where = torch.empty_like(pooled, dtype=torch.uint8)
    _native.run(
        "roi_align_max", features.device,
        _native.address(features, _native.FLOATS, "roi_align_max: features [B, H, W, C]"), _native.code(features.dtype),
        *features.shape, _native.address(boxes, (torch.float32,), "roi_align_max: boxes [n, 5]"), len(boxes),
        size, scale, sampling, aligned,
        _native.address(pooled, _native.FLOATS, "roi_align_max: pooled"),
        _native.address(where, (torch.uint8,), "roi_align_max: bins"),
    )  # fmt: skip
    return pooled, where


def _native_backward(
    grad: Tensor, boxes: Tensor, where: Tensor, batch: int, height: int, width: int, size: int, scale: float, sampling: int,
    aligned: bool,
) -> Tensor:  # fmt: skip
    grad, boxes = grad.contiguous(), boxes.contiguous()
    out = grad.new_empty(batch, height, width, grad.shape[1])
    _native.run(
        "roi_align_max_backward", grad.device,
        _native.address(grad, _native.FLOATS, "roi_align_max: grad [n, C]"), _native.code(grad.dtype),
        *out.shape, _native.address(boxes, (torch.float32,), "roi_align_max: boxes [n, 5]"), len(boxes),
        size, scale, sampling, aligned, _native.address(where, (torch.uint8,), "roi_align_max: bins"),
        _native.address(out, _native.FLOATS, "roi_align_max: gradient of features"),
    )  # fmt: skip
    return out


for _op, _reference, _function, _launch in (
    ("roi_align_max", roi_align_max_reference, _native_forward, "forward"),
    ("roi_align_max_backward", roi_align_max_backward_reference, _native_backward, "backward"),
):
    register_backends(
        _op, _reference, native=_function, triton=kernel("_roi_align_triton", _launch),
        why_not_native=backend.why_not_cpp_kernel,
    )  # fmt: skip


def _body(features: Tensor, boxes: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    *given, name = arguments
    name = name or backend.pick("roi_align_max", features.device, features.dtype)
    return backend.run("roi_align_max", name, features, boxes, *given)


def _fake(features: Tensor, boxes: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    pooled = features.new_empty(boxes.shape[0], features.shape[3])
    return pooled, torch.empty_like(pooled, dtype=torch.uint8)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    features, boxes, *ctx.geometry, name = inputs
    ctx.save_for_backward(boxes, output[1])
    ctx.mark_non_differentiable(output[1])
    ctx.shape = features.shape[:3]
    ctx.backend = name or backend.pick("roi_align_max", features.device, features.dtype)


def _gradient(ctx: Any, grad: Tensor, _: Any) -> tuple[Any, ...]:
    boxes, where = ctx.saved_tensors
    return _backward(grad, boxes, where, *ctx.shape, *ctx.geometry, ctx.backend), *(None,) * 6


def _backward_body(grad: Tensor, boxes: Tensor, where: Tensor, *arguments: Any) -> Tensor:
    *given, name = arguments
    name = name or backend.pick("roi_align_max_backward", grad.device, grad.dtype)
    return backend.run("roi_align_max_backward", name, grad, boxes, where.contiguous(), *given)


def _backward_fake(grad: Tensor, boxes: Tensor, where: Tensor, batch: int, height: int, width: int, *_: Any) -> Tensor:
    return grad.new_empty(batch, height, width, grad.shape[1])


_GEOMETRY = "int size, float scale, int sampling, bool aligned, str backend"
_backward = define(
    f"roi_align_max_backward(Tensor grad, Tensor boxes, Tensor where, SymInt batch, SymInt height, SymInt width, {_GEOMETRY})"
    " -> Tensor",
    _backward_body,
    _backward_fake,
)
_forward = define(
    f"roi_align_max(Tensor features, Tensor boxes, {_GEOMETRY}) -> (Tensor, Tensor)",
    _body,
    _fake,
    backward=_gradient,
    setup_context=_setup,
)


def _check(features: Tensor, boxes: Tensor, size: int, sampling: int) -> None:
    check(
        features.ndim == 4 and features.is_floating_point() and min(features.shape[1:]) >= 1,
        f"roi_align_max: features must be floating point [B, H, W, C], got {features.dtype} {tuple(features.shape)}",
    )
    check(
        boxes.ndim == 2 and boxes.shape[1] == 5 and boxes.dtype in (torch.float32, torch.float64),
        f"roi_align_max: boxes must be float32 [n, 5] (clip, x1, y1, x2, y2), got {boxes.dtype} {tuple(boxes.shape)}",
    )
    check(
        boxes.device == features.device, f"roi_align_max: boxes are on {boxes.device}, the features on {features.device}"
    )
    check(1 <= size <= MOST_BINS, f"roi_align_max: size must lie in 1..{MOST_BINS}, got {size}")
    check(sampling >= 0, f"roi_align_max: sampling must not be negative, got {sampling}")


def roi_align_max(
    features: Tensor, boxes: Tensor, *, size: int = 7, scale: float, sampling: int = 0, aligned: bool = False
) -> Tensor:
    """The largest of size x size RoIAlign bins of each box, per channel: [n, C] in the dtype of `features`.

    features: floating point [B, H, W, C]; boxes: float32 [n, 5] rows (clip, x1, y1, x2, y2) in pixels; scale: cells a pixel
    (1 / patch). sampling: samples of a bin along an axis, 0 for as many as cells it spans. Differentiable in `features`; boxes
    get no gradient. Accumulates in float32 whatever the dtype and takes no part in autocast; float64 has the reference only.

    Raises ValueError for other shapes, a size outside 1..16, and (on the CPU) boxes that are not finite; IndexError (on the
    CPU) for a clip outside the batch. On CUDA nothing waits to look: the Triton kernel gives such a box NaN.
    """
    _check(features, boxes, size, sampling)
    check(math.isfinite(scale) and scale > 0, f"roi_align_max: scale must be positive, got {scale}")
    if features.dtype != torch.float64:
        boxes = boxes.float()
    if type(boxes) is Tensor and boxes.device.type == "cpu" and not torch.compiler.is_compiling():
        bad = (~boxes.isfinite()).any(1).nonzero()
        check(not len(bad), f"roi_align_max: box {int(bad[0]) if len(bad) else 0} holds a value that is not finite")
    name = backend.argument("roi_align_max", features.device, features.dtype)
    return _forward(features, boxes.detach(), size, scale, sampling, aligned, name)[0]
