"""The order of clips and the plans drawn for them."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from vmae2_fast.data import Mixture, sampling
from vmae2_fast.data.plan import Planner, cut_test_views
from vmae2_fast.data.plan import test_windows as windows_of_test
from vmae2_fast.data.sampling import Purpose, counter_rng
from vmae2_fast.ops import resize_crop


def _epoch(mixture, number):
    return list(zip(*(column.tolist() for column in mixture.order(number))))


def test_an_epoch_holds_every_clip_once():
    mixture = Mixture([7, 1, 30], seed=3)
    every = {(s, i) for s, n in enumerate((7, 1, 30)) for i in range(n)}
    epochs = [_epoch(mixture, e) for e in range(4)]
    assert all(len(e) == 38 and set(e) == every for e in epochs)
    assert len({tuple(e) for e in epochs}) == 4
    assert epochs[0] != _epoch(Mixture([7, 1, 30], seed=4), 0)


def test_order_is_a_pure_function():
    ahead, direct = Mixture([5, 9], [1.0, 0.4], seed=1), Mixture([5, 9], [1.0, 0.4], seed=1)
    for epoch in range(12):
        ahead.order(epoch)
    assert _epoch(direct, 11) == _epoch(ahead, 11)
    assert _epoch(direct, 2) == _epoch(ahead, 2)
    assert [direct.record(2 * len(direct) + k) for k in range(len(direct))] == _epoch(ahead, 2)


def test_fractional_weights_are_met_over_epochs():
    sizes, weights, epochs = (5, 40, 3), (0.3, 1.0, 2.5), 20
    mixture = Mixture(sizes, weights, seed=0)
    assert len(mixture) == round(1.5 + 40 + 7.5)
    drawn = Counter(clip for e in range(epochs) for clip in _epoch(mixture, e))
    for source, (size, weight) in enumerate(zip(sizes, weights)):
        counts = [drawn[source, i] for i in range(size)]
        assert abs(sum(counts) - weight * size * epochs) <= 1
        assert max(counts) - min(counts) <= 1  # whole passes one after the other
    sources = mixture.order(0)[0]
    assert Counter(sources[:25].tolist())[1] < 25  # interleaved, not one after the other


@pytest.mark.parametrize(("sizes", "weights"), [([], None), ([3, 0], None), ([3], [0.0]), ([3], [1.0, 1.0])])
def test_bad_mixtures(sizes, weights):
    with pytest.raises(ValueError, match="non-empty sources and a positive weight"):
        Mixture(sizes, weights)


def test_streams_differ_in_every_key():
    base = (1, 2, 3, 4, Purpose.CROP, 0)
    keys = [base, *[(*base[:i], value, *base[i + 1:]) for i, value in enumerate((9, 9, 9, 9, Purpose.FLIP, 1))]]
    draws = [tuple(counter_rng(*key).randint(1 << 30, size=4)) for key in keys]
    assert len(set(draws)) == len(draws)
    assert draws[0] == tuple(counter_rng(*base).randint(1 << 30, size=4))


def test_short_videos_follow_the_rules():
    rng = np.random.RandomState(0)
    for n in (1, 2, 5, 15, 16, 17, 63):
        for ids in (
            sampling.pretrain_indices(n, 16, 4, rng),
            sampling.dense_indices(n, 16, 4, rng), sampling.dense_indices(n, 16, 4),
            sampling.dense_indices(n, 1, 1, rng, segments=16),
            sampling.segment_indices(n, 16, rng), sampling.segment_indices(n, 16),
            *sampling.dense_test_views(n, 16, 4, 5), *sampling.dense_test_views(n, 16, 4, 1),
            *sampling.segment_test_views(n, 16, 2),
        ):  # fmt: skip
            assert ids.dtype == np.int64
            assert ids.shape == (16,)
            assert ids.min() >= 0
            assert ids.max() < n
    assert sampling.pretrain_indices(40, 16, 4, rng).tolist() == [*range(0, 40, 4), *[36] * 6]
    with pytest.raises(ValueError, match="positive"):
        sampling.pretrain_indices(0, 16, 4, rng)


@pytest.mark.parametrize("crop", ["multi_scale", "random_resized", "center"])
@pytest.mark.parametrize("shape", [(48, 64), (64, 48), (1, 1), (7, 300), (31, 33)])
def test_windows_lie_inside_the_frame(crop, shape):
    planner = Planner(frames=4, size=32, sampling="pretrain", crop=crop, flip=True, views=3, seed=5)
    video = _video(2, *shape)
    for position in range(20):
        windows = planner.windows(*shape, 0, position)
        assert windows == planner.windows(*shape, 0, position)
        assert len(windows) == 3
        for window in windows:
            height, width = window.scaled or shape
            assert 0 <= window.top <= height - window.height
            assert 0 <= window.left <= width - window.width
            assert min(window.height, window.width) >= 1
        clips = resize_crop(video, windows, 32)
        assert clips.shape == (3, 2, 32, 32, 3)
        assert clips.is_contiguous()


def _video(*shape):
    return torch.from_numpy(np.random.RandomState(0).randint(0, 256, (*shape, 3)).astype(np.uint8))


def test_views_share_frames_and_draw_their_own_windows():
    planner = Planner(frames=8, size=32, sampling="pretrain", crop="multi_scale", flip=False, views=4, seed=0)
    plan = planner.plan(100, 48, 64, 4, epoch=1, position=77)
    assert plan.frames.shape == (8,)
    assert len({view.window for view in plan.views}) > 1
    assert planner.plan(100, 48, 64, 4, epoch=1, position=77).views == plan.views
    starts = {int(planner.frame_ids(100, 4, 1, p)[0]) for p in range(1500)}
    assert starts == set(range(69))  # uniform over [0, n - T*stride], both ends drawn
    flipping = Planner(frames=8, size=32, sampling="dense", crop="center", flip=True, views=1, seed=0)
    assert 60 < sum(flipping.windows(48, 64, 0, p)[0].flip for p in range(200)) < 140


def test_views_are_exact_where_nothing_is_scaled():
    video = _video(3, 40, 50)
    windows = windows_of_test(40, 50, 40, 3)
    flipped = resize_crop(video, [window._replace(flip=True) for window in windows], 40)
    for window, view, mirrored in zip(windows, cut_test_views(video, segments=1, size=40, crops=3), flipped, strict=True):
        assert torch.equal(view, video[:, :, window.left:window.left + 40])
        assert torch.equal(mirrored, view.flip(2))
    assert [w.left for w in windows] == [0, 5, 10]


@pytest.mark.parametrize("shape", [(45, 80), (80, 45)])
def test_test_views_are_cut_out_of_scaled_frames(shape):
    """Segment-major, each the rounded float64 pixels of whole frames brought to the short side."""
    video = _video(6, *shape)
    scaled = sampling.short_side(*shape, 32)
    whole = F.interpolate(video.permute(0, 3, 1, 2).double(), size=scaled, mode="bilinear", antialias=True)
    views = cut_test_views(video, segments=2, size=32, crops=3).unflatten(0, (2, 3))
    for segment, frames in zip(views, whole.split(3), strict=True):
        for view, (top, left) in zip(segment, sampling.spatial_views(*scaled, 32, 3), strict=True):
            exact = frames[:, :, top:top + 32, left:left + 32].permute(0, 2, 3, 1)
            assert (view - exact).abs().max() <= 0.5 + 1e-9
