"""Results as ratios: `python -m vmae2_fast.benchmarks.report FILE_OR_FOLDER...`.

Reads the JSON of `make bench` (pytest-benchmark) and of `make gpu-check` (one file a section) and prints one table each. The
column to read is `x ours`: how many times longer the alternative takes than ours, measured in turns with it. GB/s counts the
bytes an op must move at least, not what the alternative does move, so it compares with the machine's copy rate.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any


def table(title: str, head: list[str], rows: list[list[str]]) -> str:
    widths = [max(len(row[i]) for row in (head, *rows)) for i in range(len(head))]
    lines = ["  ".join(cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True)))
             for row in (head, *rows)]
    return "\n".join([title, lines[0], "-" * len(lines[0]), *lines[1:]])


def number(value: float | None, digits: int = 2) -> str:
    return "-" if value is None else f"{value:,.{digits}f}"


def microbenchmarks(data: dict[str, Any]) -> str:
    """The table of one pytest-benchmark file: for each op and size the variants, slowest last."""
    rows = []
    runs = sorted(data["benchmarks"], key=lambda run: (run["group"], run["extra_info"]["times_ours"]))
    group = None
    for run in runs:
        info, seconds = run["extra_info"], run["stats"]["median"]
        rate = number(info["flops"] / seconds / 1e9, 1) if info["flops"] else "-"
        name = run["group"] if run["group"] != group else ""
        rows.append([f"{name:<28}{info['variant']}", number(seconds * 1e3, 3), number(info["times_ours"]),
                     number(info["bytes"] / seconds / 1e9), rate])
        group = run["group"]
    machine, commit = data["machine_info"], data.get("commit_info") or {}
    cpu = machine.get("cpu", {}).get("brand_raw") or machine.get("processor") or machine.get("machine")
    threads = runs[0]["extra_info"]["threads"] if runs else "?"
    title = f"{cpu}, {threads} thread(s), commit {str(commit.get('id'))[:12]}, {data['datetime'][:19]}"
    return table(title, ["op, size, variant", "median ms", "x ours", "GB/s", "GFLOP/s"], rows)


def steps(record: dict[str, Any]) -> str:
    """The table of one whole-step section."""
    result, rows = record["result"], []
    for name, row in result.get("variants", {}).items():
        peak = row.get("peak_bytes")
        share = row.get("share_of_gemm_ceiling")
        rows.append([
            name, number(row["median_s"] * 1e3, 1) if "median_s" in row else row["status"], number(row.get("times_ours")),
            number(row.get("clips_per_s"), 1), number(share and 100 * share, 1), number(peak and peak / 2**30, 2),
        ])
    title = f"{result.get('model')}, batch {result.get('batch')}, {heading(record)}"
    return table(title, ["variant", "median ms", "x ours", "clips/s", "% of GEMM", "peak GiB"], rows)


def ceilings(record: dict[str, Any]) -> str:
    result = record["result"]
    rows = [["x".join(map(str, p["shape"])), number(p["tflops"], 1)] for p in result.get("gemm_bf16", [])]
    if "copy" in result:
        rows.append(["copy, GB/s read + written", number(result["copy"]["gb_per_s"], 0)])
    return table(f"ceilings, {heading(record)}", ["bf16 product M x K x N", "TFLOP/s"], rows)


def heading(record: dict[str, Any]) -> str:
    machine, versions = record.get("machine", {}), record.get("versions", {})
    what = machine.get("gpu") or machine.get("cpu")
    toy = ", DRY RUN: toy sizes, the figures mean nothing" if record.get("dry_run") else ""
    return f"{what}, torch {versions.get('torch')}, commit {str(record.get('commit'))[:12]}{toy}"


def render(data: dict[str, Any]) -> str:
    """The text of one JSON file. Raises ValueError for a file of another kind."""
    if "benchmarks" in data:
        return microbenchmarks(data)
    if "section" not in data:
        raise ValueError("neither results of pytest-benchmark nor of gpu-check")
    if data["status"] != "ok":
        text = f"{data['section']}: {data['status']}: {data.get('error')}"
        return text + ("\n" + steps(data) if data.get("result", {}).get("variants") else "")
    if "variants" in data["result"]:
        return steps(data)
    if data["section"] == "ceilings":
        return ceilings(data)
    if data["section"] == "pytest":
        counts = data["result"]
        return f"pytest -m cuda: {counts['passed']} passed, {counts['skipped']} skipped, {heading(data)}"
    return f"{data['section']}: {heading(data)}"


def main(arguments: Iterable[str]) -> int:
    files: list[Path] = []
    for name in arguments:
        path = Path(name)
        files += sorted(path.rglob("*.json")) if path.is_dir() else [path]
    if not files:
        print(f"{__doc__}\nno results given", file=sys.stderr)
        return 2
    for file in files:
        try:
            print(render(json.loads(file.read_text())), end="\n\n")
        except (OSError, ValueError, KeyError) as error:
            print(f"{file}: not a benchmark result: {error}", file=sys.stderr)
            return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
