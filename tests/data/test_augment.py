"""Erasing, mixing and whole plans: bounds, shares, purity, and the order of the steps of a view."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch

from vmae2_fast.config import AugmentConfig, MixConfig
from vmae2_fast.data import augment
from vmae2_fast.data.augment import BatchMix, Erasure, Mix, draw_erasure, draw_mix, erase_, mix_clips, mix_targets, plan_mix
from vmae2_fast.data.plan import Planner, ViewPlan, cut_views
from vmae2_fast.data.randaugment import randaugment
from vmae2_fast.ops import resize_crop
from vmae2_fast.ops.patches import IMAGENET_MEAN, IMAGENET_STD


def _clips(*shape, seed=0):
    return torch.from_numpy(np.random.RandomState(seed).randint(0, 256, (*shape, 3)).astype(np.uint8))


def _planner(**values):
    plain = {"frames": 4, "size": 32, "sampling": "dense", "crop": "random_resized", "flip": True, "views": 2, "seed": 5}
    return Planner(**{**plain, **values})


def test_erased_rectangles():
    rng = np.random.RandomState(0)
    drawn = [draw_erasure(0.25, 64, rng) for _ in range(4000)]
    found = [e for e in drawn if e is not None]
    assert abs(len(found) / len(drawn) - 0.25) < 0.03
    areas = np.array([e.height * e.width for e in found]) / 64**2
    assert areas.min() > 0.018
    assert areas.max() < 0.36
    assert abs(areas.mean() - 0.17) < 0.02  # uniform between 2 % and a third; the widest do not fit
    assert all(0 <= e.top <= 64 - e.height and 0 <= e.left <= 64 - e.width for e in found)
    ratios = np.log([e.height / e.width for e in found])
    assert abs(ratios.mean()) < 0.1
    assert np.abs(ratios).max() < -math.log(0.25)  # 0.3 but for whole pixels


def test_erasing_writes_fresh_noise_into_the_rectangle_only():
    clips = _clips(3, 4, 40, 40)
    erased = clips.clone()
    erase_(erased, [Erasure(3, 5, 20, 30, 7), None, Erasure(3, 5, 20, 30, 8)])
    assert torch.equal(erased[1], clips[1])
    outside = torch.ones(40, 40, dtype=torch.bool)
    outside[3:23, 5:35] = False
    assert torch.equal(erased[:, :, outside], clips[:, :, outside])
    first, other = erased[0, :, 3:23, 5:35], erased[2, :, 3:23, 5:35]
    assert (first[0] != first[1]).float().mean() > 0.95
    assert (first != other).float().mean() > 0.95
    again = clips.clone()
    erase_(again, [Erasure(3, 5, 20, 30, 7), None, None])
    assert torch.equal(again[0], erased[0])
    with pytest.raises(ValueError, match="need uint8"):
        erase_(clips.float(), [None] * 3)


def test_noise_is_normal_after_normalisation():
    noise = augment.pixel_noise(123, (16, 60, 70, 3), torch.device("cpu"))
    normal = (noise.double() / 255 - torch.tensor(IMAGENET_MEAN).double()) / torch.tensor(IMAGENET_STD).double()
    flat = normal.reshape(-1, 3)
    for channel, (mean, std) in enumerate(zip(IMAGENET_MEAN, IMAGENET_STD)):
        low, high = -mean / std, (1 - mean) / std
        inside = flat[:, channel][(flat[:, channel] > low) & (flat[:, channel] < high)]
        for quantile in (-1.5, -0.5, 0.0, 0.5, 1.5):
            share = 0.5 * (1 + math.erf(quantile / math.sqrt(2)))
            assert abs(float((flat[:, channel] < quantile).double().mean()) - share) < 0.01
        assert inside.unique().numel() > 200
    centred = flat - flat.mean(0)
    for lag in (1, 70, 70 * 60):
        assert abs(float((centred[lag:] * centred[:-lag]).mean())) < 0.01
    assert abs(float((centred[:, 0] * centred[:, 1]).mean())) < 0.01


def test_drawn_mixes():
    rng = np.random.RandomState(1)
    drawn = [draw_mix(augment.OFFICIAL_MIX, 32, rng) for _ in range(4000)]
    cut = [mix for mix in drawn if mix.box is not None]
    assert abs(len(cut) / len(drawn) - 0.5) < 0.03
    for mix in cut:
        top, left, height, width = mix.box
        assert 0 <= top <= top + height <= 32
        assert 0 <= left <= left + width <= 32
        assert mix.share == 1 - height * width / 32**2
    shares = np.array([mix.share for mix in drawn if mix.box is None])
    assert abs(shares.mean() - 0.5) < 0.02
    assert abs(shares.var() - 1 / (4 * (2 * 0.8 + 1))) < 0.01  # Beta(0.8, 0.8)
    only = [draw_mix(MixConfig(mixup=1.0, probability=0.3), 32, rng) for _ in range(2000)]
    assert abs(np.mean([mix.share < 1 for mix in only]) - 0.3) < 0.04
    assert all(mix.box is None for mix in only)
    assert all(draw_mix(MixConfig(cutmix=1.0), 32, rng).box is not None for _ in range(20))


def test_clips_and_targets_are_mixed_with_the_reversed_group():
    clips = _clips(6, 2, 8, 8)
    target = torch.eye(6)
    plan = BatchMix(2, (Mix(0.3, None), Mix(1 - 12 / 64, (1, 2, 3, 4)), Mix(1.0, None)))
    mixed, targets = mix_clips(clips, plan), mix_targets(target, plan)
    exact = 0.3 * clips[0].double() + 0.7 * clips[1].double()
    assert (mixed[0] - exact).abs().max() <= 0.5 + 1e-4
    inside = torch.zeros(8, 8, dtype=torch.bool)
    inside[1:4, 2:6] = True
    assert torch.equal(mixed[2][:, inside], clips[3][:, inside])
    assert torch.equal(mixed[3][:, ~inside], clips[3][:, ~inside])
    assert torch.equal(mixed[4:], clips[4:])
    torch.testing.assert_close(targets[0], 0.3 * target[0] + 0.7 * target[1])
    torch.testing.assert_close(targets[3], (1 - 12 / 64) * target[3] + 12 / 64 * target[2])
    assert torch.equal(targets[4:], target[4:])
    assert torch.equal(mix_clips(clips, BatchMix(1, ())), clips)


def test_a_clip_is_mixed_alike_in_every_batch_split():
    mix = dataclasses.replace(augment.OFFICIAL_MIX, clips=3)
    position = torch.arange(12).repeat_interleave(2)
    clips = _clips(24, 2, 16, 16)
    whole = mix_clips(clips, plan_mix(mix, position, 16, seed=4))
    parts = [
        mix_clips(c, plan_mix(mix, p, 16, seed=4)) for c, p in zip(clips.split(6), position.split(6), strict=True)
    ]  # fmt: skip
    assert torch.equal(whole, torch.cat(parts))
    assert len(set(plan_mix(mix, position, 16, seed=4).groups)) == 4
    assert plan_mix(mix, position, 16, seed=4) != plan_mix(mix, position, 16, seed=5)
    for cut in (position[:8], position[2:8]):
        with pytest.raises(ValueError, match=r"mix\.clips=3: a batch must hold whole groups"):
            plan_mix(mix, cut, 16, seed=4)
    assert plan_mix(MixConfig(), position, 16, seed=4).groups == ()


def test_views_are_augmented_whole_then_cut_then_erased():
    video = _clips(4, 50, 70)
    planner = _planner(augment=AugmentConfig(randaugment="rand-m7-n4-mstd0.5-inc1", erase=1.0), views=3)
    plans = planner.view_plans(50, 70, 0, 9)
    assert plans == planner.view_plans(50, 70, 0, 9)
    assert len({plan.operations for plan in plans}) == 3
    assert all(plan.erasure is not None for plan in plans)
    found = cut_views(video, plans, 32)
    for plan, view in zip(plans, found, strict=True):
        frames = randaugment(video[None], [plan.operations])[0]
        expected = resize_crop(frames, [plan.window], 32)
        erase_(expected, [plan.erasure])
        assert torch.equal(view, expected[0])
    mixed = [plans[0], ViewPlan((), plans[1].window, None)]
    assert torch.equal(cut_views(video, mixed, 32)[1], resize_crop(video, [plans[1].window], 32)[0])


def test_plans_depend_on_each_key_and_nothing_else():
    planner = _planner(augment=AugmentConfig(randaugment="rand-m7-n4-p1", erase=1.0))
    base = planner.plan(90, 48, 64, 4, epoch=1, position=50)
    for epoch, position, attempt in ((2, 50, 0), (1, 51, 0), (1, 50, 1)):
        other = planner.plan(90, 48, 64, 4, epoch=epoch, position=position, attempt=attempt)
        for mine, theirs in zip(base.views, other.views, strict=True):
            assert mine.operations != theirs.operations
            assert mine.window[:4] != theirs.window[:4]
            assert mine.erasure != theirs.erasure
    # what is not asked for changes no other draw
    plain = _planner().plan(90, 48, 64, 4, epoch=1, position=50)
    assert [view.window for view in plain.views] == [view.window for view in base.views]
    assert all(view.operations == () and view.erasure is None for view in plain.views)
    assert plain.frames.tolist() == base.frames.tolist()


def test_an_unreadable_policy_is_an_error_before_anything_is_decoded():
    with pytest.raises(ValueError, match="'m7x' is unknown"):
        _planner(augment=AugmentConfig(randaugment="rand-m7x"))
    with pytest.raises(ValueError, match=r"augment\.erase=1\.5"):
        AugmentConfig(erase=1.5)
