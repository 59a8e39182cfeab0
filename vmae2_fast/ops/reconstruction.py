"""Reconstruction loss of predicted patches (paper section 3.1 and 3.2): target, error and gradient, never stored apart.

For a loss token the target is its patch in order (t, y, x, c), pixels z in [0, 1], normalised per token and channel c over
the n = tubelet*patch*patch pixels:

    target = (z - mean_c) / (sqrt(var_c) + 1e-6),    var_c unbiased        (normalize=False: target = z)

and its loss the mean over K = n*C of (pred - target)^2. The mean over tokens divides by their number in the whole batch
("code", what the released code does) or by all decoded tokens ("paper", the equation of section 3.2).

Each direction is one pass over clip and prediction. The forward keeps, for each token and channel, the two numbers that
make a target of a pixel, so that the backward writes 2/K * upstream/denominator * (pred - target) straight into the gradient:
neither a target, nor an error, nor a float32 copy of the prediction exists. That is fewer bytes than a forward that writes the
error and a backward that scales it, and one tensor of the prediction's size less to hold.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import backend
from . import _native
from ._register import check, check_tensor, define, kernel, register_backends
from .patches import channel_statistics, check_clip, check_index, clip_shape, gather_patches_reference

EPS = 1e-6  # added to the standard deviation, as in the official engine


def _compute_dtype(*tensors: Tensor) -> torch.dtype:
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


def _pixels(
    clip: Tensor, index: Tensor, patch: int, tubelet: int, mean: Sequence[float], std: Sequence[float], dtype: torch.dtype
) -> tuple[Tensor, float]:
    """Pixels of the indexed patches [B, L, tubelet*patch*patch, C] and what 1.0 is in their units.

    Those of a uint8 clip stay bytes: a constant patch then has its exact mean, and its target is exactly 0.
    """
    channels = clip_shape(clip)[4]
    scale, shift = [1.0] * channels, [0.0] * channels
    rows = gather_patches_reference(clip, index, patch, tubelet, scale, shift, dtype, "pixel").unflatten(2, (-1, channels))
    if clip.dtype == torch.uint8:
        return rows, 255.0
    return torch.stack([rows[..., c] * std[c] + mean[c] for c in range(channels)], dim=-1), 1.0


def _centre_and_factor(pixels: Tensor, unit: float, normalize: bool) -> Tensor:
    """[B, L, 2, C] with target = (pixel - centre) * factor."""
    if normalize:
        variance, centre = torch.var_mean(pixels, dim=2, correction=1)
        return torch.stack((centre, 1 / (variance.sqrt() + EPS * unit)), dim=2)
    plain = pixels.new_zeros(*pixels.shape[:2], 2, pixels.shape[3])
    plain[:, :, 1] = 1 / unit
    return plain


def _error(pred: Tensor, pixels: Tensor, statistics: Tensor, loss_index: Tensor) -> Tensor:
    target = (pixels - statistics[:, :, :1]) * statistics[:, :, 1:]
    # Contiguous: the order of the sum over it must not depend on the strides of pred.
    return torch.where(loss_index[..., None] < 0, 0, pred.to(pixels.dtype) - target.flatten(2)).contiguous()


def reconstruction_loss_reference(
    pred: Tensor,
    clip: Tensor,
    loss_index: Tensor,
    patch: int,
    tubelet: int = 2,
    normalize: bool = True,
    mean: Sequence[float] = (),
    std: Sequence[float] = (),
) -> tuple[Tensor, Tensor]:
    """The specification, differentiable in `pred`: (sum of the token losses, number of loss tokens)."""
    loss_sum, count, _ = _forward_reference(pred, clip, loss_index, patch, tubelet, normalize, 1, mean, std)
    return loss_sum, count


def divided(value: Tensor, count: Tensor, divisor: int) -> Tensor:
    """`value` over `divisor`, or where that is 0 over the tokens that count, at least 1."""
    return value if divisor == 1 else value / (divisor or count.clamp(min=1))


def _forward_reference(
    pred: Tensor,
    clip: Tensor,
    loss_index: Tensor,
    patch: int,
    tubelet: int,
    normalize: bool,
    divisor: int,
    mean: Sequence[float],
    std: Sequence[float],
) -> tuple[Tensor, Tensor, Tensor]:
    with torch.no_grad():
        pixels, unit = _pixels(clip.detach(), loss_index, patch, tubelet, mean, std, _compute_dtype(pred, clip))
        valid = loss_index >= 0
        statistics = torch.where(valid[..., None, None], _centre_and_factor(pixels, unit, normalize), 0)
    loss_sum, count = _error(pred, pixels, statistics, loss_index).square().mean(2).sum(), valid.sum()
    return divided(loss_sum, count, divisor), count, statistics


def _backward_reference(
    upstream: Tensor,
    pred: Tensor,
    clip: Tensor,
    loss_index: Tensor,
    statistics: Tensor,
    count: Tensor,
    patch: int,
    tubelet: int,
    divisor: int,
    mean: Sequence[float],
    std: Sequence[float],
) -> Tensor:
    pixels, _ = _pixels(clip, loss_index, patch, tubelet, mean, std, statistics.dtype)
    scale = divided(upstream, count, divisor) * (2 / pred.shape[2])
    return (_error(pred, pixels, statistics, loss_index) * scale).to(pred.dtype)


def _forward_native(
    pred: Tensor,
    clip: Tensor,
    loss_index: Tensor,
    patch: int,
    tubelet: int,
    normalize: bool,
    divisor: int,
    mean: Sequence[float],
    std: Sequence[float],
) -> tuple[Tensor, Tensor, Tensor]:
    pred, clip = pred.contiguous(), clip.contiguous()
    loss, count = pred.new_empty((), dtype=torch.float32), loss_index.new_empty((), dtype=torch.int64)
    statistics = pred.new_empty(_statistics_shape(clip, loss_index), dtype=torch.float32)
    scratch = []
    if _native.in_cuda(pred.device):  # what its blocks leave for the last one to add up
        sums = pred.new_empty((loss_index.numel(), 2), dtype=torch.float64)
        scratch.append(_native.address(sums, (torch.float64,), "reconstruction_loss: scratch"))
    _native.run(
        "reconstruction_loss",
        pred.device,
        *_native_inputs(pred, clip, loss_index, patch, tubelet, mean, std),
        normalize,
        divisor,
        _native.address(statistics, (torch.float32,), "reconstruction_loss: statistics"),
        _native.address(loss, (torch.float32,), "reconstruction_loss: loss"),
        _native.address(count, (torch.int64,), "reconstruction_loss: count"),
        *scratch,
    )
    return loss, count, statistics


def _backward_native(
    upstream: Tensor,
    pred: Tensor,
    clip: Tensor,
    loss_index: Tensor,
    statistics: Tensor,
    count: Tensor,
    patch: int,
    tubelet: int,
    divisor: int,
    mean: Sequence[float],
    std: Sequence[float],
) -> Tensor:
    pred, clip = pred.contiguous(), clip.contiguous()
    grad = torch.empty_like(pred)
    _native.run(
        "reconstruction_loss_backward",
        pred.device,
        _native.address(upstream, (torch.float32,), "reconstruction_loss_backward: upstream"),
        *_native_inputs(pred, clip, loss_index, patch, tubelet, mean, std),
        _native.address(statistics, (torch.float32,), "reconstruction_loss_backward: statistics"),
        _native.address(count, (torch.int64,), "reconstruction_loss_backward: count"),
        divisor,
        _native.address(grad, _native.FLOATS, "reconstruction_loss_backward: grad"),
    )
    return grad


def _native_inputs(
    pred: Tensor,
    clip: Tensor,
    loss_index: Tensor,
    patch: int,
    tubelet: int,
    mean: Sequence[float],
    std: Sequence[float],
) -> tuple[Any, ...]:
    """What both native kernels read; `pred` and `clip` are contiguous."""
    return (
        _native.address(pred, _native.FLOATS, "reconstruction_loss: pred [B, L, K]"),
        _native.code(pred.dtype),
        _native.address(clip, (torch.uint8, *_native.FLOATS), "reconstruction_loss: clip"),
        _native.code(clip.dtype),
        *clip_shape(clip), tubelet, patch,
        _native.address(loss_index, (torch.int32,), "reconstruction_loss: loss_index [B, L]"),
        loss_index.shape[1], list(mean), list(std),
    )  # fmt: skip


def _statistics_shape(clip: Tensor, loss_index: Tensor) -> tuple[int, int, int, int]:
    return (*loss_index.shape, 2, clip_shape(clip)[4])


register_backends(
    "reconstruction_loss", _forward_reference, native=_forward_native, triton=kernel("_reconstruction_triton", "loss")
)
register_backends(
    "reconstruction_loss_backward",
    _backward_reference,
    native=_backward_native,
    triton=kernel("_reconstruction_triton", "gradient"),
)


def _body(pred: Tensor, clip: Tensor, loss_index: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    *given, name = arguments
    name = name or backend.pick("reconstruction_loss", pred.device, pred.dtype, clip.dtype)
    return backend.run("reconstruction_loss", name, pred, clip, loss_index.contiguous(), *given)


def _fake(pred: Tensor, clip: Tensor, loss_index: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    kind = _compute_dtype(pred, clip)
    statistics = pred.new_empty(_statistics_shape(clip, loss_index), dtype=kind)
    return pred.new_empty((), dtype=kind), loss_index.new_empty((), dtype=torch.int64), statistics


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    pred, clip, loss_index, patch, tubelet, _, divisor, mean, std, name = inputs
    _, count, statistics = output
    ctx.mark_non_differentiable(count, statistics)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(pred, clip, loss_index, statistics, *([] if divisor else [count]))
    ctx.arguments = patch, tubelet, divisor, mean, std
    ctx.backend = name or backend.pick("reconstruction_loss", pred.device, pred.dtype, clip.dtype)


def _autograd(ctx: Any, upstream: Tensor | None, *_: Any) -> tuple[Any, ...]:
    if upstream is None:
        return (None,) * 10
    pred, clip, loss_index, statistics, *kept = ctx.saved_tensors
    count = kept[0] if kept else loss_index.new_empty((), dtype=torch.int64)  # nobody looks at it: there is a divisor
    return _loss_backward(upstream, pred, clip, loss_index, statistics, count, *ctx.arguments, ctx.backend), *(None,) * 9


def _backward_body(upstream: Tensor, pred: Tensor, clip: Tensor, loss_index: Tensor, *arguments: Any) -> Tensor:
    *given, name = arguments
    return backend.run("reconstruction_loss_backward", name, upstream, pred, clip, loss_index.contiguous(), *given)


_loss = define(
    "reconstruction_loss(Tensor pred, Tensor clip, Tensor loss_index, int patch, int tubelet, bool normalize,"
    " SymInt divisor, float[] mean, float[] std, str backend) -> (Tensor, Tensor, Tensor)",
    _body,
    _fake,
    backward=_autograd,
    setup_context=_setup,
)
_loss_backward = define(
    "reconstruction_loss_backward(Tensor upstream, Tensor pred, Tensor clip, Tensor loss_index, Tensor statistics,"
    " Tensor count, int patch, int tubelet, SymInt divisor, float[] mean, float[] std, str backend) -> Tensor",
    _backward_body,
    lambda upstream, pred, *_: pred.new_empty(pred.shape),
)


def reconstruction_loss(
    pred: Tensor,
    clip: Tensor,
    loss_index: Tensor,
    *,
    patch: int,
    tubelet: int = 2,
    normalize: bool = True,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    denominator: str = "code",
    decoded: int | None = None,
    reduction: str = "mean",
) -> Tensor | tuple[Tensor, Tensor]:
    """Mean squared error between predictions and the (normalised) pixels of the loss tokens.

    pred: float [B, L, K], K = tubelet*patch*patch*C in order (t, y, x, c); clip: uint8 [B, T, H, W, C], or floating point
    [B, C, T, H, W] already normalised with `mean` and `std` (None: ImageNet's for three channels); loss_index: int32 [B, L]
    token ids, -1 where padded (int64 is converted). All arithmetic is float32, also under autocast; only `pred` gets a
    gradient, in its own dtype. float64 has the reference only and gives a float64 loss.

    `denominator`: "code" divides by the loss tokens of the whole batch, "paper" by B*`decoded`.
    Returns the float32 scalar, or with reduction="sum" the pair (sum of the token losses, that denominator as int64
    scalar). Raises ValueError for mismatched shapes, IndexError (on CPU) for ids outside the grid. On CUDA nothing waits to
    look at ids: with the native kernel, which takes at most 16 channels, such a token's loss and gradient are NaN.

    Floor: clip and predictions read once, the gradient written: 9 B a value in float32 for a uint8 clip (ViT-B, 4 clips:
    38.9 MB), 5 B in bfloat16. Ours moves 14 and 8, since it reads clip and predictions once each way: the gradient is not
    known before the upstream one is.
    """
    channels, device = check_clip(clip, patch, tubelet, "reconstruction_loss")[3], clip.device
    width = channels * tubelet * patch * patch
    check_tensor(pred, "reconstruction_loss", "pred")
    if pred.ndim != 3 or not pred.is_floating_point() or pred.shape[0] != clip.shape[0] or pred.shape[2] != width:
        raise ValueError(
            f"reconstruction_loss: pred must be floating point [{clip.shape[0]}, L, {width}] for this clip, patch {patch} and "
            f"tubelet {tubelet}, got {pred.dtype} {tuple(pred.shape)}"
        )
    if pred.device != device:
        raise ValueError(f"reconstruction_loss: pred is on {pred.device}, clip on {device}")
    loss_index = check_index(loss_index, pred.shape[0], device, "reconstruction_loss", "loss_index")
    if loss_index.shape[1] != pred.shape[1]:
        raise ValueError(
            f"reconstruction_loss: pred has {pred.shape[1]} tokens a sample, loss_index {loss_index.shape[1]}"
        )
    if normalize and tubelet * patch * patch <= 1:
        raise ValueError("reconstruction_loss: a patch of one pixel has no variance; use normalize=False")
    if denominator not in ("code", "paper"):
        raise ValueError(f"reconstruction_loss: denominator must be code or paper, got {denominator!r}")
    if reduction not in ("mean", "sum"):
        raise ValueError(f"reconstruction_loss: reduction must be mean or sum, got {reduction!r}")
    if denominator == "paper" and not (isinstance(decoded, (int, torch.SymInt)) and decoded >= 1):
        raise ValueError(
            'reconstruction_loss: denominator="paper" needs decoded=, the number of tokens decoded per clip, a whole one of '
            f"at least 1; got {decoded}"
        )
    statistics = _statistics(clip, mean, std, channels, "reconstruction_loss")
    name = backend.argument("reconstruction_loss", device, pred.dtype, clip.dtype)
    whole = pred.shape[0] * decoded if denominator == "paper" and decoded is not None else 0  # 0: the tokens that count
    if reduction == "mean":
        return _loss(pred, clip, loss_index, patch, tubelet, normalize, whole, *statistics, name)[0]
    loss_sum, count, _ = _loss(pred, clip, loss_index, patch, tubelet, normalize, 1, *statistics, name)
    return loss_sum, torch.full_like(count, whole) if denominator == "paper" else count


def _statistics(
    clip: Tensor, mean: Sequence[float] | None, std: Sequence[float] | None, channels: int, op: str
) -> tuple[list[float], list[float]]:
    # uint8 clips hold plain pixels: nothing to undo, whatever the number of channels.
    if clip.dtype == torch.uint8:
        return [0.0] * channels, [1.0] * channels
    return channel_statistics(channels, mean, std, op)


def patch_statistics(
    clip: Tensor,
    index: Tensor,
    *,
    patch: int,
    tubelet: int = 2,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> tuple[Tensor, Tensor]:
    """What turns predictions of normalised patches back into pixels in [0, 1]: pixels = pred*std + mean.

    clip, index, `mean` and `std` as in `reconstruction_loss`. Returns (mean, std) of each patch, float32 [B, L, 1, C]
    (float64 for a float64 clip); std includes the 1e-6 of the target's formula.
    """
    channels = check_clip(clip, patch, tubelet, "patch_statistics")[3]
    check(tubelet * patch * patch > 1, "patch_statistics: a patch of one pixel has no variance")
    index = check_index(index, clip.shape[0], clip.device, "patch_statistics")
    statistics = _statistics(clip, mean, std, channels, "patch_statistics")
    pixels, unit = _pixels(clip, index, patch, tubelet, *statistics, _compute_dtype(clip))
    centre, factor = _centre_and_factor(pixels, unit, normalize=True).split(1, dim=2)
    return centre / unit, 1 / (factor * unit)
