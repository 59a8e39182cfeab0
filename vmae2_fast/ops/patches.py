"""Patches of a clip by index: gather them as rows ready for a GEMM, or put rows back into a clip.

A token (t, y, x) of grid (T', H', W') covers tubelet x patch x patch pixels of C channels. A row holds its
K = C*tubelet*patch*patch values in order "conv" (c, t, y, x), the layout of a Conv3d weight, or "pixel" (t, y, x, c), the
layout of predictions. With uint8 clips the rows are normalised:

    row = x * 1/(255*std_c) + (-mean_c/std_c)        (= (x/255 - mean_c) / std_c)

Only the patches an index names are read. A row whose index is -1 is zero in gather and left out in scatter, so the two are
adjoint and each is the other's backward.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import backend
from . import _native
from ._register import check, check_tensor, define, kernel, register_backends

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
ORDERS = ("conv", "pixel")

# Dimensions of a clip split into patches -> (b, t', h', w', then the row's order).
_FROM_THWC = {"conv": (0, 1, 3, 5, 7, 2, 4, 6), "pixel": (0, 1, 3, 5, 2, 4, 6, 7)}  # b t' t h' y w' x c
_FROM_CTHW = {"conv": (0, 2, 4, 6, 1, 3, 5, 7), "pixel": (0, 2, 4, 6, 3, 5, 7, 1)}  # b c t' t h' y w' x


def channel_statistics(
    channels: int, mean: Sequence[float] | None, std: Sequence[float] | None, op: str
) -> tuple[list[float], list[float]]:
    """`mean` and `std` as lists, ImageNet's for three channels when both are None. Raises ValueError on a wrong
    count and on numbers that are not finite or no standard deviation."""
    if mean is None and std is None and channels == 3:
        return list(IMAGENET_MEAN), list(IMAGENET_STD)
    if mean is None or std is None:
        raise ValueError(f"{op}: mean and std must both be given for {channels} channels, got {mean} and {std}")
    check(
        len(mean) == channels
        and len(std) == channels
        and all(abs(v) < math.inf for v in mean)
        and all(0 < v < math.inf for v in std),
        f"{op}: mean and std must hold {channels} values each, all finite and std positive; got {tuple(mean)} and "
        f"{tuple(std)}",
    )
    return [float(v) for v in mean], [float(v) for v in std]


def _scale_and_shift(mean: Sequence[float], std: Sequence[float]) -> tuple[list[float], list[float]]:
    return [1 / (255 * s) for s in std], [-m / s for m, s in zip(mean, std, strict=True)]


_IMAGENET = _scale_and_shift(IMAGENET_MEAN, IMAGENET_STD)


def clip_shape(clip: Tensor) -> tuple[int, int, int, int, int]:
    """(B, T, H, W, C) of a clip: uint8 is [B, T, H, W, C], floating point [B, C, T, H, W]."""
    if clip.dtype == torch.uint8:
        b, t, h, w, c = clip.shape
    else:
        b, c, t, h, w = clip.shape
    return b, t, h, w, c


def check_clip(clip: Tensor, patch: int, tubelet: int, op: str) -> tuple[int, int, int, int]:
    """(T', H', W', C) of a clip after checking it. Raises ValueError naming `op`, the shape and what would fit,
    TypeError for no tensor."""
    check_tensor(clip, op, "clip")
    shape, of_bytes = clip.shape, clip.dtype == torch.uint8
    if len(shape) != 5 or not (of_bytes or clip.is_floating_point()):
        raise ValueError(
            f"{op}: clip must be uint8 [B, T, H, W, C] or floating point [B, C, T, H, W], got {clip.dtype} {tuple(shape)}"
        )
    _, t, h, w, c = shape if of_bytes else (shape[0], *shape[2:], shape[1])
    if c < 1:
        raise ValueError(f"{op}: clip must have at least one channel, got {clip.dtype} {tuple(shape)}")
    if patch < 1 or tubelet < 1 or t % tubelet or h % patch or w % patch:
        raise ValueError(f"{op}: T, H, W = {t}, {h}, {w} of the clip must be multiples of tubelet {tubelet} and patch {patch}")
    return t // tubelet, h // patch, w // patch, c


def check_index(index: Tensor, batch: int, device: torch.device, op: str, name: str = "index") -> Tensor:
    """`index` as contiguous int32 [B, K]. Raises ValueError for another shape, dtype or device, TypeError for no tensor."""
    check_tensor(index, op, name)
    dtype, shape = index.dtype, index.shape
    if len(shape) != 2 or shape[0] != batch or (dtype != torch.int32 and dtype != torch.int64):
        raise ValueError(f"{op}: {name} must be int32 [B, K] with B = {batch}, got {dtype} {tuple(shape)}")
    if index.device != device:
        raise ValueError(f"{op}: {name} is on {index.device}, the other tensors on {device}")
    if dtype == torch.int64:  # an id beyond int32 must stay outside the grid, not wrap around into it
        index = index.clamp(-2, 2**31 - 1).to(torch.int32)
    return index.contiguous()


@functools.lru_cache(maxsize=64)
def _constants(values: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    # Made once: a copy from host lists in every step would stall a device's queue.
    return torch.tensor(values, dtype=dtype, device=device)


def _by_token(clip: Tensor, patch: int, tubelet: int, order: str) -> Tensor:
    """View of a clip as [B, T', H', W', *row]."""
    b, t, h, w, c = clip_shape(clip)
    inner = (t // tubelet, tubelet, h // patch, patch, w // patch, patch)
    if clip.dtype == torch.uint8:
        return clip.reshape(b, *inner, c).permute(_FROM_THWC[order])
    return clip.reshape(b, c, *inner).permute(_FROM_CTHW[order])


def _coordinates(index: Tensor, height: int, width: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Batch and grid coordinates [B, K] of token ids; a padded -1 points at token 0."""
    ids = index.long().clamp(min=0)
    batch = torch.arange(index.shape[0], device=index.device)[:, None].expand_as(ids)
    return batch, ids // (height * width), ids // width % height, ids % width


def _check_negative(index: Tensor, op: str) -> None:
    # Only where looking costs no synchronisation; torch itself checks the upper bound.
    if index.device.type == "cpu" and index.numel() and int(index.min()) < -1:
        raise IndexError(f"{op}: index holds {int(index.min())}; token ids start at 0, -1 marks padding")


def gather_patches_reference(
    clip: Tensor,
    index: Tensor,
    patch: int,
    tubelet: int,
    scale: Sequence[float],
    shift: Sequence[float],
    dtype: torch.dtype,
    order: str,
) -> Tensor:
    """The specification: index the patch view of the clip, then x*scale_c + shift_c for uint8."""
    _check_negative(index, "gather_patches")
    view = _by_token(clip, patch, tubelet, order)
    rows = view[_coordinates(index, view.shape[2], view.shape[3])]
    if clip.dtype == torch.uint8:
        compute = torch.float64 if dtype == torch.float64 else torch.float32
        a, b = (_constants(tuple(v), compute, clip.device) for v in (scale, shift))
        if order == "conv":
            a, b = a[:, None, None, None], b[:, None, None, None]
        rows = rows.to(compute) * a + b
    rows = rows.to(dtype).flatten(2)
    return torch.where(index[..., None] < 0, 0, rows)


def scatter_patches_reference(
    rows: Tensor, index: Tensor, grid: Sequence[int], patch: int, tubelet: int, channels: int, order: str
) -> Tensor:
    """The specification: add the rows into the patch view of a clip of zeros."""
    _check_negative(index, "scatter_patches")
    frames, height, width = grid
    clip = rows.new_zeros(rows.shape[0], channels, frames * tubelet, height * patch, width * patch)
    view = _by_token(clip, patch, tubelet, order)
    values = torch.where(index[..., None] < 0, 0, rows).reshape(*index.shape, *view.shape[4:])
    view.index_put_(_coordinates(index, height, width), values, accumulate=True)
    return clip


def _gather_native(
    clip: Tensor,
    index: Tensor,
    patch: int,
    tubelet: int,
    scale: Sequence[float],
    shift: Sequence[float],
    dtype: torch.dtype,
    order: str,
) -> Tensor:
    shape, clip = clip_shape(clip), clip.contiguous()
    rows = clip.new_empty((*index.shape, shape[4] * tubelet * patch * patch), dtype=dtype)
    _native.run(
        "gather_patches",
        clip.device,
        _native.address(clip, (torch.uint8, *_native.FLOATS), "gather_patches: clip"),
        _native.code(clip.dtype),
        *shape, tubelet, patch,
        _native.address(index, (torch.int32,), "gather_patches: index [B, K]"),
        index.shape[1], scale, shift, order == "pixel",
        _native.address(rows, _native.FLOATS, "gather_patches: rows"),
        _native.code(dtype),
    )  # fmt: skip
    return rows


def _scatter_native(
    rows: Tensor, index: Tensor, grid: Sequence[int], patch: int, tubelet: int, channels: int, order: str
) -> Tensor:
    rows = rows.contiguous()
    frames, height, width = grid
    clip = rows.new_empty(rows.shape[0], channels, frames * tubelet, height * patch, width * patch)
    _native.run(
        "scatter_patches",
        rows.device,
        _native.address(rows, _native.FLOATS, "scatter_patches: rows [B, K, C*tubelet*patch*patch]"),
        _native.code(rows.dtype),
        _native.address(index, (torch.int32,), "scatter_patches: index [B, K]"),
        index.shape[1], *clip_shape(clip), tubelet, patch, order == "pixel",
        _native.address(clip, _native.FLOATS, "scatter_patches: clip"),
    )  # fmt: skip
    return clip


register_backends(
    "gather_patches", gather_patches_reference, native=_gather_native, triton=kernel("_patches_triton", "gather")
)
register_backends(
    "scatter_patches", scatter_patches_reference, native=_scatter_native, triton=kernel("_patches_triton", "scatter")
)


def _gather_body(clip: Tensor, index: Tensor, *arguments: Any) -> Tensor:
    *given, name = arguments
    name = name or backend.pick("gather_patches", clip.device, clip.dtype, given[4])
    return backend.run("gather_patches", name, clip, index.contiguous(), *given)


def _gather_fake(
    clip: Tensor, index: Tensor, patch: int, tubelet: int, scale: Any, shift: Any, dtype: torch.dtype, *_: Any
) -> Tensor:
    return clip.new_empty((*index.shape, clip_shape(clip)[4] * tubelet * patch * patch), dtype=dtype)


def _gather_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    clip, index, patch, tubelet, _, _, dtype, order, name = inputs
    ctx.save_for_backward(index)
    ctx.clip = clip_shape(clip), clip.dtype
    ctx.geometry = patch, tubelet, order
    ctx.backend = name or backend.pick("gather_patches", clip.device, clip.dtype, dtype)


def _gather_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    (_, t, h, w, c), dtype = ctx.clip
    if dtype == torch.uint8:
        return (None,) * 9
    patch, tubelet, order = ctx.geometry
    grid = [t // tubelet, h // patch, w // patch]
    try:
        clip_grad = _scatter(grad, ctx.saved_tensors[0], grid, patch, tubelet, c, order, ctx.backend).to(dtype)
    except ValueError as error:  # of a kernel that found a token named twice
        raise ValueError(
            f"gradient of gather_patches: {error}; the reference adds their gradients: run the forward under "
            'use_backend("gather_patches=reference")'
        ) from error
    return clip_grad, *(None,) * 8


def _scatter_body(rows: Tensor, index: Tensor, *arguments: Any) -> Tensor:
    *given, name = arguments
    name = name or backend.pick("scatter_patches", rows.device, rows.dtype)
    return backend.run("scatter_patches", name, rows, index.contiguous(), *given)


def _scatter_fake(
    rows: Tensor, index: Tensor, grid: Sequence[int], patch: int, tubelet: int, channels: int, *_: Any
) -> Tensor:
    frames, height, width = grid
    return rows.new_empty(rows.shape[0], channels, frames * tubelet, height * patch, width * patch)


def _scatter_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    rows, index, _, patch, tubelet, channels, order, name = inputs
    ctx.save_for_backward(index)
    ctx.geometry = patch, tubelet, channels, order, rows.dtype
    ctx.backend = name or backend.pick("scatter_patches", rows.device, rows.dtype)


def _scatter_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    patch, tubelet, channels, order, dtype = ctx.geometry
    identity = [1.0] * channels, [0.0] * channels
    rows_grad = _gather(grad, ctx.saved_tensors[0], patch, tubelet, *identity, dtype, order, ctx.backend)
    return rows_grad, *(None,) * 7


_gather = define(
    "gather_patches(Tensor clip, Tensor index, int patch, int tubelet, float[] scale, float[] shift, ScalarType dtype,"
    " str order, str backend) -> Tensor",
    _gather_body,
    _gather_fake,
    backward=_gather_backward,
    setup_context=_gather_setup,
)
_scatter = define(
    "scatter_patches(Tensor rows, Tensor index, int[] grid, int patch, int tubelet, int channels, str order, str backend)"
    " -> Tensor",
    _scatter_body,
    _scatter_fake,
    backward=_scatter_backward,
    setup_context=_scatter_setup,
)


def gather_patches(
    clip: Tensor,
    index: Tensor,
    *,
    patch: int,
    tubelet: int = 2,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    dtype: torch.dtype = torch.float32,
    order: str = "conv",
) -> Tensor:
    """Rows of the patches that `index` names: `dtype` [B, K, C*tubelet*patch*patch].

    clip: uint8 [B, T, H, W, C], normalised with the per-channel `mean` and `std` of values in [0, 1] (None: ImageNet's, for
    three channels), or floating point [B, C, T, H, W], taken as it is and differentiable where the ids of a row are distinct
    (its gradient is `scatter_patches`; the reference adds up those of a token named twice). index: int32 [B, K] token ids
    (int64 is converted); -1 gives a row of zeros.
    `order`: "conv" (c, t, y, x) or "pixel" (t, y, x, c).
    float64 has the reference only.

    Raises ValueError for a clip that is no whole number of patches, IndexError (on CPU) for ids outside the grid. On CUDA
    nothing waits to look at ids: the native kernel gives such a row NaN. It takes at most 16 channels.

    Floor: n = C*tubelet*patch*patch bytes read and n times the row's item size written a token, plus 4 B of index (4.9 MB
    for 4 uint8 clips of ViT-B in float32); 2n FLOPs a token. Bound by memory.
    """
    channels, device = check_clip(clip, patch, tubelet, "gather_patches")[3], clip.device
    index = check_index(index, clip.shape[0], device, "gather_patches")
    if order not in ORDERS:
        raise ValueError(f"gather_patches: order must be one of {', '.join(ORDERS)}, got {order!r}")
    if not dtype.is_floating_point:
        raise ValueError(f"gather_patches: dtype must be a floating point type, got {dtype}")
    if clip.dtype != torch.uint8:
        scale, shift = [1.0] * channels, [0.0] * channels
    elif mean is None and std is None and channels == 3:
        scale, shift = _IMAGENET
    else:
        scale, shift = _scale_and_shift(*channel_statistics(channels, mean, std, "gather_patches"))
    name = backend.argument("gather_patches", device, clip.dtype, dtype)
    return _gather(clip, index, patch, tubelet, scale, shift, dtype, order, name)


def scatter_patches(
    rows: Tensor,
    index: Tensor,
    *,
    grid: tuple[int, int, int],
    patch: int,
    tubelet: int = 2,
    channels: int = 3,
    order: str = "conv",
) -> Tensor:
    """A clip [B, C, T, H, W] of the dtype of `rows` with each row at its token, zeros elsewhere; adjoint of `gather_patches`.

    rows: floating point [B, K, C*tubelet*patch*patch]; index: int32 [B, K] (int64 is converted), ids of a row distinct,
    -1 leaves a row out; grid: (T', H', W'). `order` is that of the rows: "pixel" for predictions. float64 has the
    reference only. Raises ValueError for mismatched shapes, IndexError (on CPU) for ids outside
    the grid. The native CUDA kernel, which cannot look at ids without waiting, leaves out rows of ids outside the grid and
    lets the last row of a token win; it takes at most 16 channels.

    Floor: the rows read and the whole clip written once; no FLOPs.
    """
    check_tensor(rows, "scatter_patches", "rows")
    if min(patch, tubelet, channels) < 1:
        raise ValueError(
            f"scatter_patches: patch, tubelet and channels must be at least 1, got {patch}, {tubelet} and {channels}"
        )
    width = channels * tubelet * patch * patch
    if rows.ndim != 3 or not rows.is_floating_point() or rows.shape[2] != width:
        raise ValueError(
            f"scatter_patches: rows must be floating point [B, K, {width}] for {channels} channels, tubelet {tubelet} and "
            f"patch {patch}, got {rows.dtype} {tuple(rows.shape)}"
        )
    if len(grid) != 3 or min(grid) < 1:
        raise ValueError(f"scatter_patches: grid must be (T', H', W'), got {tuple(grid)}")
    if order not in ORDERS:
        raise ValueError(f"scatter_patches: order must be one of {', '.join(ORDERS)}, got {order!r}")
    index = check_index(index, rows.shape[0], rows.device, "scatter_patches")
    if index.shape[1] != rows.shape[1]:
        raise ValueError(f"scatter_patches: {rows.shape[1]} rows but {index.shape[1]} indices")
    name = backend.argument("scatter_patches", rows.device, rows.dtype)
    return _scatter(rows, index, list(grid), patch, tubelet, channels, order, name)
