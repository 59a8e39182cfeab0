"""Every attention backend that can run here, forward and backward each for itself: the table that decides which one runs.

`make gpu-check ARGS="--only attention"` writes it to `vmae2_fast/ops/attention_table.json` of the checkout, next to the code
that reads it; the rehearsal on the CPU writes it to the folder of the results.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime, timezone
from functools import partial
from statistics import median
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from vmae2_fast import backend
from vmae2_fast.ops import _attention_table as table

from . import measure
from .machine import commit, versions
from .ops import TOLERANCE

if TYPE_CHECKING:
    from .sections import Context


class Shape(NamedTuple):
    """One attention of a model: clips, tokens, heads, head dim."""

    what: str
    clips: int
    tokens: int
    heads: int
    head_dim: int


SHAPES = [
    Shape("ViT-g encoder, visible tokens", 32, 208, 16, 88),
    Shape("ViT-g encoder, all tokens", 8, 2048, 16, 88),
    Shape("ViT-g decoder", 32, 1232, 8, 64),
    Shape("ViT-H encoder, visible tokens", 32, 160, 16, 80),
    Shape("ViT-H encoder, all tokens", 8, 1568, 16, 80),
    Shape("ViT-B encoder, visible tokens", 64, 160, 12, 64),
    Shape("ViT-B encoder, all tokens", 8, 1568, 12, 64),
    Shape("ViT-B decoder", 64, 944, 6, 64),
]
TOY = [Shape("toy", 1, 9, 1, 88), Shape("toy", 1, 20, 2, 64)]
DIRECTIONS = ("forward", "backward")


class Problem:
    """Inputs of one shape and what the reference makes of them; `sets` of them take turns, lest one is found in a cache."""

    def __init__(self, shape: Shape, device: torch.device, dtype: torch.dtype, sets: int) -> None:
        self.shape, self.scale = shape, shape.head_dim**-0.5
        size = (sets, shape.clips, shape.tokens, 3, shape.heads, shape.head_dim)
        self.qkv = torch.randn(size, device=device).to(dtype)
        self.grad = torch.randn(sets, shape.clips, shape.tokens, shape.heads, shape.head_dim, device=device).to(dtype)
        self.saved = [self.forward("reference", i) for i in range(sets)]

    def forward(self, name: str, number: int) -> tuple[Tensor, Tensor]:
        out: tuple[Tensor, Tensor] = backend.run("attention", name, self.qkv[number % len(self.qkv)], self.scale, None, None)
        return out

    def backward(self, name: str, number: int) -> Tensor:
        i = number % len(self.qkv)
        out, lse = self.saved[i]
        dqkv: Tensor = backend.run(
            "attention_backward", name, self.grad[i], self.qkv[i], out, lse, self.scale, None, None
        )  # fmt: skip
        return dqkv

    def call(self, direction: str, name: str) -> Callable[[int], Any]:
        return partial(self.forward if direction == "forward" else self.backward, name)

    def wrong(self, direction: str, name: str) -> str | None:
        """How a backend's results differ from the reference's, None if they do not."""
        got, want = (self.call(direction, n)(0) for n in (name, "reference"))
        pairs = [(got, want)] if direction == "backward" else list(zip(got, want))
        for g, w in pairs:
            difference = float((g.double() - w.double()).abs().max())
            allowed = TOLERANCE[self.qkv.dtype] * float(w.double().abs().max())
            if not difference <= allowed:
                return f"differs from the reference by {difference:.3g}, allowed are {allowed:.3g}"
        return None


def present(shape: Shape, device: torch.device, dtype: torch.dtype, direction: str) -> tuple[list[str], dict[str, str]]:
    """The backends that can run a shape, and why each other one cannot. Triton's interpreter is no contestant."""
    details = (dtype, shape.head_dim, None, False, table.length_range(shape.tokens), direction)
    op = "attention" if direction == "forward" else "attention_backward"
    refused = {
        name: known.why_not(device, *details) or "" for name, known in backend._OPS[op].implementations.items()
    }
    if device.type != "cuda":
        refused["triton"] = "interpreted"
    able = [name for name in refused if not refused[name]]
    return able, {name: why for name, why in refused.items() if why}


def measure_shape(shape: Shape, context: Context, rounds: int, sets: int) -> list[dict[str, Any]]:
    """The table's entries of one shape."""
    problem = Problem(shape, context.device, context.dtype, sets)
    entries = []
    for direction in DIRECTIONS:
        able, refused = present(shape, context.device, context.dtype, direction)
        wrong: dict[str, str] = {}
        for name in able:
            try:
                problem_found = problem.wrong(direction, name)
            except Exception as error:  # a library that fails at a shape it promised to take is a result
                problem_found = f"{type(error).__name__}: {error}".splitlines()[0]
            if problem_found:
                wrong[name] = problem_found
        calls = {name: problem.call(direction, name) for name in able if name not in wrong}
        watches = {
            name: lambda number, call=call: measure.stopwatch(partial(call, number), context.device, backlog=True)
            for name, call in calls.items()
        }
        for _ in range(2):
            for watch in watches.values():
                watch(0)
        seconds = {name: median(values) for name, values in measure.in_turns(watches, rounds).items()}
        products = 2 if direction == "forward" else 5
        flops = products * 2 * shape.clips * shape.heads * shape.tokens**2 * shape.head_dim
        entries.append({
            "arch": table.architecture(context.device) or "cpu", "head_dim": shape.head_dim,
            "upto": table.length_range(shape.tokens), "dtype": str(context.dtype).removeprefix("torch."),
            "direction": direction, "order": sorted(seconds, key=seconds.__getitem__), "what": shape.what,
            "shape": [shape.clips, shape.tokens, 3, shape.heads, shape.head_dim], "seconds": seconds,
            "tflops": {name: flops / value / 1e12 for name, value in seconds.items()}, "refused": refused, "wrong": wrong,
        })  # fmt: skip
    return entries


def measure_backends(context: Context) -> dict[str, Any]:
    """The section: every shape's entries, written into the table as soon as they are there.

    Of two shapes that share an entry the longer sequence counts. Raises RuntimeError if one of our own kernels is wrong,
    TimeoutError when the time box ends; what was measured stays in the table.
    """
    path = context.out / table.PATH.name if context.dry_run else table.PATH
    device = torch.cuda.get_device_name(context.device) if context.device.type == "cuda" else "cpu"
    packages = {name: version for name, version in backend.environment()["packages"].items() if version}
    cudnn = torch.backends.cudnn.version() if torch.backends.cudnn.is_available() else None
    origin = {
        "device": device, "versions": versions() | packages | {"cudnn": cudnn}, "commit": commit(context.repo),
        "date": datetime.now(timezone.utc).date().isoformat(), "command": 'make gpu-check ARGS="--only attention"',
    }  # fmt: skip
    result: dict[str, Any] = {"table": str(path), "entries": []}
    shapes = sorted(TOY if context.dry_run else SHAPES, key=lambda shape: shape.tokens)
    for shape in shapes:
        if context.left() < 0:
            raise TimeoutError(f"attention: the time box ended before {shape.what}")
        entries = measure_shape(shape, context, 2 if context.dry_run else 20, 1 if context.dry_run else 4)
        table.write([origin | entry for entry in entries], path)
        result["entries"] += entries
        context.report(result)
        ours = [f"{e['direction']} {shape.what}: {e['wrong']['triton']}" for e in entries if "triton" in e["wrong"]]
        if ours:
            raise RuntimeError(f"attention=triton is wrong: {'; '.join(ours)}")
    return result
