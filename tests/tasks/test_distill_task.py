from __future__ import annotations

import dataclasses
import json
import re

import pytest
import torch
import torch.nn.functional as F

from tests import tiny_runs as tiny
from tests.golden.support import golden_root
from vmae2_fast.data import Batch, VideoViews
from vmae2_fast.models import build_model
from vmae2_fast.models.weights import save_weights
from vmae2_fast.tasks import DistillTask, create_task
from vmae2_fast.tasks.distill import deit_loss, distillation_loss, feature_loss, resize_tokens, soft_cross_entropy
from vmae2_fast.train.optim import Optimizer

GOLDEN = golden_root()
FILE = GOLDEN / "downstream" / "distill.json"
RECORDED = json.loads(FILE.read_text()) if FILE.exists() else {"cases": {}}
FORMS = {
    r"kl_batchmean_T([\d.]+)_times_T2": lambda s, t, label, T: distillation_loss(s, t, float(T)),
    r"soft_ce_T1": lambda s, t, label: soft_cross_entropy(s, t),
    r"deit_soft_T([\d.]+)_alpha([\d.]+)": lambda s, t, label, T, a: deit_loss(
        s, t, label, hard=False, alpha=float(a), temperature=float(T)
    ),
    r"deit_hard_alpha([\d.]+)": lambda s, t, label, a: deit_loss(s, t, label, hard=True, alpha=float(a)),
}


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


@pytest.mark.parametrize("name", RECORDED["cases"])
def test_recorded_losses(name):
    student, teacher, label = (torch.tensor(RECORDED[key]) for key in ("student", "teacher", "labels"))
    (found,) = [form(student, teacher, label, *m.groups()) for key, form in FORMS.items() if (m := re.fullmatch(key, name))]
    assert found.item() / len(student) == pytest.approx(RECORDED["cases"][name], rel=1e-5)


MVD = RECORDED.get("mvd", {})
INPUTS = ("student_feats", "teacher_feats", "masked")


@pytest.mark.parametrize("key", [key for key in MVD if key not in INPUTS])
def test_recorded_feature_losses(key):
    case = MVD
    distance, normalized, _ = key.partition("_teacher_layernorm")
    student, teacher, masked = (torch.tensor(case[name]) for name in INPUTS)
    hidden = torch.stack([tokens[mask] for tokens, mask in zip(teacher, masked)])
    found = feature_loss(student, hidden, normalize=bool(normalized), distance=distance).item() / masked.sum().item()
    assert found == pytest.approx(case[key], rel=1e-5)


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


def test_a_teacher_of_other_classes_is_an_error_not_a_random_head(tmp_path):
    save_weights(build_model(dataclasses.replace(tiny.CLASSIFY_MODEL, num_classes=5)), tmp_path / "five.safetensors")
    with pytest.raises(ValueError, match=r"has no head for teacher.num_classes=2 \(head: 5 classes dropped\)"):
        _task(tmp_path, str(tmp_path / "five.safetensors"))


def test_a_random_teacher_on_request_is_that_of_the_seed(tmp_path):
    ours, again = (_task(tmp_path, "random").teacher.state_dict() for _ in range(2))
    assert all(torch.equal(ours[n], again[n]) for n in ours)


@pytest.mark.parametrize("objective", ["soft_ce", "deit_soft", "deit_hard"])
def test_other_objectives_by_their_functions(objective, tmp_path, teacher):
    task, batch = _task(tmp_path, teacher, objective=objective, alpha=0.3), _batch()
    student, target = task.model(batch.clip), task.teacher(batch.clip)
    expected = {
        "soft_ce": lambda: soft_cross_entropy(student, target),
        "deit_soft": lambda: deit_loss(student, target, batch.label, hard=False, alpha=0.3),
        "deit_hard": lambda: deit_loss(student, target, batch.label, hard=True, alpha=0.3),
    }[objective]()
    assert task.loss(batch)["loss_sum"].item() == pytest.approx(expected.item(), rel=1e-6)
    assert task.needs_labels() == objective.startswith("deit")


def test_cached_logits_are_those_of_the_live_teacher(tmp_path, teacher):
    live = _task(tmp_path, teacher)
    fill = _task(tmp_path, teacher, teacher_cache=str(tmp_path / "cache"))
    paths = tuple(f"clip{i}" for i in range(4))
    batches = [_batch(4, seed=n)._replace(position=torch.arange(4) + 4 * n, paths=paths) for n in range(3)]
    for batch in batches:
        fill.loss(batch)
    read = _task(tmp_path, teacher, teacher_cache=str(tmp_path / "cache"))
    asked = []
    read.teacher.register_forward_hook(lambda *_: asked.append(1))
    for batch in batches:
        assert torch.equal(read.loss(batch)["loss_sum"], live.loss(batch)["loss_sum"])
    assert not asked
    read.loss(batches[0]._replace(paths=("other", *batches[0].paths[1:])))  # another clip at this place
    read.loss(_batch(4, seed=9)._replace(position=torch.arange(100, 104)))  # never seen
    assert len(asked) == 2


def test_a_torn_record_of_the_cache_is_computed_again(tmp_path, teacher):
    cache = tmp_path / "cache"
    batch = _batch(4)._replace(position=torch.arange(4))
    expected = _task(tmp_path, teacher, teacher_cache=str(cache)).loss(batch)["loss_sum"]
    whole = (cache / "logits.bin").read_bytes()
    for damaged in (whole[:-3], whole[:5] + bytes([whole[5] ^ 1]) + whole[6:]):
        (cache / "logits.bin").write_bytes(damaged)
        task = _task(tmp_path, teacher, teacher_cache=str(cache))
        assert task.cache.read(batch.position, batch.view, batch.paths) is None
        assert torch.equal(task.loss(batch)["loss_sum"], expected)
        assert (cache / "logits.bin").read_bytes() == whole


@pytest.mark.parametrize(("change", "named"), [({"seed": 1}, "seed"), ({"weights": "random"}, "teacher")])
def test_a_cache_of_other_clips_or_another_teacher_is_refused(change, named, tmp_path, teacher):
    _task(tmp_path, teacher, teacher_cache=str(tmp_path / "cache"))
    with pytest.raises(ValueError, match=rf"holds logits of other clips or another teacher \({named} differ"):
        _task(tmp_path, **{"weights": teacher, **change, "teacher_cache": str(tmp_path / "cache")})


def _feature_task(tmp_path, weights, **changes) -> DistillTask:
    return _task(tmp_path, weights, objective="features", model=tiny.PRETRAIN_MODEL, **changes)


def test_features_of_hidden_tokens_are_learned(tmp_path, teacher):
    task = _feature_task(tmp_path, teacher)
    assert task.static_count(3) == 3 * task._mask(torch.arange(1), torch.zeros(1, dtype=torch.int64)).loss_index.shape[1]
    batch = _batch(4)
    mask = task._mask(batch.position, batch.view)
    with torch.no_grad():
        target = F.layer_norm(task.teacher.tokens(batch.clip), (16,), eps=1e-6)
        expected = sum(
            F.smooth_l1_loss(p, t[rows.long()], reduction="mean") * len(rows)
            for p, t, rows in zip(task.model(batch.clip, mask), target, mask.loss_index)
        )
    assert task.loss(batch)["loss_sum"].item() == pytest.approx(expected.item(), rel=1e-5)
    optimizer = Optimizer(task.model, task.config.optim, global_batch=4, total_steps=60, steps_per_epoch=60)
    losses = []
    for step in range(60):
        optimizer.zero_grad()
        loss = task.loss(batch)["loss_sum"] / task.static_count(4)
        loss.backward()
        optimizer.step(step, loss)
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    videos = [VideoViews(c[None], 0, f"video{i}", i) for i, c in enumerate(_batch(3).clip)]
    assert 0 < task.evaluate(videos)["loss"] < losses[0]


def test_the_teachers_grid_is_resized_to_the_students(tmp_path):
    """Bilinear between patch sizes, as torch resizes an image of tokens; the same grid is left alone."""
    tokens = torch.randn(2, 4 * 8 * 8, 5)
    assert resize_tokens(tokens, (4, 8, 8), (4, 8, 8)) is tokens
    images = tokens.view(2 * 4, 8, 8, 5).permute(0, 3, 1, 2)
    expected = F.interpolate(images, (7, 7), mode="bilinear", align_corners=False).permute(0, 2, 3, 1).reshape(2, -1, 5)
    torch.testing.assert_close(resize_tokens(tokens, (4, 8, 8), (4, 7, 7)), expected)


def test_a_student_of_another_patch_size_learns_features(tmp_path):
    """Patch 4 of the teacher against 8 of the student."""
    teacher = dataclasses.replace(tiny.CLASSIFY_MODEL, patch=4, width=24, num_classes=0, drop_path=0.0)
    task = _feature_task(tmp_path, "random", teacher=teacher)
    assert (task.teacher.grid, task.model.grid) == ((4, 8, 8), (4, 4, 4))
    task.loss(_batch(2))["loss_sum"].backward()
    assert task.model.decoder.head.weight.grad.shape == (24, 16)
    assert all(p.grad is None for p in task.teacher.parameters())


def test_a_pretrained_student_loses_only_its_pixel_head(tmp_path, teacher):
    torch.manual_seed(1)
    save_weights(build_model(tiny.PRETRAIN_MODEL), tmp_path / "pixels.safetensors")
    task = _feature_task(tmp_path, teacher)
    from vmae2_fast.models import load_weights

    report = load_weights(task.model, tmp_path / "pixels.safetensors")
    assert set(report.initialised) == set(report.dropped) == {"decoder.head.weight", "decoder.head.bias"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": tiny.CLASSIFY_MODEL}, r"needs a pretrain_videomae_\* student"),
        ({"model": dataclasses.replace(tiny.PRETRAIN_MODEL, decoder_outputs=7)}, "decoder_outputs=7, the teacher is 16 wide"),
        ({"teacher_cache": "x"}, "teacher_cache: holds logits"),
    ],
)
def test_feature_mode_that_does_not_fit_is_an_error(change, message, tmp_path, teacher):
    with pytest.raises(ValueError, match=message):
        _task(tmp_path, teacher, objective="features", **{"model": tiny.PRETRAIN_MODEL, **change})
