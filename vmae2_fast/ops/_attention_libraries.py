"""Attention of other libraries behind the forms of attention.py: flash-attn 2, 3 and 4, and cuDNN through ATen.

All take q, k, v as views of packed qkv and give the natural logarithm of the sums, fp32 [B, H, N], as attention.py saves it
(cuDNN with a dimension of 1 behind). A library that can write its gradients into such views does; else they are copied.
Called below the autograd functions of these libraries: what is saved is ours to decide.

    flash2  flash-attn 2.7 or later       flash_attn.flash_attn_interface._flash_attn_forward / _flash_attn_backward
    flash3  flash-attn 3 (hopper/)        torch.ops.flash_attn_3.fwd / bwd, registered by flash_attn_interface
    flash4  flash-attn 4 (CuTe DSL)       flash_attn.cute.interface._flash_attn_fwd / _flash_attn_bwd
    cudnn   torch's own                   aten._scaled_dot_product_cudnn_attention / .._backward

A backward whose order of additions is not fixed runs unless `torch.use_deterministic_algorithms` is on: as in torch's own
flash attention, that asks flash2 and flash3 for their deterministic kernels and refuses flash4 and cudnn.
"""

from __future__ import annotations

import functools
import importlib
import inspect
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ._attention_reference import by_heads

MODULES = {
    "flash2": "flash_attn.flash_attn_interface",
    "flash3": "flash_attn_interface",
    "flash4": "flash_attn.cute.interface",
}
INSTALL = {
    "flash2": "pip install --no-build-isolation flash-attn (compiles for hours)",
    "flash3": "build hopper/ of a checkout of Dao-AILab/flash-attention",
    "flash4": "pip install --pre flash-attn-4",
}
FLASH4_MULTIPLE = 32
"""Head dims that flash-attn 4 names as supported are multiples of this: others are padded with zero columns."""


_cudnn = torch.ops.aten._scaled_dot_product_cudnn_attention
_cudnn_backward = torch.ops.aten._scaled_dot_product_cudnn_attention_backward


@functools.cache
def load(name: str) -> tuple[Any | None, str]:
    """The library of a backend, or None and the reason it cannot be used."""
    try:
        module = importlib.import_module(MODULES[name])
    except Exception as error:  # an import may fail in any way: a missing package, another torch's ABI, a missing driver
        if isinstance(error, ModuleNotFoundError) and MODULES[name].startswith(str(error.name)):
            return None, f"{MODULES[name]} is not installed: {INSTALL[name]}"
        return None, f"{MODULES[name]} cannot be imported: {error}"
    if name == "flash2" and "window_size_left" not in _parameters(module._flash_attn_forward):
        return None, "flash-attn is older than 2.7: its functions take other arguments"
    if name == "flash4" and "return_lse" not in _parameters(module._flash_attn_fwd):
        return None, "this flash-attn 4 cannot return the log-sum-exp on request: install a later one"
    return module, ""


def _parameters(function: Any) -> Any:
    function = getattr(function, "_init_fn", function)  # what torch.library.custom_op wrapped
    return inspect.signature(function).parameters


def _deterministic() -> bool:
    """Whether torch was told to refuse what is not deterministic (a warning only is no refusal)."""
    return torch.are_deterministic_algorithms_enabled() and not torch.is_deterministic_algorithms_warn_only_enabled()


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def why_not_gpu(device: torch.device, what: str, majors: tuple[int, ...]) -> str | None:
    """The reason a library for NVIDIA GPUs of these compute capabilities cannot run on `device`."""
    if device.type != "cuda":
        return f"{what} runs on cuda only, not on {device.type}"
    if torch.version.hip is not None:
        return f"{what} is used on NVIDIA GPUs only"
    if torch.cuda.is_available() and (major := torch.cuda.get_device_capability(device)[0]) not in majors:
        return f"{what} has kernels for compute capability {', '.join(f'{m}.x' for m in majors)}, not {major}.x"
    return None


def why_not_half(what: str, most: int, dtype: torch.dtype | None, head_dim: int | None) -> str | None:
    """The reason kernels for float16, bfloat16 and head dims up to `most` cannot take this one."""
    if dtype not in (None, torch.float16, torch.bfloat16):
        return f"{what} takes float16 and bfloat16, not {_name(dtype)}"
    if head_dim is not None and (head_dim % 8 or head_dim > most):
        return f"{what} takes head dims that are multiples of 8 up to {most}, not {head_dim}"
    return None


def why_not_flash(
    name: str,
    majors: tuple[int, ...],
    most: int,
    device: torch.device,
    dtype: torch.dtype | None = None,
    head_dim: int | None = None,
    window: int | None = None,
    lengths: bool = False,
    *_: object,
) -> str | None:
    """The reason a flash-attn cannot run on `device`, or not for this input there; None if it can."""
    what = f"flash-attn {name[-1]}"
    if reason := why_not_gpu(device, what, majors) or load(name)[1] or why_not_half(what, most, dtype, head_dim):
        return reason
    if lengths:
        return f"{what} takes lengths of packed sequences only, not of padded ones"
    if name == "flash4":
        if window is not None:
            return f"{what} has no backward within a window on every GPU it runs on"
        if _deterministic():
            return f"{what} has no deterministic backward on every GPU it runs on"
    return None


def why_not_cudnn(
    device: torch.device,
    dtype: torch.dtype | None = None,
    head_dim: int | None = None,
    window: int | None = None,
    lengths: bool = False,
    upto: int | None = None,
    *_: object,
) -> str | None:
    """The reason cuDNN's attention cannot run on `device`, or not for this input there; None if it can."""
    if reason := why_not_gpu(device, "cuDNN attention", (8, 9, 10, 11, 12)):
        return reason
    version = torch.backends.cudnn.version() if torch.backends.cudnn.is_available() else None
    if version is None or version < 90000:
        return f"cuDNN attention needs cuDNN 9, this torch has {version or 'none'}"
    if not torch.backends.cuda.cudnn_sdp_enabled():
        return "cuDNN attention was switched off (torch.backends.cuda.enable_cudnn_sdp)"
    if reason := why_not_half("cuDNN attention", 128, dtype, head_dim):
        return reason
    if window is not None or lengths:
        return f"cuDNN attention of torch takes no {'lengths' if window is None else 'window'}"
    if upto == 1:
        return "cuDNN attention takes more than one token"
    if _deterministic():
        return "cuDNN attention has no deterministic backward"
    return None


def _tokens_first(qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v as views [B, N, H, D] of packed qkv."""
    q, k, v = qkv.unbind(2)
    return q, k, v


def _sides(window: int | None) -> dict[str, int]:
    side = -1 if window is None else window
    return {"window_size_left": side, "window_size_right": side}


def flash2_forward(qkv: Tensor, scale: float, window: int | None, lengths: None) -> tuple[Tensor, Tensor]:
    """(out, lse), see attention.py."""
    out, lse, _, _ = load("flash2")[0]._flash_attn_forward(  # type: ignore[union-attr]
        *_tokens_first(qkv.contiguous()), 0.0, scale, causal=False, **_sides(window), softcap=0.0, alibi_slopes=None,
        return_softmax=False,
    )  # fmt: skip
    return out, lse


def flash2_backward(
    grad: Tensor, qkv: Tensor, out: Tensor, lse: Tensor, scale: float, window: int | None, lengths: None
) -> Tensor:
    """dqkv, see attention.py."""
    dqkv = torch.empty(qkv.shape, dtype=qkv.dtype, device=qkv.device)
    load("flash2")[0]._flash_attn_backward(  # type: ignore[union-attr]
        grad.contiguous(), *_tokens_first(qkv.contiguous()), out.contiguous(), lse.contiguous(), *_tokens_first(dqkv), 0.0,
        scale, False, **_sides(window), softcap=0.0, alibi_slopes=None,
        deterministic=_deterministic(),
    )  # fmt: skip
    return dqkv


def flash3_forward(qkv: Tensor, scale: float, window: int | None, lengths: None) -> tuple[Tensor, Tensor]:
    """(out, lse), see attention.py."""
    q, k, v = _tokens_first(qkv.contiguous())
    out, lse = torch.ops.flash_attn_3.fwd(q, k, v, softmax_scale=scale, is_causal=False, num_splits=1, **_sides(window))[:2]
    return out, lse


def flash3_backward(
    grad: Tensor, qkv: Tensor, out: Tensor, lse: Tensor, scale: float, window: int | None, lengths: None
) -> Tensor:
    """dqkv, see attention.py."""
    dqkv = torch.empty(qkv.shape, dtype=qkv.dtype, device=qkv.device)
    q, k, v = _tokens_first(qkv.contiguous())
    dq, dk, dv = _tokens_first(dqkv)
    torch.ops.flash_attn_3.bwd(
        grad.contiguous(), q, k, v, out.contiguous(), lse.contiguous(), dq=dq, dk=dk, dv=dv, softmax_scale=scale,
        is_causal=False, deterministic=_deterministic(), **_sides(window),
    )  # fmt: skip
    return dqkv


def _padded(x: Tensor) -> Tensor:
    """Zero columns behind a head dim that is no multiple of `FLASH4_MULTIPLE`: they change no product."""
    missing = -x.shape[-1] % FLASH4_MULTIPLE
    return F.pad(x, (0, missing)) if missing else x


def flash4_forward(qkv: Tensor, scale: float, window: None, lengths: None) -> tuple[Tensor, Tensor]:
    """(out, lse), see attention.py."""
    qkv, d = qkv.contiguous(), qkv.shape[4]
    out, lse = load("flash4")[0]._flash_attn_fwd(  # type: ignore[union-attr]
        *_tokens_first(_padded(qkv)), softmax_scale=scale, causal=False, return_lse=True
    )[:2]
    return out[..., :d].contiguous(), lse


def flash4_backward(
    grad: Tensor, qkv: Tensor, out: Tensor, lse: Tensor, scale: float, window: None, lengths: None
) -> Tensor:
    """dqkv, see attention.py."""
    d = qkv.shape[4]
    q, k, v = _tokens_first(_padded(qkv.contiguous()))
    grads = load("flash4")[0]._flash_attn_bwd(  # type: ignore[union-attr]
        q, k, v, _padded(out.contiguous()), _padded(grad.contiguous()), lse.contiguous(), softmax_scale=scale, causal=False
    )[:3]
    return torch.stack([g[..., :d] for g in grads], dim=2)


def cudnn_forward(qkv: Tensor, scale: float, window: None, lengths: None) -> tuple[Tensor, Tensor]:
    """(out, lse), see attention.py."""
    out, lse = _cudnn(*by_heads(qkv.contiguous()), None, True, scale=scale)[:2]
    return out.transpose(1, 2).contiguous(), lse.reshape(lse.shape[:3])


def cudnn_backward(
    grad: Tensor, qkv: Tensor, out: Tensor, lse: Tensor, scale: float, window: None, lengths: None
) -> Tensor:
    """dqkv, see attention.py."""
    n = qkv.shape[1]
    unused = torch.zeros((), dtype=torch.int64, device=qkv.device)  # random state of a dropout that is off
    grads = _cudnn_backward(
        grad.contiguous().transpose(1, 2), *by_heads(qkv.contiguous()), out.contiguous().transpose(1, 2),
        lse.contiguous().unsqueeze(-1), unused, unused, None, None, None, n, n, 0.0, False, scale=scale,
    )  # fmt: skip
    dqkv = torch.empty(qkv.shape, dtype=qkv.dtype, device=qkv.device)
    for part, value in zip(by_heads(dqkv), grads):
        part.copy_(value)
    return dqkv
