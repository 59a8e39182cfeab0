"""One way to register an op: schema, one opaque body, fake, autograd.

Each op is a `torch.library` definition whose body is opaque to tracing (`CompositeExplicitAutograd`). Ops that can run
in a backward pass take the backend's name as their last argument: "" asks `backend.pick` inside the body, a backward
passes the name its forward resolved. What a public function passes is `backend.argument`.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import Any

import torch

from .. import backend
from ._direct import recorded, shortcut

LIBRARY = torch.library.Library("vmae2", "FRAGMENT")


def define(
    schema: str,
    body: Callable[..., Any],
    fake: Callable[..., Any],
    *,
    backward: Callable[..., Any] | None = None,
    setup_context: Callable[..., None] | None = None,
) -> Any:
    """Register `vmae2::<schema>` and return what calls its default overload, past the dispatcher where that has nothing to do.

    `fake` gives shapes and dtypes without reading data; `backward` and `setup_context` are those of
    `torch.library.register_autograd`.
    """
    name = schema[: schema.index("(")].strip()
    LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    LIBRARY.impl(name, body, "CompositeExplicitAutograd")
    LIBRARY.impl(name, functools.partial(_refuse_transform, name), "FuncTorchDynamicLayerFrontMode")
    torch.library.register_fake(f"vmae2::{name}", fake, lib=LIBRARY)
    if "!)" in schema:  # fills a tensor it is given: nothing to differentiate, but a version for the dispatcher to count up
        return getattr(torch.ops.vmae2, name).default
    if backward is None:  # without a rule autograd would go on with a gradient that silently misses a term
        backward, setup_context = functools.partial(_refuse_gradient, name), None
    torch.library.register_autograd(f"vmae2::{name}", backward, setup_context=setup_context, lib=LIBRARY)
    return shortcut(getattr(torch.ops.vmae2, name).default, body, recorded(body, setup_context, backward))


def _refuse_gradient(name: str, *_: Any) -> Any:
    raise RuntimeError(
        f"vmae2::{name} has no gradient of its own: double backward is not supported. Take first derivatives only "
        "(no create_graph=True through this op)"
    )


def _refuse_transform(name: str, *_: Any, **__: Any) -> Any:
    raise RuntimeError(
        f"vmae2::{name} does not run under torch.func transforms (vmap, grad, jvp): fold a mapped dimension into the batch, "
        "and take gradients with autograd (backward, torch.autograd.grad)"
    )


def register_backends(
    op: str,
    reference: Callable[..., Any],
    *,
    native: Callable[..., Any] | None = None,
    triton: Callable[..., Any] | None = None,
    why_not_native: backend.WhyNot = backend.why_not_native_kernel,
) -> None:
    """Make the implementations of an op known to `backend`: the reference for every device, C++ (CPU) and CUDA kernels
    behind `native`, Triton kernels behind `triton` (both without float64). `why_not_native` where `native` is not both."""
    implementations = {"reference": backend.Implementation(reference)}
    if native is not None:
        implementations["native"] = backend.Implementation(native, why_not_native)
    if triton is not None:
        implementations["triton"] = backend.Implementation(triton, backend.why_not_triton)
    cpu = tuple(n for n in ("native", "reference") if n in implementations)
    cuda = tuple(n for n in ("native", "triton", "reference") if n in implementations)
    backend.register_op(op, implementations, {"cpu": cpu, "cuda": cuda, "*": ("reference",)})


def kernel(module: str, function: str) -> Callable[..., Any]:
    """A launcher in `vmae2_fast/ops/<module>.py`, imported at its first call: Triton is no dependency of an import."""

    @functools.cache
    def load() -> Callable[..., Any]:
        return getattr(importlib.import_module(f".{module}", __package__), function)

    return lambda *args: load()(*args)


def check_tensor(value: object, op: str, name: str) -> None:
    """Raise TypeError for an argument that is no tensor, such as a list or a NumPy array."""
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"{op}: {name} must be a torch.Tensor (torch.as_tensor makes one), got {type(value).__name__}")


def check(condition: bool, message: str) -> None:
    """Raise ValueError(message) unless `condition` holds: the argument check of the public functions."""
    if not condition:
        raise ValueError(message)
