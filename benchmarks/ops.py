"""Measure the cases of `cases.py`: `vmae2 bench ops`, and what `make bench` and `make gpu-check` are made of."""

from __future__ import annotations

import contextlib
import functools
import math
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from statistics import median
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from vmae2_fast import backend
from vmae2_fast.config import unknown

from . import cases, measure
from .machine import commit, machine, repo_root, versions

KEYS = {  # of `vmae2 bench ops`: case, size, direction
    "embed_vit_b": ("embed", "vit_b", "forward"),
    "embed_vit_g": ("embed", "vit_g", "forward"),
    "gather_vit_b": ("gather_patches", "vit_b", "forward"),
    "scatter_vit_b": ("scatter_patches", "vit_b", "forward"),
    "reconstruction_vit_b": ("reconstruction_loss", "vit_b", "forward_backward"),
    "reconstruction_vit_g": ("reconstruction_loss", "vit_g", "forward_backward"),
    "masks": ("dual_mask", "vit_b", "forward"),
    "residual_norm_vit_b": ("residual_norm", "vit_b", "forward_backward"),
    "residual_norm_vit_g": ("residual_norm", "vit_g", "forward_backward"),
    "adamw_vit_b": ("adamw", "vit_b", "forward"),
}
COPY_BYTES = 64 << 20
MOST_BATCHES = 8
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 4e-3}
"""Of the largest value: enough to see a wrong answer. How exact an op is, its tests say."""


class Contest:
    """One case at one size in one direction, with everybody who can do it on this device.

    `backends` are ours (the default one first), `forms` the strong alternative's. `batches` are the inputs that take turns: so
    many that at least `cold` bytes are touched before one comes again.
    """

    def __init__(
        self, name: str, size: str, direction: str, device: torch.device, *, clips: int, cold: int = 0,
        dtype: torch.dtype = torch.float32, compiler: str | None = "",
    ) -> None:  # fmt: skip
        self.name, self.size, self.direction, self.device, self.dtype = name, size, direction, device, dtype
        self.entry = cases.CASES[name]
        torch._dynamo.reset()  # all sizes share the functions of `strong.py`: past eight versions Dynamo would give up
        self.compiler = cases.code_generator(device) if compiler == "" else compiler
        self.batches = [cases.Batch(size, clips, device, dtype)]
        self.case: cases.Case = self.entry.make(self.batches[0], self._compiled)
        both = direction == "forward_backward"
        self.bytes = self.case.bytes + both * self.case.backward_bytes
        self.flops = self.case.flops + both * self.case.backward_flops
        more = min(MOST_BATCHES - 1, math.ceil(cold / self.bytes))
        self.batches += [cases.Batch(size, clips, device, dtype, number) for number in range(1, 1 + more)]
        self.backends = cases.backends(self.entry.op, device)
        self.forms = {n: call for n, call in self.case.strong.items() if self.compiler or not n.startswith("compiled")}
        self._upstream: dict[tuple[int, torch.Size], Tensor] = {}

    def _compiled(self, function: Callable) -> Callable:
        if self.compiler is None:
            return function
        return torch.compile(function, backend=self.compiler, dynamic=False)

    @contextlib.contextmanager
    def settings(self, which: str) -> Iterator[None]:
        """What a variant runs under: its backend, autocast, gradients. Entered outside of what is timed."""
        autocast = torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)
        chosen = backend.use_backend(f"{self.entry.op}={which}") if which in self.backends else contextlib.nullcontext()
        with chosen, autocast, torch.set_grad_enabled(self.direction == "forward_backward"):
            yield

    def call(self, which: str, number: int = 0) -> Callable[[], Any]:
        """The work of a variant (a backend, `plain`, or a form of strong) on one of the batches, to be run in `settings`."""
        function = self.case.plain if which == "plain" else self.forms.get(which, self.case.ours)
        batch = self.batches[number % len(self.batches)]
        if self.direction == "forward":
            return functools.partial(function, batch)

        def both() -> tuple[Tensor, ...]:
            out = function(batch)
            key = (number % len(self.batches), out.shape)
            if key not in self._upstream:
                self._upstream[key] = torch.ones_like(out) if out.ndim == 0 else torch.randn_like(out)
            return out.detach(), *torch.autograd.grad(out, self.case.gradient(batch), self._upstream[key])

        return both

    def watch(self, which: str) -> Callable[[int], float]:
        """Seconds of a variant in a round."""

        def seconds(number: int) -> float:
            with self.settings(which):
                return measure.stopwatch(self.call(which, number), self.device, backlog=True)

        return seconds

    def check(self, report: Callable[[str], None] = lambda which: None) -> None:
        """Run everybody once and compare with the reference. Raises AssertionError naming who differs."""
        want = self._results("reference")
        for which in (*self.backends, "plain", *self.forms):
            report(which)
            got = self._results(which)
            if self.case.random and which not in self.backends:
                if which in self.forms and [g.shape for g in got] != [w.shape for w in want]:
                    raise AssertionError(f"{self.name}: {which} gives other shapes than the reference")
                continue
            if which in self.forms:
                got = [self.case.arrange(got[0]), *got[1:]]
            for g, w in zip(got, want, strict=True):
                inexact = w.is_floating_point() and w.numel()
                allowed = TOLERANCE[self.dtype] * float(w.abs().max()) if inexact else 0.0
                if not w.is_floating_point() and which not in self.backends:
                    allowed = float(self.case.levels)
                where = f"{self.name}, {self.size}, {self.direction}: {which} differs from the reference: "
                torch.testing.assert_close(g.to(w.dtype), w, rtol=0.0, atol=allowed, msg=where.__add__)

    def _results(self, which: str) -> list[Any]:
        with self.settings(which):
            result = self.call(which)()
        parts = result if isinstance(result, tuple) else (result,)
        return [part.detach() if isinstance(part, Tensor) else part for part in parts]

    def strongest(self, rounds: int = 3) -> str:
        """The form of strong that is fastest here."""
        trial = measure.in_turns({n: self.watch(n) for n in self.forms}, rounds)
        return min(trial, key=lambda n: median(trial[n]))

    def run(
        self, rounds: int, copy: measure.Copy, report: Callable[[str], None] = lambda which: None, every_backend: bool = True
    ) -> dict[str, Any]:
        """Measure the variants and a copy in turns: medians, rates, shares of the copy's rate, ratios to our default.

        `report` is told who runs; without `every_backend` only the default one of ours does.
        """
        self.check(report)
        backends = self.backends if every_backend else self.backends[:1]
        watches = {which: self.watch(which) for which in (*backends, "plain", *self.forms)}
        watches["copy"] = lambda number: measure.stopwatch(copy, self.device, backlog=True)
        for which in (*watches, *watches):
            report(which)
            watches[which](0)
        report("rounds")
        seconds = measure.in_turns(watches, rounds)
        middle = {which: median(values) for which, values in seconds.items()}
        copied, ours = copy.rate(middle.pop("copy")), middle[self.backends[0]]
        best = min(self.forms, key=middle.__getitem__)
        winner = min(backends, key=middle.__getitem__)
        variants = {which: self.rates(value) for which, value in middle.items()}
        for row in variants.values():
            row["share_of_copy"] = row["gb_per_s"] / copied
        return {
            "op": self.entry.op, "case": self.name, "size": self.size, "direction": self.direction,
            "dtype": str(self.dtype).removeprefix("torch."), "shapes": self.case.shapes, "clips": self.batches[0].clips,
            "bytes": self.bytes, "flops": self.flops, "rounds": rounds, "copy_gb_per_s": copied, "variants": variants,
            "backends": list(backends), "default": self.backends[0], "winner": winner, "strong": best,
            "ratio_vs_plain": middle["plain"] / ours, "ratio_vs_strong": middle[best] / ours,
        }  # fmt: skip

    def rates(self, seconds: float) -> dict[str, float]:
        """What a median means: the bytes and operations the op must move and do, not those the variant does."""
        return {"median_s": seconds, "gb_per_s": self.bytes / seconds / 1e9, "gflops": self.flops / seconds / 1e9}


def chosen_keys(only: Sequence[str]) -> list[str]:
    """The keys asked for, all if none. Raises ValueError for an unknown one."""
    for key in only:
        if key not in KEYS:
            raise ValueError(unknown("key", key, list(KEYS)))
    return [key for key in KEYS if key in only or not only]


def set_threads(threads: int) -> None:
    """Pin torch to `threads`; 0 means all cores this process may use. Raises ValueError for a negative number."""
    if threads < 0:
        raise ValueError(f"threads must be at least 1, or 0 for all cores, got {threads}")
    available = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    torch.set_num_threads(threads or available)


def bench_ops(only: Iterable[str] = (), *, rounds: int = 15, threads: int = 0, toy: bool = False) -> dict[str, Any]:
    """Measure `KEYS` on this processor in float32; dictionaries by key, ratios of interleaved medians.

    `ratio_vs_strong` is against the fastest form, named under `strong`; `held_memory`: whether all variants had memory that
    was in use already (`measure.held_memory`). Raises ValueError for unknown keys or numbers out of
    range, AssertionError if a variant computes something else.
    """
    if rounds < 1:
        raise ValueError(f"rounds must be at least 1, got {rounds}")
    keys = chosen_keys(list(only))
    set_threads(threads)
    device = torch.device("cpu")
    results: dict[str, dict[str, Any]] = {}
    with measure.held_memory() as held, tqdm(keys, desc="bench ops", unit="key", disable=None) as bar:
        copy = measure.Copy(device, 1 << 20 if toy else COPY_BYTES)
        for key in bar:
            name, size, direction = KEYS[key]
            size = "toy" if toy else size
            contest = Contest(name, size, direction, device, clips=cases.CPU_BATCH[size], compiler=None if toy else "")
            bar.set_description(key)
            results[key] = contest.run(rounds, copy, bar.set_postfix_str, every_backend=False)
    ours = {key: result["variants"][result["default"]] for key, result in results.items()}
    return {
        "ratio_vs_plain": {key: result["ratio_vs_plain"] for key, result in results.items()},
        "ratio_vs_strong": {key: result["ratio_vs_strong"] for key, result in results.items()},
        "gb_per_s": {key: row["gb_per_s"] for key, row in ours.items()},
        "share_of_copy": {key: row["share_of_copy"] for key, row in ours.items()},
        "copy_gb_per_s": median(result["copy_gb_per_s"] for result in results.values()),
        "backend": {key: result["default"] for key, result in results.items()},
        "strong": {key: result["strong"] for key, result in results.items()},
        "ops": results, "dtype": "float32", "toy": toy, "rounds": rounds, "held_memory": held,
        "threads": torch.get_num_threads(), "cpu_flags": machine(device)["cpu_flags"], "machine": machine(device),
        "versions": versions(), "commit": commit(repo_root()),
    }  # fmt: skip
