"""Features of untrimmed videos with their annotations on the same grid: training batches, and whole videos to detect in.

Feature k of a video stands for `frames` frames from frame k * `stride` on; second t lies at feature

    g = (t * fps - frames / 2) / stride        and back        t = (g * stride + frames / 2) / fps

Training cuts a random part out of a video longer than the detector takes, and leaves a random share of a shorter one; actions
that lie in the part too little do not count there (ActionFormer, arXiv 2202.07925, section 4).
"""

from __future__ import annotations

import dataclasses
import os
import sys
import time
from collections import Counter, deque
from collections.abc import Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..config import ActionFormerConfig, TadDataConfig
from .sampling import Purpose, counter_rng
from .schedule import Mixture
from .tad import TadError, UntrimmedVideo, check_features, choose_subset, read_annotations, read_features
from .tad_points import label_points, make_points

AGNOSTIC = "action"
"""Name of the only class of class-agnostic detection."""
_TRIALS = 200


@dataclasses.dataclass(frozen=True)
class Grid:
    """Where features lie in time. `frames` and `stride` are in frames of `fps` a second, `duration` in seconds."""

    fps: float
    stride: float
    frames: float
    duration: float

    def to_features(self, seconds: np.ndarray) -> np.ndarray:
        return (np.asarray(seconds, dtype=np.float64) * self.fps - 0.5 * self.frames) / self.stride

    def to_seconds(self, features: np.ndarray) -> np.ndarray:
        """Seconds, kept within the video."""
        seconds = (np.asarray(features, dtype=np.float64) * self.stride + 0.5 * self.frames) / self.fps
        return np.clip(seconds, 0.0, self.duration)


class Sequence(NamedTuple):
    """One video as the detector sees it."""

    video: str
    features: Tensor
    """float32 [T, C]."""
    segments: Tensor
    """float32 [N, 2], in features."""
    labels: Tensor
    """int64 [N]."""
    grid: Grid


class TadBatch(NamedTuple):
    """Sequences of one step, padded to one length."""

    features: Tensor
    """float32 [B, T, C]."""
    valid: Tensor
    """bool [B, T]."""
    classes: Tensor
    """float32 [B, P, classes]: what every point of the pyramid should say."""
    distances: Tensor
    """float32 [B, P, 2], in strides of the point's level."""
    paths: tuple[str, ...]
    replaced: list[Any]
    """Always empty: a feature file that cannot be read ends the run."""


def resize_features(features: Tensor, length: int, method: str = "linear") -> Tensor:
    """Stretch float [T, C] to [length, C].

    "linear" interpolates at the middle of each of the new features (ActionFormer); "roi_align" averages ceil(T / length) such
    samples within each (OpenTAD), which is the same where T <= length.
    """
    samples = -(-len(features) // length) if method == "roi_align" else 1
    stretched = F.interpolate(features.T[None], length * samples, mode="linear", align_corners=False)[0].T
    return stretched.unflatten(0, (length, samples)).mean(1)


def cut_sequence(
    sequence: Sequence, rng: Any, *, longest: int, threshold: float, crop_range: tuple[float, float] | None
) -> Sequence:
    """A random part of a training sequence: `longest` features of a longer one, of another the share drawn from `crop_range`.

    Parts without any action are drawn again, at last one around an action. rng: `randint` as numpy's RandomState has it.
    """
    total, segments = len(sequence.features), sequence.segments
    if total <= longest:
        if crop_range is None:
            return sequence
        low, high = max(round(crop_range[0] * total), 1), min(round(crop_range[1] * total), total)
        longest = int(rng.randint(low, high + 1))
        if longest == total:
            return sequence
    half = 0.5 * sequence.grid.frames / sequence.grid.stride
    length = (segments[:, 1] - segments[:, 0]).clamp(min=1e-6)

    def inside(start: int) -> tuple[Tensor, Tensor]:
        left, right = segments[:, 0].clamp(min=start - half), segments[:, 1].clamp(max=start + longest + half)
        return torch.stack((left, right), dim=1), (right - left).clamp(min=0) / length >= threshold

    for trial in range(_TRIALS + 1):
        start = int(rng.randint(total - longest + 1))
        if trial == _TRIALS and len(segments):
            middle = float(segments[int(rng.randint(len(segments)))].mean())
            start = min(max(round(middle - longest / 2), 0), total - longest)
        parts, counts = inside(start)
        if counts.any() or not len(segments):
            break
    kept = sequence.features[start : start + longest]
    return sequence._replace(features=kept, segments=parts[counts] - start, labels=sequence.labels[counts])


class TadSource:
    """The videos of one subset and how they are read. Raises TadError for files that cannot be used or are not there.

    Args:
        data: what to read. frames: of the window of a feature. channels: of a feature.
        classes: names in the order of the model's; None: those of the annotations (`AGNOSTIC` when class-agnostic).
        training: leave videos without any action out, with a note on stderr.
    """

    def __init__(
        self, data: TadDataConfig, *, frames: int, channels: int, classes: tuple[str, ...] | None = None,
        training: bool = False,
    ) -> None:  # fmt: skip
        self.data, self.frames, self.channels = data, frames, channels
        if not data.features or not data.annotations:
            raise TadError("give data.features (a folder) and data.annotations (a file)")
        if not os.path.isdir(data.features):
            raise TadError(f"data.features: the folder {data.features} does not exist; `vmae2 tad features` makes it")
        check_features(data.features, step=data.stride, frames=frames)
        annotations = read_annotations(data.annotations)
        videos = choose_subset(annotations, data.subset, data.block_list)
        self.classes = classes or ((AGNOSTIC,) if data.class_agnostic else annotations.classes)
        self.empty = sum(not v.labels for v in videos.values())
        """Videos without any action."""
        if training:
            videos = {k: v for k, v in videos.items() if v.labels}
            if not videos:
                raise TadError(f"{data.annotations}: no video of subset {data.subset!r} has an annotation")
        self.videos = list(videos.values())
        self._check(annotations.ignored)
        if training and self.empty:
            print(f"{data.annotations}: {self.empty} videos without annotations are left out of training", file=sys.stderr)

    def _check(self, ignored: dict[str, int]) -> None:
        data = self.data
        for what, count in ignored.items():
            print(f"{data.annotations}: {count} {what} are left out", file=sys.stderr)
        missing = [v.name for v in self.videos if not os.path.isfile(self.path(v))]
        if missing:
            raise TadError(
                f"{data.features}: no features of {missing[0]}" + (f" and {len(missing) - 1} more" if missing[1:] else "")
                + f" of subset {data.subset!r}; take them with `vmae2 tad features`, or put what you lack on data.block_list"
            )
        read_features(self.path(self.videos[0]), self.channels)  # features of another model are found out before a run begins
        untimed = [v.name for v in self.videos if v.fps is None and data.fps is None]
        if untimed:
            raise TadError(f"{data.annotations}: {untimed[0]} has no fps; set data.fps")
        known = set(self.classes)
        for video in self.videos:
            strange = [label for label in video.labels if label not in known]
            if strange and not data.class_agnostic:
                raise TadError(f"{data.annotations}: {video.name}: class {strange[0]!r} is none of the model's")

    def __len__(self) -> int:
        return len(self.videos)

    def path(self, video: UntrimmedVideo) -> str:
        return os.path.join(self.data.features, f"{video.name}.npy")

    def read(self, index: int) -> Sequence:
        """A whole video. Raises TadError naming a feature file that cannot be used."""
        video, data = self.videos[index], self.data
        features = torch.from_numpy(read_features(self.path(video), self.channels))
        fps = video.fps or data.fps
        assert fps is not None
        features, grid = place_features(features, fps, video.duration, data, self.frames)
        segments = torch.from_numpy(grid.to_features(video.segments).astype(np.float32)).view(-1, 2)
        number = {name: i for i, name in enumerate(self.classes)}
        labels = [0 if data.class_agnostic else number[label] for label in video.labels]
        return Sequence(video.name, features, segments, torch.tensor(labels, dtype=torch.int64), grid)


def place_features(
    features: Tensor, fps: float, duration: float, data: TadDataConfig, frames: int
) -> tuple[Tensor, Grid]:
    """Features [T, C] stretched as `data` asks, and where they then lie in time."""
    if data.resize_to is None:
        return features, Grid(fps, float(data.stride), float(frames), duration)
    stride = ((len(features) - 1) * data.stride + frames) / data.resize_to
    return resize_features(features, data.resize_to, data.resize_method), Grid(fps, stride, stride, duration)


def pad(sequences: list[Tensor], length: int) -> tuple[Tensor, Tensor]:
    """Sequences [T_i, C] as one [B, length, C] with zeros behind each, and which entries are theirs: bool [B, length]."""
    features = sequences[0].new_zeros(len(sequences), length, sequences[0].shape[1])
    valid = torch.zeros(len(sequences), length, dtype=torch.bool)
    for row, sequence in enumerate(sequences):
        features[row, : len(sequence)] = sequence
        valid[row, : len(sequence)] = True
    return features, valid


class TadLoader:
    """Training batches; what a batch holds is a pure function of (seed, position).

    `position` and `steps` as those of `VideoLoader`: where the next iteration begins, and how many batches it makes (None:
    endless). Batch b of rank r of w covers the positions start + (b * w + r) * clips_per_batch + [0, clips_per_batch).
    """

    sources: tuple[Any, ...] = ()

    def __init__(
        self, source: TadSource, detector: ActionFormerConfig, *, clips_per_batch: int, seed: int, rank: int = 0,
        world: int = 1,
    ) -> None:  # fmt: skip
        self.source, self.detector, self.clips_per_batch, self.seed = source, detector, clips_per_batch, seed
        self.rank, self.world = rank, world
        self.position = 0
        self.steps: int | None = None
        self.mixture = Mixture([len(source)], seed=seed)
        self.points = make_points(detector, detector.max_length)
        self.wait_s = self.decode_s = 0.0
        """Seconds this process waited for batches; and seconds reading and cutting took in all threads."""
        self.fallback = self.rgb = Counter[str]()
        """As those of a `VideoLoader`: nothing is decoded here."""
        self._running: Generator[TadBatch, None, None] | None = None

    @property
    def num_clips(self) -> int:
        """Videos of an epoch."""
        return len(self.mixture)

    def close(self) -> None:
        """End a running iteration and join its threads."""
        if self._running is not None:
            self._running.close()

    def __enter__(self) -> TadLoader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __iter__(self) -> Iterator[TadBatch]:
        self._running = self._batches()
        return self._running

    def _batches(self) -> Generator[TadBatch, None, None]:
        data = self.source.data
        pool = ThreadPoolExecutor(max(data.workers, 1), thread_name_prefix="vmae2-features")
        ahead: deque[Future[tuple[TadBatch, float]]] = deque()
        begin, submitted, step = self.position, 0, self.clips_per_batch * self.world
        try:
            while True:
                while len(ahead) < data.prefetch and (self.steps is None or submitted < self.steps):
                    first = begin + submitted * step + self.rank * self.clips_per_batch
                    for place in (first, first + self.clips_per_batch - 1):
                        self.mixture.order(place // len(self.mixture))  # drawn here once, not by every thread
                    ahead.append(pool.submit(self._timed, first))
                    submitted += 1
                if not ahead:
                    return
                asked = time.perf_counter()
                batch, seconds = ahead.popleft().result()
                self.wait_s += time.perf_counter() - asked
                self.decode_s += seconds
                self.position += step
                yield batch
        finally:
            pool.shutdown(wait=True, cancel_futures=True)

    def _timed(self, first: int) -> tuple[TadBatch, float]:
        begin = time.perf_counter()
        return self._batch(first), time.perf_counter() - begin

    def _batch(self, first: int) -> TadBatch:
        detector = self.detector
        sequences = [self.sequence(position) for position in range(first, first + self.clips_per_batch)]
        features, valid = pad([s.features for s in sequences], detector.max_length)
        targets = [
            label_points(self.points, s.segments, s.labels, detector.classes, detector.center_radius) for s in sequences
        ]
        return TadBatch(
            features, valid, torch.stack([t.classes for t in targets]), torch.stack([t.distances for t in targets]),
            tuple(s.video for s in sequences), [],
        )  # fmt: skip

    def sequence(self, position: int) -> Sequence:
        """The part of a video that is learned from at a position."""
        data = self.source.data
        whole = self.source.read(self.mixture.record(position)[1])
        rng = counter_rng(self.seed, position // len(self.mixture), position, 0, Purpose.CROP)
        return cut_sequence(
            whole, rng, longest=self.detector.max_length, threshold=data.truncate_threshold, crop_range=data.crop_range
        )


class TadEvaluationLoader:
    """Every video of a subset once, whole (`Sequence`); on rank r of w the videos r, r + w, ..."""

    def __init__(self, source: TadSource, rank: int = 0, world: int = 1) -> None:
        self.source = source
        self.stats: dict[str, Any] = {"bad": {}}
        self._numbers = range(rank, len(source), world)

    def __len__(self) -> int:
        return len(self._numbers)

    def __iter__(self) -> Iterator[Sequence]:
        return map(self.source.read, self._numbers)

    def __enter__(self) -> TadEvaluationLoader:
        return self

    def __exit__(self, *_: object) -> None:
        """Nothing stays open."""
