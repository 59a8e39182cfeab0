"""`make gpu-check` rehearsed on the CPU: every section really runs, results are kept, failures are results too."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from vmae2_fast.benchmarks import cases, gpu, sections, steps
from vmae2_fast.benchmarks.machine import read
from vmae2_fast.benchmarks.sections import SECTIONS, Context
from vmae2_fast.data.dali import why_not_dali

ROOT = Path(__file__).parents[2]
GREEN = "import pytest\n\n@pytest.mark.cuda\ndef test_one():\n    pass\n\ndef test_not_for_cuda():\n    raise AssertionError\n"
RED = GREEN + "\n@pytest.mark.cuda\ndef test_two():\n    raise AssertionError('planted')\n"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two small test trees (`green`, `red`) and room for results."""
    path = tmp_path_factory.mktemp("gpu-check")
    for name, text in (("green", GREEN), ("red", RED)):
        (path / name).mkdir()
        (path / name / "test_planted.py").write_text(text)
        (path / name / "pytest.ini").write_text("[pytest]\nmarkers = cuda\n")
    return path


def check(folder: Path, *arguments: str, tests: str = "green", out: str = "out") -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "vmae2_fast.benchmarks.gpu", "--dry-run", "--out", str(folder / out)]
    command += ["--tests", str(folder / tests), *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def rehearsal(folder: Path) -> dict[str, dict[str, Any]]:
    """The records of one whole dry run."""
    done = check(folder)
    assert done.returncode == 0, done.stdout + done.stderr
    return {path.stem: json.loads(path.read_text()) for path in (folder / "out").iterdir()}


def test_every_section_writes_its_record(rehearsal: dict[str, dict[str, Any]]) -> None:
    assert set(rehearsal) == {*SECTIONS, "attention_table"}  # the table as it would be committed
    for record in (rehearsal[name] for name in SECTIONS):
        assert record["status"] == "ok"
        assert record["dry_run"] is True
        assert record["versions"]["torch"] == torch.__version__
        assert record["machine"]["cores"] >= 1
        assert record["command"].startswith("python -m vmae2_fast.benchmarks.gpu --dry-run")
        assert record["commit"]
    assert "gather_patches" in rehearsal["environment"]["result"]["ops"]
    assert rehearsal["ceilings"]["result"]["copy"]["gb_per_s"] > 0
    counts = rehearsal["pytest"]["result"]
    assert (counts["tests"], counts["passed"], counts["failures"]) == (1, 1, 0)


@pytest.mark.parametrize("section", sections.OP_SECTIONS)
def test_op_sections_say_which_backend_won(rehearsal: dict[str, dict[str, Any]], section: str) -> None:
    result = rehearsal[section]["result"]
    assert [row["direction"] for row in result["contests"]] == list(cases.CASES[section].directions)
    for row in result["contests"]:
        middle = {name: variant["median_s"] for name, variant in row["variants"].items()}
        assert {*row["backends"], "plain"} < set(middle)
        assert row["winner"] == min(row["backends"], key=middle.__getitem__)
        assert row["strong"] in middle
        assert result["winners"][f"toy 2 {row['direction']}"] == row["winner"]
        assert row["variants"][row["default"]]["share_of_copy"] > 0


def test_capture_is_rehearsed_with_fresh_masks(rehearsal: dict[str, dict[str, Any]]) -> None:
    result = rehearsal["capture"]["result"]
    assert (result["syncs"], result["masks_equal"], result["captured"]) == (None, True, False)
    assert len(set(result["loss_replayed"])) == 3  # another position, another mask
    assert result["loss_replayed"] == pytest.approx(result["loss_eager"])


def test_share_of_the_data_path(rehearsal: dict[str, dict[str, Any]]) -> None:
    result = rehearsal["data_share"]["result"]
    parts = result["masks_s"] + result["embed_s"] + result["loss_s"]
    assert result["share_masks_embed_loss"] == pytest.approx(parts / result["step_s"])


@pytest.mark.parametrize("section", ["steps_base", "steps_giant"])
def test_steps_measure_all_variants_on_the_same_loss(rehearsal: dict[str, dict[str, Any]], section: str) -> None:
    result = rehearsal[section]["result"]
    rows = result["variants"]
    assert set(rows) == {"ours", "strong", "strong_compiled", "plain_bf16", "plain_bf16_checkpoint", "plain_fp32"}
    for row in rows.values():
        assert row["status"] == "ok"
        assert row["loss"] == pytest.approx(rows["ours"]["loss"], rel=steps.AGREEMENT)
        assert row["clips_per_s"] == pytest.approx(result["batch"] / row["median_s"])
    assert rows["ours"]["times_ours"] == 1
    assert result["tokens"]["loss"] > 0


def test_done_sections_are_not_run_again(rehearsal: dict[str, dict[str, Any]], folder: Path) -> None:
    before = {path: path.read_bytes() for path in (folder / "out").iterdir()}
    again = check(folder)
    assert again.returncode == 0
    assert again.stdout.count("there already") == len(SECTIONS)
    assert before == {path: path.read_bytes() for path in (folder / "out").iterdir()}


def test_only_and_force_run_one_section_again(rehearsal: dict[str, dict[str, Any]], folder: Path) -> None:
    before = {path.stem: path.read_bytes() for path in (folder / "out").iterdir()}
    assert check(folder, "--only", "ceilings", "--force").returncode == 0
    after = {path.stem: path.read_bytes() for path in (folder / "out").iterdir()}
    assert {name for name in before if before[name] != after[name]} == {"ceilings"}


def test_a_red_test_fails_its_section_and_no_other(folder: Path) -> None:
    done = check(folder, "--only", "pytest", "ceilings", tests="red", out="red-out")
    assert done.returncode == 1
    record = json.loads((folder / "red-out" / "pytest.json").read_text())
    assert record["status"] == "failed"
    assert "1 failed" in record["error"]
    assert record["result"]["passed"] == 1
    assert [name.rpartition("::")[2] for name in record["result"]["failed"]] == ["test_two"]
    assert json.loads((folder / "red-out" / "ceilings.json").read_text())["status"] == "ok"
    # A failed section is tried again; here it has become green.
    assert check(folder, "--only", "pytest", out="red-out").returncode == 0


def test_a_section_is_stopped_at_its_limit(folder: Path) -> None:
    args = argparse.Namespace(out=folder / "late", dry_run=True, tests=None, command_line="none")
    gpu.supervise("environment", args, 0.01)
    record = read(folder / "late" / "environment.json")
    assert (record["status"], record["error"]) == ("failed", "stopped at its time limit of 0 s")


def test_without_budget_nothing_starts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu.main(["--dry-run", "--out", str(tmp_path / "out"), "--budget-s", "0"]) == 3
    assert capsys.readouterr().out.count("not run: budget") == len(SECTIONS)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("arguments", "message"), [
    (["--dry-run", "--only", "everything"], "invalid choice: 'everything'"),
    (["--dry-run", "--out", str(ROOT / "benchmarks" / "results" / "toy")], "do not belong"),
])
def test_wrong_usage_is_one_error(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str],
                                  monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    with pytest.raises(SystemExit) as stopped:
        gpu.main(arguments)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def test_without_a_gpu_only_the_rehearsal_runs(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        gpu.main([])
    assert "--dry-run rehearses" in capsys.readouterr().err


def test_memory_and_errors_of_one_variant_are_recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    everything = steps.variants

    def planted(bench: steps.StepBench, owner: Any) -> list[steps.Variant]:
        def full(*_: Any) -> Any:
            raise torch.OutOfMemoryError("planted")

        def another(clip: torch.Tensor, mask: Any) -> Any:
            honest = ours.make(clip, mask)
            return lambda: 1.5 * honest()

        ours = everything(bench, owner)[0]
        return [ours, steps.Variant("large", None, "foreach", full), steps.Variant("other", None, "fused", another)]

    monkeypatch.setattr(steps, "variants", planted)
    reports: list[dict[str, Any]] = []
    context = Context(torch.device("cpu"), True, time.monotonic() + 600, tmp_path, ROOT, tmp_path, reports.append)
    with pytest.raises(RuntimeError, match=r"other: failed: loss 1\.\d+ is not ours"):
        sections.steps_of("vit_b", context)
    rows = reports[-1]["variants"]
    assert rows["large"]["status"] == "out of memory"
    assert rows["ours"]["status"] == "ok"
    assert "median_s" not in rows["other"]


def test_decoders_are_compared_where_dali_is_installed(rehearsal: dict[str, dict[str, Any]]) -> None:
    result = rehearsal["decoders"]["result"]
    names = {"pyav", "dali_1", "dali_2"} if why_not_dali() is None else {"pyav"}
    assert set(result["gop12"]) == names
    for rate in result["gop12"].values():
        assert rate["clips_per_s"] > 0
        assert rate["fallback"] == {}
    assert why_not_dali() in (None, result["dali"])
