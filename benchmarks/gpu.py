"""The one GPU entry point: `make gpu-check`, or `python -m vmae2_fast.benchmarks.gpu`.

Runs in the interpreter it is started with, uses no network, and needs torch, triton, numpy and pytest only.
Each section runs in its own process (a crash or an exhausted card takes down one section, not the others) within its own
time box, and writes OUT/SECTION.json as soon as it ends. A section whose result is there is skipped, a failed one runs
again, so the command can be repeated until everything is done:

    python -m vmae2_fast.benchmarks.gpu --budget-s 540        # again and again, until it says all done
    python -m vmae2_fast.benchmarks.gpu --only steps_giant --force
    python -m vmae2_fast.benchmarks.gpu --dry-run             # toy sizes on the CPU, into a temporary folder

Exit code: 0 all sections done, 1 a section failed, 2 wrong usage, 3 the budget ended before all sections had run.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import platform
import re
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch

Result = dict[str, Any]
SMALLEST_BOX = 20.0  # seconds of budget under which no section is started


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


# --- sections -------------------------------------------------------------------------------------------------------


def environment(context: Context) -> Result:
    """What this machine has and which implementation of each op would run."""
    import vmae2_fast
    from vmae2_fast import backend, models, ops  # noqa: F401  the ops register themselves on import

    return {"package": str(Path(vmae2_fast.__file__).parent), **backend.environment()}


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
    products: list[Result] = []
    for m, k, n in shapes:
        # Two sets of operands in turn: one alone could live in the cache.
        left, right = (torch.randn(2, *shape, device=context.device).bfloat16() for shape in ((m, k), (k, n)))
        seconds = timed([partial(torch.mm, left[i], right[i]) for i in (0, 1)], context.device, repeats)
        products.append({"shape": [m, k, n], "median_s": seconds, "tflops": 2 * m * k * n / seconds / 1e12})
        context.report({"gemm_bf16": products})
    source = torch.randint(0, 255, (copy_bytes,), dtype=torch.uint8, device=context.device)
    target = torch.empty_like(source)
    seconds = timed([partial(target.copy_, source)], context.device, repeats)
    copy = {"bytes": copy_bytes, "median_s": seconds, "gb_per_s": 2 * copy_bytes / seconds / 1e9, "counted": "read + written"}
    return {
        "gemm_bf16": products,
        "gemm_bf16_tflops": max(p["tflops"] for p in products[:-1]),
        "copy": copy,
    }


def timed(calls: list[Callable[[], Any]], device: torch.device, repeats: int) -> float:
    """Median seconds of one call, each launch timed by itself; the calls take turns."""
    for call in calls * 2:
        call()
    seconds = []
    for i in range(repeats):
        seconds.append(stopwatch(calls[i % len(calls)], device))
    return median(seconds)


def stopwatch(call: Callable[[], Any], device: torch.device) -> float:
    """Seconds from before to after `call`, on the device's own clock where it has one."""
    if device.type != "cuda":
        begin = time.perf_counter()
        call()
        return time.perf_counter() - begin
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


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


def steps_base(context: Context) -> Result:
    from .steps import pretrain_steps

    return pretrain_steps("base", context)


def steps_giant(context: Context) -> Result:
    from .steps import pretrain_steps

    return pretrain_steps("giant", context)


SECTIONS: dict[str, tuple[Callable[[Context], Result], float]] = {  # and the seconds each may take
    "environment": (environment, 60),
    "ceilings": (ceilings, 60),
    "pytest": (tests, 420),
    "steps_base": (steps_base, 300),
    "steps_giant": (steps_giant, 480),
}


# --- driver ---------------------------------------------------------------------------------------------------------


def repo_root() -> Path:
    """The checkout the command was started in: the nearest folder upwards with `benchmarks/results`, else this one."""
    here = Path.cwd()
    return next((p for p in (here, *here.parents) if (p / "benchmarks" / "results").is_dir()), here)


def commit(repo: Path) -> str:
    """VMAE2_COMMIT, or what git says, `-dirty` if files differ, or `unknown` (an exported tree)."""
    if os.environ.get("VMAE2_COMMIT"):
        return os.environ["VMAE2_COMMIT"]
    git = ["git", "-C", str(repo), "describe", "--always", "--abbrev=40", "--dirty", "--exclude=*"]
    try:
        return subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def machine(device: torch.device) -> Result:
    cpu = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):  # Linux names the processor
        named = re.search(r"model name\s*:\s*(.*)", Path("/proc/cpuinfo").read_text())
        cpu = named.group(1) if named else cpu
    out: Result = {"cpu": cpu, "cores": os.cpu_count(), "threads": torch.get_num_threads(), "platform": platform.platform()}
    if device.type == "cuda":
        p = torch.cuda.get_device_properties(device)
        out |= {"gpu": p.name, "gpu_memory": p.total_memory, "multiprocessors": p.multi_processor_count}
        out["capability"] = f"{p.major}.{p.minor}"
    return out


def versions() -> Result:
    from importlib import metadata

    out: Result = {"python": platform.python_version(), "torch": torch.__version__, "cuda": torch.version.cuda}
    for name in ("vmae2-fast", "triton", "numpy", "pytest"):
        try:
            out[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            out[name] = None
    return out


def slug(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def write(path: Path, record: Result) -> None:
    """Whole or not at all: a killed run must not leave half a result that the next one would take for done."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(record, indent=1, allow_nan=False) + "\n")
    os.replace(temporary, path)


def read(path: Path) -> Result:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return {}


def run_section(name: str, args: argparse.Namespace, seconds: float) -> bool:
    """The child's side: run one section here and write its record. Returns whether it went well."""
    device = torch.device("cpu" if args.dry_run or not torch.cuda.is_available() else "cuda")
    repo, path, begin = repo_root(), args.out / f"{name}.json", time.monotonic()
    record: Result = {
        "section": name, "status": "running", "error": None, "dry_run": args.dry_run,
        "started": datetime.now(timezone.utc).isoformat(timespec="seconds"), "time_box_s": seconds,
        "machine": machine(device), "versions": versions(), "commit": commit(repo), "command": args.command_line, "result": {},
    }

    def report(result: Result, **changes: Any) -> None:
        record.update(changes, result=finite(result) or record["result"], seconds=round(time.monotonic() - begin, 2))
        write(path, record)

    # A tenth of the box is kept for winding up: a section that watches its deadline ends by itself.
    context = Context(device, args.dry_run, begin + 0.9 * seconds, args.out, repo, args.tests or repo / "tests", report)
    report({})
    try:
        report(SECTIONS[name][0](context), status="ok")
    except Exception as error:  # any failure is a result: it is recorded and the other sections go on
        traceback.print_exc()
        report({}, status="failed", error=f"{type(error).__name__}: {error}", traceback=traceback.format_exc(limit=-6))
    return record["status"] == "ok"


def finite(value: Any) -> Any:
    """JSON has no NaN: a figure that is not finite becomes null."""
    if isinstance(value, dict):
        return {k: finite(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def supervise(name: str, args: argparse.Namespace, seconds: float) -> None:
    """The parent's side: run a section in a process of its own, and end it when its time is over."""
    path = args.out / f"{name}.json"
    path.unlink(missing_ok=True)
    command = [sys.executable, "-m", f"{__package__}.gpu", "--section", name, "--budget-s", str(seconds)]
    command += ["--out", str(args.out), "--command-line", args.command_line]
    command += ["--dry-run"] if args.dry_run else []
    command += ["--tests", str(args.tests)] if args.tests else []
    child = subprocess.Popen(command, start_new_session=True)
    try:
        rc: int | None = child.wait(timeout=seconds)
    except subprocess.TimeoutExpired:
        rc = None
    finally:
        if child.poll() is None:
            os.killpg(child.pid, signal.SIGKILL)  # its own group: pytest and compile workers go with it
            child.wait()
    record = read(path)
    if record.get("status") not in ("ok", "failed"):
        why = f"stopped at its time limit of {seconds:.0f} s" if rc is None else f"the process ended with code {rc}"
        write(path, {"section": name, "dry_run": args.dry_run, **record, "status": "failed", "error": why})


def parse(argv: list[str] | None) -> argparse.Namespace:
    prog = f"python -m {__package__}.gpu"
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog=prog, description=__doc__, formatter_class=raw)
    parser.add_argument("--only", nargs="+", choices=list(SECTIONS), metavar="SECTION", help=f"of: {', '.join(SECTIONS)}")
    parser.add_argument("--force", action="store_true", help="measure again what is there")
    parser.add_argument("--budget-s", type=float, default=math.inf, help="start nothing that would end later than this")
    parser.add_argument("--out", type=Path, help="folder of the results (default: benchmarks/results/MACHINE)")
    parser.add_argument("--machine", help="name of the results folder (default: from the GPU)")
    parser.add_argument("--tests", type=Path, help="test tree (default: tests of this checkout)")
    parser.add_argument("--dry-run", action="store_true", help="toy sizes on the CPU, never into benchmarks/results")
    parser.add_argument("--section", choices=list(SECTIONS), help=argparse.SUPPRESS)
    parser.add_argument("--command-line", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    results = repo_root() / "benchmarks" / "results"
    if args.out is None and args.dry_run:
        args.out = Path(tempfile.mkdtemp(prefix="vmae2-gpu-check-"))
    elif args.out is None:
        name = torch.cuda.get_device_name() if torch.cuda.is_available() else machine(torch.device("cpu"))["cpu"]
        args.out = results / (args.machine or slug(name))
    args.out = args.out.resolve()
    if args.dry_run and results.resolve() in (args.out, *args.out.parents):
        parser.error(f"--dry-run measures toys: its results do not belong in {results}")
    if not args.dry_run and not torch.cuda.is_available():
        parser.error("no CUDA device; --dry-run rehearses every section on the CPU")
    args.tests = args.tests.resolve() if args.tests else None
    args.command_line = args.command_line or " ".join([prog, *(sys.argv[1:] if argv is None else argv)])
    return args


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    if args.section:
        return 0 if run_section(args.section, args, args.budget_s) else 1
    end = time.monotonic() + args.budget_s
    states = {}
    for name in args.only or SECTIONS:
        record = read(args.out / f"{name}.json")
        if record.get("status") == "ok" and record.get("dry_run") == args.dry_run and not args.force:
            states[name] = "there already"
            continue
        box = min(SECTIONS[name][1], end - time.monotonic())
        if box < min(SMALLEST_BOX, SECTIONS[name][1]):
            states[name] = "not run: budget"
            continue
        print(f"== {name} (at most {box:.0f} s)", flush=True)
        supervise(name, args, box)
        record = read(args.out / f"{name}.json")
        states[name] = "done" if record["status"] == "ok" else f"FAILED: {record['error']}"
    for name, state in states.items():
        print(f"{name:<14}{state}")
    print(f"results: {args.out}")
    if any(s.startswith("FAILED") for s in states.values()):
        return 1
    return 3 if any(s.startswith("not run") for s in states.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
