"""`vmae2 data check` names every missing root, list, file and weights of a recipe, and nothing else."""

from __future__ import annotations

import json

import pytest

from vmae2_fast import cli
from vmae2_fast.config import DataConfig, SourceConfig
from vmae2_fast.data.check import check_sources

RECIPE = """
from vmae2_fast.config import DataConfig, ModelConfig, PretrainConfig, SourceConfig

def mine(datasets: str = "datasets.toml") -> PretrainConfig:
    \"\"\"Own data.\"\"\"
    sources = (SourceConfig(name="videos"), SourceConfig(name="frames"))
    return PretrainConfig(
        name="mine", model=ModelConfig(name="pretrain_videomae_small_patch16_224"),
        data=DataConfig(sources=sources, datasets=datasets), init="weights.pth",
    )
"""


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "videos.csv").write_text("".join(f"v/{i}.mp4 0 -1\n" for i in range(600)))
    (tmp_path / "frames.csv").write_text("d1 1 3\nd2 1 2\n")
    (tmp_path / "datasets.toml").write_text(
        '[videos]\ntrain = "videos.csv"\n[frames]\ntrain = "frames.csv"\ntemplate = "{:02}.jpg"\n')
    for name in [f"v/{i}.mp4" for i in range(600)] + [f"d1/{k:02}.jpg" for k in (1, 2, 3)] + ["d2/01.jpg", "d2/02.jpg"]:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "recipe.py").write_text(RECIPE)
    return tmp_path


def _check(folder, *flags):
    cli.main(["data", "check", f"{folder}/recipe.py:mine", "--datasets", f"{folder}/datasets.toml", *flags])


def test_everything_is_there(folder, capsys, monkeypatch):
    monkeypatch.chdir(folder)
    (folder / "weights.pth").touch()
    _check(folder, "--json")
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["missing"] == 0
    assert {row["source"]: row["looked_at"] for row in result["sources"]} == {
        "mine.init": 1, "videos/train": 600, "frames/train": 2,
    }  # fmt: skip
    _check(folder, "--sample", "5")
    assert "videos/train: 5 of 600 clips looked for, 0 missing" in capsys.readouterr().out


def test_a_folder_of_several_clips_is_named_once(tmp_path):
    (tmp_path / "train.csv").write_text("film 1 300\nfilm 301 300\nother 1 300\n")
    source = SourceConfig(name="cut", root=str(tmp_path), list="train.csv", template="img_{:05}.jpg")
    (found,) = check_sources(DataConfig(sources=(source,)))
    assert found.missing == 3
    assert found.examples == (str(tmp_path / "film"), str(tmp_path / "other"))


def test_all_that_is_missing_is_named(folder, capsys, monkeypatch):
    monkeypatch.chdir(folder)
    for name in ("v/7.mp4", "v/599.mp4", "d1/03.jpg"):
        (folder / name).unlink()
    (folder / "d2" / "01.jpg").unlink()
    (folder / "d2" / "02.jpg").unlink()
    (folder / "d2").rmdir()
    with pytest.raises(SystemExit) as stop:
        _check(folder, "--json")
    assert stop.value.code == 2
    captured = capsys.readouterr()
    result = json.loads(captured.out.splitlines()[-1])
    assert (result["missing"], sum(row["missing"] for row in result["sources"])) == (5, 5)
    named = {line.strip() for line in captured.out.splitlines() if line.startswith("  ")}
    assert named == {"weights.pth", *(str(folder / name) for name in ("v/7.mp4", "v/599.mp4", "d1/03.jpg", "d2"))}
    assert captured.err.splitlines()[-1].startswith("vmae2: error: 5 missing for")


def test_a_missing_root_or_list_does_not_hide_the_next_source(folder):
    names = ("none", "videos", "frames")
    data = DataConfig(sources=tuple(SourceConfig(name=n) for n in names), datasets=str(folder / "datasets.toml"))
    (folder / "frames.csv").unlink()
    (folder / "v" / "3.mp4").unlink()
    none, videos, frames = check_sources(data)
    assert "unknown data set 'none'" in none.examples[0]
    assert videos.examples == (str(folder / "v" / "3.mp4"),)
    assert "frames.csv: cannot read the list" in frames.examples[0]
    assert [check.missing for check in (none, videos, frames)] == [1, 1, 1]
