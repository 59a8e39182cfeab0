"""Copies of weights in bfloat16 that the optimiser writes in the pass that updates them, so that no product casts them again.

A copy counts only while its weight is what it was made of: the same memory at the same version. Everything that torch
records as a write (an update, `load_state_dict`, a swap for the moving average, an edit in place) makes it stale, and the
weight is cast until the optimiser has written the next copy. What is written through `weight.data` torch does not record: a
sample of the values is compared, which tells a weight that was changed as a whole. Copies belong to whoever made them, the
optimiser; here are weak references alone.
"""

from __future__ import annotations

import weakref
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary


class _Copy(NamedTuple):
    of: weakref.ref[Tensor]
    version: int
    address: int


SAMPLE = 64
_copies = WeakTensorKeyDictionary()


def remember(weight: Tensor, copy: Tensor) -> None:
    """`copy` holds what `weight` holds now."""
    _copies[weight] = _Copy(weakref.ref(copy), weight._version, weight.data_ptr())


def cast(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """`weight.to(dtype)`: the optimiser's copy of it where there is a valid one. Not to be written to."""
    if dtype == torch.bfloat16 and _copies and (known := _copies.get(weight)) is not None:
        copy = known.of()
        recorded = copy is not None and (weight._version, weight.data_ptr()) == (known.version, known.address)
        if copy is not None and recorded and torch.equal(_sample(weight).to(dtype), _sample(copy)):
            return copy
    return weight.to(dtype)


def _sample(tensor: Tensor) -> Tensor:
    values = tensor.detach().view(-1)
    return values[:: max(1, len(values) // SAMPLE)]
