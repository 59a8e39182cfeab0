"""Which frames and which windows: the official index rules, with every random draw made through an explicit `rng`.

All functions return 0-based frame ids as int64 arrays. `rng` is anything with the methods of
`numpy.random.RandomState` (frame rules: `randint`; crops: `choice` on a range and `uniform`, which Python's
`random.Random` offers too), so that cases recorded under a seed reproduce exactly. Our own draws use `counter_rng`.

Rules: VideoMAE V2 paper section 4 and the released data sets (`HybridVideoMAE`, `VideoClsDataset`,
`RawFrameClsDataset`), including what they do with short videos.
"""

from __future__ import annotations

import enum
import math
from typing import Any

import numpy as np

MULTI_SCALES = (1.0, 0.875, 0.75, 0.66)
"""Window sides of the multi-scale crop, as shares of the short side (pre-training)."""
AREA_RANGE = (0.08, 1.0)
ASPECT_RANGE = (3 / 4, 4 / 3)


class Purpose(enum.IntEnum):
    """What a draw is for: one independent stream each."""

    FRAMES = 1
    CROP = 2
    FLIP = 3
    REPLACEMENT = 4
    SHUFFLE = 5
    INTERLEAVE = 6
    AUGMENT = 7
    ERASE = 8
    MIX = 9
    SUBSET = 10
    BOXES = 11
    SCALE = 12


def _philox(seed: int, purpose: Purpose, counter: tuple[int, int, int]) -> np.random.Philox:
    # numpy's Philox is 4x64; word 0 of its counter is the one that advances while drawing. The masks of
    # `vmae2_fast.ops.masks` use Philox 4x32-10 under (seed, purpose): another generator, never mixed with this one.
    key = np.array([seed & (2**64 - 1), purpose], dtype=np.uint64)
    return np.random.Philox(key=key, counter=np.array([0, *counter], dtype=np.uint64))


def counter_rng(seed: int, epoch: int, position: int, view: int, purpose: Purpose, attempt: int = 0) -> np.random.RandomState:
    """The stream of draws of one purpose: a pure function of its arguments.

    Args:
        seed: of the run.
        epoch, position: the sample; `position` counts consumed samples over all epochs.
        view: 0 for what the views of a clip share.
        attempt: 0 for the sample itself, k for its k-th replacement.
    """
    return np.random.RandomState(_philox(seed, purpose, (position, view | attempt << 32, epoch)))


def permutation(seed: int, purpose: Purpose, stream: int, number: int, size: int) -> np.ndarray:
    """A permutation of range(size): the order of raw Philox words, int64 [size].

    Written on raw words so that it is the same under every numpy version. Words keep their high bits and carry the index
    in the low ones, because sorting numbers is several times faster than finding the order of others.
    """
    low = np.uint64((1 << max(size - 1, 1).bit_length()) - 1)
    words = _philox(seed, purpose, (number, stream, 0)).random_raw(size)
    words = words & ~low | np.arange(size, dtype=np.uint64)
    words.sort()
    return (words & low).astype(np.int64)


def pretrain_indices(num_frames: int, frames: int, stride: int, rng: Any, *, jitter: bool = False) -> np.ndarray:
    """Pre-training: one dense clip, its start uniform in [0, num_frames - frames*stride].

    A short video is walked from frame 0 and its last reachable frame repeated (40 frames at stride 4: 0, 4, ... 36, 36).

    Args:
        jitter: move every frame by a random offset below the stride (`temporal_jitter`).
    Returns: int64 [frames].
    """
    _check(num_frames, frames, stride)
    span = frames * stride
    start = int(rng.randint(num_frames - span + 1, size=1)[0]) if num_frames >= span else 0
    offsets = rng.randint(stride, size=frames) if jitter else np.zeros(frames, dtype=np.int64)
    ids = np.empty(frames, dtype=np.int64)
    for i in range(frames):
        moved = start + int(offsets[i])
        ids[i] = moved if moved < num_frames else start
        if start + 1 + stride < num_frames:
            start += stride
    return ids


def dense_indices(num_frames: int, frames: int, stride: int, rng: Any | None = None, *, segments: int = 1) -> np.ndarray:
    """Fine-tuning: `frames` ids spread over a span of frames*stride in each of `segments` equal parts.

    The ids are a linspace over the span, so steps are 4, 4, 4, 5, ... and not a constant 4. `rng=None` takes the middle
    (validation). Parts shorter than the span use what they have and repeat their last frame.

    Returns: int64 [segments * frames].
    """
    _check(num_frames, frames, stride)
    span, part = frames * stride, num_frames // segments
    parts = []
    for i in range(segments):
        if part <= span:
            walked = part // stride
            ids = np.concatenate((np.linspace(0, part, num=walked), np.full(frames - walked, float(part))))
            first, last = 0, max(part - 1, 0)
        else:
            end = (span + part) // 2 if rng is None else int(rng.randint(span, part))
            ids = np.linspace(end - span, end, num=frames)
            first, last = end - span, end - 1
        parts.append(np.clip(ids, first, last).astype(np.int64) + i * part)
    return np.concatenate(parts)


def segment_indices(num_frames: int, frames: int, rng: Any | None = None) -> np.ndarray:
    """Segments (TSN, SSv2): one frame of each of `frames` equal parts, random or (`rng=None`) its middle.

    Short videos repeat their first frame in front. Returns: int64 [frames].
    """
    _check(num_frames, frames, 1)
    part = num_frames // frames
    if part == 0:
        return np.concatenate((np.zeros(frames - num_frames, dtype=np.int64), np.arange(num_frames, dtype=np.int64)))
    inside = part // 2 if rng is None else rng.randint(part, size=frames)
    return np.asarray(np.arange(frames, dtype=np.int64) * part + inside, dtype=np.int64)


def dense_test_views(num_frames: int, frames: int, stride: int, segments: int) -> np.ndarray:
    """Multi-view test, dense: every stride-th frame of the video, cut into `segments` windows of `frames`.

    One segment is the centre clip of validation (the official code divides by zero). Returns: int64 [segments, frames].
    """
    _check(num_frames, frames, stride)
    if segments == 1:
        return dense_indices(num_frames, frames, stride)[None]
    ids = np.arange(0, num_frames, stride, dtype=np.int64)
    if len(ids) < frames:
        ids = np.concatenate((ids, np.full(frames - len(ids), ids[-1])))
    step = max((len(ids) - frames) / (segments - 1), 0.0)
    return np.stack([ids[int(c * step):int(c * step) + frames] for c in range(segments)])


def segment_test_views(num_frames: int, frames: int, segments: int) -> np.ndarray:
    """Multi-view test, segments: `segments` interleaved sets of one frame per part. Returns: int64 [segments, frames]."""
    _check(num_frames, frames, 1)
    if segments == 1:
        return segment_indices(num_frames, frames)[None]
    tick = num_frames / float(frames)
    ids = np.sort([int(s * tick / segments + tick * x) for s in range(segments) for x in range(frames)])
    return np.stack([ids[c::segments] for c in range(segments)]).astype(np.int64)


def tad_window_starts(num_frames: int, step: int, window: int = 16) -> np.ndarray:
    """First frames of the sliding windows of feature extraction: step 4 for THUMOS14, 16 for FineAction."""
    return np.arange(0, max(num_frames - window + 1, 0), step, dtype=np.int64)


def multi_scale_crop(height: int, width: int, size: int, rng: Any) -> tuple[int, int, int, int]:
    """Pre-training's crop: sides from `MULTI_SCALES` of the short side, neighbours in that list paired, 13 fixed places.

    Sides within 2 pixels of `size` become `size`. Returns: (top, left, height, width) in pixels.
    """
    sides = [int(min(height, width) * scale) for scale in MULTI_SCALES]
    sides = [size if abs(side - size) < 3 else side for side in sides]
    pairs = [(h, w) for i, h in enumerate(sides) for j, w in enumerate(sides) if abs(i - j) <= 1]
    crop_h, crop_w = pairs[rng.choice(range(len(pairs)))]
    # a snapped side may exceed a frame that is a pixel or two smaller than `size`
    crop_h, crop_w = max(min(crop_h, height), 1), max(min(crop_w, width), 1)
    dx, dy = (width - crop_w) // 4, (height - crop_h) // 4
    places = ((0, 0), (4, 0), (0, 4), (4, 4), (2, 2), (0, 2), (4, 2), (2, 4), (2, 0), (1, 1), (3, 1), (1, 3), (3, 3))
    x, y = places[rng.choice(range(len(places)))]
    return y * dy, x * dx, crop_h, crop_w


def random_resized_crop(
    height: int, width: int, rng: Any, *, area: tuple[float, float] = AREA_RANGE, aspect: tuple[float, float] = ASPECT_RANGE
) -> tuple[int, int, int, int]:
    """Fine-tuning's crop: area and (log-uniform) aspect drawn up to 10 times, else the centre.

    Returns: (top, left, height, width) in pixels.
    """
    low, high = math.log(aspect[0]), math.log(aspect[1])
    for _ in range(10):
        target = rng.uniform(*area) * height * width
        ratio = math.exp(rng.uniform(low, high))
        crop_w, crop_h = round(math.sqrt(target * ratio)), round(math.sqrt(target / ratio))
        if 0 < crop_w <= width and 0 < crop_h <= height:
            top = int(rng.choice(range(height - crop_h + 1)))
            return top, int(rng.choice(range(width - crop_w + 1))), crop_h, crop_w
    ratio = width / height
    crop_w = min(width, round(height * aspect[1])) if ratio > aspect[1] else width
    crop_h = min(height, round(width / aspect[0])) if ratio < aspect[0] else height
    return (height - crop_h) // 2, (width - crop_w) // 2, crop_h, crop_w


def short_side(height: int, width: int, size: int) -> tuple[int, int]:
    """Height and width after the short side is scaled to `size`, the long one truncated to whole pixels."""
    if height <= width:
        return size, max(int(size * width / height), size)
    return max(int(size * height / width), size), size


def center_crop(height: int, width: int, size: int) -> tuple[int, int]:
    """(top, left) of the centred size x size window (validation)."""
    return round((height - size) / 2.0), round((width - size) / 2.0)


def spatial_views(height: int, width: int, size: int, crops: int) -> list[tuple[int, int]]:
    """(top, left) of `crops` size x size windows along the long side of a frame whose short side is `size` (test)."""
    if crops == 1:
        return [center_crop(height, width, size)]
    step = (max(height, width) - size) / (crops - 1)
    return [(int(c * step), 0) if height >= width else (0, int(c * step)) for c in range(crops)]


def _check(num_frames: int, frames: int, stride: int) -> None:
    if num_frames < 1 or frames < 1 or stride < 1:
        raise ValueError(f"frames, stride and the length of the video must be positive, got {frames}, {stride}, {num_frames}")


def repeated(ids: np.ndarray) -> np.ndarray:
    """Which frames of a clip only fill it up: bool, of the shape of `ids` [..., T], true where an id was there before."""
    ids = np.asarray(ids)
    flags = np.zeros(ids.shape, dtype=bool)
    flags[..., 1:] = ids[..., 1:] == ids[..., :-1]
    return flags
