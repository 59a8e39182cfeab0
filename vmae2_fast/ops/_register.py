"""One way to register an op: schema, one opaque body, fake, autograd.

Each op is a `torch.library` definition whose body is opaque to tracing (`CompositeExplicitAutograd`). Ops that can run
in a backward pass take the backend's name as their last argument: "" asks `backend.pick` inside the body, a backward
passes the name its forward resolved.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

LIBRARY = torch.library.Library("vmae2", "FRAGMENT")


def define(
    schema: str,
    body: Callable[..., Any],
    fake: Callable[..., Any],
    *,
    backward: Callable[..., Any] | None = None,
    setup_context: Callable[..., None] | None = None,
) -> Any:
    """Register `vmae2::<schema>` and return its default overload, ready to be called.

    `fake` gives shapes and dtypes without reading data; `backward` and `setup_context` are those of
    `torch.library.register_autograd`.
    """
    name = schema[: schema.index("(")].strip()
    LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    LIBRARY.impl(name, body, "CompositeExplicitAutograd")
    torch.library.register_fake(f"vmae2::{name}", fake, lib=LIBRARY)
    if backward is not None:
        torch.library.register_autograd(f"vmae2::{name}", backward, setup_context=setup_context, lib=LIBRARY)
    return getattr(torch.ops.vmae2, name).default


def check(condition: bool, message: str) -> None:
    """Raise ValueError(message) unless `condition` holds: the argument check of the public functions."""
    if not condition:
        raise ValueError(message)
