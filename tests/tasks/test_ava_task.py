"""Action detection end to end on encoded scenes: what is learned, what is pooled, what bad input does."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional as F

from tests.tiny_runs import AVA_MODEL as MODEL
from tests.tiny_runs import ava_config as config
from vmae2_fast import cli
from vmae2_fast.config import AvaConfig, ModelConfig, TrainConfig, save
from vmae2_fast.data import decode_video
from vmae2_fast.data.ava import ACTIONS, AvaError, read_annotations, read_results, write_results
from vmae2_fast.data.ava_loader import AvaBatch
from vmae2_fast.data.loader import BadDataError
from vmae2_fast.data.synthetic_ava import COLOURS, write_ava_scenes
from vmae2_fast.models import build_model, load_weights, save_weights
from vmae2_fast.models.detect import Detector
from vmae2_fast.tasks import create_task
from vmae2_fast.tasks.metrics.ava import score_files
from vmae2_fast.train.loop import train


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_ava_scenes(tmp_path_factory.mktemp("ava") / "scenes", train=64, val=16)


def test_a_class_that_lies_inside_the_box_is_learned(scenes: Path, tmp_path: Path) -> None:
    run = config(scenes, tmp_path)
    summary = train(run)
    metrics = summary["validation"]
    assert metrics["frame_map"] >= 0.95
    assert metrics["boxes"] == 32  # the low-scored ones are left out
    assert summary["classes"][11] == COLOURS[12][0]
    assert summary["classes"][1] == "2"
    assert (tmp_path / "toy_ava" / "best.safetensors").exists()

    task = create_task(run)
    task.model.load_state_dict(_weights(summary["weights"]))
    with task.validation_views() as views:
        rows = list(task.detections(views))
    write_results(tmp_path / "det.csv", rows)
    again = score_files(scenes / "val.csv", tmp_path / "det.csv", labels=scenes / "labels.pbtxt")
    assert again["frame_map"] == pytest.approx(metrics["frame_map"], abs=0.02)  # five decimals make ties
    cli.main(["detect", "ava", str(tmp_path / "toy_ava"), "--out", str(tmp_path / "best.csv")])
    assert len((tmp_path / "best.csv").read_text().splitlines()) == 32 * ACTIONS
    best_map = score_files(scenes / "val.csv", tmp_path / "best.csv", labels=scenes / "labels.pbtxt")["frame_map"]
    assert best_map == pytest.approx(metrics["frame_map"], abs=0.02)
    # The two boxes of a clip get different classes.
    truth = read_annotations(scenes / "val.csv")
    best: dict[tuple, tuple[float, int]] = {}
    for frame, box, action, score in rows:
        key = frame, tuple(np.round(box, 4))
        best[key] = max(best.get(key, (0.0, 0)), (score, action))
    right = [best[f, tuple(np.round(b, 4))][1] == a for f, b, a in zip(truth.frames, truth.boxes, truth.actions)]
    assert np.mean(right) >= 0.95


def _weights(path: str) -> dict[str, torch.Tensor]:
    return load_file(path)


def test_resuming_gives_the_same_bits(scenes: Path, tmp_path: Path) -> None:
    short = TrainConfig(epochs=1, global_batch=8, threads=1, checkpoint_every=4, log_every=4)
    plain = dataclasses.replace(config(scenes, tmp_path).optim, warmup_epochs=0.0)
    straight = train(config(scenes, tmp_path / "a", train=short, optim=plain))
    broken = config(scenes, tmp_path / "b", train=short, optim=plain)
    train(broken)
    folder = tmp_path / "b" / "toy_ava"
    (folder / "done.json").unlink()
    (folder / "weights.safetensors").unlink()
    newest = sorted((folder / "checkpoints").iterdir())[-1]
    for file in newest.iterdir():
        file.unlink()
    newest.rmdir()
    resumed = train(broken)
    ours, theirs = _weights(resumed["weights"]), _weights(straight["weights"])
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


def test_loss_by_its_formula_and_micro_batches(scenes: Path, tmp_path: Path) -> None:
    task = create_task(config(scenes, tmp_path))
    clip = torch.randint(0, 256, (2, 4, 48, 48, 3), dtype=torch.uint8)
    boxes = torch.tensor([[0, 3.0, 4, 20, 30], [1, 10, 10, 40, 40], [1, 0, 0, 47, 47]])
    label = (torch.rand(3, ACTIONS) < 0.1).float()
    out = task.loss(AvaBatch(clip, boxes, label, ("a", "b"), []))
    logits = task.model(clip, boxes)
    expected = 3 * F.binary_cross_entropy_with_logits(logits, label)
    assert out["loss_sum"].item() == pytest.approx(expected.item(), rel=1e-5)
    assert task.static_count(2) == 2
    alone = [
        task.loss(AvaBatch(clip[i : i + 1], boxes[rows] * torch.tensor([0.0, 1, 1, 1, 1]), label[rows], ("a",), []))
        for i, rows in enumerate(([0], [1, 2]))
    ]
    assert sum(part["loss_sum"].item() for part in alone) == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize(("name", "patch"), [("vit_giant_patch14_224", 14), ("vit_base_patch16_224", 16)])
def test_any_size_with_the_native_table(name: str, patch: int) -> None:
    model = Detector(ModelConfig(name=name, num_classes=ACTIONS, pooling="first", depth=1, width=32, heads=2, frames=4)).eval()
    native = model.position_table(224 // patch, 224 // patch, torch.device("cpu"))
    assert torch.equal(native, model.positions.table)
    clip = torch.randint(0, 256, (1, 4, 64, 115, 3), dtype=torch.uint8)
    boxes = torch.tensor([[0.0, 5, 5, 60, 50]])
    with torch.no_grad():
        assert model.features(clip).shape == (1, -(-64 // patch), -(-115 // patch), 32)
        scores = model(clip, boxes)
        mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
        normalised = ((clip.float() / 255 - mean) / std).permute(0, 4, 1, 2, 3).contiguous()
        assert torch.allclose(scores, model(normalised, boxes), atol=1e-5)
    assert scores.shape == (1, ACTIONS)
    with pytest.raises(ValueError, match="this detector takes uint8"):
        model(clip[:, :3], boxes)
    with pytest.raises(ValueError, match="a detector needs num_classes"):
        Detector(ModelConfig(name=name, num_classes=ACTIONS))


@pytest.mark.parametrize("from_head", [False, True])
def test_starts_from_a_fine_tuned_classifier(from_head: bool, tmp_path: Path) -> None:
    classifier = build_model(dataclasses.replace(MODEL, pooling="mean", num_classes=7))
    torch.nn.init.normal_(classifier.fc_norm.weight)
    save_weights(classifier, tmp_path / "c.safetensors")
    detector = Detector(MODEL, norm_from_head=from_head)
    report = load_weights(detector, tmp_path / "c.safetensors")
    assert torch.equal(detector.blocks[0].mlp.fc1.weight, classifier.blocks[0].mlp.fc1.weight)
    expected = classifier.fc_norm.weight if from_head else torch.ones(48)
    assert torch.equal(detector.norm.weight, expected)
    assert {"head.weight", "head.bias"} <= set(report.initialised)


def _changed(scenes: Path, tmp_path: Path, **changes) -> AvaConfig:
    plain = config(scenes, tmp_path)
    return dataclasses.replace(plain, data=dataclasses.replace(plain.data, **changes), validation=None)


def test_people_of_a_video_of_ones_own_are_detected_and_drawn(
    scenes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """No annotations: the key frames are those of the boxes. A real clip where VMAE2_CLIPS has it."""
    pytest.importorskip("PIL")
    given = Path(os.environ.get("VMAE2_CLIPS", "")) / "one_by_one_person.mp4"
    real = bool(os.environ.get("VMAE2_CLIPS")) and given.is_file()
    clip = given if real else scenes / "videos" / "scene_0000.mp4"
    run = config(scenes, tmp_path)
    folder = tmp_path / "run"
    folder.mkdir()
    save(run, folder / "config.json")
    save_weights(create_task(run).model, folder / "weights.safetensors")
    people = tmp_path / "people.csv"
    people.write_text(f"{clip.stem},1,0.2,0.1,0.6,0.9,0.9\n{clip.stem},1,0.5,0.2,0.9,0.9,0.95\n{clip.stem},2,0,0,1,1,0.5\n")
    out, picture = tmp_path / "det.csv", tmp_path / "drawn.mp4"
    cli.main(["detect", "ava", str(folder), "--videos", str(clip), "--boxes", str(people), "--out", str(out), "--json"])
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["rows"] == 2 * ACTIONS  # the third person scores too little
    found = read_results(out)
    assert set(found.frames) == {f"{clip.stem},0001"}
    assert {tuple(box) for box in found.boxes.tolist()} == {(0.2, 0.1, 0.6, 0.9), (0.5, 0.2, 0.9, 0.9)}
    cli.main(["draw", "ava", str(clip), str(out), "--threshold", "0", "--begin", "0.9", "--end", "1.1", "--out", str(picture)])
    first = decode_video(str(picture), np.asarray([0])).astype(int)[0]
    assert (np.abs(first - first.mean((0, 1))).max(-1) > 60).any()
    for arguments, message in (
        (["--videos", str(clip)], "--videos and --boxes go together"),
        (["--videos", "gone.mp4", "--boxes", str(people)], "gone.mp4: no such video"),
        (["--videos", str(scenes), "--boxes", str(people)], "holds no video of"),
        (["--videos", str(clip), "--boxes", "gone.csv"], "gone.csv: cannot be read"),
    ):
        with pytest.raises(SystemExit) as stop:
            cli.main(["detect", "ava", str(folder), "--out", str(tmp_path / "no.csv"), *arguments])
        assert stop.value.code == 2
        assert message in capsys.readouterr().err
    assert not (tmp_path / "no.csv").exists()


def test_what_cannot_be_trained_on_is_one_error(scenes: Path, tmp_path: Path) -> None:
    (tmp_path / "gone.csv").write_text("nobody,0001,0.1,0.1,0.5,0.5,1,0\n")
    (tmp_path / "late.csv").write_text("scene_0000,0009,0.1,0.1,0.5,0.5,1,0\n" * 2)
    for changes, message in (
        ({"videos": str(tmp_path / "none")}, "does not exist"),
        ({"annotations": ""}, "give data.annotations"),
        ({"annotations": str(tmp_path / "gone.csv")}, "holds no video of nobody"),
    ):
        with pytest.raises(AvaError, match=message):
            create_task(_changed(scenes, tmp_path, **changes)).training_loader(1)
    with (
        create_task(_changed(scenes, tmp_path, annotations=str(tmp_path / "late.csv"))).training_loader(1) as loader,
        pytest.raises(BadDataError, match="key frame at 9 s lies outside the video"),
    ):
        next(iter(loader))
