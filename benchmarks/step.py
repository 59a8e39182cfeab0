"""`vmae2 bench step`: our pre-training step and its alternatives on this processor, in turns in one process.

Peak memory cannot be told apart inside that process, so each variant also takes three steps in a fresh one:

    above_start = highest resident set during the steps - resident set before them
    peak        = above_start - 12 bytes a parameter         (fp32 gradients and AdamW's two moments, the same for all)

Before the steps model, clips and (for plain) the normalised clips are there, the allocator has handed back what it no longer
uses, and the kernel's mark of the highest resident set is reset (/proc/self/clear_refs; Linux only).
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import gc
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any, Literal

import torch
from tqdm import tqdm

from vmae2_fast.config import ModelConfig, unknown
from vmae2_fast.models.sizes import SIZES
from vmae2_fast.tasks.base import autocast_dtype

from . import baselines, cases, measure, steps
from .machine import commit, machine, repo_root, versions
from .ops import set_threads

CPU = torch.device("cpu")
Dtype = Literal["auto", "float32", "bfloat16"]


def pretrain_name(model: str) -> str:
    """The official name of `vit_base` and the like. Raises ValueError for anything that is no pre-training model."""
    names = {f"vit_{size}": f"pretrain_videomae_{size}_patch{row.patch}_224" for size, row in SIZES.items()}
    if model not in names and model not in names.values():
        raise ValueError(unknown("pre-training model", model, [*names, *names.values()]))
    return names.get(model, model)


def bench_step(
    model: str = "vit_base", *, batch: int = 2, rounds: int = 5, threads: int = 0, dtype: Dtype = "auto", toy: bool = False
) -> dict[str, Any]:
    """Median seconds of each variant, ratios to ours, and memory; see the head of this file.

    `ratio_vs_plain` compares ours in `dtype` with plain in fp32, `ratio_vs_plain_same_dtype` both in `dtype`,
    `ratio_vs_strong` ours with the faster of eager and torch.compile in `dtype`; `memory_ratio_vs_plain` is our peak over that
    of plain in fp32. dtype "auto" is bfloat16 where the processor has instructions for it. Raises ValueError for an unknown
    model or numbers out of range, RuntimeError if losses differ.
    """
    config = cases.MODELS["toy"] if toy else ModelConfig(name=pretrain_name(model))
    for name, value in (("batch", batch), ("rounds", rounds)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    set_threads(threads)
    chosen = autocast_dtype("bfloat16", "cpu") or torch.float32 if dtype == "auto" else getattr(torch, dtype)
    side = 64 if toy else 1024
    seconds = measure.timed(measure.products(CPU, (side, side, side), chosen), CPU, 5)
    with tqdm(desc="steps", unit="round", disable=None) as bar:
        bench = steps.StepBench(
            config, batch, CPU, chosen, rounds, gemm_tflops=2 * side**3 / seconds / 1e12, report=lambda result: bar.update(),
            compile_backend=None if toy else cases.code_generator(CPU),
        )  # fmt: skip
        result = steps.measure_steps(bench)
    rows = result["variants"]
    middle = {name: row["median_s"] for name, row in rows.items()}
    same, strong = f"plain_{steps.SHORT[chosen]}", min((n for n in middle if n.startswith("strong")), key=middle.__getitem__)
    memory = {name: peak(name, bench) for name in tqdm(["ours", "strong", *dict.fromkeys((same, "plain_fp32"))],
                                                       desc="memory", disable=None)}  # fmt: skip
    used, official = (memory[name].get("peak_bytes") for name in ("ours", "plain_fp32"))
    return {
        "ratio_vs_plain": middle["plain_fp32"] / middle["ours"],
        "ratio_vs_plain_same_dtype": middle[same] / middle["ours"],
        "ratio_vs_strong": middle[strong] / middle["ours"],
        "memory_ratio_vs_plain": used / official if used and official and official > 0 else None,
        "strong": strong, "memory": memory, **result, "toy": toy, "threads": torch.get_num_threads(),
        "cpu_flags": machine(CPU)["cpu_flags"], "machine": machine(CPU), "versions": versions(), "commit": commit(repo_root()),
    }  # fmt: skip


# --- memory of one variant, in a process of its own ---------------------------------------------------------------------


def peak(variant: str, bench: steps.StepBench) -> dict[str, Any]:
    """Bytes of three steps of one variant in a fresh process, or under `error` why there are none."""
    order = {
        "variant": variant, "config": dataclasses.asdict(bench.config), "batch": bench.batch,
        "dtype": str(bench.dtype).removeprefix("torch."), "threads": torch.get_num_threads(),
    }  # fmt: skip
    command = [sys.executable, "-m", f"{__package__}.step", json.dumps(order)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        return {"error": f"not measured: {last}"}
    return json.loads(done.stdout.splitlines()[-1])


def resident(key: Literal["VmRSS", "VmHWM"]) -> int:
    """Resident set in bytes, now or its highest since the last reset. Raises OSError where /proc does not tell."""
    found = re.search(rf"^{key}:\s*(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    if found is None:
        raise OSError(f"/proc/self/status has no {key}")
    return int(found.group(1)) * 1024


def measure_peak(order: dict[str, Any]) -> dict[str, Any]:
    """The child's side of `peak`."""
    torch.set_num_threads(order["threads"])
    bench = steps.StepBench(ModelConfig(**order["config"]), order["batch"], CPU, getattr(torch, order["dtype"]), 1, 1.0,
                            compile_backend=None)  # fmt: skip
    owner, clip, mask = steps.inputs(bench.config, bench.batch, CPU)
    variant = next(v for v in steps.variants(bench, owner) if v.name == order["variant"])
    loss, optimizer = variant.make(clip, mask), steps.make_optimizer(variant.optimizer, owner)
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):  # glibc only
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    start = resident("VmRSS")
    for _ in range(3):
        baselines.step(loss, optimizer, variant.autocast, variant.check)
    above, shared = resident("VmHWM") - start, 12 * sum(p.numel() for p in owner.parameters())
    return {"start_bytes": start, "above_start_bytes": above, "gradients_and_adam_bytes": shared, "peak_bytes": above - shared}


if __name__ == "__main__":
    print(json.dumps(measure_peak(json.loads(sys.argv[1]))))
