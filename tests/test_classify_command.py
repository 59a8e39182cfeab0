"""`vmae2 classify` from the shell: a distilled run, the names of Kinetics, a part of K710, and what must not pass."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests import tiny_runs as tiny
from vmae2_fast import cli
from vmae2_fast.config import DataConfig, SourceConfig
from vmae2_fast.inference import load_model, read_views
from vmae2_fast.models import build_model, save_weights
from vmae2_fast.models.kinetics import class_names, label_map
from vmae2_fast.train.loop import train

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def clips(tmp_path_factory) -> Path:
    return tiny.write_clips(tmp_path_factory.mktemp("clips"), per_class=2)


@pytest.fixture(scope="module")
def k710(tmp_path_factory) -> Path:
    torch.manual_seed(1)
    path = tmp_path_factory.mktemp("k710") / "k710.safetensors"
    save_weights(build_model(dataclasses.replace(tiny.CLASSIFY_MODEL, num_classes=710, init_std=0.3)), path)
    return path


def test_a_distilled_run_names_a_video_from_the_shell(clips, tmp_path):
    teacher = tmp_path / "teacher.safetensors"
    save_weights(build_model(tiny.CLASSIFY_MODEL), teacher)
    train(tiny.distill_config(clips, tmp_path, str(teacher)))
    command = [sys.executable, "-m", "vmae2_fast", "classify", str(clips / "left" / "0.mp4"), str(clips / "right" / "0.mp4")]
    done = subprocess.run(
        [*command, "--weights", str(tmp_path / "tiny_distill"), "--segments", "2", "--crops", "1", "--json"],
        capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    results = json.loads(done.stdout.splitlines()[-1])
    assert [Path(r["video"]).parent.name for r in results] == ["left", "right"]
    model = load_model(str(tmp_path / "tiny_distill")).model
    for result in results:
        views = read_views(result["video"], frames=tiny.FRAMES, size=tiny.SIZE, stride=2, segments=2)  # the run's stride
        with torch.no_grad():
            expected = model(views).softmax(-1).mean(0)
        found = {p["label"]: p["probability"] for p in result["predictions"]}
        assert found == pytest.approx({"left": expected[0].item(), "right": expected[1].item()}, rel=1e-5)
    assert "left/0.mp4: " in done.stdout


def _classify(capsys, *arguments: str) -> list[dict]:
    cli.main(["classify", *arguments, "--segments", "1", "--crops", "1", "--json"])
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def test_names_of_kinetics_and_a_part_of_it(clips, k710, capsys):
    video = str(clips / "left" / "0.mp4")
    (whole,) = _classify(capsys, video, "--weights", str(k710), "--topk", "710")
    assert {p["label"] for p in whole["predictions"]} == set(class_names(710))
    (part,) = _classify(capsys, video, "--weights", str(k710), "--topk", "400", "--label-map", "k400")
    assert {p["label"] for p in part["predictions"]} == set(class_names(400))
    all_of_it = {p["label"]: p["probability"] for p in whole["predictions"]}
    kept = sum(all_of_it[name] for name in class_names(400))
    for p in part["predictions"][:5]:  # softmax over the part: the same ratios
        assert p["probability"] == pytest.approx(all_of_it[p["label"]] / kept, rel=1e-4)
    assert label_map(400)


def test_names_from_a_file(clips, k710, tmp_path, capsys):
    (tmp_path / "rows.json").write_text("[7, 3]")
    (tmp_path / "names.txt").write_text("seven\nthree\n")
    video = str(clips / "left" / "0.mp4")
    arguments = ["--weights", str(k710), "--label-map", str(tmp_path / "rows.json"), "--labels", str(tmp_path / "names.txt")]
    (found,) = _classify(capsys, video, *arguments)
    assert {p["label"] for p in found["predictions"]} == {"seven", "three"}
    with pytest.raises(SystemExit):
        cli.main(["classify", video, "--weights", str(k710), "--labels", str(tmp_path / "names.txt")])
    assert "2 class names for 710 classes" in capsys.readouterr().err


def test_what_a_run_directory_says_of_its_sampling(clips, tmp_path):
    assert (load_model(str(_saved(tmp_path))).stride, load_model(str(_saved(tmp_path))).sampling) == (4, "dense")
    source = SourceConfig(name="tiny", root=str(clips), stride=3)
    config = tiny.classify_config(clips, tmp_path, data=DataConfig(sources=(source,), stride=2, sampling="segment", workers=1))
    train(tiny.with_train(dataclasses.replace(config, validation=None), epochs=1, global_batch=2))
    loaded = load_model(str(tmp_path / "tiny_classify"))
    assert (loaded.stride, loaded.sampling) == (3, "segment")


def _saved(folder: Path) -> Path:
    save_weights(build_model(tiny.CLASSIFY_MODEL), folder / "w.safetensors")
    return folder / "w.safetensors"


def test_segments_are_read_over_the_whole_video(clips):
    views = read_views(clips / "left" / "0.mp4", frames=5, size=32, segments=2, sampling="segment")
    whole = read_views(clips / "left" / "0.mp4", frames=20, size=32, stride=1)[0]
    # 20 frames, 5 parts of 4: every half part, taken in turns
    assert torch.equal(views[0], whole[[0, 4, 8, 12, 16]])
    assert torch.equal(views[1], whole[[2, 6, 10, 14, 18]])
