"""Progressions that end at detection, shrunk: weights are handed on, features come from them, any stage may be the first."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from vmae2_fast import cli
from vmae2_fast.inference import load_model
from vmae2_fast.models import build_model, save_weights
from vmae2_fast.models.weights import weights_digest
from vmae2_fast.recipes import progressive
from vmae2_fast.train.smoke import smoke


def launch(*arguments: str, capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    cli.main(["launch", *arguments, "--json"])
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def refused(*arguments: str, capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as stop:
        cli.main(["launch", *arguments])
    assert stop.value.code == 2
    return capsys.readouterr().err.splitlines()[-1]


def test_left_and_entered_between_stages_and_features_follow_the_weights(tmp_path, capsys):
    out = tmp_path / "out"
    common = ("progressive:vit_huge", "--target", "thumos14", "--smoke", "--out", str(out))
    (checked,) = launch(*common, "--check", "--from", "detect", capsys=capsys)["check"]
    assert (checked["stage"], checked["steps"]) == ("detect", 3)
    assert sorted(p.name for p in out.iterdir()) == ["data", "untrimmed"]  # no weights, no features
    assert "post_pretrain/weights.safetensors, which does not exist" in refused(*common, "--from", "detect", capsys=capsys)
    launch(*common, "--until", "post_pretrain", capsys=capsys)
    summary = launch(*common, "--from", "detect", capsys=capsys)
    assert summary["detect"]["steps"] > 1
    folder = out / "untrimmed" / "features"
    trunk = load_model(str(out / "post_pretrain"), kind="classify").model
    assert json.loads((folder / "features.json").read_text())["weights"] == weights_digest(trunk, without=("head.",))
    taken = {p.name: p.stat().st_mtime_ns for p in folder.glob("*.npy")}
    again = launch(*common, "--from", "post_pretrain", capsys=capsys)  # finished stages are not run again
    assert again["detect"] == summary["detect"]
    assert taken == {p.name: p.stat().st_mtime_ns for p in folder.glob("*.npy")}

    save_weights(build_model(trunk.config), out / "post_pretrain" / "weights.safetensors")
    told = refused(*common, "--from", "detect", capsys=capsys)
    assert "trunk_weights changed since this run began" in told
    told = refused(*common, "--from", "detect", "--restart", capsys=capsys)
    assert "features taken in another way (weights: " in told


@pytest.mark.parametrize("target", ["ava", "fineaction"])
def test_given_weights_stand_in_for_those_of_the_stage_before(target, tmp_path, capsys):
    out = str(tmp_path / "out")
    run = smoke(progressive.vit_giant(target=target, out=out))
    before, last = run.stages[-2:]
    given = tmp_path / "given.safetensors"
    trunk = build_model(before.model)
    save_weights(trunk, given)
    common = ("progressive:vit_giant", "--target", target, "--smoke", "--out", out, "--from", last.name)
    launch(*common, "--init-weights", str(given), capsys=capsys)
    config, summary = (json.loads((Path(out) / last.name / name).read_text()) for name in ("config.json", "done.json"))
    if target == "ava":
        assert config["init"] == str(given)
        assert 0 <= summary["validation"]["frame_map"] <= 1
        assert "blocks.0.attn.qkv.weight" in load_file(summary["weights"])
    else:
        assert (config["init"], config["trunk_weights"]) == (None, str(given))
        header = json.loads((Path(out) / "untrimmed" / "features" / "features.json").read_text())
        assert header["weights"] == weights_digest(trunk, without=("head.",))
        assert 0 <= summary["validation"]["average_map"] <= 1
