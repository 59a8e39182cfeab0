"""Inputs, plain-torch oracles and checks shared by the tests of the half-blocks and attention."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.support import assert_within_budget
from vmae2_fast import backend

SHAPES = [(2, 1, 8), (2, 63, 33), (3, 16, 24)]
INTERPRETED = [(2, 3, 33)]  # enough for Triton: its interpreter runs every row as a program
BRANCHES = ["none", "branch", "gamma", "drop", "gamma+drop"]
MODES = ["float32", "bfloat16", "autocast", "autocast-bf16-stream"]
EPS = 1e-6


def autocast(mode: str) -> Any:
    return torch.autocast("cpu", torch.bfloat16, enabled=mode.startswith("autocast"))


def stream(shape: tuple[int, int, int], kind: str, mode: str = "float32") -> dict[str, Tensor | None]:
    """x, branch, gamma, drop, norm_weight, norm_bias in the dtypes `mode` has in a model."""
    b, n, c = shape
    parameter = torch.bfloat16 if mode == "bfloat16" else torch.float32
    x_dtype = torch.bfloat16 if mode in ("bfloat16", "autocast-bf16-stream") else torch.float32
    branch_dtype = torch.float32 if mode == "float32" else torch.bfloat16
    return {
        "x": torch.randn(b, n, c).to(x_dtype),
        "branch": None if kind == "none" else torch.randn(b, n, c).to(branch_dtype),
        "gamma": torch.randn(c).to(parameter) if "gamma" in kind else None,
        "drop": torch.tensor([1.25, 0.0, 1.25])[:b] if "drop" in kind else None,
        "norm_weight": (1 + 0.1 * torch.randn(c)).to(parameter),
        "norm_bias": torch.randn(c).to(parameter),
    }


def weight(rows: int, columns: int, mode: str = "float32") -> Tensor:
    return (torch.randn(rows, columns) / columns**0.5).to(torch.bfloat16 if mode == "bfloat16" else torch.float32)


def plain_stream(
    x: Tensor, branch: Any, gamma: Any, drop: Any, norm_weight: Tensor, norm_bias: Tensor
) -> tuple[Tensor, Tensor]:
    """The official order of operations with torch's own functions."""
    if branch is not None:
        if gamma is not None:
            branch = gamma * branch
        if drop is not None:
            branch = branch * drop[:, None, None]
        x = (x + branch).to(x.dtype)
    return x, F.layer_norm(x.to(norm_weight.dtype), x.shape[-1:], norm_weight, norm_bias, EPS)


def leaves(arguments: dict[str, Tensor | None], dtype: torch.dtype | None = None) -> dict[str, Tensor | None]:
    """Copies as autograd leaves (drop has no gradient), in another dtype if given."""
    made = {}
    for name, tensor in arguments.items():
        if tensor is not None:
            tensor = tensor.detach().to(dtype or tensor.dtype).clone().requires_grad_(name != "drop")
        made[name] = tensor
    return made


def gradients(outputs: tuple[Tensor, ...], arguments: dict[str, Tensor | None], upstream: list[Tensor]) -> dict[str, Tensor]:
    wanted = {n: t for n, t in arguments.items() if t is not None and t.requires_grad}
    upstream = [g.to(o.dtype) for g, o in zip(upstream, outputs)]
    return dict(zip(wanted, torch.autograd.grad(outputs, list(wanted.values()), upstream)))


def assert_op_matches(
    op: Callable[..., tuple[Tensor, ...]],
    plain: Callable[..., tuple[Tensor, ...]],
    arguments: dict[str, Tensor | None],
    mode: str,
) -> None:
    """Outputs and all gradients of `op` against float64, in the budget of `plain` run in the same dtypes."""
    ours, same, truth = leaves(arguments), leaves(arguments), leaves(arguments, torch.float64)
    with autocast(mode):
        out, out_same = op(**ours), plain(**same)
    out_truth = plain(**truth)
    upstream = [torch.randn(o.shape).to(torch.bfloat16).double() for o in out]  # exact in every dtype
    for i, (a, s, t) in enumerate(zip(out, out_same, out_truth)):
        assert_within_budget(a, s.to(a.dtype), t, f"output {i}")
    grads, grads_same, grads_truth = (
        gradients(o, a, upstream) for o, a in ((out, ours), (out_same, same), (out_truth, truth))
    )
    for name, grad in grads.items():
        assert grad.dtype == ours[name].dtype
        assert_within_budget(grad, grads_same[name], grads_truth[name], f"gradient of {name}")


def other_backend(op: str, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Give an op and its backward a backend named "other", which is the reference; the calls of both, as they are made."""
    calls: list[str] = []
    for name in (op, f"{op}_backward"):
        known = backend._OPS[name].implementations
        run = known["reference"].run
        spy = backend.Implementation(lambda *a, name=name, run=run: calls.append(name) or run(*a))
        monkeypatch.setitem(known, "other", spy)
    return calls


def saved_bytes(function: Callable[[], Any], known: dict[str, Tensor | None]) -> tuple[set[str], list[int]]:
    """Which of the `known` tensors `function` saves for backward, and the sizes in bytes of everything else it saves."""
    saved: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        result = function()
    by_address = {t.untyped_storage().data_ptr(): n for n, t in known.items() if t is not None}
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in saved}
    del result
    return {by_address[a] for a in storages if a in by_address}, sorted(s for a, s in storages.items() if a not in by_address)
