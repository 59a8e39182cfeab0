"""Eager calls of an op without the dispatcher, where the dispatcher has nothing to do.

A call through `torch.library` crosses Python and C++ several times: 0.2 ms with cold caches, as much as some kernels take. In
plain eager inference, in a backward, and for data that needs no gradient all it does is to call the op's body; in plain eager
training it also records the op's rule for the backward. `shortcut` looks whether that is so and then does just that.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._C import DispatchKey, DispatchKeySet
from torch.autograd import forward_ad, profiler

# Bound once: a chain of attributes is a chain of cache misses, and this runs between kernels that filled the caches.
_active, _keys = torch._C._dispatch_tls_local_include_set, torch._C._dispatch_keys
_function_modes = torch._C._len_torch_function_stack
# Other compilers than dynamo, and export's tracer, work by dispatch modes.
_in_dynamo = torch.compiler.is_dynamo_compiling

_NONE = type(None)
_TYPES: dict[str, tuple[type, ...]] = {
    "Tensor": (Tensor, torch.nn.Parameter),  # no subclass
    "int": (int,), "SymInt": (int,), "float": (float,), "bool": (bool,), "str": (str,), "ScalarType": (torch.dtype,),
}  # fmt: skip
"""Python types that the dispatcher hands to a body as they are; others it converts or refuses."""
_ITEMS: dict[str, type] = {"List[int]": int, "List[float]": float, "List[bool]": bool}


def _bits(*names: str) -> int:
    keys = [DispatchKeySet(getattr(DispatchKey, name)) for name in names]
    return int(functools.reduce(operator.or_, keys).raw_repr())


_PLAIN = _bits("CPU", "CUDA", "ADInplaceOrView", "AutogradCPU", "AutogradCUDA", "AutocastCPU", "AutocastCUDA")
_QUIET = _bits("BackendSelect", "ADInplaceOrView")  # what a thread has when nothing is active, in inference mode or not


def recorded(
    body: Callable[..., Any], setup_context: Callable[..., None] | None, backward: Callable[..., Any]
) -> Callable[..., Any]:
    """`body` as a function with a gradient, by the rule that `torch.library.register_autograd` takes."""

    class Recorded(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *arguments: Any) -> Any:
            output = body(*arguments)
            if setup_context is not None:
                setup_context(ctx, arguments, output)
            return output

        @staticmethod
        def backward(ctx: Any, *grads: Any) -> Any:
            return backward(ctx, *grads)

    # Without what Function.apply does for functorch, of which `shortcut` knows that it is not there.
    return super(torch.autograd.Function, Recorded).apply


def _accepted(schema: Any) -> list[tuple[type, ...]] | None:
    """The Python types of each argument, or None if one is of a kind not known here."""
    kinds: list[tuple[type, ...]] = []
    for argument in schema.arguments:
        kind, optional = str(argument.real_type), False
        if kind.startswith("Optional["):
            kind, optional = kind.removeprefix("Optional[").removesuffix("]"), True
        accepted = (list,) if kind in _ITEMS else _TYPES.get(kind)
        if accepted is None:
            return None
        kinds.append((*accepted, _NONE) if optional else accepted)
    return kinds


def shortcut(overload: Any, body: Callable[..., Any], record: Callable[..., Any] | None = None) -> Callable[..., Any]:
    """`overload`, with a way past the dispatcher for calls that it would only pass on: straight to `body`, or to `record`
    (`recorded`) where a tensor needs a gradient.

    Through the dispatcher go: everything under torch.compile, export, torch.jit, make_fx and other tracers, functorch
    transforms, forward-mode AD, torch-function and torch-dispatch modes (fake tensors, checkpoint policies, FLOP counters);
    tensor subclasses, functional, batched, meta, sparse and quantized tensors, lazily negated views; tensors that need a
    gradient where there is no `record`; arguments it must convert or refuse; and all calls under a profiler, whose trace would
    otherwise lack the op.
    """
    accepted = _accepted(overload._schema)
    if accepted is None:
        return overload
    items = {i: _ITEMS[str(a.real_type)] for i, a in enumerate(overload._schema.arguments) if str(a.real_type) in _ITEMS}
    count = len(accepted)
    known: dict[tuple[type, ...], tuple[int, ...]] = {}  # argument types seen -> places of the tensors
    with_gradient = overload if record is None else record

    def places(types: tuple[type, ...]) -> tuple[int, ...] | None:
        if len(types) != count or not all(kind in allowed for kind, allowed in zip(types, accepted, strict=True)):
            return None
        known[types] = tuple(i for i, kind in enumerate(types) if kind in _TYPES["Tensor"])
        return known[types]

    def way(arguments: tuple[Any, ...]) -> Callable[..., Any]:
        types = tuple(map(type, arguments))
        tensors = known.get(types) or places(types)
        if tensors is None:
            return overload
        for i, kind in items.items():
            for item in arguments[i]:
                if type(item) is not kind:
                    return overload
        if (
            _function_modes()
            or profiler._is_profiler_enabled
            or forward_ad._current_level >= 0
            or _active().raw_repr() & ~_QUIET
        ):
            return overload
        needs_gradient = False
        for i in tensors:
            tensor = arguments[i]
            if _keys(tensor).raw_repr() & ~_PLAIN:
                return overload
            needs_gradient |= tensor.requires_grad
        return with_gradient if needs_gradient and torch.is_grad_enabled() else body

    def call(*arguments: Any) -> Any:
        return overload(*arguments) if _in_dynamo() else way(arguments)(*arguments)

    return call
