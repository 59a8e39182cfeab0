"""Whole pre-training steps side by side: ours, strong (eager, compiled) and plain (in ours' dtype and in fp32).

All variants share one set of parameters (`baselines.tie`) and see the same clips and masks, so their losses must agree
before their times mean anything. First each runs alone (on a GPU: for its peak memory); then those that fit take turns, round
by round, and the median over the rounds counts. A step is clip on the device -> loss -> gradients -> AdamW. Ours and strong
start from uint8 clips, plain from the fp32 normalised ones its loader would send; ours draws its masks inside the step,
the others are given theirs.
"""

from __future__ import annotations

import gc
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import Any, Literal

import torch
from torch import Tensor

from vmae2_fast.config import MaskConfig, ModelConfig, OptimConfig
from vmae2_fast.models import build_model
from vmae2_fast.models.vit import autocast_weights
from vmae2_fast.ops.masks import DualMask, dual_mask
from vmae2_fast.ops.reconstruction import reconstruction_loss
from vmae2_fast.train.adamw import make_adamw
from vmae2_fast.train.ledger import ledger

from . import baselines, measure, plain
from .cases import hidden_mask

SHORT = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
AGREEMENT = 0.02  # losses in bf16 and fp32 differ by about 1e-3; another step than ours differs by far more


@dataclass
class Variant:
    """One way to do the step. `make(clip, mask)` returns the loss function; what it holds is freed with it."""

    name: str
    autocast: torch.dtype | None
    optimizer: str
    make: Callable[[Tensor, DualMask], Callable[[], Tensor]]
    check: bool = False
    """Look at the loss on the host before the backward, as the official loop does."""


@dataclass(frozen=True)
class StepBench:
    """What is measured, where, and how often."""

    config: ModelConfig
    batch: int
    device: torch.device
    dtype: torch.dtype
    """Autocast dtype of ours and strong; float32 is none."""
    rounds: int
    gemm_tflops: float
    """Rate of matrix products in `dtype` on this device: the ceiling a step is compared with."""
    compile_backend: str | None = "inductor"
    """None: no compiled variant."""
    compile_mode: Literal["whole", "blocks"] = "blocks"
    """What torch.compile gets: everything, or each block by itself (44 blocks in one graph take minutes to compile and gain
    little over blocks)."""
    checkpointing: bool = False
    """Whether plain also runs with activation checkpointing of each block."""
    left: Callable[[], float] = lambda: math.inf
    """Seconds of budget left: nothing is started after them."""
    report: Callable[[dict[str, Any]], None] = lambda result: None
    """Told the result so far whenever there is more of it."""

    @property
    def inner(self) -> int:
        """Steps timed together. On a GPU the first one after another variant pays for the change and is not timed."""
        return 3 if self.device.type == "cuda" else 1


def variants(bench: StepBench, owner: Any) -> list[Variant]:
    """In the order in which they matter: a short budget measures the first ones."""

    def baseline(cls: type, **options: Any) -> Any:
        with torch.device("meta"):
            model = cls(bench.config, **options)
        baselines.tie(model, owner)
        return model

    def ours(clip: Tensor, mask: DualMask) -> Callable[[], Tensor]:
        spec, given = owner.spec, MaskConfig()
        position = torch.arange(clip.shape[0], device=clip.device)
        view = torch.zeros_like(position)

        def loss() -> Tensor:
            drawn = dual_mask(position, view, grid=spec.grid, seed=0, encoder_ratio=given.encoder_ratio,
                              decoder=given.decoder, decoder_ratio=given.decoder_ratio)
            value = reconstruction_loss(owner(clip, drawn), clip, drawn.loss_index, patch=spec.patch, tubelet=spec.tubelet)
            assert isinstance(value, Tensor)
            return value

        return loss

    def strong(clip: Tensor, mask: DualMask) -> Callable[[], Tensor]:
        model = baseline(baselines.Strong)
        return lambda: model.loss(clip, *mask)

    compiled: list[Callable[..., Tensor]] = []

    def strong_compiled(clip: Tensor, mask: DualMask) -> Callable[[], Tensor]:
        if not compiled:  # once: compiling takes longer than everything measured with it
            model = baseline(baselines.Strong)
            options: dict[str, Any] = {"backend": bench.compile_backend, "dynamic": False}
            whole = bench.compile_mode == "whole"
            for block in () if whole else (*model.encoder.blocks, *model.decoder.blocks):
                block.compile(**options)
            if not whole:
                model.rows, model.targets = (torch.compile(f, **options) for f in (model.rows, model.targets))
            compiled.append(torch.compile(model.loss, **options) if whole else model.loss)
        return lambda: compiled[0](clip, *mask)

    def official(**options: Any) -> Callable[[Tensor, DualMask], Callable[[], Tensor]]:
        def make(clip: Tensor, mask: DualMask) -> Callable[[], Tensor]:
            model = baseline(baselines.Plain, **options)
            video = plain.normalised(clip, model.mean, model.std)
            hidden, left_out = (hidden_mask(index, owner.spec.tokens) for index in (mask.visible_index, mask.decode_index))
            return lambda: model.loss(video, hidden, left_out)

        return make

    dtype = None if bench.dtype == torch.float32 else bench.dtype
    out = [
        # As in a run: the copies of weights are for products in bfloat16.
        Variant("ours", dtype, "ours, shadows" if dtype == torch.bfloat16 else "ours", ours),
        Variant("strong", dtype, "fused", strong),
        Variant(f"plain_{SHORT[bench.dtype]}", dtype, "foreach", official(), check=True),
    ]
    if bench.checkpointing:
        checkpointed = official(activation_checkpoint=True)
        out.append(Variant(f"plain_{SHORT[bench.dtype]}_checkpoint", dtype, "foreach", checkpointed, check=True))
    if bench.compile_backend:
        out.append(Variant("strong_compiled", dtype, "fused", strong_compiled))
    if dtype is not None:
        out.append(Variant("plain_fp32", None, "foreach", official(), check=True))
    return out


def inputs(config: ModelConfig, batch: int, device: torch.device) -> tuple[Any, Tensor, DualMask]:
    """A model with random weights, random clips and their masks: what every variant is given."""
    torch.manual_seed(0)
    with device:
        owner = build_model(config).train()
    spec = owner.spec
    shape = (batch, spec.frames, spec.size, spec.size, spec.channels)
    clip = torch.randint(0, 256, shape, dtype=torch.uint8, device=device)
    position = torch.arange(batch, device=device)
    return owner, clip, dual_mask(position, torch.zeros_like(position), grid=spec.grid, seed=0)


def measure_steps(bench: StepBench) -> dict[str, Any]:
    """Measure all variants; see the head of this file. Raises RuntimeError, after reporting, if one fails or differs."""
    owner, clip, mask = inputs(bench.config, bench.batch, bench.device)
    account = ledger(bench.config)
    everything = variants(bench, owner)
    rows: dict[str, dict[str, Any]] = {v.name: {"status": "not run: budget"} for v in everything}
    result = {
        "model": bench.config.name, "batch": bench.batch, "clip": list(clip.shape[1:]), "tokens": account["tokens"],
        "dtype": str(bench.dtype).removeprefix("torch."), "compile": bench.compile_mode if bench.compile_backend else None,
        "flops_step": bench.batch * account["flops_step"], "variants": rows, "gemm_tflops": bench.gemm_tflops,
        "rounds": bench.rounds, "steps_per_round": bench.inner,
    }  # fmt: skip
    for variant in everything:
        if bench.left() > 0:
            rows[variant.name] = alone(variant, owner, clip, mask, bench.device)
            bench.report(result)
    first = rows["ours"].get("loss")
    for row in rows.values():
        if first is not None and "loss" in row and abs(row["loss"] - first) > AGREEMENT * abs(first):
            row["status"] = f"failed: loss {row['loss']:.5f} is not ours ({first:.5f})"
    in_turns(bench, [v for v in everything if rows[v.name]["status"] == "fits"], owner, clip, mask, result)
    failed = [f"{name}: {row['status']}" for name, row in rows.items() if row["status"].startswith("failed")]
    if failed:
        bench.report(result)
        raise RuntimeError("; ".join(failed))
    return result


class TrainingAdamW:
    """The AdamW of a training run (`optim.implementation=auto`), with the two methods a step calls."""

    def __init__(self, owner: Any, shadows: bool) -> None:
        config = OptimConfig(betas=(0.9, 0.95))
        self.adamw = make_adamw(baselines.groups(owner), config, 1e-8, autocast_weights(owner) if shadows else ())
        self.param_groups = self.adamw.param_groups
        self.not_skipped = torch.zeros((), device=self.param_groups[0]["params"][0].device)

    def zero_grad(self, set_to_none: bool = True) -> None:
        for p in [p for group in self.param_groups for p in group["params"]]:
            p.grad = None

    def step(self) -> None:
        self.adamw.update(None, self.not_skipped)


def make_optimizer(kind: str, owner: Any) -> Any:
    if kind.startswith("ours"):
        return TrainingAdamW(owner, shadows=kind == "ours, shadows")
    # So small a rate that all variants keep computing the same loss; the work of a step does not depend on it.
    return torch.optim.AdamW(baselines.groups(owner), lr=1e-8, betas=(0.9, 0.95), **{kind: True})


def alone(variant: Variant, owner: Any, clip: Tensor, mask: DualMask, device: torch.device) -> dict[str, Any]:
    """A step with nothing else on the device, on a GPU three: the loss, the peak memory, or why it did not run."""
    cuda = device.type == "cuda"
    row: dict[str, Any] = {"status": "fits"}
    optimizer: Any = None
    loss: Any = None
    value: Any = None
    try:
        optimizer, loss = make_optimizer(variant.optimizer, owner), variant.make(clip, mask)
        for i in range(3 if cuda else 1):
            value = baselines.step(loss, optimizer, variant.autocast, variant.check)
            if i == 0:
                row["loss"] = value.item()
                if cuda:  # the first step compiles and tunes; the optimiser's state exists from here on
                    torch.cuda.synchronize()
                    gradients = sum(p.grad.nbytes for p in owner.parameters() if p.grad is not None)
                    row["resident_bytes"] = torch.cuda.memory_allocated() - gradients
                    torch.cuda.reset_peak_memory_stats()
        if cuda:
            torch.cuda.synchronize()
            row["peak_bytes"] = torch.cuda.max_memory_allocated()
    except torch.OutOfMemoryError:
        row = {"status": "out of memory"}
    except Exception as error:  # one broken alternative must not take the others' figures with it
        row = {"status": f"failed: {type(error).__name__}: {str(error)[:500]}"}
    owner.zero_grad(set_to_none=True)
    del optimizer, loss, value  # before the next one is measured
    gc.collect()
    if cuda:
        torch.cuda.empty_cache()
    return row


def in_turns(
    bench: StepBench, chosen: list[Variant], owner: Any, clip: Tensor, mask: DualMask, result: dict[str, Any]
) -> None:
    """Time the chosen variants round by round, another one first in each round; ratios are paired within a round."""
    rows, cuda = result["variants"], bench.device.type == "cuda"
    optimizers = {kind: make_optimizer(kind, owner) for kind in {v.optimizer for v in chosen}}
    ready: dict[str, Callable[[], Any]] = {}
    seconds: dict[str, list[float]] = {}

    def attempt(variant: Variant, work: Callable[[], Any]) -> Any:
        try:
            return work()
        except torch.OutOfMemoryError:
            rows[variant.name]["status"] = "out of memory beside the others: peak alone holds, no time"
        except Exception as error:
            rows[variant.name]["status"] = f"failed: {type(error).__name__}: {str(error)[:500]}"
        ready.pop(variant.name, None)
        owner.zero_grad(set_to_none=True)
        return None

    for v in chosen:
        if bench.left() > 0:
            loss = attempt(v, partial(v.make, clip, mask))
            if loss is not None:
                ready[v.name] = partial(baselines.step, loss, optimizers[v.optimizer], v.autocast, v.check)
                attempt(v, partial(repeat, ready[v.name], 2 if cuda else 1))
    named = {v.name: v for v in chosen}
    for order in measure.turns(list(ready), bench.rounds):
        for name in order:
            if name not in ready or bench.left() < 0:
                continue
            # On a GPU the first step after another variant pays for the change; shadows are stale after its update.
            if cuda or named[name].optimizer == "ours, shadows":
                attempt(named[name], ready[name])
            if name in ready:
                work = partial(repeat, ready[name], bench.inner)
                group = attempt(named[name], partial(measure.stopwatch, work, bench.device))
                if group is not None:
                    seconds.setdefault(name, []).append(group / bench.inner)
        for name, values in seconds.items():
            if name in ready:
                rows[name] |= summary(values, seconds.get("ours", []), result)
        bench.report(result)


def repeat(work: Callable[[], Any], times: int) -> None:
    for _ in range(times):
        work()


def summary(values: list[float], ours: list[float], result: dict[str, Any]) -> dict[str, Any]:
    """Figures of one variant from its seconds per step in each round."""
    middle = median(values)
    out = {
        "status": "ok", "median_s": middle, "min_s": min(values), "max_s": max(values), "rounds": len(values),
        "clips_per_s": result["batch"] / middle, "tflops": result["flops_step"] / middle / 1e12,
    }
    out["share_of_gemm_ceiling"] = out["tflops"] / result["gemm_tflops"]
    if ours:
        out["times_ours"] = median(v / o for v, o in zip(values, ours, strict=False))
    return out
