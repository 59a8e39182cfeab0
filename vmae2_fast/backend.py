"""Which implementation of an op runs: `VMAE2_BACKEND`, `use_backend()`, and why each other one was refused.

Every op registers its implementations in a fixed order of preference per device type. A request is an ordered list
(`native,reference`) for all ops, or for one op (`attention=sdpa+reference`), or both mixed with commas:

    VMAE2_BACKEND="native,reference,attention=reference" python train.py

A request never falls back silently: an op whose list holds nothing that can run raises and names what could.
The choice is process-global (autograd threads see no context variables): it is resolved in the forward and handed to
the backward op as an argument. This file imports nothing of the package but the optional native extension.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import os
import platform
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

WhyNot = Callable[..., "str | None"]
_in_dynamo = torch.compiler.is_dynamo_compiling  # bound once, as in ops/_direct.py


@dataclass(frozen=True)
class Implementation:
    """One way to run an op.

    `why_not(device, *details)` gives the reason it cannot run there, or None. `details` is what the op tells `pick` about
    an input (dtypes, head dim); there are none when only the device is asked for.
    """

    run: Callable[..., Any]
    why_not: WhyNot = lambda device, *details: None


@dataclass(frozen=True)
class OpEntry:
    name: str
    implementations: dict[str, Implementation]
    order: dict[str, tuple[str, ...]]  # device type -> preference; "*" is any other device
    because: dict[str, str | Callable[[], str]]  # device type -> what the order rests on
    measured: Callable[..., tuple[str, ...] | None]  # (device, *details) -> the order measured for such an input, if any
    remember: bool  # whether a choice for an input of these details stands until the request changes

    def preference(self, device: torch.device, *details: Any) -> Sequence[str]:
        """All names that run without a request, the first choice first."""
        order = self.order.get(device.type, self.order["*"])
        first = self.measured(device, *details)
        if not first:
            return order
        measured = [n for n in first if n in self.implementations]
        return [*measured, *(n for n in order if n not in measured)]

    def reason(self, kind: str) -> str:
        """What the order on a device type rests on."""
        because = self.because.get(kind, "")
        return because if isinstance(because, str) else because()


_OPS: dict[str, OpEntry] = {}
# (op, device, details) -> what `pick` chose: with cold caches, between the kernels of a step, choosing anew takes 0.1 ms.
# A change of what a choice rests on puts an empty dictionary in place of this one (`forget_choices`).
_choices: dict[tuple[Any, ...], str] = {}


class BackendError(RuntimeError):
    """No requested implementation of an op can run."""


def register_op(
    name: str,
    implementations: dict[str, Implementation],
    order: dict[str, tuple[str, ...]],
    because: dict[str, str | Callable[[], str]] | None = None,
    measured: Callable[..., tuple[str, ...] | None] = lambda device, *details: None,
    remember: bool = True,
) -> None:
    """Make an op known. `order["*"]` must name an implementation that runs on every device; `because` says, for the report
    of `vmae2 env`, what the order on a device type rests on. `measured(device, *details)` gives names that come before the
    order for such an input, or None. `remember=False` where a `why_not` asks for what may change at any time, such as
    torch's switches."""
    assert "*" in order, name
    assert all(n in implementations for names in order.values() for n in names), name
    _OPS[name] = OpEntry(name, implementations, order, because or {}, measured, remember)
    forget_choices()


def ops() -> list[str]:
    """Names of all registered ops."""
    return sorted(_OPS)


@dataclass(frozen=True)
class _Request:
    every: tuple[str, ...] = ()
    one: tuple[tuple[str, tuple[str, ...]], ...] = ()

    def for_op(self, op: str) -> tuple[str, ...]:
        return dict(self.one).get(op, self.every) if self.one else self.every


def _parse(text: str) -> _Request:
    every: list[str] = []
    one: dict[str, tuple[str, ...]] = {}
    for item in filter(None, (part.strip() for part in text.split(","))):
        op, equals, names = item.partition("=")
        if equals:
            one[op.strip()] = tuple(n.strip() for n in names.split("+") if n.strip())
        else:
            every.append(item)
    return _Request(tuple(every), tuple(one.items()))


def _validated(request: _Request) -> _Request:
    known = {n for entry in _OPS.values() for n in entry.implementations}
    for op, names in request.one:
        if op not in _OPS:
            raise BackendError(f"unknown op {op!r} in a backend request; ops: {', '.join(ops())}")
        if op.endswith("_backward"):
            raise BackendError(f"{op} runs what its forward ran: request {op.removesuffix('_backward')}= instead")
        for n in names:
            if n not in _OPS[op].implementations:
                raise BackendError(f"{op} has no backend {n!r}; it has: {', '.join(_OPS[op].implementations)}")
    for n in request.every:
        if n not in known:
            raise BackendError(f"unknown backend {n!r}; backends: {', '.join(sorted(known))}")
    return request


_current: _Request | None = None  # set by use_backend; None: read the environment
_text: str | None = None  # what `_current` was parsed from: dynamo guards on a string, not on an object


@functools.cache
def _environment_text() -> str:
    return os.environ.get("VMAE2_BACKEND", "")


@functools.cache
def _from_environment() -> _Request:
    return _validated(_parse(_environment_text()))


def _request() -> _Request:
    return _current if _current is not None else _from_environment()


def forget_choices() -> None:
    """Have the next call of every op choose its implementation anew."""
    global _choices
    _choices = {}


@contextlib.contextmanager
def use_backend(request: str) -> Iterator[None]:
    """Run the body with `request` (the syntax of VMAE2_BACKEND) in force, in all threads of the process."""
    global _current, _text
    before, before_text = _current, _text
    _current, _text = _validated(_parse(request)), request
    forget_choices()
    try:
        yield
    finally:
        _current, _text = before, before_text
        forget_choices()


def refusals(op: str, device: torch.device | str) -> dict[str, str | None]:
    """For each implementation of `op`: None if it can run on `device`, else the reason it cannot."""
    device = torch.device(device)
    return {n: impl.why_not(device) for n, impl in _OPS[op].implementations.items()}


def available(op: str, device: torch.device | str, *details: Any) -> list[str]:
    """Implementations of `op` that can run on `device` (and on such an input), the default one first."""
    device = torch.device(device)
    entry = _OPS[op]
    order = entry.preference(device, *details)
    names = [*order, *(n for n in entry.implementations if n not in order)]
    return [n for n in names if entry.implementations[n].why_not(device, *details) is None]


def pick(op: str, device: torch.device, *details: Any) -> str:
    """The implementation that runs `op` on `device` now, for an input of these `details` (see `Implementation`).

    Raises BackendError if the request leaves nothing.
    """
    key, choices = (op, device, details), _choices  # another thread may change the request meanwhile
    name = choices.get(key)
    if name is None:
        name = _choose(op, device, *details)
        if _OPS[op].remember:
            choices[key] = name
    return name


def _choose(op: str, device: torch.device, *details: Any) -> str:
    entry = _OPS[op]
    wanted = _request().for_op(op)
    for n in wanted or entry.preference(device, *details):
        impl = entry.implementations.get(n)
        if impl is not None and impl.why_not(device, *details) is None:
            return n
    known = entry.implementations
    reasons = "; ".join(
        f"{n}: {known[n].why_not(device, *details) if n in known else 'not implemented for this op'}" for n in wanted
    )
    raise BackendError(
        f"{op}: none of the requested backends ({', '.join(wanted) or 'default'}) can run on {device.type}: {reasons}. "
        f"Available: {', '.join(available(op, device, *details))}"
    )


def _pick_for_graph(request: str | None, op: str, device: torch.device, *details: Any) -> str:
    return pick(op, device, *details)


# What torch.compiler.assume_constant_result does, without its import of dynamo: the choice is a constant of the graph.
_pick_for_graph._dynamo_marked_constant = True  # type: ignore[attr-defined]


def argument(op: str, device: torch.device, *details: Any) -> str:
    """The backend argument of an op called from Python: "", to ask `pick` when it runs, or under torch.compile the name.

    A compiled backward has its backend fixed when it is traced, so its forward must have the same one: part of the graph
    (and of the key of compile caches), traced anew under another request. An exported graph goes to other machines and asks
    when it runs.
    """
    if _in_dynamo() and not torch.compiler.is_exporting():
        return _pick_for_graph(_text, op, device, *details)
    return ""


def run(op: str, name: str, *args: Any) -> Any:
    """Call implementation `name` of `op`."""
    return _OPS[op].implementations[name].run(*args)


_EXTENSION = "vmae2_fast._C"


@functools.cache
def _load_native() -> tuple[Any | None, str]:
    """The extension, or None and the reason."""
    wish = os.environ.get("VMAE2_NATIVE") or "auto"
    if wish not in ("auto", "require", "off"):
        raise BackendError(f"VMAE2_NATIVE={wish} is unknown; it must be auto, require or off")
    if wish == "off":
        return None, f"{_EXTENSION} is not used (VMAE2_NATIVE=off)"
    try:
        return importlib.import_module(_EXTENSION), ""
    except ImportError as error:
        if wish == "require":
            raise BackendError(
                f"VMAE2_NATIVE=require, but {_EXTENSION} cannot be imported ({error}); "
                "build it with `pip install .` and a C++ compiler"
            ) from error
        if isinstance(error, ModuleNotFoundError) and error.name == _EXTENSION:
            return None, f"{_EXTENSION} was not built (no C++ compiler at install time)"
        return None, f"{_EXTENSION} cannot be imported: {error}"


def native() -> Any | None:
    """The compiled extension `vmae2_fast._C`, or None. VMAE2_NATIVE=require makes its absence an error, =off hides it;
    BackendError for any other value than these and auto."""
    return _load_native()[0]


def _too_old(device: torch.device, what: str) -> str | None:
    if torch.cuda.is_available() and torch.cuda.get_device_capability(device) < (8, 0):
        return f"{what} need compute capability 8.0"
    return None


def why_not_native(device: torch.device) -> str | None:
    """The refusal shared by all native implementations."""
    extension, reason = _load_native()
    if extension is None:
        return reason
    if device.type == "cpu":
        return None
    if device.type == "cuda":
        if not extension.cuda_available():
            return "vmae2_fast._C was built without CUDA (no nvcc at install time, or VMAE2_CUDA=OFF)"
        return _too_old(device, "CUDA kernels")
    return f"no native kernels for {device.type}"


def why_not_native_kernel(device: torch.device, *dtypes: torch.dtype) -> str | None:
    """For native kernels in float32, bfloat16 and float16, in C++ and CUDA."""
    return why_not_native(device) or ("native kernels take no float64" if torch.float64 in dtypes else None)


def why_not_cpp_kernel(device: torch.device, *dtypes: torch.dtype) -> str | None:
    """For native kernels in float32, bfloat16 and float16 that there are in C++ only."""
    if device.type != "cpu":
        return f"the C++ kernel runs on the cpu, not on {device.type}"
    if others := set(dtypes) - {torch.float32, torch.bfloat16, torch.float16}:
        return f"the C++ kernel takes float32, bfloat16 and float16, not {', '.join(sorted(map(str, others)))}"
    return why_not_native(device)


@functools.cache
def _load_triton() -> str | None:
    """None if triton can be imported, else the reason."""
    try:
        importlib.import_module("triton")
    except ImportError as error:
        return f"triton cannot be imported: {error}"
    return None


def why_not_triton(device: torch.device, *dtypes: torch.dtype) -> str | None:
    """For Triton kernels in float32, bfloat16 and float16. On the CPU only Triton's interpreter can run them: on request."""
    if torch.float64 in dtypes:
        return "Triton kernels take no float64"
    if device.type == "cpu":
        if os.environ.get("TRITON_INTERPRET") != "1":
            return "Triton kernels run on the cpu only in Triton's interpreter (TRITON_INTERPRET=1), for tests"
    elif device.type != "cuda":
        return f"no Triton kernels for {device.type}"
    elif reason := _too_old(device, "Triton kernels"):
        return reason
    return _load_triton()


def environment() -> dict[str, Any]:
    """What this machine has and what would run: the report behind `vmae2 env` and each run's `environment.json`."""

    def version(module: str) -> str | None:
        from importlib import metadata

        with contextlib.suppress(metadata.PackageNotFoundError):
            return metadata.version(module)
        return None

    packages = {
        n: version(n)
        for n in (
            "torch", "triton", "numpy", "safetensors", "av", "flash-attn", "flash-attn-3", "flash-attn-4",
            "nvidia-dali-cuda130", "torchao",
        )
    }  # fmt: skip
    packages["apex"] = "present" if importlib.util.find_spec("apex") else None
    extension = native()
    devices = ["cpu"] + [f"cuda:{i} {torch.cuda.get_device_name(i)}" for i in range(torch.cuda.device_count())]
    kinds = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "threads": torch.get_num_threads(),
        "packages": packages,
        "native": None if extension is None else extension.build_info(),
        "devices": devices,
        "request": _environment_text(),
        "ops": {
            op: {
                kind: {
                    "runs": _picked(op, kind),
                    "because": "it was asked for" if _request().for_op(op) else _OPS[op].reason(kind),
                    "refused": {n: r for n, r in refusals(op, kind).items() if r},
                }
                for kind in kinds
            }
            for op in ops()
            if not op.endswith("_backward")  # follows its forward
        },
        "executable": sys.executable,
    }


def _picked(op: str, kind: str) -> str:
    try:
        return pick(op, torch.device(kind))
    except BackendError as error:
        return f"error: {error}"
