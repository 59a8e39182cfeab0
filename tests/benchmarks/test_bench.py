"""`vmae2 bench` in toy form: every case agrees with its alternatives, and the JSON holds what a ratio needs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from vmae2_fast import backend, cli
from vmae2_fast.benchmarks import cases, measure, ops, step

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")
CONTESTS = [(name, direction) for name, entry in cases.CASES.items() for direction in entry.directions]


@pytest.fixture(autouse=True)
def _as_in_a_process_of_its_own() -> Any:
    """One thread (toys are too small for more), interpreted Triton off, and no poisoned memory: compiled code may not ask for
    deterministic algorithms."""
    threads, interpreted = torch.get_num_threads(), os.environ.pop("TRITON_INTERPRET", None)
    torch.use_deterministic_algorithms(False)
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    if interpreted is not None:
        os.environ["TRITON_INTERPRET"] = interpreted


def contest(name: str, direction: str) -> ops.Contest:
    return ops.Contest(name, "toy", direction, CPU, clips=2, compiler="eager")


@pytest.mark.parametrize(("name", "direction"), CONTESTS)
def test_every_variant_of_a_case_computes_the_same(name: str, direction: str) -> None:
    it = contest(name, direction)
    assert it.backends[0] == backend.available(it.entry.op, CPU)[0]
    assert not {"triton", "emulated"} & set(it.backends)
    assert it.bytes > 0
    it.check()
    if direction == "forward_backward":
        assert it.bytes > contest(name, "forward").bytes


def test_a_fast_wrong_answer_is_found() -> None:
    it = contest("reconstruction_loss", "forward_backward")
    honest = it.case.plain
    it.case.plain = lambda batch: 1.01 * honest(batch)
    with pytest.raises(AssertionError, match="reconstruction_loss, toy, forward_backward: plain differs from the reference"):
        it.check()


def test_cold_inputs_come_in_turns() -> None:
    it = ops.Contest("gather_patches", "toy", "forward", CPU, clips=2, cold=300_000, compiler="eager")
    assert len(it.batches) == 1 + -(-300_000 // it.bytes)
    first, second = (it.call("native" if "native" in it.backends else "reference", number)() for number in (0, 1))
    assert first.shape == second.shape
    assert not torch.equal(first, second)
    assert len(ops.Contest("gather_patches", "toy", "forward", CPU, clips=2, cold=1 << 40).batches) == ops.MOST_BATCHES


def test_each_round_starts_with_another() -> None:
    assert list(measure.turns(["a", "b", "c"], 4)) == [["a", "b", "c"], ["b", "a", "c"], ["c", "a", "b"], ["a", "c", "b"]]


def last_line(capsys: pytest.CaptureFixture[str]) -> tuple[dict[str, Any], str]:
    *table, line = capsys.readouterr().out.splitlines()
    return json.loads(line), "\n".join(table)


def test_bench_ops(capsys: pytest.CaptureFixture[str]) -> None:
    cli.main(["bench", "ops", "--toy", "--rounds", "2", "--threads", "1", "--json"])
    result, table = last_line(capsys)
    keys = {"embed_vit_b", "embed_vit_g", "gather_vit_b", "scatter_vit_b", "masks"}
    keys |= {"reconstruction_vit_b", "reconstruction_vit_g", "adamw_vit_b"}
    keys |= {"residual_norm_vit_b", "residual_norm_vit_g"}
    for name in ("ratio_vs_plain", "ratio_vs_strong", "gb_per_s", "share_of_copy", "strong", "backend"):
        assert set(result[name]) == keys, name
    for key in keys:
        row = result["ops"][key]
        middle = {name: variant["median_s"] for name, variant in row["variants"].items()}
        assert result["ratio_vs_plain"][key] == pytest.approx(middle["plain"] / middle[row["default"]])
        fastest = min(middle[name] for name in middle if name not in ("plain", *row["backends"]))
        assert result["ratio_vs_strong"][key] == pytest.approx(fastest / middle[row["default"]])
        assert result["gb_per_s"][key] == pytest.approx(row["bytes"] / middle[row["default"]] / 1e9)
        assert result["share_of_copy"][key] == pytest.approx(result["gb_per_s"][key] / row["copy_gb_per_s"])
        assert key in table
    assert result["threads"] == 1
    assert result["versions"]["torch"] == torch.__version__
    assert isinstance(result["cpu_flags"], list)


def test_bench_ops_measures_what_is_asked_for() -> None:
    result = ops.bench_ops(["masks"], rounds=1, threads=1, toy=True)
    assert list(result["ratio_vs_plain"]) == ["masks"]
    assert result["ops"]["masks"]["shapes"]["samples"] == 1024


def test_bench_step(capsys: pytest.CaptureFixture[str]) -> None:
    cli.main(["bench", "step", "--toy", "--rounds", "2", "--threads", "1", "--dtype", "bfloat16", "--json"])
    result, table = last_line(capsys)
    middle = {name: row["median_s"] for name, row in result["variants"].items()}
    assert set(middle) == {"ours", "strong", "plain_bf16", "plain_fp32"}
    assert result["ratio_vs_plain"] == pytest.approx(middle["plain_fp32"] / middle["ours"])
    assert result["ratio_vs_plain_same_dtype"] == pytest.approx(middle["plain_bf16"] / middle["ours"])
    assert result["ratio_vs_strong"] == pytest.approx(middle["strong"] / middle["ours"])
    assert result["dtype"] == "bfloat16"
    if sys.platform == "linux":
        ours, plain = (result["memory"][name] for name in ("ours", "plain_fp32"))
        assert result["memory_ratio_vs_plain"] == pytest.approx(ours["peak_bytes"] / plain["peak_bytes"])
        assert ours["above_start_bytes"] - ours["gradients_and_adam_bytes"] == ours["peak_bytes"]
    assert "ratio_vs_plain_same_dtype" in table


def test_memory_of_a_variant_that_cannot_run_says_why() -> None:
    from vmae2_fast.benchmarks import steps

    bench = steps.StepBench(cases.MODELS["toy"], 2, CPU, torch.float32, 1, 1.0, compile_backend=None)
    assert step.peak("nobody", bench)["error"].startswith("not measured: ")


@pytest.mark.parametrize(("arguments", "message"), [
    (["bench"], "Expected one of {ops, step, memory}"),
    (["bench", "ops", "--only", "gater_vit_b"], "unknown key 'gater_vit_b'; did you mean gather_vit_b"),
    (["bench", "ops", "--rounds", "0"], "rounds must be at least 1, got 0"),
    (["bench", "ops", "--threads", "-1"], "threads must be at least 1, or 0 for all cores, got -1"),
    (["bench", "step", "--model", "vit_bse"], "unknown pre-training model 'vit_bse'; did you mean vit_base"),
    (["bench", "step", "--model", "vit_base_patch16_224"], "did you mean pretrain_videomae_base_patch16_224"),
    (["bench", "step", "--batch", "0"], "batch must be at least 1, got 0"),
    (["bench", "step", "--dtype", "float16"], "invalid choice 'float16'"),
    (["bench", "step", "--modl", "x"], "Unrecognized options: --modl, x; did you mean --model"),
])  # fmt: skip
def test_bad_input_is_one_line(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main(arguments)
    assert stop.value.code == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("vmae2: error: ")
    assert message in line


def test_names_of_models() -> None:
    assert step.pretrain_name("vit_base") == "pretrain_videomae_base_patch16_224"
    assert step.pretrain_name("pretrain_videomae_giant_patch14_224") == "pretrain_videomae_giant_patch14_224"


def test_gpu_check_starts_without_what_only_a_command_line_needs() -> None:
    """No command line, no decoder, no pytest-benchmark: a card's own interpreter may have none of them."""
    script = (
        "import sys\n"
        "class Block:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.split('.')[0] in ('tyro', 'av', 'pytest_benchmark', 'matplotlib'):\n"
        "            raise ModuleNotFoundError(name, name=name)\n"
        "sys.meta_path.insert(0, Block())\n"
        "import vmae2_fast.benchmarks.gpu\n"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
