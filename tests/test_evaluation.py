"""Tests on many views: one decode a video, interruptions, several processes, saved predictions, and what must not pass."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from tests import tiny_runs as tiny
from tests.golden.support import golden_root
from vmae2_fast import cli, evaluation
from vmae2_fast.config import DataConfig, SourceConfig, ViewsConfig
from vmae2_fast.data import EvaluationLoader
from vmae2_fast.data import workers as workers_module
from vmae2_fast.evaluation import Ranks, evaluate, score
from vmae2_fast.inference import load_model
from vmae2_fast.models import build_model, save_weights
from vmae2_fast.tasks.predictions import PredictionStore, read_official, write_official
from vmae2_fast.train.loop import train

ROOT = Path(__file__).parents[1]
VIEWS = ViewsConfig(segments=2, crops=2, batch=4)
MERGE = golden_root() / "downstream" / "multiview_merge.json"


@pytest.fixture(scope="module")
def clips(tmp_path_factory) -> Path:
    return tiny.write_clips(tmp_path_factory.mktemp("clips"), per_class=3)


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> str:
    torch.manual_seed(3)
    path = tmp_path_factory.mktemp("weights") / "w.safetensors"
    save_weights(build_model(tiny.CLASSIFY_MODEL), path, {"classes": ["left", "right"]})
    return str(path)


def _data(clips: Path) -> DataConfig:
    return tiny.data(clips, sampling="dense", crop="center")


def _run(weights: str, clips: Path, out: Path, **changes):
    return evaluate(load_model(weights), _data(clips), out, **{"views": VIEWS, **changes})


def _files(out: Path) -> dict[str, object]:
    return json.loads((out / "metrics.json").read_text())


def test_metrics_are_those_of_the_model_by_hand(weights, clips, tmp_path):
    metrics = _run(weights, clips, tmp_path)
    loaded = load_model(weights)
    videos = list(EvaluationLoader(_data(clips), frames=tiny.FRAMES, size=tiny.SIZE, segments=2, crops=2))
    with torch.no_grad():
        chosen = [int(loaded.model(v.clips).double().softmax(-1).mean(0).argmax()) for v in videos]
    right = [c == v.label for c, v in zip(chosen, videos)]
    assert metrics["top1"] == sum(right) / 6
    assert metrics["per_class"] == [
        {"class": name, "videos": 3, "top1": sum(r for r, v in zip(right, videos) if v.label == i) / 3}
        for i, name in enumerate(("left", "right"))
    ]
    assert metrics["views_per_video"] == 4
    assert metrics["left_out"] == 0
    assert _files(tmp_path)["top1"] == metrics["top1"]
    assert (tmp_path / "confusion.png").read_bytes()[:4] == b"\x89PNG"


def test_frames_decoded_are_a_tenth_of_the_official_scripts(weights, tmp_path, monkeypatch):
    """A 5x3 test of 300 frames at stride 4: the official script decodes 75 frames for each of the 15 views."""
    clips = tiny.write_clips(tmp_path / "clips", per_class=1, frames=300)
    decoded = []

    def spy(path, ids, decode=workers_module.video_frames):
        decoded.append((path, len(np.unique(ids))))
        return decode(path, ids)

    monkeypatch.setattr(workers_module, "video_frames", spy)
    source = SourceConfig(name="long", root=str(clips))
    data = DataConfig(sources=(source,), stride=4, sampling="dense", crop="center", workers=0)
    evaluate(load_model(weights), data, tmp_path / "out", views=ViewsConfig(segments=5, crops=3))
    assert len({path for path, _ in decoded}) == len(decoded) == 2
    assert sum(frames for _, frames in decoded) <= 0.1 * 2 * 15 * 75


def test_an_interrupted_test_goes_on_and_ends_the_same(weights, clips, tmp_path, monkeypatch):
    whole = _run(weights, clips, tmp_path / "whole")
    monkeypatch.setattr(evaluation, "SAVE_EVERY", 2)
    append, seen = PredictionStore.append, []

    def killed(self, predictions, paths, rank=0):
        if len(seen) == 1:
            raise KeyboardInterrupt
        seen.extend(sorted(paths))
        append(self, predictions, paths, rank)
        seen[:] = [tuple(seen)]

    monkeypatch.setattr(PredictionStore, "append", killed)
    with pytest.raises(KeyboardInterrupt):
        _run(weights, clips, tmp_path / "cut")
    monkeypatch.setattr(PredictionStore, "append", append)
    done = PredictionStore(tmp_path / "cut").finished()
    assert done == {0, 1}
    read = []
    original = EvaluationLoader._job
    monkeypatch.setattr(EvaluationLoader, "_job", lambda self, i, memory: (read.append(i), original(self, i, memory))[1])
    assert _run(weights, clips, tmp_path / "cut") == whole
    assert sorted(read) == [2, 3, 4, 5]
    read.clear()
    assert _run(weights, clips, tmp_path / "cut") == whole  # finished: metrics only
    assert not read


def test_two_processes_merge_to_what_one_finds(weights, clips, tmp_path):
    whole = _run(weights, clips, tmp_path / "one")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    command = [
        sys.executable, "-m", "vmae2_fast", "eval", weights, "--data", str(clips), "--stride", "2", "--segments", "2",
        "--crops", "2", "--batch", "4", "--workers", "1", "--out", str(tmp_path / "two"), "--json",
    ]  # fmt: skip
    environment = {
        **os.environ, "PYTHONPATH": str(ROOT), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port,
        "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    started = [
        subprocess.Popen(
            command, env={**environment, "RANK": str(r), "LOCAL_RANK": str(r)}, stdout=subprocess.PIPE,
            stderr=subprocess.PIPE, text=True,
        )
        for r in range(2)
    ]  # fmt: skip
    printed = [process.communicate() for process in started]
    assert [process.returncode for process in started] == [0, 0], printed
    assert json.loads(printed[0][0].splitlines()[-1])["top1"] == whole["top1"]
    assert {path.name[:9] for path in PredictionStore(tmp_path / "two").parts()} == {"part-0000", "part-0001"}
    one, two = _files(tmp_path / "one"), _files(tmp_path / "two")
    skip = ("weights", "sources")
    assert {k: v for k, v in one.items() if k not in skip} == {k: v for k, v in two.items() if k not in skip}
    # the same logits view for view, up to what another place in the batch does to the last bits
    ours, theirs = (PredictionStore(tmp_path / name).read().predictions for name in ("one", "two"))
    order = [np.lexsort((p.split, p.chunk, p.video)) for p in (ours, theirs)]
    for a, b in zip(ours[:4], theirs[:4]):
        assert np.array_equal(a[order[0]], b[order[1]])
    np.testing.assert_allclose(ours.logits[order[0]], theirs.logits[order[1]], rtol=1e-5, atol=1e-6)


def test_shares_of_a_job_array_are_merged_by_score(weights, clips, tmp_path, capsys):
    whole = _run(weights, clips, tmp_path / "one")
    for share in (0, 1, 2):
        assert _run(weights, clips, tmp_path / "many", share=Ranks(share, 3)) == {}
    cli.main(["score", str(tmp_path / "many"), "--official", str(tmp_path / "all.txt"), "--json"])
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == json.loads(json.dumps(whole))
    text = score(read_official([tmp_path / "all.txt"]), names=["left", "right"])
    assert {k: v for k, v in text.items() if k != "left_out"} == {k: v for k, v in whole.items() if k != "left_out"}


@pytest.mark.skipif(not MERGE.exists(), reason="no recorded merge in this golden directory")
@pytest.mark.parametrize("scores", ["prob", "score"])
def test_score_of_recorded_official_files(scores, tmp_path, capsys):
    case = json.loads(MERGE.read_text())
    files = []
    for number, text in enumerate(case["rank_files"]):
        files.append(str(tmp_path / f"{number}.txt"))
        Path(files[-1]).write_text(text)
    cli.main(["score", *files, "--scores", {"prob": "softmax", "score": "logits"}[scores], "--json"])
    metrics = json.loads(capsys.readouterr().out.splitlines()[-1])
    found = [100 * metrics["top1"], 100 * metrics["top5"]]
    assert found == pytest.approx(case["expected_top1_top5"][scores], rel=1e-12)


def test_official_text_round_trip(weights, clips, tmp_path):
    _run(weights, clips, tmp_path / "one")
    saved = PredictionStore(tmp_path / "one").read()
    write_official(saved, tmp_path / "text.txt")
    again = read_official([tmp_path / "text.txt"])
    assert again.paths == saved.paths
    for ours, theirs in zip(again.predictions, saved.predictions):
        assert np.array_equal(ours, theirs)


def test_a_label_map_selects_outputs(weights, clips, tmp_path):
    swapped = _run(weights, clips, tmp_path / "swapped", label_map=[1, 0])
    plain = PredictionStore(tmp_path / "plain")
    _run(weights, clips, tmp_path / "plain")
    again = score(plain, label_map=[1, 0], names=["0", "1"], out=tmp_path)
    assert swapped["top1"] == again["top1"]
    ours = PredictionStore(tmp_path / "swapped").read().predictions.logits
    assert np.array_equal(ours, plain.read().predictions.logits[:, [1, 0]])


def _broken(clips: Path, tmp_path: Path) -> Path:
    root = tmp_path / "some"
    for name in ("left", "right"):
        (root / name).mkdir(parents=True)
        for file in (clips / name).iterdir():
            (root / name / file.name).write_bytes(file.read_bytes())
    (root / "left" / "1.mp4").write_bytes(b"no video")
    return root


def test_undecodable_videos_are_left_out_and_named(weights, clips, tmp_path):
    metrics = _run(weights, _broken(clips, tmp_path), tmp_path / "out")
    assert (metrics["videos"], metrics["left_out"]) == (5, 1)
    (line,) = (tmp_path / "out" / "quarantine.jsonl").read_text().splitlines()
    assert json.loads(line)["path"].endswith("left/1.mp4")


def test_another_test_in_the_same_folder_is_refused(weights, clips, tmp_path):
    _run(weights, clips, tmp_path)
    with pytest.raises(ValueError, match=r"another evaluation \(views: .*--restart"):
        _run(weights, clips, tmp_path, views=ViewsConfig(segments=1, crops=1))
    assert _run(weights, clips, tmp_path, views=ViewsConfig(segments=1, crops=1), restart=True)["views_per_video"] == 1


def test_a_damaged_part_is_named(weights, clips, tmp_path):
    _run(weights, clips, tmp_path)
    (part,) = PredictionStore(tmp_path).parts()
    part.write_bytes(part.read_bytes()[:-10])
    with pytest.raises(ValueError, match=r"part-0000-000000.safetensors: damaged .* delete it"):
        score(PredictionStore(tmp_path))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--set", "k40"], "unknown labelled set 'k40'; did you mean k400"),
        (["--set", "k400", "--datasets", "nowhere.toml"], "nowhere.toml: cannot read the data sets"),
        (["--set", "k400", "--data", "x"], "give either --set or --data"),
        ([], "nothing to test on: give --set NAME, or --data FOLDER"),
        (["--data", "{clips}", "--list", "missing.csv"], "missing.csv: cannot read the list"),
        (["--data", "{clips}", "--list", "{tmp}/wrong.csv"], "has label 2, but the model has classes 0..1"),
        (["--data", "{clips}", "--label-map", "k400"], "k400 takes the 710 classes of Kinetics-710, the model has 2"),
        (["--data", "{clips}", "--label-map", "{tmp}/wrong.csv"], "neither one of k400, k600, k700 nor a readable JSON list"),
        (["--data", "{clips}", "--label-map", "{tmp}/far.json"], "entry 1 is 2, the model has classes 0..1"),
        (["--data", "{clips}", "--label-map", "{tmp}/twice.json"], "class 1 of the model stands for two classes"),
        (["--data", "{clips}", "--label-map", "{tmp}/one.json"], "but the label map has classes 0..0"),
        (["--data", "{one}"], "source one has 1 classes, the model has 2"),
        (["--data", "{clips}", "--shard", "3/2"], "--shard 3/2: give I/N"),
        (["--data", "{clips}", "--segments", "0"], "views.segments=0: must be at least 1"),
        (["--data", "{clips}", "--crops", "0"], "views.crops=0: must be at least 1"),
        (["--data", "{clips}", "--model", "vit_base_patch16_224"], "does not fit vit_base_patch16_224"),
    ],
)
def test_bad_input_is_one_line(arguments, message, weights, clips, tmp_path, capsys):
    (tmp_path / "wrong.csv").write_text(f"{clips}/left/0.mp4 0\n{clips}/right/0.mp4 2\n")
    for name, rows in (("far", [0, 2]), ("twice", [1, 1]), ("one", [0])):
        (tmp_path / f"{name}.json").write_text(json.dumps(rows))
    one = tmp_path / "one"
    (one / "left").mkdir(parents=True)
    (one / "left" / "0.mp4").write_bytes((clips / "left" / "0.mp4").read_bytes())
    given = [a.format(clips=clips, tmp=tmp_path, one=one) for a in arguments]
    with pytest.raises(SystemExit) as stop:
        cli.main(["eval", weights, *given, "--out", str(tmp_path / "out")])
    assert stop.value.code == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert message in line
    assert not list((tmp_path / "out").glob("*"))


def test_class_names_of_data_and_weights_must_agree(clips, tmp_path):
    save_weights(build_model(tiny.CLASSIFY_MODEL), tmp_path / "w.safetensors", {"classes": ["right", "left"]})
    with pytest.raises(ValueError, match="class 0 is 'left' in the data and 'right' in the weights"):
        _run(str(tmp_path / "w.safetensors"), clips, tmp_path / "out")


@pytest.mark.parametrize(
    ("text", "message"),
    [("1, 0\nv0 [1, 2] 0 0\n", "0.txt:2: not a line"), ("1, 0\nv0 [1, x] 0 0 0\n", "0.txt:2"), ("1, 0\n", "no predictions")],
)
def test_official_files_that_cannot_be_read_are_named(text, message, tmp_path):
    (tmp_path / "0.txt").write_text(text)
    with pytest.raises(ValueError, match=message):
        read_official([tmp_path / "0.txt"])


def test_a_run_is_tested_on_its_own_validation_data(clips, tmp_path, capsys):
    found = train(tiny.classify_config(clips, tmp_path))["validation"]
    cli.main(["eval", str(tmp_path / "tiny_classify"), "--json"])
    metrics = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert metrics["views_per_video"] == 2
    assert {key: metrics[key] for key in ("top1", "videos", "confusion")} == {
        key: found[key] for key in ("top1", "videos", "confusion")
    }
    assert (tmp_path / "tiny_classify" / "eval" / "metrics.json").exists()
    cli.main(["eval", str(tmp_path / "tiny_classify"), "--segments", "1", "--out", str(tmp_path / "one"), "--json"])
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["views_per_video"] == 1
