"""Who can run attention.py, and which of them does.

A backend's forward takes (qkv, scale, window, lengths) and gives (out, lse); its backward takes (grad, qkv, out, lse, scale,
window, lengths) and gives dqkv. Both have one form in every backend, so forward and backward are chosen each for itself: as
requested, else as measured (`_attention_table.py`), else in the documented order `PRIOR`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from .. import backend
from . import _attention_libraries as libraries
from . import _attention_reference as reference
from . import _attention_sdpa as sdpa
from . import _attention_table as table
from ._register import kernel


def why_not_sdpa(
    device: torch.device,
    dtype: torch.dtype | None = None,
    head_dim: int | None = None,
    window: int | None = None,
    lengths: bool = False,
    *_: object,
) -> str | None:
    """The reason sdpa cannot run on `device`, or not for this input there; None if it can."""
    if device.type == "cpu":
        return None
    if device.type != "cuda":
        return f"ATen has no flash attention with log-sum-exp for {device.type}"
    if torch.version.hip is None and torch.cuda.is_available() and torch.cuda.get_device_capability(device) < (8, 0):
        return "ATen's flash attention needs compute capability 8.0"
    if reason := libraries.why_not_half("ATen's flash attention on cuda", 256, dtype, head_dim):
        return reason
    if window is not None or lengths:
        return f"ATen's flash attention with log-sum-exp takes no {'lengths' if window is None else 'window'} on cuda"
    return None


def why_not_triton(
    device: torch.device, dtype: torch.dtype | None = None, head_dim: int | None = None, *_: object
) -> str | None:
    """The reason our Triton kernels cannot run on `device`, or not for this input there; None if they can."""
    if dtype not in (None, torch.float16, torch.bfloat16, torch.float32):
        return f"Triton attention takes float16, bfloat16 and float32, not {str(dtype).removeprefix('torch.')}"
    if head_dim is not None and (head_dim % 8 or not 8 <= head_dim <= 128):
        return f"Triton attention takes head dims that are multiples of 8 up to 128, not {head_dim}"
    if device.type == "cuda" and torch.version.hip is not None:
        return "Triton attention has tiles for NVIDIA GPUs only"
    return backend.why_not_triton(device)


PRIOR = {"cpu": ("sdpa", "reference"), "cuda": ("sdpa", "triton", "reference"), "*": ("reference",)}
"""Who runs where nothing was measured. The libraries run when they are asked for, or where the table names them first."""

_FORWARD: dict[str, Callable[..., Any]] = {
    "sdpa": sdpa.forward,
    "triton": kernel("_attention_triton", "forward"),
    "reference": reference.forward,
    "cudnn": libraries.cudnn_forward,
    "flash2": libraries.flash2_forward,
    "flash3": libraries.flash3_forward,
    "flash4": libraries.flash4_forward,
}
_BACKWARD: dict[str, Callable[..., Any]] = {
    "sdpa": sdpa.backward,
    "triton": kernel("_attention_triton", "backward"),
    "reference": reference.backward,
    "cudnn": libraries.cudnn_backward,
    "flash2": libraries.flash2_backward,
    "flash3": libraries.flash3_backward,
    "flash4": libraries.flash4_backward,
}
_WHY_NOT: dict[str, Callable[..., str | None]] = {
    "sdpa": why_not_sdpa,
    "triton": why_not_triton,
    "reference": lambda device, *details: None,
    "cudnn": libraries.why_not_cudnn,
    "flash2": partial(libraries.why_not_flash, "flash2", (8, 9, 10, 12), 256),
    "flash3": partial(libraries.why_not_flash, "flash3", (9,), 256),
    "flash4": partial(libraries.why_not_flash, "flash4", (9, 10, 11), 128),
}


def register() -> None:
    """Make the backends of `attention` and `attention_backward` known."""
    for op, runs in (("attention", _FORWARD), ("attention_backward", _BACKWARD)):
        backend.register_op(
            op,
            {name: backend.Implementation(run, _WHY_NOT[name]) for name, run in runs.items()},
            PRIOR,
            because={
                "cpu": "it was measured 1.4 to 3.2 times as fast as the reference (forward and backward, 160 to 2048 tokens, "
                "float32 and bfloat16; torch 2.13, 2 threads, AVX2)",
                "cuda": table.explanation,
            },
            measured=table.measured_order,
            remember=False,  # libraries are refused by switches that torch.use_deterministic_algorithms and others set
        )
