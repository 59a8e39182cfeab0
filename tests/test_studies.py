"""The studies run end to end, shrunk, and hand weights on as they say."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from vmae2_fast import cli, studies
from vmae2_fast.config import to_dict
from vmae2_fast.data import open_sources
from vmae2_fast.data.synthetic import render_scene, source_tables
from vmae2_fast.studies import arms, markdown, study
from vmae2_fast.studies.table import write_table


def test_a_shrunken_study_gives_its_table(tmp_path, capsys):
    cli.main(["study", "progressive", "--out", str(tmp_path), "--seeds", "0", "1", "--short", "--json"])
    table = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert table == json.loads((tmp_path / "progressive.json").read_text())
    assert [row["name"] for row in table["rows"]][::3] == ["from scratch", "pre-train, post-pre-train, fine-tune"]
    for row in table["rows"]:
        first, second = (run["top-1 %"] for run in row["runs"])
        assert row["mean"]["top-1 %"] == pytest.approx((first + second) / 2)
        assert row["spread"]["top-1 %"] == pytest.approx(abs(first - second))
    assert (tmp_path / "progressive.md").read_text() == markdown(table)
    assert (tmp_path / "progressive.png").read_bytes()[:4] == b"\x89PNG"
    inits = {p.parent.name: json.loads(p.read_text())["init"] for p in (tmp_path / "seed-0").glob("*/config.json")}
    assert inits.pop("finetune_from_scratch") is inits.pop("post_pretrain_from_scratch") is inits.pop("pretrain") is None
    assert {name: Path(init).parent.name for name, init in inits.items()} == {
        "finetune_from_pretrain": "pretrain",
        "finetune_from_post_pretrain_from_scratch": "post_pretrain_from_scratch",
        "post_pretrain_from_pretrain": "pretrain",
        "finetune_from_post_pretrain_from_pretrain": "post_pretrain_from_pretrain",
    }


def test_a_stopped_study_goes_on_and_others_take_its_stages(tmp_path, monkeypatch):
    """Stopped in the middle of the second seed: the first is in the table; what is done is not done again."""
    trained: list[str] = []
    real = studies.train

    def stopping(config):
        if len(trained) == 8:
            raise SystemExit(143)
        trained.append(f"{config.out}/{config.name}")
        return real(config)

    monkeypatch.setattr(studies, "train", stopping)
    with pytest.raises(SystemExit):
        study("progressive", tmp_path / "tables", runs=tmp_path, seeds=(0, 1), short=True)
    assert json.loads((tmp_path / "tables" / "progressive.json").read_text())["seeds"] == [0]

    fresh: list[str] = []

    def noting(config):
        if not (tmp_path / config.out / config.name / "done.json").exists():
            fresh.append(f"{config.out}/{config.name}")
        return real(config)

    monkeypatch.setattr(studies, "train", noting)
    assert study("progressive", tmp_path / "tables", runs=tmp_path, seeds=(0, 1), short=True)["seeds"] == [0, 1]
    assert not set(fresh) & set(trained)
    assert len(fresh) + len(trained) == 2 * 7
    fresh.clear()
    study("masking", tmp_path / "tables", runs=tmp_path, seeds=(0,), short=True)
    assert {Path(path).name for path in fresh} == {
        f"{stage}pretrain_{decoder}" for stage in ("", "finetune_from_") for decoder in ("none", "frame", "random")
    }
    with pytest.raises(ValueError, match="another --runs"):
        study("progressive", tmp_path / "tables", runs=tmp_path, seeds=(0,))


def test_masking_compares_equal_runs_under_other_masks(tmp_path):
    listed = arms.masking(tmp_path, 0, arms.FULL)
    cost = {arm.name: arm.cost for arm in listed}
    assert cost["dual, running cell"]["decoder tokens"] < cost["encoder only"]["decoder tokens"]
    assert cost["dual, running cell"]["activation KiB / clip"] < cost["encoder only"]["activation KiB / clip"]
    assert all(value["step ms"] > 0 for value in cost.values())
    pretrain, finetune = (
        {json.dumps({k: v for k, v in to_dict(arm.stages[i]).items() if k not in ("name", "init", "mask")}) for arm in listed}
        for i in (0, 1)
    )
    assert len(pretrain) == len(finetune) == 1
    for arm in listed:
        assert arm.stages[1].init == f"stage:{arm.stages[0].name}"


def test_scaling_takes_the_same_number_of_steps_on_shares_of_the_set(tmp_path):
    for name, line in (("unlabeled_video", "{}.mp4 0 -1\n"), ("unlabeled_frames", "{} 1 12\n")):
        (tmp_path / "data" / name).mkdir(parents=True)
        (tmp_path / "data" / name / "train.csv").write_text("".join(line.format(n) for n in range(32)))
    (tmp_path / "data" / "datasets.toml").write_text(source_tables(12, 6))
    listed = arms.scaling(tmp_path, 0, arms.FULL)
    assert [arm.name for arm in listed] == [f"width {w}, {n} clips" for w in (16, 32, 64) for n in (4, 16, 64)]
    steps = set()
    for arm in listed:
        pretrain = arm.stages[0]
        steps.add(sum(len(source.manifest) for source in open_sources(pretrain.data)) * pretrain.train.epochs)
        assert arm.stages[1].model.width == pretrain.model.width
    assert len(steps) == 1
    assert listed[-1].stages == arms.progressive(tmp_path, 0, arms.FULL)[2].stages


def test_a_row_need_not_have_every_figure(tmp_path):
    rows = [{"name": "a", "runs": [{"x": 1.0}, {"x": 3.0}]}, {"name": "b", "runs": [{"x": 4.0, "y": 2.0}] * 2}]
    table = {"study": "t", "command": "c", "seeds": [0, 1], "training_seconds": 60.0, "rows": rows}
    write_table(table, tmp_path)
    assert (tmp_path / "t.md").read_text().splitlines()[2:4] == ["| a | 2 (1 to 3) |  |", "| b | 4 | 2 |"]


def test_the_documented_tables_are_those_that_were_measured():
    docs = Path(__file__).parents[1] / "docs" / "studies"
    text = (docs / "README.md").read_text()
    for file in ("progressive.json", "masking.json", "scaling.json"):
        table = json.loads((docs / file).read_text())
        assert not table["short"]
        assert markdown(table) in text
        assert f"]({table['study']}.png)" in text
        assert (docs / f"{table['study']}.png").exists()


def test_seeds_must_differ_and_a_length_be_one(tmp_path):
    with pytest.raises(ValueError, match="needs different seeds"):
        study("progressive", tmp_path, seeds=(1, 1))
    with pytest.raises(ValueError, match=r"length=0\.0 must be above 0"):
        study("progressive", tmp_path, length=0.0)
    assert not list(tmp_path.iterdir())


def test_length_multiplies_every_stage_and_leaves_at_least_one_epoch(tmp_path):
    stages, longer = (
        [stage for arm in arms.progressive(tmp_path, 0, arms.FULL.scaled(length)) for stage in arm.stages] for length in (1, 3)
    )
    assert [stage.train.epochs for stage in longer] == [3 * stage.train.epochs for stage in stages]
    assert arms.FULL.scaled(1e-6) == arms.Epochs(pretrain=1, post_pretrain=1, finetune=1, scratch=1)


def test_a_shaking_camera_moves_the_whole_picture():
    def rng():
        return np.random.Generator(np.random.Philox(key=[3, 0]))

    still = render_scene("red_then_blue", rng(), frames=6, size=48, distractors=0)
    shaken = render_scene("red_then_blue", rng(), frames=6, size=48, distractors=0, shake=0.2)
    change = [np.abs(v[1].astype(int) - v[0]).mean() for v in (still, shaken)]
    assert change[1] > 2 * change[0]
