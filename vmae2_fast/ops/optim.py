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
    written = [exp_avgs, exp_avg_sqs, params]
    dense = [[t.contiguous() for t in tensors] for tensors in written]
    kind = (torch.float32,)
    addresses = [
        [_native.address(t, kind, f"adamw: {name}") for t in tensors]
        for name, tensors in zip(("exp_avgs", "exp_avg_sqs", "params"), dense, strict=True)
    ]
    gradients = [grad.contiguous() for grad in grads]
    copies = [_native.address(s, (torch.bfloat16,), "adamw: shadows") if s.numel() else 0 for s in shadows]
    skip = skipped is not None and float(skipped) == 1
    counts = [float(step) + 1 for step in steps]
    _native.run(
        "adamw", params[0].device,
        addresses[2], [_native.address(g, kind, "adamw: grads") for g in gradients], *addresses[:2], copies,
        [p.numel() for p in params], [1 - beta1**t for t in counts], [(1 - beta2**t) ** 0.5 for t in counts],
        lr, beta1, beta2, eps, weight_decay, 1.0 if scale is None else float(scale), skip,
    )  # fmt: skip
    for tensors, made in zip(written, dense, strict=True):
        for tensor, copy in zip(tensors, made, strict=True):
            if copy is not tensor:
                tensor.copy_(copy)
    if not skip:
        # What torch has not seen written: graphs that saved a weight, and shadows made of it before, are out of date.
        torch.autograd.graph.increment_version([t for tensors in written for t in tensors])
        for step in steps:
            step.add_(1)


def _why_not_native(device: torch.device, *dtypes: torch.dtype) -> str | None:
    if device.type != "cpu":
        return f"the C++ kernel runs on the cpu, not on {device.type}"
    if others := {dtype for dtype in dtypes if dtype != torch.float32}:
        return f"the C++ kernel takes float32, not {', '.join(sorted(map(str, others)))}"
    return backend.why_not_native(device)


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


@torch.no_grad()
def adamw(
    params: _Tensors, grads: _Tensors, exp_avgs: _Tensors, exp_avg_sqs: _Tensors, steps: _Tensors, *,
    lr: float, betas: tuple[float, float], eps: float, weight_decay: float, scale: Tensor | None = None,
    skipped: Tensor | None = None, shadows: Sequence[Tensor | None] | None = None,
) -> None:  # fmt: skip
    """Update parameters, moments and step counts in place; see the head of this file.

    Args:
        params, grads, exp_avgs, exp_avg_sqs: lists of equal length, of tensors alike in shape, dtype and device.
        steps: one-element tensors, how many updates each parameter has had.
        lr, betas, eps, weight_decay: of all of them.
        scale: scalar that gradients are divided by.
        skipped: scalar, 1 where the step is not to be taken (as `found_inf` of torch's optimisers).
        shadows: for each parameter a contiguous bfloat16 tensor of its shape, or None. Each gets what the parameter holds
            afterwards, skipped or not, and `ops.linear` and the half-blocks take it as long as the parameter is not written
            to. The caller keeps it alive, and keeps its hands off it.

    float32 on the CPU runs in C++ and gives the same bits on any number of threads and any instruction set.
    Raises ValueError for lists or shapes that do not fit, TypeError for gradients or moments of another dtype.
    """
    lists = {"grads": grads, "exp_avgs": exp_avgs, "exp_avg_sqs": exp_avg_sqs, "steps": steps}
    for name, tensors in lists.items():
        check(len(tensors) == len(params), f"adamw: {len(params)} params, but {len(tensors)} {name}")
        for p, t in zip(params, tensors, strict=True):
            want = t.numel() == 1 if name == "steps" else t.shape == p.shape
            check(want, f"adamw: {name} of shape {tuple(t.shape)} for a parameter of shape {tuple(p.shape)}")
            if name != "steps" and t.dtype != p.dtype:
                raise TypeError(f"adamw: {name} of {t.dtype} for a parameter of {p.dtype}")
    none = torch.empty(0, dtype=torch.bfloat16)
    given = list(shadows or [None] * len(params))
    check(len(given) == len(params), f"adamw: {len(params)} params, but {len(given)} shadows")
    for p, s in zip(params, given, strict=True):
        fits = s is None or (s.shape == p.shape and s.dtype == torch.bfloat16 and s.device == p.device and s.is_contiguous())
        check(fits, f"adamw: a shadow must be contiguous bfloat16 of its parameter's shape {tuple(p.shape)} and device")
    _adamw(
        list(params), list(grads), list(exp_avgs), list(exp_avg_sqs), list(steps), [none if s is None else s for s in given],
        scale, skipped, lr, *betas, eps, weight_decay,
        backend.argument("adamw", params[0].device, *{p.dtype for p in params}) if params else "",
    )  # fmt: skip
    for p, s in zip(params, given, strict=True):
        if s is not None:
            _shadow.remember(p, s)
