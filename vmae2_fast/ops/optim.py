"""One step of AdamW on many parameters, in one pass over their memory.

    g = grad / scale                         scale: gradients were multiplied by it, or are to be clipped; 1 when None
    m = m + (1 - beta1) (g - m)
    v = beta2 v + (1 - beta2) g^2
    p = (1 - lr weight_decay) p - lr / (1 - beta1^t) m / (sqrt(v) / sqrt(1 - beta2^t) + eps)

for step t, the one after `steps`; what `torch.optim.AdamW(fused=True)` computes, to rounding (Loshchilov & Hutter, 2019).
Where `skipped` is 1 nothing changes, the count of steps included. A shadow is a bfloat16 copy of p, written in the same pass
(see `_shadow.py`). Gradients are left as they are. Floor: 28 bytes a parameter read and written in float32, 30 with a
shadow.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import backend
from . import _native, _shadow
from ._register import check, define

_Tensors = Sequence[Tensor]


def adamw_reference(
    params: _Tensors, grads: _Tensors, exp_avgs: _Tensors, exp_avg_sqs: _Tensors, steps: _Tensors, shadows: _Tensors,
    scale: Tensor | None, skipped: Tensor | None, lr: float, beta1: float, beta2: float, eps: float, weight_decay: float,
) -> None:  # fmt: skip
    """In plain torch; reads nothing back from a device."""
    for p, grad, m, v, step, shadow in zip(params, grads, exp_avgs, exp_avg_sqs, steps, shadows, strict=True):
        g = grad if scale is None else grad / scale.to(grad.dtype)
        t = step.double() + 1
        first, root = (1 - beta1**t), (1 - beta2**t).sqrt()
        new_m = m + (1 - beta1) * (g - m)
        new_v = beta2 * v + (1 - beta2) * (g * g)
        size = new_v.sqrt() / root.to(p) + eps
        new_p = (1 - lr * weight_decay) * p - (lr / first).to(p) * (new_m / size)
        for old, new in ((p, new_p), (m, new_m), (v, new_v), (step, t.to(step.dtype))):
            old.copy_(new if skipped is None else torch.where(skipped.to(old.device) == 1, old, new))
        if shadow.numel():
            shadow.copy_(p)


def _native_adamw(
    params: _Tensors, grads: _Tensors, exp_avgs: _Tensors, exp_avg_sqs: _Tensors, steps: _Tensors, shadows: _Tensors,
    scale: Tensor | None, skipped: Tensor | None, lr: float, beta1: float, beta2: float, eps: float, weight_decay: float,
) -> None:  # fmt: skip
    written = [params, exp_avgs, exp_avg_sqs]
    dense = [
        tensors if all(map(Tensor.is_contiguous, tensors)) else [t.contiguous() for t in tensors]
        for tensors in (*written, grads)
    ]
    weights, *moments, gradients = (
        _native.addresses(tensors, torch.float32, f"adamw: {name}")
        for tensors, name in zip(dense, ("params", "exp_avgs", "exp_avg_sqs", "grads"), strict=True)
    )
    given = [i for i, shadow in enumerate(shadows) if shadow.numel()]
    copies = dict(zip(given, _native.addresses([shadows[i] for i in given], torch.bfloat16, "adamw: shadows"), strict=True))
    skip = skipped is not None and float(skipped) == 1
    _native.run(
        "adamw", params[0].device, weights, gradients, *moments,
        _native.addresses(steps, torch.float32, "adamw: steps"), [copies.get(i, 0) for i in range(len(params))],
        [p.numel() for p in params], lr, beta1, beta2, eps, weight_decay, 1.0 if scale is None else float(scale), skip,
    )  # fmt: skip
    for tensors, made in zip(written, dense):
        for tensor, copy in zip(tensors, made, strict=True) if made is not tensors else ():
            if copy is not tensor:
                tensor.copy_(copy)
    if not skip:
        # What torch has not seen written: graphs that saved a weight, and shadows made of it before, are out of date.
        torch.autograd.graph.increment_version([t for tensors in (*written, steps) for t in tensors])


def _why_not_native(device: torch.device, *dtypes: torch.dtype) -> str | None:
    if others := {dtype for dtype in dtypes if dtype != torch.float32}:
        return f"the C++ kernel takes float32, not {', '.join(sorted(map(str, others)))}"
    return backend.why_not_cpp_kernel(device)


backend.register_op(
    "adamw",
    {
        "reference": backend.Implementation(adamw_reference),
        "native": backend.Implementation(_native_adamw, _why_not_native),
    },
    {"cpu": ("native", "reference"), "*": ("reference",)},
)


def _body(params: _Tensors, *rest: object) -> None:
    *given, name = rest
    if params:
        name = name or backend.pick("adamw", params[0].device, *{p.dtype for p in params})
        backend.run("adamw", str(name), params, *given)


_adamw = define(
    "adamw(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avgs, Tensor(c!)[] exp_avg_sqs, Tensor(d!)[] steps, "
    "Tensor(e!)[] shadows, Tensor? scale, Tensor? skipped, float lr, float beta1, float beta2, float eps, "
    "float weight_decay, str backend) -> ()",
    _body,
    lambda *_: None,
)


def _alike(tensors: _Tensors, shapes: list[Any], dtypes: list[Any], devices: list[Any]) -> bool:
    return (
        [t.shape for t in tensors] == shapes
        and [t.dtype for t in tensors] == dtypes
        and [t.device for t in tensors] == devices
    )


def _check(params: _Tensors, lists: dict[str, Sequence[Tensor | None]]) -> None:
    """Raise what `adamw` says."""
    shapes, dtypes, devices = [p.shape for p in params], [p.dtype for p in params], [p.device for p in params]
    for name, tensors in lists.items():
        check(len(tensors) == len(params), f"adamw: {len(params)} params, but {len(tensors)} {name}")
        if name == "steps":
            check(all(t.numel() == 1 for t in tensors if t is not None), "adamw: steps must hold one number each")
            continue
        wanted = [torch.bfloat16] * len(params) if name == "shadows" else dtypes
        # Asked of all at once: of hundreds of tensors a step, none is looked at by itself.
        if name != "shadows" and _alike(tensors, shapes, dtypes, devices):  # type: ignore[arg-type]
            continue
        for shape, dtype, device, t in zip(shapes, wanted, devices, tensors, strict=True):
            if t is None:
                continue
            if t.shape != shape or t.device != device:
                raise ValueError(
                    f"adamw: {name} of shape {tuple(t.shape)} on {t.device} "
                    f"for a parameter of shape {tuple(shape)} on {device}"
                )
            if t.dtype != dtype:
                raise TypeError(f"adamw: {name} of {t.dtype} where {dtype} is wanted")
            if name == "shadows" and not t.is_contiguous():
                raise ValueError(f"adamw: shadows must be contiguous, got strides {t.stride()}")


@torch.no_grad()
def adamw(
    params: _Tensors, grads: _Tensors, exp_avgs: _Tensors, exp_avg_sqs: _Tensors, steps: _Tensors, *,
    lr: float, betas: tuple[float, float], eps: float, weight_decay: float, scale: Tensor | None = None,
    skipped: Tensor | None = None, shadows: Sequence[Tensor | None] | None = None,
) -> None:  # fmt: skip
    """Update parameters, moments and step counts in place; see the head of this file.

    Args:
        params, grads, exp_avgs, exp_avg_sqs: lists of equal length, of tensors alike in shape, dtype and device.
        steps: one-element tensors (float32 for the C++ kernel), how many updates each parameter has had.
        lr, betas, eps, weight_decay: of all of them.
        scale: scalar that gradients are divided by.
        skipped: scalar, 1 where the step is not to be taken (as `found_inf` of torch's optimisers).
        shadows: for each parameter a contiguous bfloat16 tensor of its shape, or None. Each gets what the parameter holds
            afterwards, skipped or not, and `ops.linear` and the half-blocks take it as long as the parameter is not written
            to. The caller keeps it alive, and keeps its hands off it.

    float32 on the CPU runs in C++ and gives the same bits on any number of threads and any instruction set.
    Raises ValueError for lists or shapes that do not fit, TypeError for a dtype that does not.
    """
    given = list(shadows or [None] * len(params))
    _check(params, {"grads": grads, "exp_avgs": exp_avgs, "exp_avg_sqs": exp_avg_sqs, "steps": steps, "shadows": given})
    none = torch.empty(0, dtype=torch.bfloat16)
    _adamw(
        list(params), list(grads), list(exp_avgs), list(exp_avg_sqs), list(steps), [none if s is None else s for s in given],
        scale, skipped, lr, *betas, eps, weight_decay,
        backend.argument("adamw", params[0].device, *{p.dtype for p in params}) if params else "",
    )  # fmt: skip
    for p, s in zip(params, given, strict=True):
        if s is not None:
            _shadow.remember(p, s)
