"""Every case of `cases.py` on this processor: op x backend x model size, forward and backward, beside the alternatives.

`make bench` runs this file and prints the ratios, for ViT-B and ViT-g, or with VMAE2_BENCH=all for every published size. Each
variant is timed right after one run of ours (the backend that runs by default), so a machine that slows down slows both;
`times_ours` is the median of those ratios. `strong` is the fastest form of the strong alternative in a short trial, named in
`extra_info`.
"""

from __future__ import annotations

import functools
import os
import time
from statistics import median
from typing import Any

import pytest
import torch

from vmae2_fast.benchmarks import cases
from vmae2_fast.benchmarks.ops import Contest

CPU = torch.device("cpu")
PUBLISHED = [size for size in cases.MODELS if size != "toy"]
SIZES = {"": ["vit_b", "vit_g"], "all": PUBLISHED}.get(os.environ.get("VMAE2_BENCH", ""))
if SIZES is None:
    raise pytest.UsageError(f"VMAE2_BENCH={os.environ['VMAE2_BENCH']} is unknown: all, or unset for vit_b and vit_g")
ROUNDS = 5
VARIANTS = [
    pytest.param(name, size, direction, variant, id=f"{name}-{size}-{direction}-{variant}")
    for name, entry in cases.CASES.items() for size in SIZES for direction in entry.directions
    for variant in (*cases.backends(entry.op, CPU), "plain", "strong")
]


@functools.lru_cache(maxsize=1)  # the variants of one contest come one after the other
def contest(name: str, size: str, direction: str) -> tuple[Contest, str]:
    """A case, checked, and the form of strong that is fastest."""
    ready = Contest(name, size, direction, CPU, clips=cases.CPU_BATCH[size])
    ready.check()
    return ready, ready.strongest()


@pytest.mark.parametrize(("name", "size", "direction", "variant"), VARIANTS)
def test_op(name: str, size: str, direction: str, variant: str, benchmark: Any, ceilings: dict[str, float]) -> None:
    it, form = contest(name, size, direction)
    ours = it.call(it.backends[0])
    beside: list[float] = []

    def setup() -> None:
        with it.settings(it.backends[0]):
            begin = time.perf_counter()
            ours()
            beside.append(time.perf_counter() - begin)

    benchmark.group = f"{name} {size} {direction}"
    is_ours = variant == it.backends[0]
    with it.settings(variant):
        call = it.call(form if variant == "strong" else variant)
        benchmark.pedantic(call, setup=None if is_ours else setup, rounds=ROUNDS, warmup_rounds=1)
    benchmark.extra_info.update(
        ceilings, op=it.entry.op, case=name, size=size, direction=direction, variant=variant, ours=is_ours, bytes=it.bytes,
        flops=it.flops, shapes=it.case.shapes, dtype="float32", device="cpu", threads=torch.get_num_threads(),
        form=form if variant == "strong" else variant,
    )  # fmt: skip
    if benchmark.stats is not None:
        seconds = benchmark.stats.stats.data
        pairs = zip(seconds, beside[-len(seconds) :] or seconds, strict=True)
        benchmark.extra_info["times_ours"] = median(s / o for s, o in pairs)
