"""Temporal detection on the one loop: it learns, it resumes bit for bit, its averages are what is written and evaluated."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from safetensors.torch import load_file

from tests.tiny_runs import TAD_DETECTOR as DETECTOR
from tests.tiny_runs import TAD_TRUNK as TRUNK
from tests.tiny_runs import metrics_without_time
from tests.tiny_runs import tad_config as config
from tests.tiny_runs import tad_data as data
from vmae2_fast.config import DetectionConfig
from vmae2_fast.data.synthetic_tad import write_tad_features
from vmae2_fast.tasks import TadTask, create_task
from vmae2_fast.train import loop, train
from vmae2_fast.train.loop import accumulate
from vmae2_fast.train.optim import Optimizer
from vmae2_fast.train.saver import Saver


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    root = tmp_path_factory.mktemp("tad") / "data"
    write_tad_features(root)
    return root


def test_learns_to_detect_in_sequences_it_has_not_seen(toy, tmp_path):
    """24 epochs of 24 sequences on one thread; average mAP from .3 to .7 on 12 others."""
    summary = train(config(toy, tmp_path, epochs=24))
    found = summary["validation"]
    assert found["average_map"] >= 0.95
    assert found["events"] > 30
    assert summary["classes"] == ["circling", "jumping", "waving"]
    kept = load_file(tmp_path / "toy" / "best.safetensors")
    assert all(torch.equal(value, kept[key]) for key, value in load_file(summary["weights"]).items())


def test_a_killed_run_goes_on_with_the_same_bits(toy, tmp_path, monkeypatch):
    def stopped(*arguments, **keywords):
        raise KeyboardInterrupt

    whole = train(config(toy, tmp_path / "whole"))
    with monkeypatch.context() as patch:
        saves = []

        def save_once(*arguments, **keywords):
            saves.append(1)
            if len(saves) > 1:
                stopped()
            return keep(*arguments, **keywords)

        keep = Saver.save
        patch.setattr(Saver, "save", save_once)
        with pytest.raises(KeyboardInterrupt):
            train(config(toy, tmp_path / "killed"))
    again = train(config(toy, tmp_path / "killed"))
    ours, theirs = (load_file(run["weights"]) for run in (again, whole))
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    assert "normalizer" in theirs
    assert theirs["normalizer"] != DETECTOR.initial_normalizer
    assert again["validation"] == whole["validation"]
    lines = [metrics_without_time(tmp_path / name / "toy" / "metrics.jsonl") for name in ("killed", "whole")]
    assert lines[0] == lines[1]


def test_written_and_evaluated_weights_are_the_moving_average(toy, tmp_path):
    """Against an average kept by hand over the same run without one."""
    trained = config(toy, tmp_path, epochs=1)
    seen: list[dict[str, torch.Tensor]] = []

    class Watched(Optimizer):
        def __init__(self, model, *arguments, **keywords):
            super().__init__(model, *arguments, **keywords)
            seen.append({k: p.detach().clone() for k, p in self.params.items()})

        def step(self, *arguments):
            out = super().step(*arguments)
            seen.append({k: p.detach().clone() for k, p in self.params.items()})
            return out

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "Optimizer", Watched)
        summary = train(trained)
    written = load_file(summary["weights"])
    for key, average in seen[0].items():
        average = average.double()
        for step in seen[1:]:
            average = 0.95 * average + 0.05 * step[key].double()
        torch.testing.assert_close(written[key].double(), average, rtol=1e-5, atol=1e-7)


def test_accumulated_gradients_are_those_of_the_whole_batch(toy, tmp_path):
    run = config(toy, tmp_path, detector=dataclasses.replace(DETECTOR, drop_path=0.0))
    results = []
    for micro in (4, 2, 1):
        torch.manual_seed(0)
        task = create_task(run)
        loader = task.training_loader(micro)
        loader.steps = 4 // micro
        with loader:
            sums, _ = accumulate(task, iter(loader), 4 // micro, 4)
        results.append((sums["loss"], task.model.normalizer, {n: p.grad for n, p in task.model.named_parameters()}))
    for loss, normalizer, gradients in results[1:]:
        torch.testing.assert_close(loss, results[0][0])
        assert torch.equal(normalizer, results[0][1])
        for name, gradient in gradients.items():
            torch.testing.assert_close(gradient, results[0][2][name], rtol=1e-4, atol=1e-6, msg=name)


def test_a_batch_without_actions_has_a_loss_and_finite_gradients(toy, tmp_path):
    task = create_task(config(toy, tmp_path))
    assert isinstance(task, TadTask)
    loader = task.training_loader(2)
    loader.steps = 1
    with loader:
        (batch,) = loader
    silent = batch._replace(classes=torch.zeros_like(batch.classes), distances=torch.zeros_like(batch.distances))
    assert float(task.count([silent])) == 0
    normalizer = task.denominator(task.count([silent]))
    assert float(normalizer) == pytest.approx(0.9 * 20 + 0.1)
    out = task.loss(silent)
    assert float(out["distance_loss"]) == 0
    (out["loss_sum"] / normalizer).backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in task.model.parameters())


def test_class_agnostic_detections_take_the_classes_of_their_videos(toy, tmp_path):
    run = config(
        toy, tmp_path, epochs=6, data=data(toy, class_agnostic=True, resize_to=128),
        validation=data(toy, "test", class_agnostic=True, resize_to=128),
        detector=dataclasses.replace(DETECTOR, classes=1), video_scores=str(toy / "video_scores.json"),
        detection=DetectionConfig(per_class=False, sigma=0.75, limit=100, voting_threshold=0.9, fused_classes=3),
        benchmark="fineaction", label_smoothing=0.1,
    )  # fmt: skip
    found = train(run)["validation"]
    assert set(found["per_class"]) == {"circling", "jumping", "waving"}
    assert found["detections"] <= 12 * 100 * 3
    # The classes are known only by how much of a video they fill, so many are wrong; far above what chance gives.
    assert found["map"]["0.50"] > 0.2


def test_what_does_not_fit_is_said_before_training(toy, tmp_path):
    scores = json.loads((toy / "video_scores.json").read_text())
    scores["results"].pop("test_030")
    (tmp_path / "scores.json").write_text(json.dumps(scores))
    agnostic: dict[str, bool] = {"class_agnostic": True}
    one = dataclasses.replace(DETECTOR, classes=1)
    for changes, message in (
        ({"detector": dataclasses.replace(DETECTOR, classes=20)}, "has 3 classes, detector.classes=20; set it to 3"),
        ({"detector": dataclasses.replace(DETECTOR, inputs=24)}, "features of vit_small_patch16_224 have 16 channels"),
        ({"data": data(toy, features=str(tmp_path / "none"))}, "none does not exist"),
        ({"validation": data(toy, "test", block_list=("test_001",))}, "block_list names 'test_001'"),
        ({"data": data(toy, stride=16), "model": dataclasses.replace(TRUNK, width=24)}, "16 channels, the detector takes 24"),
        (
            {"data": data(toy, **agnostic), "validation": data(toy, "test", **agnostic), "detector": one,
             "video_scores": str(tmp_path / "scores.json")},
            "no class scores of test_030",
        ),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            train(config(toy, tmp_path / "runs", **changes))
        assert not (tmp_path / "runs" / "toy").exists()  # nothing half-made stays
    for changes, message in (
        ({"data": data(toy, **agnostic)}, "set detector.classes to 1"),
        ({"data": data(toy, **agnostic), "detector": one}, "must be the same"),
        ({"data": data(toy, **agnostic), "validation": data(toy, **agnostic), "detector": one}, "needs video_scores"),
        ({"data": data(toy, resize_to=500)}, "detector.max_length=128 is shorter"),
    ):
        with pytest.raises(ValueError, match=message):
            config(toy, tmp_path, **changes)
