"""The CUDA kernels on host memory as one more backend, "emulated": `tests.support.backends` lists it beside the others, so
every test of an op runs its kernels too, through the launchers that a GPU would see."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from types import ModuleType
from typing import Any
from unittest import mock

import torch

from tests.cuda_emulator import build
from vmae2_fast import backend
from vmae2_fast.ops import _native

OPS = ("dual_mask", "gather_patches", "scatter_patches", "reconstruction_loss", "reconstruction_loss_backward")
SANITIZE = "VMAE2_SANITIZE"
"""Set to run native code compiled with AddressSanitizer and UndefinedBehaviorSanitizer."""


@functools.cache
def module() -> ModuleType:
    """The extension with emulated CUDA kernels, built at first use."""
    return build.load(build.build(build.SANITIZED if os.environ.get(SANITIZE) else build.PLAIN))


def _why_not(device: torch.device, *dtypes: torch.dtype) -> str | None:
    if device.type != "cpu":
        return "emulated CUDA kernels run on the cpu"
    if torch.float64 in dtypes:
        return "native kernels take no float64"
    return None if build.compiler() else "no C++ compiler"


def _run(native: Callable[..., Any], *arguments: Any) -> Any:
    with mock.patch.multiple(_native, extension=module, in_cuda=lambda device: True, queue=lambda device: (0, 0)):
        return native(*arguments)


def register() -> None:
    """Add the backend to every op that has CUDA kernels."""
    for op in OPS:
        implementations = backend._OPS[op].implementations
        native = implementations["native"].run
        implementations["emulated"] = backend.Implementation(functools.partial(_run, native), _why_not)
