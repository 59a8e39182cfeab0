from __future__ import annotations

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from tests import tiny_runs as tiny
from vmae2_fast.config import MaskConfig
from vmae2_fast.data import Batch, VideoViews
from vmae2_fast.tasks import PretrainTask, create_task
from vmae2_fast.tasks.pretrain import nearest_visible
from vmae2_fast.train.optim import Optimizer


def _task(tmp_path, **changes) -> PretrainTask:
    torch.manual_seed(0)
    return create_task(tiny.pretrain_config(tmp_path, tmp_path, **changes))


def _batch(clips: int = 3, seed: int = 0) -> Batch:
    clip = torch.randint(
        0, 256, (clips, tiny.FRAMES, tiny.SIZE, tiny.SIZE, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed)
    )
    position = torch.arange(clips) + 10
    return Batch(clip, torch.full((clips,), -1), position, torch.zeros(clips, dtype=torch.int64), ("x",) * clips, [])


def _videos(count: int = 3, views: int = 2) -> list[VideoViews]:
    clips = _batch(count * views).clip.view(count, views, tiny.FRAMES, tiny.SIZE, tiny.SIZE, 3)
    return [VideoViews(c, -1, f"video{i}", i) for i, c in enumerate(clips)]


@pytest.mark.parametrize("decoder", ["running_cell", "none", "random", "tube", "frame"])
@pytest.mark.parametrize("denominator", ["code", "paper"])
def test_the_count_is_that_of_the_loss_op(tmp_path, decoder, denominator):
    task = _task(tmp_path, mask=MaskConfig(encoder_ratio=0.75, decoder=decoder))
    task.config = tiny.with_train(task.config, loss_denominator=denominator)
    batch = _batch(4)
    mask = task.masks(batch.position, batch.view)
    expected = 4 * mask.decode_index.shape[1] if denominator == "paper" else int((mask.loss_index >= 0).sum())
    static = task.static_count(4)
    assert (static if static is not None else task.count([batch]).item()) == expected
    if denominator == "code" and decoder == "random":
        assert static is None


def test_loss_and_masks_do_not_depend_on_the_batch_split(tmp_path):
    task = _task(tmp_path)
    batch = _batch(4)
    whole = task.loss(batch)["loss_sum"]
    parts = [task.loss(Batch(*(x[i : i + 1] for x in batch[:4]), batch.paths[:1], []))["loss_sum"] for i in range(4)]
    assert torch.stack(parts).sum().item() == pytest.approx(whole.item(), rel=1e-5)


def test_step_reads_no_device_value(tmp_path):
    """Under FakeTensorMode `.item()`, nonzero and boolean indexing raise: none is around the ops, from clip to updated
    weights. Inside them, where fake tensors do not go: tests/ops/test_no_host_sync.py."""
    task = _task(tmp_path)
    with FakeTensorMode() as mode:
        for module in task.model.modules():
            for held in (module._parameters, module._buffers):
                held.update({name: mode.from_tensor(tensor) for name, tensor in held.items() if tensor is not None})
        optimizer = Optimizer(task.model, task.config.optim, global_batch=2, total_steps=10, steps_per_epoch=10)
        batch = Batch(
            torch.empty(2, tiny.FRAMES, tiny.SIZE, tiny.SIZE, 3, dtype=torch.uint8), torch.empty(2, dtype=torch.int64),
            torch.empty(2, dtype=torch.int64), torch.empty(2, dtype=torch.int64), ("x", "y"), [],
        )  # fmt: skip
        loss = task.loss(batch)["loss_sum"] / task.static_count(2)
        loss.backward()
        norm, skipped = optimizer.step(3, loss)
    assert norm.shape == skipped.shape == ()
    assert optimizer.state_tensors().keys() == {
        f"{n}.{k}" for n, _ in task.model.named_parameters() for k in ("step", "exp_avg", "exp_avg_sq")
    }


def test_nearest_visible_equals_a_search(tmp_path):
    task = _task(tmp_path)
    mask = task.masks(torch.arange(5), torch.zeros(5, dtype=torch.int64))
    found = nearest_visible(mask.visible_index, mask.loss_index, task.grid)

    def place(token):
        return np.array(np.unravel_index(token, task.grid))

    for b in range(5):
        visible = mask.visible_index[b].tolist()
        for slot, token in zip(found[b].tolist(), mask.loss_index[b].tolist()):
            distances = [((place(v) - place(token)) ** 2).sum() for v in visible]
            assert slot == distances.index(min(distances))


def test_evaluation_against_predictors_written_out(tmp_path):
    task = _task(tmp_path)
    videos = _videos()
    metrics = task.evaluate(videos)
    assert metrics == task.evaluate(videos)
    zero, copied, count = 0.0, 0.0, 0
    for video in videos:
        for view, clip in enumerate(video.clips):
            mask = task.masks(torch.tensor([video.index]), torch.tensor([view]))
            pixels = clip.double() / 255
            # [T', H', W', pixels of a patch, C]
            tubes = pixels.unfold(0, 2, 2).unfold(1, 8, 8).unfold(2, 8, 8).permute(0, 1, 2, 4, 5, 6, 3).reshape(64, -1, 3)
            target = (tubes - tubes.mean(1, keepdim=True)) / (tubes.std(1, keepdim=True) + 1e-6)
            slots = nearest_visible(mask.visible_index, mask.loss_index, task.grid)[0]
            for token, slot in zip(mask.loss_index[0].tolist(), slots.tolist()):
                zero += target[token].square().mean().item()
                copied += (target[mask.visible_index[0, slot]] - target[token]).square().mean().item()
                count += 1
    assert metrics["clips"] == 6
    assert metrics["zero_predictor"] == pytest.approx(zero / count, rel=1e-5)
    assert metrics["copy_nearest"] == pytest.approx(copied / count, rel=1e-5)
    assert metrics["ratio_to_zero_predictor"] == metrics["loss"] / metrics["zero_predictor"]


def test_evaluation_does_not_depend_on_its_batch(tmp_path):
    task = _task(tmp_path)
    small = task.evaluate(_videos())
    task.config = tiny.with_train(task.config, global_batch=5)
    assert task.evaluate(_videos()) == pytest.approx(small, rel=1e-6)


def test_a_classification_model_is_an_error(tmp_path):
    with pytest.raises(ValueError, match=r"tiny_pretrain: pre-training needs a pretrain_videomae_\* model"):
        _task(tmp_path, model=tiny.CLASSIFY_MODEL)


def test_nothing_to_evaluate_is_an_error(tmp_path):
    task = _task(tmp_path)
    with pytest.raises(ValueError, match="no decodable video"):
        task.evaluate([])
    with pytest.raises(ValueError, match=r"config\.validation is not set"):
        task.validation_views()


def test_bfloat16_autocast_stays_near_float32(tmp_path, monkeypatch):
    task = _task(tmp_path)
    full = task.loss(_batch())["loss_sum"]
    task.dtype = torch.bfloat16
    half = task.loss(_batch())["loss_sum"]
    assert half.dtype == torch.float32
    assert 0 < abs(half.item() - full.item()) < 0.01 * full.item()


def test_a_cpu_without_bfloat16_falls_back_and_says_so(tmp_path, monkeypatch, capsys):
    from vmae2_fast.tasks.base import autocast_dtype

    autocast_dtype.cache_clear()
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    config = tiny.with_train(tiny.pretrain_config(tmp_path, tmp_path), precision="bfloat16")
    assert create_task(config).dtype is None
    assert "no bfloat16 instructions; computing in float32" in capsys.readouterr().err
    autocast_dtype.cache_clear()


def test_unnormalised_targets_change_all_three_predictors(tmp_path):
    plain, normed = _task(tmp_path, normalize_target=False).evaluate(_videos()), _task(tmp_path).evaluate(_videos())
    # random pixels u in [0, 1]: E u^2 = 1/3, E (u - v)^2 = 1/6
    assert plain["zero_predictor"] == pytest.approx(1 / 3, rel=0.02)
    assert plain["copy_nearest"] == pytest.approx(1 / 6, rel=0.02)
    assert normed["copy_nearest"] == pytest.approx(2, rel=0.02)
