"""The commands as a user types them: in a process of their own, bad input included."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.tiny_runs import CLASSIFY_MODEL, PRETRAIN_MODEL, classify_config, write_clips
from vmae2_fast import cli
from vmae2_fast.models import build_model, save_weights
from vmae2_fast.train import train


def run(*arguments: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    return subprocess.run(
        [sys.executable, "-m", "vmae2_fast", *arguments],
        cwd=cwd,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": path},
    )


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_clips(tmp_path_factory.mktemp("clips"), per_class=2)


def test_usage_lists_every_command() -> None:
    out = run().stdout
    for name in ("launch", "recipes", "env", "reconstruct", "classify", "ledger", "convert", "report", "bench"):
        assert f"\n  {name} " in out


@pytest.mark.parametrize("command", ["launch", *cli.COMMANDS])
def test_every_command_has_help_with_an_example(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main([command, "--help"])
    assert stop.value.code == 0
    assert f"Example: vmae2 {command}" in capsys.readouterr().out.replace("VMAE2_BACKEND=reference ", "")


def test_env_names_what_runs_and_why_not_another() -> None:
    done = run("env", "--json")
    report = json.loads(done.stdout.splitlines()[-1])
    assert report["ops"]["gather_patches"]["cpu"]["runs"] in ("native", "reference")
    assert "runs" in done.stdout


def test_env_reports_a_request_that_leaves_nothing() -> None:
    path = str(Path(__file__).parents[1])
    environment = {**os.environ, "PYTHONPATH": path, "VMAE2_NATIVE": "off", "VMAE2_BACKEND": "native"}
    done = subprocess.run([sys.executable, "-m", "vmae2_fast", "env"], capture_output=True, text=True, env=environment)
    assert "none of the requested backends (native)" in done.stdout
    assert "Available: reference" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["lauch"], "unknown command 'lauch'; did you mean launch"),
        (["launch", "demo:progresive"], "unknown recipe 'demo:progresive'; did you mean demo:progressive"),
        (["launch", "nowhere.py:run"], "nowhere.py: no such recipe file"),
        (["ledger", "pretrain_videomae_gigant_patch14_224"], "did you mean pretrain_videomae_giant_patch14_224"),
        (["classify", "x.mp4", "--weights", "nowhere.safetensors"], "nowhere.safetensors"),
        (["convert", "nowhere.pth", "a.safetensors"], "nowhere.pth"),
        (["launch", "demo:progressive", "--clips", "nowhere"], "nowhere: no such folder of videos"),
        (
            ["launch", "pretrain:vit_base_hybrid", "--optm.lr", "1"],
            "Unrecognized options: --optm.lr, 1; did you mean --optim.lr?",
        ),
        (["launch", "pretrain:vit_base_hybrid", "--optim.lr", "x"], "--optim.lr: could not convert string to float: 'x'"),
        (
            ["launch", "pretrain:vit_base_hybrid", "--model.size", "225", "--dry-run"],
            "model.size=225 is not divisible by model.patch=16",
        ),
        (["launch", "pretrain:vit_base_hybrid", "--model.size", "240", "--dry-run"], "needs an even grid, got H'xW' = 15x15"),
        (
            ["launch", "pretrain:vit_base_hybrid", "--mask.decoder-ratio", "0.3", "--dry-run"],
            "must be a multiple of 1/4, got 0.3",
        ),
        (["launch", "demo:progressive", "--pretrain.train.global-batch", "15"], "not divisible by data.views=2; the nearest"),
        (["classify", "--weights", "w"], "at least one video"),
        (["report", "nowhere"], "nowhere: no run directory, there is no config.json"),
        (["report", "a", "b", "c"], "name one or two run directories, not 3"),
        (["ledger"], "Missing from vmae2 ledger"),
        (["launch", "demo:progressive", "--from", "finetun", "--dry-run"], "unknown stage 'finetun'"),
        (["launch", "vit_base_hybrid", "--until", "pretrain", "--dry-run"], "_hybrid is a single one; leave them out"),
        (["ledger", "pretrain:vit_base_hybrid", "--mfu", "2"], "vmae2: error: --mfu 2.0: must lie above 0"),
        (["launch", "demo:progressive", "--from", "distill", "--until", "pretrain", "--dry-run"], "comes after --until"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main([*arguments, "--json"])
    assert stop.value.code == 2
    said = capsys.readouterr()
    (line,) = said.err.strip().splitlines()
    assert line.startswith("vmae2: error: ")
    assert message in line
    assert json.loads(said.out.splitlines()[-1]) == {"error": line.removeprefix("vmae2: error: ")}


def test_overrides_reach_the_plan(capsys: pytest.CaptureFixture[str]) -> None:
    cli.main(["launch", "vit_base_hybrid", "--optim.lr", "0.0125", "--dry-run", "--json"])
    assert "lr 0.0125" in json.loads(capsys.readouterr().out.splitlines()[-1])["plan"][0]


def test_a_recipe_of_ones_own_is_found(tmp_path: Path, clips: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "mine.py").write_text(
        "from vmae2_fast.config import *\n"
        "def tiny() -> PretrainConfig:\n"
        "    '''Mine.'''\n"
        f"    return PretrainConfig(name='mine', out={str(tmp_path)!r}, model={PRETRAIN_MODEL!r},\n"
        f"        data=DataConfig(sources=(SourceConfig(name='x', root={str(clips)!r}),), stride=2),\n"
        "        mask=MaskConfig(encoder_ratio=0.75), train=TrainConfig(global_batch=2))\n"
    )
    cli.main(["launch", f"{tmp_path / 'mine.py'}:tiny", "--train.epochs", "2", "--json"])
    summary = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert summary["steps"] == 4
    assert (tmp_path / "mine" / "weights.safetensors").exists()


def test_a_recipe_file_without_annotations_is_told_what_is_missing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "mine.py").write_text("def tiny():\n    return 1\n")
    with pytest.raises(SystemExit):
        cli.main(["launch", f"{tmp_path / 'mine.py'}:tiny"])
    assert "return annotation" in capsys.readouterr().err


def test_ledger_prints_published_macs(capsys: pytest.CaptureFixture[str]) -> None:
    cli.main(["ledger", "pretrain_videomae_giant_patch14_224", "--json"])
    account = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert account["macs"]["published"]["total"] == pytest.approx(241.61e9, rel=3e-3)  # paper, dual masking table


def test_reconstruct_writes_pictures(tmp_path: Path, clips: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_weights(build_model(PRETRAIN_MODEL), tmp_path / "w.safetensors")
    weights = ["--weights", str(tmp_path / "w.safetensors"), "--encoder-ratio", "0.75"]
    cli.main(["reconstruct", str(clips / "left" / "0.mp4"), *weights, "--out", str(tmp_path / "video")])
    cli.main(["reconstruct", *weights, "--out", str(tmp_path / "scene")])
    for name in ("video", "scene"):
        assert (tmp_path / f"{name}.png").read_bytes()[:4] == b"\x89PNG"
        assert (tmp_path / f"{name}.gif").read_bytes()[:4] == b"GIF8"
    with pytest.raises(SystemExit):
        cli.main(["reconstruct", *weights, "--out", str(tmp_path / "no" / "such")])
    assert "no such folder" in capsys.readouterr().err


def test_classify_uses_the_names_of_the_run(tmp_path: Path, clips: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train(classify_config(clips, tmp_path))
    weights = ["--weights", str(tmp_path / "tiny_classify")]
    cli.main(["classify", str(clips / "left" / "0.mp4"), *weights, "--json"])
    (result,) = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert {p["label"] for p in result["predictions"]} == {"left", "right"}
    assert sum(p["probability"] for p in result["predictions"]) == pytest.approx(1, abs=1e-5)
    (tmp_path / "broken.mp4").write_bytes(b"not a video")
    with pytest.raises(SystemExit) as stop:
        cli.main(["classify", str(tmp_path / "broken.mp4"), *weights])
    assert stop.value.code == 2
    assert "broken.mp4" in capsys.readouterr().err


def test_wrong_kind_of_weights_is_named(tmp_path: Path, clips: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_weights(build_model(CLASSIFY_MODEL), tmp_path / "w.safetensors")
    with pytest.raises(SystemExit):
        cli.main(["reconstruct", "--weights", str(tmp_path / "w.safetensors")])
    assert "this needs a pre-training model" in capsys.readouterr().err
