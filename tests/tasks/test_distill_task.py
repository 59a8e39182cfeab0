from __future__ import annotations

import dataclasses
import json

import pytest
import torch
import torch.nn.functional as F

from tests import tiny_runs as tiny
from tests.golden.support import golden_root
from vmae2_fast.data.loader import Batch, VideoViews
from vmae2_fast.models import build_model
from vmae2_fast.models.weights import save_weights
from vmae2_fast.tasks import DistillTask, create_task
from vmae2_fast.tasks.distill import distillation_loss
from vmae2_fast.train.optim import Optimizer

GOLDEN = golden_root()
FILE = GOLDEN / "downstream" / "distill.json"
RECORDED = json.loads(FILE.read_text()) if FILE.exists() else {"cases": {}}
KL_CASES = [name for name in RECORDED["cases"] if name.startswith("kl_batchmean_T") and name.endswith("_times_T2")]


@pytest.fixture
def teacher(tmp_path) -> str:
    torch.manual_seed(5)
    path = tmp_path / "teacher.safetensors"
    save_weights(build_model(tiny.CLASSIFY_MODEL), path)
    return str(path)


def _task(tmp_path, weights, **changes) -> DistillTask:
    torch.manual_seed(0)
    return create_task(tiny.distill_config(tmp_path, tmp_path, weights, **changes))


def _batch(clips: int = 4, seed: int = 0) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    clip = torch.randint(0, 256, (clips, tiny.FRAMES, tiny.SIZE, tiny.SIZE, 3), dtype=torch.uint8, generator=generator)
    zeros = torch.zeros(clips, dtype=torch.int64)
    return Batch(clip, zeros, zeros, zeros, ("x",) * clips, [])


@pytest.mark.parametrize("name", KL_CASES)
def test_recorded_losses(name):
    temperature = float(name.removeprefix("kl_batchmean_T").removesuffix("_times_T2"))
    student, teacher = torch.tensor(RECORDED["student"]), torch.tensor(RECORDED["teacher"])
    assert distillation_loss(student, teacher, temperature).item() / len(student) == pytest.approx(
        RECORDED["cases"][name], rel=1e-5
    )


def test_equal_logits_give_exactly_zero():
    logits = torch.randn(5, 7, requires_grad=True)
    loss = distillation_loss(logits, logits.detach().clone(), 3.0)
    loss.backward()
    assert loss.item() == 0.0
    # T (softmax(s/T) - softmax(t/T)) is zero but for the rounding of one softmax
    assert logits.grad.abs().max() < 3 * torch.finfo(torch.float32).eps


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_gradient_by_its_closed_form(temperature):
    student, teacher = torch.randn(2, 5, 7, generator=torch.Generator().manual_seed(0))
    student.requires_grad_()
    distillation_loss(student, teacher, temperature).backward()
    s, t = student.detach().double(), teacher.double()
    expected = temperature * ((s / temperature).softmax(-1) - (t / temperature).softmax(-1))
    torch.testing.assert_close(student.grad.double(), expected, rtol=1e-5, atol=1e-6)


def test_the_student_comes_to_agree_and_the_teacher_stays(tmp_path, teacher):
    task = _task(tmp_path, teacher)
    frozen = {n: t.clone() for n, t in task.teacher.state_dict().items()}
    optimizer = Optimizer(task.model, task.config.optim, global_batch=8, total_steps=60, steps_per_epoch=60)
    losses = []
    for step in range(60):
        optimizer.zero_grad()
        out = task.loss(_batch(8, seed=step % 4))
        loss = out["loss_sum"] / 8
        loss.backward()
        optimizer.step(step, loss)
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 5
    assert all(torch.equal(frozen[n], t) for n, t in task.teacher.state_dict().items())
    assert all(p.grad is None for p in task.teacher.parameters())
    assert not task.teacher.training


def test_label_term_is_added(tmp_path, teacher):
    batch = _batch()
    plain = _task(tmp_path, teacher)
    with_labels = _task(tmp_path, teacher, label_weight=0.5)
    expected = plain.loss(batch)["loss_sum"] + 0.5 * F.cross_entropy(plain.model(batch.clip), batch.label, reduction="sum")
    assert with_labels.loss(batch)["loss_sum"].item() == pytest.approx(expected.item(), rel=1e-6)


def test_evaluation_reports_agreement(tmp_path, teacher):
    task = _task(tmp_path, teacher)
    clips = _batch(8).clip
    videos = [VideoViews(c[None], i % 2, f"video{i}", i) for i, c in enumerate(clips)]
    metrics = task.evaluate(videos)
    with torch.no_grad():
        ours, theirs = task.model(clips).argmax(-1), task.teacher(clips).argmax(-1)
    assert metrics["agreement"] == (ours == theirs).double().mean().item()
    assert metrics["teacher_top1"] == (theirs == torch.arange(8) % 2).double().mean().item()
    assert metrics["top1"] == (ours == torch.arange(8) % 2).double().mean().item()
    task.model = task.teacher
    assert task.evaluate(videos)["agreement"] == 1.0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_classes": 5}, "teacher.num_classes=5 differs from model.num_classes=2"),
        ({"frames": 16}, "teacher.frames=16 differs from model.frames=8"),
    ],
)
def test_a_teacher_that_does_not_fit_is_an_error(tmp_path, teacher, change, message):
    with pytest.raises(ValueError, match=message):
        _task(tmp_path, teacher, teacher=dataclasses.replace(tiny.CLASSIFY_MODEL, **change))


def test_a_teacher_without_weights_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="set teacher_weights"):
        _task(tmp_path, None)


def test_a_random_teacher_on_request_is_that_of_the_seed(tmp_path):
    ours, again = (_task(tmp_path, "random").teacher.state_dict() for _ in range(2))
    assert all(torch.equal(ours[n], again[n]) for n in ours)
