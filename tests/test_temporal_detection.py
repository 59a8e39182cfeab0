"""From videos to mAP by the commands: features, scores, training, detections, score, picture; and what bad input says."""

from __future__ import annotations

import dataclasses
import json
import os
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.tiny_runs import official_windows, write_untrimmed
from vmae2_fast import cli, timeline
from vmae2_fast.config import (
    ActionFormerConfig,
    ExtractConfig,
    ModelConfig,
    OptimConfig,
    Progression,
    TadConfig,
    TadDataConfig,
    TrainConfig,
)
from vmae2_fast.data.probing import frame_rate, probe
from vmae2_fast.data.tad import Detections, TadError, read_detections
from vmae2_fast.models import create_model, save_weights
from vmae2_fast.tasks.features import video_features
from vmae2_fast.train import train
from vmae2_fast.train.progression import run_progression

TRUNK = {"width": 24, "depth": 1, "heads": 2, "size": 32, "patch": 16, "frames": 16, "init_std": 0.1}


def run(*arguments: str, capsys) -> dict:
    cli.main([*arguments, "--json"])
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def refused(*arguments: str, capsys) -> str:
    with pytest.raises(SystemExit) as stop:
        cli.main(list(arguments))
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    return error


@pytest.fixture
def trunk(tmp_path: Path) -> str:
    torch.manual_seed(0)
    model = create_model("vit_small_patch16_224", num_classes=2, **TRUNK)
    save_weights(model, tmp_path / "trunk.safetensors", {"classes": ["someone", "nobody"]})
    return str(tmp_path / "trunk.safetensors")


@pytest.fixture
def clip(tmp_path: Path) -> Path:
    """An untrimmed clip: a real one of VMAE2_CLIPS where there is one, else one encoded here."""
    given = Path(os.environ.get("VMAE2_CLIPS", "")) / "one_by_one_person.mp4"
    if os.environ.get("VMAE2_CLIPS") and given.is_file():
        return given
    return write_untrimmed(tmp_path / "walkers.mp4", 700, rate=10)


def clip_config(clip: Path, tmp_path: Path, trunk: str, epochs: int) -> TadConfig:
    """A detector for four made-up events of one clip, trained on it and validated on it."""
    fps = frame_rate(str(clip))
    duration = probe(str(clip)).num_frames / fps
    events = [[duration * a, duration * (a + 0.12)] for a in (0.05, 0.3, 0.55, 0.8)]
    entry = {"subset": "validation", "duration": duration, "fps": fps}
    entry["annotations"] = [{"label": "someone", "segment": segment} for segment in events]
    (tmp_path / "annotations.json").write_text(json.dumps({"database": {clip.stem: entry}}))
    data = TadDataConfig(
        features=str(tmp_path / "features"), annotations=str(tmp_path / "annotations.json"), videos=str(clip), workers=1
    )
    return TadConfig(
        name="clip", model=ModelConfig(name="vit_small_patch16_224", **TRUNK), data=data, validation=data, out=str(tmp_path),
        detector=ActionFormerConfig(
            classes=1, width=16, heads=2, windows=(5,) * 5, range_ends=(4.0, 8.0, 16.0, 32.0), max_length=352, stem_blocks=1
        ),
        trunk_weights=trunk, optim=OptimConfig(lr=2e-3, lr_batch=0),
        train=TrainConfig(epochs=epochs, global_batch=1, threads=1),
    )  # fmt: skip


def test_from_a_video_to_map_and_a_picture(clip, trunk, tmp_path, capsys):
    name, count = clip.stem, probe(str(clip)).num_frames
    duration = count / frame_rate(str(clip))
    folder = str(tmp_path / "features")
    taken = run("tad", "features", str(clip), "--weights", trunk, "--out", folder, capsys=capsys)
    assert taken["frames"] == count
    assert 3.5 * taken["frames"] < taken["frames_by_window"] == 16 * taken["windows"]
    assert np.load(f"{folder}/{name}.npy").shape == (taken["windows"], 24) == ((count - 16) // 4 + 1, 24)

    summary = train(clip_config(clip, tmp_path, trunk, epochs=8))
    assert summary["steps"] == 8

    scores = run(
        "tad", "scores", str(clip), "--weights", trunk, "--out", str(tmp_path / "scores.json"), "--segments", "1",
        "--crops", "2", capsys=capsys,
    )  # fmt: skip
    assert scores["classes"] == 2
    assert sum(json.loads((tmp_path / "scores.json").read_text())["results"][name]) == pytest.approx(1, abs=1e-6)

    for extra in ((), ("--features", folder, "--videos", name)):
        target = tmp_path / f"found{len(extra)}.json"
        written = run("tad", "detect", str(tmp_path / "clip"), "--out", str(target), *extra, capsys=capsys)
        assert written["detections"] == summary["validation"]["detections"]
    first, second = (read_detections(tmp_path / f"found{n}.json")[name] for n in (0, 4))
    assert np.array_equal(first.segments, second.segments)
    assert first.segments.min() >= 0
    assert first.segments.max() <= duration + 1e-3

    annotations = str(tmp_path / "annotations.json")
    result = run("score", "tad", annotations, str(target), "--subset", "validation", capsys=capsys)
    assert result["average_map"] == pytest.approx(summary["validation"]["average_map"], abs=1e-3)
    assert result["events"] == 4

    picture = tmp_path / "timeline.png"
    drawn = run(
        "tad", "draw", str(target), "--annotations", annotations, "--out", str(picture), "--threshold", "0", capsys=capsys
    )
    assert drawn["detections"] + drawn["hidden"] == written["detections"]
    assert picture.stat().st_size > 5000


def test_training_takes_the_features_it_lacks(trunk, tmp_path, capsys):
    clip = write_untrimmed(tmp_path / "short.mp4", 120)
    train(clip_config(clip, tmp_path, trunk, epochs=1))
    run("tad", "features", str(clip), "--weights", trunk, "--out", str(tmp_path / "commanded"), capsys=capsys)
    ours, theirs = (np.load(tmp_path / folder / "short.npy") for folder in ("features", "commanded"))
    assert np.array_equal(ours, theirs)


def test_features_are_those_of_every_window_by_itself(trunk, tmp_path):
    from vmae2_fast.inference import load_model

    path = write_untrimmed(tmp_path / "v.mp4", 75)
    model = load_model(trunk, kind="classify").model
    with torch.no_grad():
        alone = torch.cat([model.forward_features(clip[None]) for clip in official_windows(path, 4, 16, 32)]).numpy()
    for batch in (1, 5, 64):
        together = video_features(model, path, ExtractConfig(step=4, resize="squash", normalize="none", batch=batch))[0]
        assert np.abs(together - alone).max() < 1e-5
    mean, std = (torch.tensor(v)[:, None, None, None] for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    with torch.no_grad():
        seen = (official_windows(path, 4, 16, 32) - mean) / std
        coloured = torch.cat([model.forward_features(clip[None]) for clip in seen]).numpy()
    assert np.abs(video_features(model, path, ExtractConfig(step=4, resize="squash"))[0] - coloured).max() < 1e-5
    assert np.abs(coloured - alone).max() > 1e-3


def test_extraction_goes_on_where_it_was_and_refuses_a_mixture(trunk, tmp_path, capsys):
    videos = tmp_path / "videos" / "more"
    videos.mkdir(parents=True)
    for i in range(3):
        write_untrimmed(videos / f"{i}.mp4", 20 + i)
    write_untrimmed(videos.parent / "short.mp4", 3)
    (videos / "broken.mp4").write_bytes(b"no video")
    out = tmp_path / "out"
    command = ("tad", "features", str(videos.parent), "--weights", trunk, "--out", str(out))
    first = run(*command, "--shard", "2/2", capsys=capsys)
    whole = run(*command, capsys=capsys)
    assert (first["written"], whole["written"], whole["skipped"]) == (1, 3, 1)
    assert list(whole["failed"]) == [str(videos / "broken.mp4")]
    times = {p.name: p.stat().st_mtime_ns for p in out.glob("*.npy")}
    assert sorted(times) == ["0.npy", "1.npy", "2.npy", "short.npy"]
    assert np.load(out / "short.npy").shape == (1, 24)
    (out / "1.npy").unlink()
    assert run(*command, capsys=capsys)["written"] == 1
    assert all(p.stat().st_mtime_ns == times[p.name] for p in out.glob("*.npy") if p.name != "1.npy")
    assert not list(out.glob(".*"))
    header = json.loads((out / "features.json").read_text())
    assert (header["normalize"], header["step"], header["frames"], header["weights_file"]) == ("none", 4, 16, trunk)
    assert header["resize"] == "squash"
    for flags, told in (
        (("--normalize", "imagenet"), "normalize: 'none' there, 'imagenet' now"), (("--step", "16"), "step: 4 there, 16 now"),
    ):  # fmt: skip
        assert told in refused(*command, *flags, capsys=capsys)


def test_missing_features_without_a_way_to_take_them_are_named(trunk, tmp_path, clip):
    annotations = tmp_path / "annotations.json"
    entry = {"subset": "validation", "duration": 9.0, "fps": 10.0, "annotations": [{"label": "a", "segment": [1, 2]}]}
    annotations.write_text(json.dumps({"database": {"elsewhere": entry}}))
    data = TadDataConfig(features=str(tmp_path / "features"), annotations=str(annotations), videos=str(clip))
    config = TadConfig(
        name="x", model=ModelConfig(name="vit_small_patch16_224", **TRUNK), data=data, out=str(tmp_path / "runs"),
        detector=ActionFormerConfig(classes=1, width=16), trunk_weights=trunk,
    )  # fmt: skip
    with pytest.raises(TadError, match="no video of elsewhere"):
        train(config)


def test_missing_class_scores_are_said_before_features_are_taken(trunk, tmp_path, clip):
    config = clip_config(clip, tmp_path, trunk, epochs=1)
    parts = {name: dataclasses.replace(getattr(config, name), class_agnostic=True) for name in ("data", "validation")}
    path = tmp_path / "scores.json"
    config = dataclasses.replace(config, video_scores=str(path), **parts)
    command = f"vmae2 tad scores {clip} --weights CLASSIFIER --out {path}"
    with pytest.raises(TadError, match=re.escape(f"are not there; make them first: {command}")):
        train(config)
    path.write_text(json.dumps({"class": ["someone", "nobody"], "results": {"another": [0.5, 0.5]}}))
    with pytest.raises(TadError, match=re.escape(f"no class scores of {clip.stem} (and 0 more); make them first: {command}")):
        train(config)
    stages = (dataclasses.replace(config, name="first", video_scores=None, validation=None), config)
    with pytest.raises(TadError, match="make them first"):
        run_progression(Progression(name="two", stages=stages, out=str(tmp_path / "two")))
    assert not (tmp_path / "features").exists()
    assert not (tmp_path / "two").exists()


def test_bad_input_is_one_line(trunk, tmp_path, capsys):
    good = tmp_path / "d.json"
    good.write_text(json.dumps({"results": {"v": []}}))
    (tmp_path / "empty.json").write_text(json.dumps({"results": {}}))
    video = str(write_untrimmed(tmp_path / "v.mp4", 20))
    for arguments, message in (
        (("tad", "features", "--weights", trunk, "--out", "x"), "needs at least one video"),
        (("tad", "features", "none.mp4", "--weights", trunk, "--out", "x"), "none.mp4: no such video or folder"),
        (("tad", "features", video, "--weights", trunk, "--out", "x", "--shard", "3/2"), "--shard 3/2: give I/N"),
        (("tad", "features", video, "--weights", trunk, "--out", "x", "--step", "0"), "step=0 must be at least 1"),
        (("tad", "scores", video, "--weights", trunk, "--out", "s.txt"), "must end in .json"),
        (("tad", "detect", str(tmp_path)), "config.json"),
        (("tad", "draw", str(good), "--videos", "w", "--out", str(tmp_path / "t.png")), "no detections of w"),
        (("tad", "draw", str(tmp_path / "empty.json"), "--out", str(tmp_path / "t.png")), "holds no video"),
        (("tad", "draw", str(good), "--out", str(tmp_path / "no" / "t.png")), "no such folder"),
        (("tad", "draw", str(good), "--out", "t.png", "--threshold", "nan"), "--threshold nan: must be a number"),
        (("tad", "draw", str(good), "--out", "t.png", "--most", "0"), "--most 0: must be at least 1"),
        (("score", "tad", str(tmp_path / "none.json"), str(good)), "none.json: No such file"),
        (("tad", "feature"), "did you mean tad features"),
    ):
        assert message in refused(*arguments, capsys=capsys)


def test_help_names_the_commands_and_shows_examples(capsys):
    cli.main([])
    assert "tad features" in capsys.readouterr().out
    cli.main(["tad"])
    assert "usage: vmae2 tad COMMAND" in (listed := capsys.readouterr().out)
    assert all(f"  {name} " in listed for name in ("features", "scores", "detect", "draw"))
    for command in (("tad", "features"), ("tad", "scores"), ("tad", "detect"), ("tad", "draw"), ("score", "tad")):
        with pytest.raises(SystemExit):
            cli.main([*command, "--help"])
        assert f"Example: vmae2 {' '.join(command)}" in capsys.readouterr().out


def test_lanes_hold_what_does_not_overlap():
    segments = np.array([[0.0, 4.0], [2.0, 6.0], [4.0, 8.0], [5.0, 7.0], [0.0, 1.0]])
    assert timeline.lanes(segments, np.array([0.9, 0.8, 0.7, 0.6, 0.5])).tolist() == [0, 1, 0, 2, 1]


def test_pictures_of_nothing_and_of_much(tmp_path):
    found = {
        "nothing": Detections(np.zeros((0, 2)), (), np.zeros(0)),
        "much": Detections(np.array([[0.0, 9.0]] * 6), ("a",) * 6, np.linspace(0.9, 0.4, 6)),
    }
    drawn = timeline.draw_timelines(found, {"much": (np.array([[1.0, 2.0]]), ["b"])}, tmp_path / "t.svg", threshold=0.5)
    assert (drawn["detections"], drawn["hidden"]) == (4, 1)
    assert "nothing annotated, nothing detected" in (tmp_path / "t.svg").read_text()  # matplotlib names its glyph groups
