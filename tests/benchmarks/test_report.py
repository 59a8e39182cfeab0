"""From a measurement to the table people read."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from vmae2_fast.benchmarks import report

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A short run of the microbenchmarks themselves."""
    path = tmp_path_factory.mktemp("bench") / "ops.json"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "benchmarks/test_ops.py", "-k",
               "base and (dual_mask or encoder_attention)", f"--benchmark-json={path}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return path


def test_microbenchmarks_carry_what_a_ratio_needs(measured: Path) -> None:
    runs = json.loads(measured.read_text())["benchmarks"]
    assert {(r["extra_info"]["op"], r["extra_info"]["variant"]) for r in runs} == {
        (op, variant) for op in ("dual_mask", "encoder_attention") for variant in ("ours", "plain", "strong")}
    for run in runs:
        info = run["extra_info"]
        assert info["bytes"] > 0
        assert info["times_ours"] > 0
        assert info["variant"] != "ours" or info["times_ours"] == 1
        assert info["threads"] == 1


def test_report_of_microbenchmarks(measured: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert report.main([str(measured)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].split() == ["op,", "size,", "variant", "median", "ms", "x", "ours", "GB/s", "GFLOP/s"]
    assert sum("1.00" in line and "ours" in line for line in lines) == 2


def test_report_of_gpu_sections(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    record = {
        "section": "steps_base", "status": "ok", "dry_run": True, "commit": "abc",
        "machine": {"gpu": "A Card"}, "versions": {"torch": "2.11"},
        "result": {"model": "m", "batch": 64, "variants": {
            "ours": {"status": "ok", "median_s": 0.02, "times_ours": 1.0, "clips_per_s": 3200.0, "share_of_gemm_ceiling": 0.61,
                     "peak_bytes": 2**30},
            "plain_fp32": {"status": "out of memory"}}},
    }
    (tmp_path / "steps_base.json").write_text(json.dumps(record))
    assert report.main([str(tmp_path)]) == 0
    text = capsys.readouterr().out
    assert "m, batch 64, A Card, torch 2.11, commit abc, DRY RUN" in text
    ours, plain = text.splitlines()[-3:-1]
    assert ours.split() == ["ours", "20.0", "1.00", "3,200.0", "61.0", "1.00"]
    assert plain.split() == ["plain_fp32", "out", "of", "memory", "-", "-", "-", "-"]


def test_other_files_are_one_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "other.json").write_text("{}")
    assert report.main([str(tmp_path / "other.json")]) == 2
    assert "other.json: not a benchmark result" in capsys.readouterr().err
    assert report.main([]) == 2
