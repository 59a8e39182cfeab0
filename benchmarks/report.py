"""Results as ratios: `python -m vmae2_fast.benchmarks.report FILE_OR_FOLDER...`.

Reads the JSON of `make bench` (pytest-benchmark), of `vmae2 bench --json` and of `make gpu-check` (one file a section) and
prints one table each. The column to read is `x ours`: how many times longer the alternative takes than ours (the backend that
runs by default), measured in turns with it. GB/s and GFLOP/s count the bytes an op must move and the operations it must do at
least, not what the alternative does, so they compare with the machine's own rates. `% of floor` does that: the floor is those
bytes at the measured copy rate or those operations at the measured matrix product rate, whichever takes longer.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any


def table(title: str, head: list[str], rows: list[list[str]]) -> str:
    """Plain text: words to the left, numbers to the right."""
    widths = [max(len(row[i]) for row in (head, *rows)) for i in range(len(head))]
    words = [i == 0 or name in ("variant", "strongest form", "") for i, name in enumerate(head)]
    lines = ["  ".join(cell.ljust(w) if word else cell.rjust(w) for cell, w, word in zip(row, widths, words, strict=True))
             for row in (head, *rows)]
    lines = [line.rstrip() for line in lines]
    return "\n".join([title, lines[0], "-" * len(lines[0]), *lines[1:]])


def number(value: float | None, digits: int = 2) -> str:
    return "-" if value is None else f"{value:,.{digits}f}"


def rate(value: float) -> str:
    return number(value, 1) if value else "-"


def percent(share: float | None) -> str:
    return number(share and 100 * share, 1)


def microbenchmarks(data: dict[str, Any]) -> str:
    """The table of one pytest-benchmark file: for each op, size and direction the variants, slowest last."""
    rows = []
    runs = sorted(data["benchmarks"], key=lambda run: (run["group"], run["extra_info"]["times_ours"]))
    group = None
    for run in runs:
        info, seconds = run["extra_info"], run["stats"]["median"]
        floor = max(info["bytes"] / info["copy_gb_per_s"], info["flops"] / info["gemm_gflops"]) / 1e9
        form = "" if info["form"] == info["variant"] else f": {info['form']}"
        rows.append([run["group"] if run["group"] != group else "", info["variant"] + form, number(seconds * 1e3, 3),
                     number(info["times_ours"]), number(info["bytes"] / seconds / 1e9), rate(info["flops"] / seconds / 1e9),
                     percent(floor / seconds)])
        group = run["group"]
    machine, commit = data["machine_info"], data.get("commit_info") or {}
    cpu = machine.get("cpu", {}).get("brand_raw") or machine.get("processor") or machine.get("machine")
    first: dict[str, Any] = runs[0]["extra_info"] if runs else {}
    title = f"{cpu}, {first.get('threads')} thread(s), commit {str(commit.get('id'))[:12]}, {data['datetime'][:19]}"
    title += f"\nmeasured copy {number(first.get('copy_gb_per_s'), 1)} GB/s read + written, "
    title += f"float32 product {number(first.get('gemm_gflops'), 1)} GFLOP/s"
    head = ["op, size, direction", "variant", "median ms", "x ours", "GB/s", "GFLOP/s", "% of floor"]
    return table(title, head, rows)


def contests(record: dict[str, Any], results: Iterable[dict[str, Any]]) -> str:
    """The table of measured cases: all variants, the fastest first, and which of our backends won against the default."""
    rows = []
    for result in results:
        name = f"{result['case']} {result['size']} {result['direction']}"
        ours = result["variants"][result["default"]]["median_s"]
        for which, row in sorted(result["variants"].items(), key=lambda item: item[1]["median_s"]):
            kind = which if which in result["backends"] or which == "plain" else f"strong: {which}"
            note = "default" * (which == result["default"])
            if which == result["winner"] != result["default"]:
                note = "faster than the default"
            rows.append([name, kind, number(row["median_s"] * 1e3, 3), number(row["median_s"] / ours), number(row["gb_per_s"]),
                         rate(row["gflops"]), percent(row["share_of_copy"]), note])
            name = ""
    head = ["op, size, direction", "variant", "median ms", "x ours", "GB/s", "GFLOP/s", "% of copy", ""]
    return table(heading(record), head, rows)


def steps(record: dict[str, Any]) -> str:
    """The table of one whole-step section."""
    result, rows = record["result"], []
    for name, row in result.get("variants", {}).items():
        peak = (result.get("memory", {}).get(name) or row).get("peak_bytes")
        share = row.get("share_of_gemm_ceiling")
        rows.append([
            name, number(row["median_s"] * 1e3, 1) if "median_s" in row else row["status"], number(row.get("times_ours")),
            number(row.get("clips_per_s"), 1), percent(share), number(peak and peak / 2**30, 2),
        ])
    title = f"{result.get('model')}, batch {result.get('batch')}, {result.get('dtype')}, {heading(record)}"
    return table(title, ["variant", "median ms", "x ours", "clips/s", "% of GEMM", "peak GiB"], rows)


def ceilings(record: dict[str, Any]) -> str:
    result = record["result"]
    rows = [["x".join(map(str, p["shape"])), number(p["tflops"], 1)] for p in result.get("gemm_bf16", [])]
    if "copy" in result:
        rows.append(["copy, GB/s read + written", number(result["copy"]["gb_per_s"], 0)])
    return table(f"ceilings, {heading(record)}", ["bf16 product M x K x N", "TFLOP/s"], rows)


def heading(record: dict[str, Any]) -> str:
    machine, versions = record.get("machine", {}), record.get("versions", {})
    what = machine.get("gpu") or f"{machine.get('cpu')}, {machine.get('threads')} thread(s)"
    toy = ", DRY RUN: toy sizes, the figures mean nothing" if record.get("dry_run") or record.get("toy") else ""
    return f"{what}, torch {versions.get('torch')}, commit {str(record.get('commit'))[:12]}{toy}"


def ratios(data: dict[str, Any]) -> str:
    """The last lines of `vmae2 bench`: what its JSON calls ratio_..., by key where there are several."""
    found = {name: value for name, value in data.items() if "ratio_vs" in name}
    if "ops" in data:
        rows = [[key, *(number(values[key]) for values in found.values()), number(data["gb_per_s"][key]),
                 percent(data["share_of_copy"][key]), data["strong"][key]] for key in data["ops"]]
        return table("ours", ["key", *found, "GB/s", "% of copy", "strongest form"], rows)
    return "\n".join(f"{name} {number(value)}" for name, value in found.items())


def memory(data: dict[str, Any]) -> str:
    """The table of `vmae2 bench memory`."""
    rows = [[row["model"], row["variant"], number(row["bytes"] / 2**20, 1), number(row["share"], 4)] for row in data["rows"]]
    title = f"saved for backward by one clip ({data['clip']}), torch {data['torch']}"
    return table(title, ["", "variant", "MiB", "of plain fp32"], rows)


def render(data: dict[str, Any]) -> str:
    """The text of one JSON file. Raises ValueError for a file of another kind."""
    if "benchmarks" in data:
        return microbenchmarks(data)
    if "ratio_vs_plain" in data:
        measured = contests(data, data["ops"].values()) if "ops" in data else steps({**data, "result": data})
        return f"{measured}\n\n{ratios(data)}"
    if data.get("kind") == "memory":
        return memory(data)
    if "section" not in data:
        raise ValueError("neither results of pytest-benchmark nor of vmae2 bench nor of gpu-check")
    result = data["result"]
    if data["status"] != "ok":
        text = f"{data['section']}: {data['status']}: {data.get('error')}"
        return text + ("\n" + steps(data) if result.get("variants") else "")
    if "variants" in result:
        return steps(data)
    if "contests" in result:
        return contests(data, result["contests"])
    if data["section"] == "ceilings":
        return ceilings(data)
    if data["section"] == "pytest":
        return f"pytest -m cuda: {result['passed']} passed, {result['skipped']} skipped, {heading(data)}"
    lines = [f"{name}: {value}" for name, value in result.items() if isinstance(value, (int, float, str, bool))]
    return "\n  ".join([f"{data['section']}: {heading(data)}", *lines])


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
