from __future__ import annotations

import dataclasses

import pytest
import torch

from tests import tiny_runs as tiny
from vmae2_fast.config import MixConfig, TrainConfig
from vmae2_fast.data import Batch, VideoViews
from vmae2_fast.data.augment import mix_clips, mix_targets, plan_mix
from vmae2_fast.tasks import ClassifyTask, create_task
from vmae2_fast.tasks.base import view_batches
from vmae2_fast.tasks.classify import shuffle_frames


def _task(tmp_path, **changes) -> ClassifyTask:
    torch.manual_seed(0)
    return create_task(tiny.classify_config(tmp_path, tmp_path, **changes))


def _batch(label) -> Batch:
    clip = torch.randint(0, 256, (len(label), tiny.FRAMES, tiny.SIZE, tiny.SIZE, 3), dtype=torch.uint8)
    zeros = torch.zeros(len(label), dtype=torch.int64)
    return Batch(clip, torch.tensor(label), zeros, zeros, tuple(f"clip{i}" for i in range(len(label))), [])


def _videos(count: int, views: int) -> list[VideoViews]:
    clips = torch.randint(0, 256, (count, views, tiny.FRAMES, tiny.SIZE, tiny.SIZE, 3), dtype=torch.uint8)
    return [VideoViews(c, i % 2, f"video{i}", i) for i, c in enumerate(clips)]


def test_label_smoothing_by_its_formula(tmp_path):
    task = _task(tmp_path)
    task.model.eval()
    batch = _batch([0, 1, 1])
    log_p = task.model(batch.clip).double().log_softmax(-1)
    expected = -(0.9 * log_p[range(3), batch.label] + 0.1 * log_p.mean(-1)).sum()
    out = task.loss(batch)
    assert out["loss_sum"].item() == pytest.approx(expected.item(), rel=1e-6)
    assert out["top1"].item() == (log_p.argmax(-1) == batch.label).sum().item()
    assert task.static_count(3) == 3


@pytest.mark.parametrize(
    ("label", "message"), [([0, -1], "clip1 has no label"), ([2, 0], r"clip0 has label 2, but the model has classes 0\.\.1")]
)
def test_bad_labels_name_the_clip(tmp_path, label, message):
    with pytest.raises(ValueError, match=message):
        _task(tmp_path).loss(_batch(label))


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (dataclasses.replace(tiny.CLASSIFY_MODEL, num_classes=0), "tiny_classify: set num_classes of vit_small_patch16_224"),
        (dataclasses.replace(tiny.PRETRAIN_MODEL, num_classes=2), r"tiny_classify: classification needs a vit_\* model"),
    ],
)
def test_a_model_that_cannot_classify_is_an_error(tmp_path, model, message):
    with pytest.raises(ValueError, match=message):
        _task(tmp_path, model=model)


def test_views_are_regrouped_without_loss():
    videos = _videos(3, 3)
    batches = list(view_batches(videos, 4))
    assert [len(b.clip) for b in batches] == [4, 4, 1]
    assert [(v, w) for b in batches for v, w in zip(b.video, b.view)] == [(i, v) for i in range(3) for v in range(3)]
    assert torch.equal(torch.cat([b.clip for b in batches]), torch.cat([v.clips for v in videos]))


def test_evaluation_averages_softmax_over_views(tmp_path):
    task = _task(tmp_path)
    videos = _videos(4, 3)
    metrics = task.evaluate(videos)
    assert not task.model.training
    with torch.no_grad():
        scores = torch.stack([task.model(v.clips).double().softmax(-1).mean(0) for v in videos])
    right = [int(s.argmax()) == v.label for s, v in zip(scores, videos)]
    assert metrics["top1"] == sum(right) / 4
    assert metrics["top5"] == 1.0
    assert metrics["videos"] == 4
    assert sum(sum(row) for row in metrics["confusion"]) == 4


def test_shuffled_frames_are_a_fixed_permutation_of_each_clip(tmp_path):
    (batch,) = view_batches(_videos(6, 2), 12)
    once, again, other = (shuffle_frames(batch, seed) for seed in (0, 0, 1))
    assert torch.equal(once, again)
    assert not torch.equal(once, other)
    frames = batch.clip.flatten(2).long().sum(-1)
    shuffled = once.flatten(2).long().sum(-1)
    assert torch.equal(shuffled.sort(1).values, frames.sort(1).values)
    assert (shuffled != frames).any(1).float().mean() > 0.8
    # clips have permutations of their own
    order = torch.stack([(frames[i][None] == shuffled[i][:, None]).long().argmax(1) for i in range(12)])
    assert len({tuple(o.tolist()) for o in order}) > 6


def test_shuffling_hides_what_only_time_tells(tmp_path):
    """A model that reads the first frames decides differently once frames are shuffled."""
    task = _task(tmp_path)

    class FirstFrames(torch.nn.Module):
        def forward(self, clip):
            bright = clip[:, :2].float().mean((1, 2, 3, 4))
            return torch.stack((-bright, bright), dim=1) + torch.tensor([127.0, -127.0])

    task.model = FirstFrames()
    videos = _videos(40, 1)
    for video in videos:
        video.clips[:, :2] = 255 * video.label
        video.clips[:, 2:4] = 255 * (1 - video.label)
        video.clips[:, 4:] = 127
    assert task.evaluate(videos)["top1"] == 1.0
    assert task.evaluate(videos, shuffled=True)["top1"] < 0.8


def test_a_small_set_is_learned(tmp_path):
    task = _task(tmp_path, model=dataclasses.replace(tiny.CLASSIFY_MODEL, drop_path=0.0, head_dropout=0.0))
    from vmae2_fast.train.optim import Optimizer

    optimizer = Optimizer(task.model, task.config.optim, global_batch=4, total_steps=60, steps_per_epoch=60)
    batch = _batch([0, 1, 0, 1])
    for step in range(60):
        optimizer.zero_grad()
        out = task.loss(batch)
        loss = out["loss_sum"] / 4
        loss.backward()
        optimizer.step(step, loss)
    # the floor of label smoothing 0.1 over two classes is 0.1985
    assert out["top1"].item() == 4
    assert loss.item() < 0.3


def test_mixed_clips_and_soft_targets_reach_the_loss(tmp_path):
    """Mixup and cutmix of the whole pipeline: the loss is that of the mixed clips with their mixed, smoothed targets."""
    task = _task(tmp_path, mix=MixConfig(mixup=0.8, cutmix=1.0))
    task.model.eval()
    clips = _batch([0, 1, 1, 0])
    batch = clips._replace(position=torch.tensor([6, 7, 8, 9]))
    plan = plan_mix(task.config.mix, batch.position, tiny.SIZE, task.config.seed)
    assert [round(mix.share, 3) for mix in plan.groups] != [1.0, 1.0]
    smooth = torch.eye(2)[batch.label] * 0.9 + 0.05
    target = mix_targets(smooth, plan)
    log_p = task.model(mix_clips(batch.clip, plan)).double().log_softmax(-1)
    assert task.loss(batch)["loss_sum"].item() == pytest.approx(-(target * log_p).sum().item(), rel=1e-6)
    assert task.loss(clips._replace(position=torch.tensor([2, 3, 8, 9])))["loss_sum"] != task.loss(batch)["loss_sum"]


def test_micro_batches_hold_whole_mixing_groups(tmp_path):
    train = TrainConfig(global_batch=8, micro_batch=4)
    with pytest.raises(ValueError, match=r"train\.micro_batch=4 is not divisible by mix\.clips \* data\.views=3"):
        tiny.classify_config(tmp_path, tmp_path, mix=MixConfig(mixup=0.8, clips=3), train=train)
