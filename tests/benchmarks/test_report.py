"""From a measurement to the table people read."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from vmae2_fast.benchmarks import report

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A short run of the microbenchmarks themselves."""
    path = tmp_path_factory.mktemp("bench") / "ops.json"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "benchmarks/test_ops.py", "-k",
               "vit_b and (encoder_attention or (scatter_patches and backward and not strong))", f"--benchmark-json={path}"]
    # Without this process's own pytest-xdist, under which pytest-benchmark measures nothing.
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET" and not k.startswith("PYTEST_")}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    return path


def test_microbenchmarks_carry_what_a_ratio_needs(measured: Path) -> None:
    runs = json.loads(measured.read_text())["benchmarks"]
    attention = {r["extra_info"]["variant"] for r in runs if r["extra_info"]["case"] == "encoder_attention"}
    assert attention == {"sdpa", "reference", "plain", "strong"}
    for run in runs:
        info = run["extra_info"]
        assert info["bytes"] > 0
        assert info["copy_gb_per_s"] > 0
        assert info["gemm_gflops"] > 0
        assert info["times_ours"] > 0
        assert not info["ours"] or info["times_ours"] == 1
        assert info["threads"] == 1
        assert info["direction"] in ("forward", "forward_backward")
        assert info["variant"] != "strong" or info["form"] == "SDPA"


def test_report_of_microbenchmarks(measured: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert report.main([str(measured)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "GB/s read + written" in lines[1]
    assert lines[2].split()[-5:] == ["GB/s", "GFLOP/s", "%", "of", "floor"]
    assert sum(" 1.00 " in line and "sdpa" in line for line in lines) == 2


def test_share_of_the_floor_is_the_slower_of_bytes_and_operations() -> None:
    def run(group: str, data: int, flops: int) -> dict[str, Any]:
        info = {"variant": "native", "form": "native", "times_ours": 1.0, "bytes": data, "flops": flops, "threads": 1,
                "copy_gb_per_s": 10.0, "gemm_gflops": 50.0}  # fmt: skip
        return {"group": group, "extra_info": info, "stats": {"median": 0.01}}

    # 10 ms; at 10 GB/s and 50 GFLOP/s the bytes of the first take 4 ms, the operations of the second 8 ms and its bytes 1.
    data = {"benchmarks": [run("a", 40_000_000, 0), run("b", 10_000_000, 400_000_000)], "machine_info": {}, "datetime": "now"}
    first, second = report.render(data).splitlines()[-2:]
    assert first.split() == ["a", "native", "10.000", "1.00", "4.00", "-", "40.0"]
    assert second.split() == ["b", "native", "10.000", "1.00", "1.00", "40.0", "80.0"]


def test_report_names_a_backend_that_beats_the_default() -> None:
    def row(seconds: float) -> dict[str, float]:
        return {"median_s": seconds, "gb_per_s": 1 / seconds, "gflops": 0.0, "share_of_copy": 0.1 / seconds}

    middle = {"native": 2.0, "triton": 1.0, "plain": 9.0, "reference": 5.0, "compiled": 4.0}
    contest = {
        "case": "gather_patches", "size": "vit_g", "direction": "forward", "backends": ["native", "triton", "reference"],
        "default": "native", "winner": "triton", "variants": {name: row(seconds) for name, seconds in middle.items()},
    }  # fmt: skip
    record = {"section": "gather_patches", "status": "ok", "result": {"contests": [contest]}}
    lines = report.render(record).splitlines()[3:]
    assert lines[0].split() == ["gather_patches", "vit_g", "forward", "triton", "1,000.000", "0.50", "1.00", "-", "10.0",
                                "faster", "than", "the", "default"]  # fmt: skip
    assert lines[1].split()[-1] == "default"
    assert [line.split()[0] for line in lines[2:]] == ["strong:", "reference", "plain"]


def test_report_of_gpu_sections(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    record = {
        "section": "steps_base", "status": "ok", "dry_run": True, "commit": "abc",
        "machine": {"gpu": "A Card"}, "versions": {"torch": "2.11"},
        "result": {"model": "m", "batch": 64, "dtype": "bfloat16", "variants": {
            "ours": {"status": "ok", "median_s": 0.02, "times_ours": 1.0, "clips_per_s": 3200.0, "share_of_gemm_ceiling": 0.61,
                     "peak_bytes": 2**30},
            "plain_fp32": {"status": "out of memory"}}},
    }
    (tmp_path / "steps_base.json").write_text(json.dumps(record))
    assert report.main([str(tmp_path)]) == 0
    text = capsys.readouterr().out
    assert "m, batch 64, bfloat16, A Card, torch 2.11, commit abc, DRY RUN" in text
    ours, plain = text.splitlines()[-3:-1]
    assert ours.split() == ["ours", "20.0", "1.00", "3,200.0", "61.0", "1.00"]
    assert plain.split() == ["plain_fp32", "out", "of", "memory", "-", "-", "-", "-"]


def test_other_files_are_one_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "other.json").write_text("{}")
    assert report.main([str(tmp_path / "other.json")]) == 2
    assert "other.json: not a benchmark result" in capsys.readouterr().err
    assert report.main([]) == 2
