"""Whole pre-training steps side by side: ours, strong (eager, compiled) and plain (fp32, bf16, bf16 with checkpointing).

All variants share one set of parameters (`baselines.tie`) and see the same clips and masks, so their losses must agree
before their times mean anything. First each runs alone, for its peak memory; then those that fit take turns, round by
round, and the median over the rounds counts. A step is clip on the device -> loss -> gradients -> AdamW. Ours and strong
start from uint8 clips, plain from the fp32 normalised ones its loader would send; ours draws its masks inside the step,
the others are given theirs.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from vmae2_fast.config import MaskConfig, ModelConfig
from vmae2_fast.models import build_model
from vmae2_fast.ops.masks import DualMask, dual_mask
from vmae2_fast.ops.reconstruction import reconstruction_loss
from vmae2_fast.train.ledger import ledger

from . import baselines

if TYPE_CHECKING:
    from .gpu import Context

# Model, clips of a step, and what torch.compile gets: everything, or each block by itself (44 blocks in one graph take
# minutes to compile and gain little over blocks).
REAL = {
    "base": (ModelConfig(name="pretrain_videomae_base_patch16_224"), 64, "whole"),
    "giant": (ModelConfig(name="pretrain_videomae_giant_patch14_224"), 32, "blocks"),
}
_TOY: dict[str, Any] = {"frames": 8, "depth": 1, "decoder_depth": 1, "decoder_width": 32, "decoder_heads": 2}
TOY = {
    "base": (ModelConfig(name="pretrain_videomae_base_patch16_224", size=32, width=64, heads=1, **_TOY), 2, "whole"),
    "giant": (ModelConfig(name="pretrain_videomae_giant_patch14_224", size=28, width=88, heads=1, **_TOY), 2, "blocks"),
}
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


def variants(config: ModelConfig, owner: Any, compile_mode: str, compile_backend: str) -> list[Variant]:
    """In the order in which they matter: a short budget measures the first ones."""

    def baseline(cls: type, **options: Any) -> Any:
        with torch.device("meta"):
            model = cls(config, **options)
        # The position tables are no parameters: they are made again for real.
        for name, buffer in list(model.named_buffers()):
            setattr(model, name, baselines.sinusoid(*buffer.shape[1:]))
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
            options: dict[str, Any] = {"backend": compile_backend, "dynamic": False}
            if compile_mode == "blocks":
                for block in (*model.encoder.blocks, *model.decoder.blocks):
                    block.compile(**options)
                model.patches = torch.compile(model.patches, **options)
            compiled.append(model.loss if compile_mode == "blocks" else torch.compile(model.loss, **options))
        return lambda: compiled[0](clip, *mask)

    def plain(**options: Any) -> Callable[[Tensor, DualMask], Callable[[], Tensor]]:
        def make(clip: Tensor, mask: DualMask) -> Callable[[], Tensor]:
            model = baseline(baselines.Plain, **options)
            mean, std = (torch.tensor(v, device=clip.device) for v in (baselines.MEAN, baselines.STD))
            video = ((clip / 255 - mean) / std).permute(0, 4, 1, 2, 3).contiguous()
            hidden, left_out = (hidden_mask(index, owner.spec.tokens) for index in (mask.visible_index, mask.decode_index))
            return lambda: model.loss(video, hidden, left_out)

        return make

    bf16 = torch.bfloat16
    return [
        Variant("ours", bf16, "fused", ours),
        Variant("strong", bf16, "fused", strong),
        Variant("plain_bf16", bf16, "foreach", plain(), check=True),
        Variant("plain_bf16_checkpoint", bf16, "foreach", plain(activation_checkpoint=True), check=True),
        Variant("strong_compiled", bf16, "fused", strong_compiled),
        Variant("plain_fp32", None, "foreach", plain(), check=True),
    ]


def hidden_mask(index: Tensor, tokens: int) -> Tensor:
    """Bool [B, tokens], True where `index` [B, K] does not point."""
    return torch.ones(index.shape[0], tokens, dtype=torch.bool, device=index.device).scatter_(1, index.long(), False)


def pretrain_steps(size: str, context: Context) -> dict[str, Any]:
    """Measure all variants of one model size; see the head of this file. Lengths, batch and shapes are in the result."""
    from .gpu import ceilings, read

    config, batch, compile_mode = (TOY if context.dry_run else REAL)[size]
    backend, rounds, inner = ("eager", 2, 1) if context.dry_run else ("inductor", 9, 3)
    torch.manual_seed(0)
    with context.device:
        owner = build_model(config).train()
    spec, account = owner.spec, ledger(config)
    shape = (batch, spec.frames, spec.size, spec.size, spec.channels)
    clip = torch.randint(0, 256, shape, dtype=torch.uint8, device=context.device)
    position = torch.arange(batch, device=context.device)
    mask = dual_mask(position, torch.zeros_like(position), grid=spec.grid, seed=0)
    everything = variants(config, owner, compile_mode, backend)
    rows: dict[str, dict[str, Any]] = {v.name: {"status": "not run: budget"} for v in everything}
    known = read(context.out / "ceilings.json").get("result", {}).get("gemm_bf16_tflops")
    result = {
        "model": config.name, "batch": batch, "clip": list(shape[1:]), "tokens": account["tokens"],
        "compile": compile_mode, "flops_step": batch * account["flops_step"], "variants": rows,
        "gemm_bf16_tflops": known or ceilings(context)["gemm_bf16_tflops"], "rounds": rounds, "steps_per_round": inner,
    }

    for variant in everything:
        if context.left() > 0:
            rows[variant.name] = alone(variant, owner, clip, mask, context.device)
            context.report(result)
    first = rows["ours"].get("loss")
    for row in rows.values():
        if first is not None and "loss" in row and abs(row["loss"] - first) > AGREEMENT * abs(first):
            row["status"] = f"failed: loss {row['loss']:.5f} is not ours ({first:.5f})"
    in_turns([v for v in everything if rows[v.name]["status"] == "fits"], rows, owner, clip, mask, result, context)
    failed = [f"{name}: {row['status']}" for name, row in rows.items() if row["status"].startswith("failed")]
    if failed:
        context.report(result)
        raise RuntimeError("; ".join(failed))
    return result


def make_optimizer(kind: str, owner: Any) -> torch.optim.Optimizer:
    # So small a rate that all variants keep computing the same loss; the work of a step does not depend on it.
    return torch.optim.AdamW(baselines.groups(owner), lr=1e-8, betas=(0.9, 0.95), **{kind: True})


def alone(variant: Variant, owner: Any, clip: Tensor, mask: DualMask, device: torch.device) -> dict[str, Any]:
    """Three steps with nothing else on the device: the loss, the peak memory, or why it did not run."""
    cuda = device.type == "cuda"
    row: dict[str, Any] = {"status": "fits"}
    optimizer: Any = None
    loss: Any = None
    value: Any = None
    try:
        optimizer, loss = make_optimizer(variant.optimizer, owner), variant.make(clip, mask)
        for i in range(3):
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
    chosen: list[Variant], rows: dict[str, dict[str, Any]], owner: Any, clip: Tensor, mask: DualMask,
    result: dict[str, Any], context: Context,
) -> None:
    """Time the chosen variants round by round, another one first in each round; ratios are paired within a round."""
    from .gpu import stopwatch

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
        if context.left() > 0:
            loss = attempt(v, partial(v.make, clip, mask))
            if loss is not None:
                ready[v.name] = partial(baselines.step, loss, optimizers[v.optimizer], v.autocast, v.check)
                attempt(v, partial(repeat, ready[v.name], 2))
    inner = result["steps_per_round"]
    for i in range(result["rounds"]):
        turn = [v for v in chosen if v.name in ready]
        turn = turn[i % len(turn) :] + turn[: i % len(turn)] if turn else []
        for v in turn:
            if context.left() < 0:
                break
            attempt(v, ready[v.name])  # not timed: the first step after another variant pays for the change
            if v.name in ready:
                group = attempt(v, partial(stopwatch, partial(repeat, ready[v.name], inner), context.device))
                if group is not None:
                    seconds.setdefault(v.name, []).append(group / inner)
        for name, values in seconds.items():
            if name in ready:
                rows[name] |= summary(values, seconds.get("ours", []), result)
        context.report(result)


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
    out["share_of_gemm_ceiling"] = out["tflops"] / result["gemm_bf16_tflops"]
    if ours:
        out["times_ours"] = median(v / o for v, o in zip(values, ours, strict=False))
    return out
