"""What the tests of all ops share: the error budget, opcheck, awkward inputs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from vmae2_fast import backend

NO_EDITABLE = "import sys; sys.meta_path = [f for f in sys.meta_path if 'editable' not in repr(f).lower()]\n"
"""First line of a script that tests a copy of the package: an editable install of this checkout would lend it its _C."""


def error(actual: Tensor, truth: Tensor) -> float:
    """Largest absolute difference, measured in float64. Both infinite or both NaN counts as equal."""
    actual, truth = actual.detach().double().cpu(), truth.detach().double().cpu()
    assert actual.shape == truth.shape, f"shape {tuple(actual.shape)}, expected {tuple(truth.shape)}"
    if not actual.numel():
        return 0.0
    difference = (actual - truth).abs()
    same = (actual == truth) | (actual.isnan() & truth.isnan())
    return float(torch.where(same, 0.0, difference).nan_to_num(nan=float("inf")).max())


def assert_within_budget(actual: Tensor, reference: Tensor, truth: Tensor, what: str = "result") -> None:
    """The rule of all arithmetic ops: no more than twice the error of plain torch in the same dtype, plus one rounding.

    `reference` is what the plain reference gives in the dtype under test, `truth` what it gives in float64:
    error(actual) <= 2 * error(reference) + eps(dtype of actual) * max|truth|.
    """
    assert truth.dtype == torch.float64, "the truth must be computed in float64"
    assert actual.dtype == reference.dtype, f"{what}: dtype {actual.dtype}, the reference gives {reference.dtype}"
    largest = float(truth.detach().abs().max()) if truth.numel() else 0.0
    budget = 2 * error(reference, truth) + torch.finfo(actual.dtype).eps * largest
    measured = error(actual, truth)
    assert measured <= budget, f"{what}: error {measured:.3e} exceeds the budget {budget:.3e}"


def opcheck(op: Any, arguments: Sequence[Any], **keywords: Any) -> None:
    """All of torch's checks of a registered op: schema, autograd registration, fake, traced with dynamic shapes."""
    result = torch.library.opcheck(op, tuple(arguments), keywords)
    assert set(result.values()) == {"SUCCESS"}, result


def backends(op: str, device: str = "cpu") -> list[str]:
    """The implementations of an op to test on a device: all that can run there."""
    return backend.available(op, device)


def cases(op: str, values: Sequence[Any], interpreted: Sequence[Any]) -> list[tuple[str, Any]]:
    """(backend, value) for a parametrised test: all values, but few and small ones for Triton.

    Where there is no GPU its kernels run in an interpreter that takes some hundredth of a second for each program.
    """
    return [(name, value) for name in backends(op) for value in (interpreted if name == "triton" else values)]


def compiles(function: Callable[..., Any], *arguments: Any) -> Any:
    """The result of `function` compiled as one graph, without a code generator behind it."""
    torch._dynamo.reset()
    return torch.compile(function, fullgraph=True, backend="aot_eager")(*arguments)


def awkward(tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
    """The same values in memory layouts a kernel may not expect."""
    yield "contiguous", tensor.contiguous()
    wide = tensor.new_zeros((*tensor.shape[:-1], 2 * tensor.shape[-1] + 1))
    wide[..., 1::2] = tensor
    yield "strided", wide[..., 1::2]
    order = list(range(tensor.ndim))[::-1]
    yield "transposed", tensor.permute(order).contiguous().permute(order)
    shifted = tensor.new_zeros(tensor.numel() + 1)
    shifted[1:] = tensor.flatten()
    yield "unaligned", shifted[1:].view(tensor.shape)


def expanded(tensor: Tensor) -> Tensor:
    """The first sample repeated over the batch without memory of its own (stride 0)."""
    return tensor[:1].expand(tensor.shape)


def random_index(batch: int, count: int, tokens: int, *, padding: int = 0, seed: int = 0) -> Tensor:
    """`count` distinct ascending token ids a row, then `padding` times -1: int32 [batch, count + padding]."""
    generator = torch.Generator().manual_seed(seed)
    rows = [torch.randperm(tokens, generator=generator)[:count].sort().values for _ in range(batch)]
    index = torch.stack(rows).to(torch.int32)
    return torch.cat([index, index.new_full((batch, padding), -1)], dim=1)
