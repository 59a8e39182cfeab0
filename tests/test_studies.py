"""The studies run end to end, shrunk, and hand weights on as they say."""

from __future__ import annotations

import json

import numpy as np
import pytest

from vmae2_fast import cli, studies
from vmae2_fast.config import to_dict
from vmae2_fast.data import open_sources
from vmae2_fast.data.synthetic import render_scene
from vmae2_fast.studies import study


def test_a_shrunken_study_gives_its_table(tmp_path, capsys):
    cli.main(["study", "progressive", "--out", str(tmp_path), "--seeds", "0", "1", "--short", "--json"])
    table = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert table == json.loads((tmp_path / "table.json").read_text())
    assert [row["name"] for row in table["rows"]][::2] == ["from scratch", "pre-train, post-pre-train, fine-tune"]
    for row in table["rows"]:
        first, second = (run["top1"] for run in row["runs"])
        assert row["mean"] == {"top1": pytest.approx((first + second) / 2)}
        assert row["spread"] == {"top1": pytest.approx(abs(first - second))}
    assert (tmp_path / "table.md").read_text().count("\n|") == 4
    assert (tmp_path / "table.png").read_bytes()[:4] == b"\x89PNG"
    inits = {p.parent.name: json.loads(p.read_text())["init"] for p in (tmp_path / "seed-0").glob("*/config.json")}
    assert inits["scratch"] is None
    assert inits["finetune_progressive"].endswith("post_pretrain/weights.safetensors")
    assert inits["finetune_direct"].endswith("/pretrain/weights.safetensors")
    assert inits["post_pretrain"].endswith("/pretrain/weights.safetensors")


def test_masking_compares_equal_runs_under_other_masks(tmp_path):
    rows = studies.masking(tmp_path, 0, studies._Lengths())
    done = {"validation": {"top1": 0.5}, "clips_per_s": 10.0}
    read = {row.name: row.read({stage.name: done for stage in row.stages}) for row in rows}
    assert read["dual, running cell"]["decoder tokens"] < read["encoder only"]["decoder tokens"]
    assert read["dual, running cell"]["activation KiB"] < read["encoder only"]["activation KiB"]
    pretrain, finetune = (
        {json.dumps({k: v for k, v in to_dict(row.stages[i]).items() if k not in ("name", "init", "mask")}) for row in rows}
        for i in (0, 1)
    )
    assert len(pretrain) == len(finetune) == 1
    for row in rows:
        assert row.stages[1].init == f"stage:{row.stages[0].name}"


def test_scaling_takes_the_same_number_of_steps_on_shares_of_the_set(tmp_path):
    listed = tmp_path / "data" / "unlabeled_video" / "train.csv"
    listed.parent.mkdir(parents=True)
    listed.write_text("".join(f"{n}.mp4 0 -1\n" for n in range(16)))
    rows = studies.scaling(tmp_path, 0, studies._Lengths())
    assert [row.name for row in rows] == [f"width {w}, {n} clips" for w in (32, 64, 96) for n in (4, 8, 16)]
    steps = set()
    for row in rows:
        pretrain = row.stages[0]
        (source,) = open_sources(pretrain.data)
        steps.add(len(source.manifest) * pretrain.train.epochs)
        assert row.stages[1].model.width == pretrain.model.width
    assert len(steps) == 1


def test_seeds_must_differ(tmp_path):
    with pytest.raises(ValueError, match="needs different seeds"):
        study("progressive", tmp_path, seeds=(1, 1))


def test_a_shaking_camera_moves_the_whole_picture():
    def rng():
        return np.random.Generator(np.random.Philox(key=[3, 0]))

    still = render_scene("red_then_blue", rng(), frames=6, size=48, distractors=0)
    shaken = render_scene("red_then_blue", rng(), frames=6, size=48, distractors=0, shake=0.2)
    change = [np.abs(v[1].astype(int) - v[0]).mean() for v in (still, shaken)]
    assert change[1] > 2 * change[0]
