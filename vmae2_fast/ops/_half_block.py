"""What the half-blocks `residual_norm`, `norm_qkv` and `norm_mlp` share: residual stream, LayerNorm, GEMMs, dtypes.

Everything here works without autograd, inside the bodies of opaque ops, or is the bookkeeping around them. A gradient that
nobody wants is an empty tensor: an op returns the same number of tensors always, and none of them twice.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import backend
from . import _norm_native
from ._register import check, kernel, register_backends
from ._shadow import cast

STREAM = "Tensor x, Tensor? branch, Tensor? gamma, Tensor? drop, Tensor norm_weight, Tensor norm_bias, float eps"
STREAM_BACKWARD = (
    "Tensor? grad_x, Tensor grad, Tensor x, Tensor mean, Tensor rstd, Tensor? branch, Tensor? gamma, Tensor? drop, "
    "Tensor norm_weight, Tensor norm_bias, ScalarType? branch_dtype, bool[] needs"
)


def compute_dtype(device: torch.device, otherwise: torch.dtype) -> torch.dtype:
    """The dtype a GEMM-like op computes in: autocast's where it is on (fp64 is left alone), else `otherwise`."""
    if otherwise != torch.float64 and torch.is_autocast_enabled(device.type):
        return torch.get_autocast_dtype(device.type)
    return otherwise


def opaque(body: Callable[..., Any]) -> Callable[..., Any]:
    """`body` with autocast off: it stays in force inside a registered op and would cast the operands of its GEMMs."""

    @functools.wraps(body)
    def run(*args: Any) -> Any:
        kind = next(a for a in args if isinstance(a, Tensor)).device.type
        if not torch.is_autocast_enabled(kind):
            return body(*args)
        with torch.autocast(kind, enabled=False):
            return body(*args)

    return run


def statistics_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of means, deviations and log-sum-exps of values of `dtype`."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def check_stream(
    op: str, x: Tensor, branch: Tensor | None, gamma: Tensor | None, drop: Tensor | None, weight: Tensor, bias: Tensor
) -> None:
    """Argument check shared by the half-blocks."""
    # Every block of a model comes by here twice a step: a message is made only for an error.
    shape, device = x.shape, x.device
    if len(shape) != 3 or not x.is_floating_point():
        raise ValueError(f"{op}: x must be a floating-point [B, N, C], got {x.dtype} {tuple(shape)}")
    c = shape[2]
    for name, tensor in (("norm weight", weight), ("norm bias", bias), ("gamma", gamma)):
        if tensor is not None and tensor.shape != (c,):
            raise ValueError(f"{op}: {name} must be [C] = [{c}], got {tuple(tensor.shape)}")
    for name, tensor in (
        ("norm weight", weight), ("norm bias", bias), ("gamma", gamma), ("drop", drop), ("branch", branch),
    ):  # fmt: skip
        if tensor is not None and (tensor.device != device or tensor.is_complex()):
            raise ValueError(f"{op}: {name} is {tensor.dtype} on {tensor.device}; it must be real and on {device}, like x")
    if branch is None:
        check(gamma is None and drop is None, f"{op}: gamma and drop scale a branch, but branch is None")
    elif branch.shape != shape:
        raise ValueError(f"{op}: branch must have x's shape {tuple(shape)}, got {tuple(branch.shape)}")
    if drop is not None and drop.shape != shape[:1]:
        raise ValueError(f"{op}: drop must be [B] = [{shape[0]}], got {tuple(drop.shape)}")


def check_linear(op: str, name: str, weight: Tensor, bias: Tensor | None, columns: int, rows: int | None = None) -> None:
    """Argument check of one weight [rows, columns] and its bias."""
    ok = weight.ndim == 2 and weight.shape[1] == columns and rows in (None, weight.shape[0])
    check(ok, f"{op}: {name} weight must be [{'outputs' if rows is None else rows}, {columns}], got {tuple(weight.shape)}")
    if bias is not None:
        check(bias.shape == weight.shape[:1], f"{op}: {name} bias must be [{weight.shape[0]}], got {tuple(bias.shape)}")


def branch_scale(gamma: Tensor | None, drop: Tensor | None) -> Tensor | None:
    """gamma * drop[b], broadcastable to [B, N, C]; None where there is neither."""
    if drop is None:
        return gamma
    rows = drop[:, None, None]
    return rows if gamma is None else rows * gamma


def stream_forward(
    x: Tensor,
    branch: Tensor | None,
    gamma: Tensor | None,
    drop: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(x_new = x + gamma * drop[b] * branch in x's dtype, h = LayerNorm(x_new) in `dtype`, mean, rstd).

    Without a branch x_new is x, which an op may not return: the first is empty then.
    """
    returned, x_new = x.new_empty(0), x
    if branch is not None:
        returned = x_new = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        scale = branch_scale(gamma, drop)
        if scale is None:
            torch.add(x, branch, out=x_new)
        else:
            torch.addcmul(x, branch, scale, out=x_new)
    kind = statistics_dtype(x.dtype)
    h, mean, rstd = torch.native_layer_norm(x_new.to(kind), x.shape[-1:], weight.to(kind), bias.to(kind), eps)
    return returned, h.to(dtype), mean, rstd


def linear(rows: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """rows [M, K] times the transpose of weight [O, K], plus bias [O], in `dtype`."""
    transposed = cast(weight, dtype).t()
    rows = rows.to(dtype)
    return torch.mm(rows, transposed) if bias is None else torch.addmm(bias.to(dtype), rows, transposed)


def weight_grad(grad: Tensor, rows: Tensor, weight: Tensor, wanted: bool) -> Tensor:
    """Gradient of `linear` for its weight, in the weight's dtype."""
    return torch.mm(grad.t(), rows.to(grad.dtype)).to(weight.dtype) if wanted else grad.new_empty(0)


def bias_grad(grad: Tensor, bias: Tensor | None, wanted: bool) -> Tensor:
    """Gradient of `linear` for its bias, in the bias's dtype."""
    return grad.sum(0).to(bias.dtype) if wanted and bias is not None else grad.new_empty(0)


def stream_backward(
    grad_x: Tensor | None,
    grad_h: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    branch: Tensor | None,
    gamma: Tensor | None,
    drop: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    branch_dtype: torch.dtype | None,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients for (x, branch, gamma, norm weight, norm bias) from those of x_new and h; `x` is x_new.

    needs = (gamma, norm weight, norm bias, ...). The branch's gradient is empty where it equals x's (no gamma, no drop).
    """
    kind = statistics_dtype(x.dtype)
    dx, dweight, dbias = torch.ops.aten.native_layer_norm_backward.default(
        grad_h.to(kind), x.to(kind), x.shape[-1:], mean, rstd, weight.to(kind), bias.to(kind), [True, needs[1], needs[2]]
    )
    if grad_x is not None:
        dx.add_(grad_x)
    scale = branch_scale(gamma, drop)
    dbranch = x.new_empty(0) if scale is None else (dx * scale).to(branch_dtype)
    if needs[0]:
        assert branch is not None
        assert gamma is not None
        per_clip = (dx * branch).sum(1)
        dgamma = (per_clip if drop is None else per_clip * drop[:, None]).sum(0).to(gamma.dtype)
    else:
        dgamma = x.new_empty(0)
    dweight = dweight.to(weight.dtype) if needs[1] else x.new_empty(0)
    dbias = dbias.to(bias.dtype) if needs[2] else x.new_empty(0)
    return dx.to(x.dtype), dbranch, dgamma, dweight, dbias


class Stream(NamedTuple):
    """Residual stream and LayerNorm of one backend: what the half-blocks put around their GEMMs."""

    forward: Callable[..., tuple[Tensor, Tensor, Tensor, Tensor]]
    backward: Callable[..., tuple[Tensor, Tensor, Tensor, Tensor, Tensor]]

    def norm_rows(self, x: Tensor, weight: Tensor, bias: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
        """LayerNorm(x) as the forward computed it, as rows [B * N, C]: nothing of it was kept."""
        return self.forward(x, None, None, None, weight, bias, eps, dtype)[1].view(-1, x.shape[2])


STREAMS = {
    "reference": Stream(stream_forward, stream_backward),
    "native": Stream(_norm_native.forward, _norm_native.backward),
    "triton": Stream(kernel("_norm_triton", "forward"), kernel("_norm_triton", "backward")),
}


def register(op: str, run: Callable[..., Any]) -> None:
    """Make the backends of a half-block known: `run` with each backend's `Stream` as its first argument."""
    runs = {name: functools.partial(run, stream) for name, stream in STREAMS.items()}
    register_backends(op, **runs, why_not_native=backend.why_not_cpp_kernel)


def details(x: Tensor, branch: Tensor | None, norm_weight: Tensor, dtype: torch.dtype) -> tuple[Any, ...]:
    """What `backend.pick` and `backend.argument` are told of a half-block's input and of the dtype it computes in."""
    return x.device, x.dtype, x.dtype if branch is None else branch.dtype, norm_weight.dtype, dtype


def body(op: str) -> Callable[..., Any]:
    """The opaque body of a half-block: its arguments begin with those of `STREAM` and end with the dtype and the backend."""

    def run(*args: Any) -> Any:
        *given, name = args
        return backend.run(op, name or backend.pick(op, *details(given[0], given[1], given[4], given[-1])), *given)

    return opaque(run)


def backward_body(op: str) -> Callable[..., Any]:
    """The opaque body of a half-block's backward, whose last argument is the backend its forward ran."""
    return opaque(lambda *args: backend.run(op, args[-1], *args[:-1]))


def fake_stream(x: Tensor, branch: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """x_new, mean and rstd of a fake half-block."""
    b, n, c = x.shape
    stats = [x.new_empty((b, n, 1), dtype=statistics_dtype(x.dtype)) for _ in range(2)]
    return x.new_empty(0) if branch is None else x.new_empty((b, n, c)), stats[0], stats[1]


def fake_grad(like: Tensor | None, wanted: bool, x: Tensor) -> Tensor:
    """A fake gradient for `like`."""
    return like.new_empty(like.shape) if wanted and like is not None else x.new_empty(0)


def fake_stream_backward(
    x: Tensor,
    gamma: Tensor | None,
    drop: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    branch_dtype: torch.dtype | None,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Shapes of `stream_backward`'s results."""
    scaled = gamma is not None or drop is not None
    dbranch = x.new_empty(x.shape, dtype=branch_dtype) if scaled else x.new_empty(0)
    grads = [fake_grad(t, wanted, x) for t, wanted in zip((gamma, weight, bias), needs[:3])]
    return x.new_empty(x.shape), dbranch, grads[0], grads[1], grads[2]


def save_stream(ctx: Any, op: str, inputs: tuple[Any, ...], output: tuple[Tensor, ...], *more: Tensor | None) -> None:
    """setup_context of a half-block with inputs (x, branch, gamma, drop, norm weight, norm bias, ..., dtype, backend) and
    output (x_new, result, mean, rstd, ...). `more` is saved behind the stream's own eight tensors."""
    x, branch, gamma, drop, weight, bias = inputs[:6]
    x_new, _, mean, rstd = output[:4]
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[2:], *([x_new] if branch is None else []))
    ctx.branch_dtype = None if branch is None else branch.dtype
    ctx.backend = inputs[-1] or backend.pick(op, *details(x, branch, weight, inputs[-2]))
    ctx.save_for_backward(
        x if branch is None else x_new, mean, rstd, branch if gamma is not None else None, gamma, drop, weight, bias, *more
    )


def stream_grads(ctx: Any, grads: tuple[Tensor, ...]) -> tuple[Tensor | None, ...]:
    """Gradients of (x, branch, gamma, drop, norm weight, norm bias, eps) as autograd wants them."""
    dx, dbranch, dgamma, dweight, dbias = grads[:5]
    needs = ctx.needs_input_grad
    if ctx.branch_dtype is not None and not dbranch.numel():
        dbranch = dx.to(ctx.branch_dtype)
    return (
        dx,
        dbranch if ctx.branch_dtype is not None else None,
        dgamma if needs[2] else None,
        None,
        dweight if needs[4] else None,
        dbias if needs[5] else None,
        None,
    )
