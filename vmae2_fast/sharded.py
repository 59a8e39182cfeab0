"""Which tensors are split over ranks (DTensor), told without importing what splits them.

`torch.distributed.tensor` brings SymPy along and takes half as long to import as torch itself: only a process that shards
pays for it.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, TypeGuard

from torch import Tensor

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


def is_sharded(tensor: Tensor) -> TypeGuard[DTensor]:
    """Whether `tensor` is a `DTensor`: none exists before its module was imported."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)
