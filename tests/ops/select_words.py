"""The selection of `dual_mask`'s Triton kernel on words that are given instead of drawn."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from vmae2_fast.ops._masks_triton import _keep, _threshold


@triton.jit
def _select_kernel(words_ptr, kept_ptr, items, count, BLOCK: tl.constexpr):
    item = tl.arange(0, BLOCK)
    words = tl.load(words_ptr + item).to(tl.uint32)
    threshold, equals = _threshold(words, items, count, 0, 0, 0, 0, 2, BLOCK, 1)
    tl.store(kept_ptr + item, _keep(words, item < items, threshold, equals)[0].to(tl.int32))


def select(words: Sequence[int], items: int, count: int) -> list[int]:
    """Indices of the `count` smallest of the first `items` words, ascending."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    given, kept = torch.tensor(words, device=device), torch.empty(len(words), dtype=torch.int32, device=device)
    _select_kernel[(1,)](given, kept, items, count, BLOCK=len(words))
    return [i for i, keep in enumerate(kept.tolist()) if keep]
