"""The sections of `make gpu-check`: what is measured and proved on a card, one function each (`gpu.py` runs them)."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, Literal

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from vmae2_fast import backend
from vmae2_fast.config import ModelConfig
from vmae2_fast.models.sizes import resolve
from vmae2_fast.ops.masks import DualMask, dual_mask
from vmae2_fast.ops.reconstruction import reconstruction_loss

from . import baselines, cases, measure, steps
from .machine import read
from .ops import Contest

Result = dict[str, Any]

_SMALL: dict[str, Any] = {"frames": 8, "depth": 1, "decoder_depth": 1, "decoder_width": 32, "decoder_heads": 2}
CUDA_KERNELS = {(op, "native") for op in ("dual_mask", "gather_patches", "scatter_patches", "reconstruction_loss")}
TOY = {
    "vit_b": ModelConfig(name=cases.MODELS["vit_b"].name, size=32, width=64, heads=1, **_SMALL),
    "vit_g": ModelConfig(name=cases.MODELS["vit_g"].name, size=28, width=88, heads=1, **_SMALL),
}
"""The models of the rehearsal, with the patches and head dims of the real ones."""


@dataclass
class Context:
    """What a section may know: where it runs, how large, until when, and where partial results go."""

    device: torch.device
    dry_run: bool
    deadline: float
    """On time.monotonic()."""
    out: Path
    repo: Path
    tests: Path
    report: Callable[[Result], None] = field(default=lambda result: None)
    """Write a partial result: what is measured survives a killed section."""

    def left(self) -> float:
        return self.deadline - time.monotonic()

    @property
    def dtype(self) -> torch.dtype:
        return torch.float32 if self.dry_run else torch.bfloat16

    @property
    def compiler(self) -> str | None:
        """The rehearsal traces what would be compiled, without a code generator behind it."""
        return "eager" if self.dry_run else "inductor"


def environment(context: Context) -> Result:
    """What this machine has and which implementation of each op would run."""
    import vmae2_fast
    from vmae2_fast import backend, models, ops  # noqa: F401  the ops register themselves on import

    result = {"package": str(Path(vmae2_fast.__file__).parent), **backend.environment()}
    context.report(result)
    kernels = {(op, name): why for op in backend.ops() for name, why in backend.refusals(op, context.device).items() if why}
    missing = [f"{op}={name}: {why}" for (op, name), why in kernels.items() if name == "triton" or (op, name) in CUDA_KERNELS]
    if context.device.type == "cuda" and missing:
        raise RuntimeError(f"kernels that should run here do not: {'; '.join(missing)}")
    return result


def ceilings(context: Context) -> Result:
    """The two rates nothing can beat: bf16 matrix products at ViT-g shapes, and device-to-device copy.

    Shapes are (M, K, N) of [M, K] x [K, N]: the four products of an encoder block on 32 clips' visible tokens, two of a
    fine-tuning batch, and a large square for comparison with published figures. Random data: zeros run faster than any
    real data would.
    """
    if context.dry_run:
        shapes, copy_bytes, repeats = [(64, 176, 528), (64, 528, 176)], 1 << 20, 2
    else:
        m = 32 * 208
        shapes = [(m, 1408, 4224), (m, 1408, 1408), (m, 1408, 6144), (m, 6144, 1408), (16384, 1408, 6144), (16384, 6144, 1408)]
        shapes, copy_bytes, repeats = [*shapes, (8192, 8192, 8192)], 1 << 32, 20
    rates: list[Result] = []
    for m, k, n in shapes:
        products = measure.products(context.device, (m, k, n), torch.bfloat16)
        seconds = measure.timed(products, context.device, repeats)
        rates.append({"shape": [m, k, n], "median_s": seconds, "tflops": 2 * m * k * n / seconds / 1e12})
        context.report({"gemm_bf16": rates})
    copy = measure.Copy(context.device, copy_bytes)
    seconds = measure.timed([copy], context.device, repeats)
    return {
        "gemm_bf16": rates,
        "gemm_bf16_tflops": max(rate["tflops"] for rate in rates[:-1]),
        "copy": {"bytes": copy_bytes, "median_s": seconds, "gb_per_s": copy.rate(seconds), "counted": "read + written"},
    }


def tests(context: Context) -> Result:
    """`pytest -m cuda` over the test tree: counts, and the names of what failed."""
    if not context.tests.is_dir():
        raise FileNotFoundError(f"no test tree at {context.tests}: run from a checkout, or give --tests")
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "junit.xml"
        command = [sys.executable, "-m", "pytest", "-m", "cuda", "-q", "-p", "no:cacheprovider", f"--junitxml={report}"]
        command.append(str(context.tests))
        rc = subprocess.run(command, cwd=context.repo, check=False).returncode
        if not report.exists():
            raise RuntimeError(f"pytest ended with code {rc} and wrote no report")
        suite = next(ElementTree.parse(report).iter("testsuite"))
    counts = {k: int(suite.get(k, 0)) for k in ("tests", "failures", "errors", "skipped")}
    counts["passed"] = counts["tests"] - counts["failures"] - counts["errors"] - counts["skipped"]
    bad = [case for case in suite.iter("testcase") if any(e.tag in ("failure", "error") for e in case)]
    failed = [f"{case.get('classname')}::{case.get('name')}" for case in bad]
    result = {"exit_code": rc, **counts, "seconds": float(suite.get("time", 0)), "failed": failed[:50]}
    context.report(result)
    if rc not in (0, 5):  # 5: nothing collected
        raise RuntimeError(f"pytest -m cuda: {counts['failures']} failed, {counts['errors']} errors, exit code {rc}")
    if counts["passed"] == 0 and context.device.type == "cuda":
        raise RuntimeError("pytest -m cuda ran no test on a machine with a GPU")
    return result


def op(name: str, context: Context) -> Result:
    """One case: every backend that can run here beside plain and strong, checked against the reference, inputs in turns so
    that none is found in the card's cache. `winners` by size, clips and direction is the table that decides the default."""
    sizes = [("toy", 2)] if context.dry_run else [("vit_b", 64), ("vit_g", 32), ("vit_g", 64)]
    rounds, copied = (2, 1 << 20) if context.dry_run else (30, 1 << 30)
    copy = measure.Copy(context.device, copied)
    cache = torch.cuda.get_device_properties(context.device).L2_cache_size if context.device.type == "cuda" else 1 << 20
    results: list[Result] = []
    result: Result = {"contests": results, "winners": {}, "l2_bytes": cache, "refused": backend.refusals(
        cases.CASES[name].op, context.device)}  # fmt: skip
    for size, clips in sizes:
        for direction in cases.CASES[name].directions:
            if context.left() < 0:
                raise TimeoutError(f"{name}: the time box ended before {size}, {clips} clips, {direction}")
            contest = Contest(name, size, direction, context.device, clips=clips, cold=4 * cache, dtype=context.dtype,
                              compiler=context.compiler)  # fmt: skip
            results.append(contest.run(rounds, copy))
            best = results[-1]
            result["winners"][f"{size} {clips} {direction}"] = best["winner"]
            result["default"] = best["default"]
            context.report(result)
            del contest
            free(context.device)
    return result


def free(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def steps_of(size: str, context: Context) -> Result:
    """Whole pre-training steps of a model: ours, strong and plain, with peak memory."""
    config = TOY[size] if context.dry_run else cases.MODELS[size]
    batch, mode = 2 if context.dry_run else cases.GPU_BATCH[size], WHAT_IS_COMPILED[size]
    known = read(context.out / "ceilings.json").get("result", {}).get("gemm_bf16_tflops")
    return steps.measure_steps(steps.StepBench(
        config, batch, context.device, torch.bfloat16, rounds=2 if context.dry_run else 9,
        gemm_tflops=known or ceilings(context)["gemm_bf16_tflops"], compile_backend=context.compiler, compile_mode=mode,
        checkpointing=True, left=context.left, report=context.report,
    ))  # fmt: skip


def capture(context: Context) -> Result:
    """No host sync between clip and loss, and the whole forward and backward as one CUDA graph whose replays draw fresh masks.

    The rehearsal calls the step again where a GPU replays the graph and cannot count syncs (`syncs` is None): it only traces
    what is around the ops with fake tensors, where reading a value back is an error. Raises RuntimeError if a sync, a mask, a
    loss or a gradient is not as it should be.
    """
    clips, cuda = (2, False) if context.dry_run else (16, context.device.type == "cuda")
    owner, clip, _ = steps.inputs(cases.MODELS["toy" if context.dry_run else "vit_b"], clips, context.device)
    spec, position = owner.spec, torch.arange(clips, device=context.device)
    view = torch.zeros_like(position)

    def masks() -> DualMask:
        return dual_mask(position, view, grid=spec.grid, seed=0)

    def forward() -> tuple[DualMask, Tensor]:
        # The cache of cast weights would tie a graph to the weights of its capture.
        with torch.autocast(context.device.type, torch.bfloat16, enabled=cuda, cache_enabled=False):
            drawn = masks()
            value = reconstruction_loss(owner(clip, drawn), clip, drawn.loss_index, patch=spec.patch, tubelet=spec.tubelet)
        assert isinstance(value, Tensor)
        return drawn, value

    def step() -> tuple[DualMask, Tensor, Tensor]:
        owner.zero_grad(set_to_none=True)
        drawn, value = forward()
        value.backward()
        return drawn, value.detach(), torch.cat([p.grad.flatten() for p in owner.parameters()])

    step()
    if cuda:
        torch.cuda.set_sync_debug_mode("error")
        try:
            step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    else:
        with FakeTensorMode(allow_non_fake_inputs=True):
            forward()
    result: Result = {"syncs": 0 if cuda else None, "captured": cuda, "masks_equal": True}
    result |= {"loss_eager": [], "loss_replayed": [], "gradient_rel": []}
    context.report(result)
    replay = captured(step) if cuda else step
    for shift in (0, 1000, 2**33):
        position.copy_(torch.arange(clips, device=context.device) + shift)
        _, loss, gradient = step()
        drawn, replayed_loss, replayed_gradient = replay()
        with backend.use_backend("dual_mask=reference"):
            result["masks_equal"] &= all(map(torch.equal, drawn, masks()))
        result["loss_eager"].append(loss.item())
        result["loss_replayed"].append(replayed_loss.item())
        result["gradient_rel"].append(float((replayed_gradient - gradient).norm() / gradient.norm()))
        context.report(result)
    close = all(abs(a - b) <= 1e-3 * abs(a) for a, b in zip(result["loss_eager"], result["loss_replayed"], strict=True))
    if not (close and result["masks_equal"] and max(result["gradient_rel"]) <= 1e-2):
        raise RuntimeError(f"a replay differs from the step itself: {result}")
    result["eager_s"], result["replay_s"] = (measure.timed([call], context.device, 2 if context.dry_run else 10)
                                             for call in (step, replay))  # fmt: skip
    return result


def captured(step: Callable[[], Any]) -> Callable[[], Any]:
    """`step` as a CUDA graph: a function that replays it and returns the same tensors, filled anew."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # libraries allocate their workspaces before the capture
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        written = step()

    def replay() -> Any:
        graph.replay()
        return written

    return replay


def data_share(context: Context) -> Result:
    """What masks, clip-to-embedding and loss take of a ViT-g step of ours: parts and step alone, on the same clips."""
    size, clips = ("toy", 2) if context.dry_run else ("vit_g", cases.GPU_BATCH["vit_g"])
    repeats, device = (2 if context.dry_run else 20), context.device
    result: Result = {"model": cases.MODELS[size].name, "clips": clips}

    def median_of(name: str, direction: str) -> float:
        contest = Contest(name, size, direction, device, clips=clips, dtype=context.dtype, compiler=None)
        watch = contest.watch(contest.backends[0])
        watch(0)
        return median(watch(i) for i in range(repeats))

    position = torch.arange(clips, device=device)
    draw = partial(dual_mask, position, torch.zeros_like(position), grid=resolve(cases.MODELS[size]).grid, seed=0)
    result["masks_s"] = measure.timed([draw], device, repeats)
    result["gather_s"] = median_of("gather_patches", "forward")
    result["embed_s"] = median_of("embed", "forward_backward")
    result["loss_s"] = median_of("reconstruction_loss", "forward_backward")
    context.report(result)
    owner, clip, mask = steps.inputs(cases.MODELS[size], clips, device)
    bench = steps.StepBench(cases.MODELS[size], clips, device, context.dtype, 1, 1.0)
    ours, optimizer = steps.variants(bench, owner)[0], steps.make_optimizer("ours", owner)
    work = partial(baselines.step, ours.make(clip, mask), optimizer, ours.autocast)
    result["step_s"] = measure.timed([work], device, repeats)
    result["share_masks_gather_loss"] = (result["masks_s"] + result["gather_s"] + result["loss_s"]) / result["step_s"]
    result["share_masks_embed_loss"] = (result["masks_s"] + result["embed_s"] + result["loss_s"]) / result["step_s"]
    return result


def attention_backends(context: Context) -> Result:
    """All attention backends present at the shapes of the models: the table that decides who runs."""
    from . import attention

    return attention.measure_backends(context)


def decoders(context: Context) -> Result:
    """Clips per second out of the video engines by number of DALI pipelines, beside PyAV on every core."""
    try:
        import av  # noqa: F401

        from . import decoding
    except ImportError as error:  # the other sections need none of the data path's libraries
        return {"not_measured": f"the data path's libraries are missing: {error}"}
    with tempfile.TemporaryDirectory() as folder:
        return decoding.measure_decoders(
            Path(folder), dry_run=context.dry_run, workers=1 if context.dry_run else os.cpu_count() or 1,
            left=context.left, report=context.report,
        )  # fmt: skip


WHAT_IS_COMPILED: dict[str, Literal["whole", "blocks"]] = {"vit_b": "whole", "vit_g": "blocks"}
OP_SECTIONS = list(cases.CASES)
SECTIONS: dict[str, tuple[Callable[[Context], Result], float]] = {  # and the seconds each may take
    "environment": (environment, 60),
    "ceilings": (ceilings, 60),
    "pytest": (tests, 420),
    **{name: (partial(op, name), 240) for name in OP_SECTIONS},
    "attention": (attention_backends, 300),
    "capture": (capture, 120),
    "data_share": (data_share, 120),
    "decoders": (decoders, 300),
    "steps_base": (partial(steps_of, "vit_b"), 300),
    "steps_giant": (partial(steps_of, "vit_g"), 480),
}
