"""The one GPU entry point: `make gpu-check`, or `python -m vmae2_fast.benchmarks.gpu`.

Runs in the interpreter it is started with, uses no network, and needs torch, triton, numpy, safetensors, tqdm and pytest only.
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
import math
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from .machine import commit, machine, read, repo_root, versions, write
from .sections import SECTIONS, Context, Result

SMALLEST_BOX = 20.0  # seconds of budget under which no section is started


def slug(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


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
        print(f"{name:<20}{state}")
    print(f"results: {args.out}")
    if any(s.startswith("FAILED") for s in states.values()):
        return 1
    return 3 if any(s.startswith("not run") for s in states.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
