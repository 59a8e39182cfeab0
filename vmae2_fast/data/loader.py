"""Batches of uint8 clips out of encoded video, decoded ahead by threads (PyAV releases the GIL).

What a batch holds is a pure function of (seed, position, view): the number of threads, how far they run ahead and where a
run was resumed change nothing. A clip that cannot be decoded is replaced by another one drawn from the same position,
counted, and named once in the quarantine file; too many of them end the run.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import weakref
from collections import Counter, deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch

from ..config import DataConfig
from . import sampling
from .decode import DecodeError, FrameCache, decode_images, decode_video, probe
from .manifest import Record, Source, open_sources
from .plan import Planner, cut_test_views, cut_views
from .sampling import Purpose, counter_rng
from .schedule import Mixture

_JUDGED_AFTER = 32
"""Clips after which the rate of bad ones is looked at."""


class Replaced(NamedTuple):
    """One clip that could not be decoded."""

    position: int
    path: str
    reason: str


class Batch(NamedTuple):
    """Clips of one step; rows are clip-major: the views of a clip follow one another."""

    clip: torch.Tensor
    """uint8 [B, T, H, W, C], contiguous."""
    label: torch.Tensor
    """int64 [B]; -1 where there is none."""
    position: torch.Tensor
    """int64 [B]: consumed decodes over all epochs; the key of this clip's random draws."""
    view: torch.Tensor
    """int64 [B]: 0 .. views - 1."""
    paths: tuple[str, ...]
    """The video or frame folder of each row."""
    replaced: list[Replaced]
    """What could not be decoded on the way to this batch."""


@dataclass(frozen=True)
class VideoViews:
    """Every test view of one video."""

    clips: torch.Tensor
    """uint8 [segments * crops, T, H, W, C]; segment-major."""
    label: int
    path: str
    index: int
    """Number of the video in the concatenated lists."""


class Draw(NamedTuple):
    """What the random numbers of a clip depend on."""

    seed: int
    epoch: int
    position: int
    attempt: int


class BadDataError(RuntimeError):
    """Too many clips cannot be decoded."""


class _Reader:
    """Sources, cache and quarantine: what training and evaluation share."""

    def __init__(self, data: DataConfig, quarantine: str | os.PathLike[str] | None) -> None:
        self.data = data
        self.sources: list[Source] = self._open(data)
        self.cache = FrameCache(data.cache_mb << 20) if data.cache_mb else None
        self.decoded = self.replaced = 0
        self.bad: Counter[str] = Counter()
        self._quarantine = None if quarantine is None else os.fspath(quarantine)
        self._quarantined = self._known_bad()
        # weak: a loop that breaks off drops its iteration, which then ends its own threads
        self._running: weakref.WeakSet[Generator[Any, None, None]] = weakref.WeakSet()

    def _open(self, data: Any) -> list[Source]:
        return open_sources(data)

    @property
    def label_names(self) -> tuple[str, ...] | None:
        """Class names, where every source has the same."""
        names = {source.label_names for source in self.sources}
        return names.pop() if len(names) == 1 else None

    @property
    def num_classes(self) -> int:
        """Classes declared by the sources, else the highest label + 1; 0 without labels."""
        return max(source.classes or int(source.manifest.labels.max()) + 1 for source in self.sources)

    @property
    def stats(self) -> dict[str, Any]:
        """Clips decoded and replaced so far, and failures by path."""
        return {"decoded": self.decoded, "replaced": self.replaced, "bad": dict(self.bad)}

    def close(self) -> None:
        """End running iterations and join their threads. Closing twice is fine."""
        for iteration in list(self._running):
            iteration.close()

    def __enter__(self) -> Any:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _start(self, iteration: Generator[Any, None, None]) -> Generator[Any, None, None]:
        self._running.add(iteration)
        return iteration

    def read(self, source: Source, record: Record, choose: Callable[[int], np.ndarray]) -> tuple[torch.Tensor, str]:
        """Frames `choose(num_frames)` of a clip, uint8 [T, H, W, C], and its path. Raises DecodeError."""
        path = source.path(record)
        key = path, record.start, record.total
        video = None if self.cache is None else self.cache.get(key)
        if video is not None:
            return torch.from_numpy(video[choose(len(video))]), path
        if record.total >= 0:
            files = source.frame_files(record)
            count = record.total

            def get(ids: np.ndarray) -> np.ndarray:
                return decode_images(path, files, ids)
        else:
            count = probe(path).num_frames

            def get(ids: np.ndarray) -> np.ndarray:
                return decode_video(path, ids)
        ids = choose(count)
        frames = get(ids)
        if self.cache is not None and self.cache.has_room(frames[0].nbytes * count):
            with contextlib.suppress(DecodeError):  # damaged outside the planned frames: a good clip of a video not kept
                self.cache.put(key, get(np.arange(count)))
        return torch.from_numpy(frames), path

    def note(self, failures: list[Replaced]) -> None:
        """Count failures and write each path once into the quarantine file."""
        for failure in failures:
            self.bad[failure.path] += 1
            if self._quarantine is not None and failure.path not in self._quarantined:
                self._quarantined.add(failure.path)
                line = json.dumps({"path": failure.path, "reason": failure.reason, "position": failure.position}) + "\n"
                # one write to a file opened for appending: whole lines, also when several processes write
                handle = os.open(self._quarantine, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
                try:
                    os.write(handle, line.encode())
                finally:
                    os.close(handle)

    def _known_bad(self) -> set[str]:
        if self._quarantine is None or not os.path.exists(self._quarantine):
            return set()
        known = set()
        with open(self._quarantine, encoding="utf-8") as lines:
            for line in lines:
                try:
                    known.add(json.loads(line)["path"])
                except (ValueError, KeyError, TypeError):
                    continue  # a line cut off by a full disk: its path is written again
        return known

    def judge(self, *, final: bool = False) -> None:
        """Raise BadDataError above `max_bad_rate`, once enough clips were seen or the set is at its end."""
        if (final or self.decoded >= _JUDGED_AFTER) and self.replaced > self.data.max_bad_rate * self.decoded:
            listed = f"; all are listed in {self._quarantine}" if self._quarantine else ""
            raise BadDataError(
                f"{self.replaced} of {self.decoded} clips could not be decoded, more than "
                f"data.max_bad_rate={self.data.max_bad_rate} allows; for example {self.bad.most_common(1)[0][0]}{listed}"
            )


class VideoLoader(_Reader):
    """Training batches. Iterating goes on at `position` (first: `start`); breaking off or `close()` ends the threads.

    Args:
        data: sources and how clips are cut.
        frames, size: T, and height and width of a clip in pixels.
        clips_per_batch: decodes of a batch; it has clips_per_batch * data.views rows.
        seed: of the run.
        start: position to begin at (clips consumed before, over all epochs and devices).
        steps: batches to make; None: endless.
        quarantine: JSONL file for clips that cannot be decoded.
        rank, world: batch b covers the positions start + (b * world + rank) * clips_per_batch + [0, clips_per_batch).

    Raises ManifestError (a ValueError) for lists and folders that cannot be used; iterating raises BadDataError.
    """

    def __init__(
        self, data: DataConfig, *, frames: int, size: int, clips_per_batch: int, seed: int = 0, start: int = 0,
        steps: int | None = None, quarantine: str | os.PathLike[str] | None = None, rank: int = 0, world: int = 1,
    ) -> None:
        if clips_per_batch < 1 or start < 0 or not 0 <= rank < world:
            raise ValueError(f"clips_per_batch={clips_per_batch}, start={start}, rank={rank} of {world}: out of range")
        super().__init__(data, quarantine)
        self.frames, self.size, self.clips_per_batch, self.seed = frames, size, clips_per_batch, seed
        self.steps, self.rank, self.world = steps, rank, world
        self.position = start
        """Where the next iteration would begin: all the state there is."""
        self.mixture = Mixture([len(s.manifest) for s in self.sources], [s.weight for s in self.sources], seed)
        self.planner = Planner(
            frames=frames, size=size, sampling=data.sampling, crop=data.crop, flip=data.flip, views=data.views, seed=seed,
            augment=data.augment)

    @property
    def num_clips(self) -> int:
        """Clips of an epoch."""
        return len(self.mixture)

    def __iter__(self) -> Iterator[Any]:
        return self._start(self._batches())

    def _batches(self) -> Generator[Any, None, None]:
        pool = ThreadPoolExecutor(max(self.data.workers, 1), thread_name_prefix="vmae2-decode")
        ahead: deque[tuple[torch.Tensor, list[int], list[Future[tuple[Any, str, list[Replaced]]]]]] = deque()
        submitted, step, begin = 0, self.clips_per_batch * self.world, self.position
        try:
            while True:
                while len(ahead) < max(self.data.prefetch, 1) and (self.steps is None or submitted < self.steps):
                    first = begin + submitted * step + self.rank * self.clips_per_batch
                    positions = list(range(first, first + self.clips_per_batch))
                    for p in (positions[0], positions[-1]):
                        self.mixture.order(p // len(self.mixture))  # drawn once here, not by every thread at the same time
                    shape = (len(positions) * self.data.views, self.frames, self.size, self.size, 3)
                    clip = torch.empty(shape, dtype=torch.uint8)
                    rows = clip.split(self.data.views)
                    ahead.append((clip, positions, [pool.submit(self._fill, p, out) for p, out in zip(positions, rows)]))
                    submitted += 1
                if not ahead:
                    return
                clip, positions, futures = ahead.popleft()
                batch = self._collect(clip, positions, [future.result() for future in futures])
                self.position += step
                yield batch
        finally:
            pool.shutdown(wait=True, cancel_futures=True)

    def _collect(self, clip: torch.Tensor, positions: list[int], done: list[tuple[Any, str, list[Replaced]]]) -> Any:
        views, failures = self.data.views, self._count(done)
        return Batch(
            clip=clip,
            label=torch.tensor([label for label, _, _ in done]).repeat_interleave(views),
            position=torch.tensor(positions).repeat_interleave(views),
            view=torch.arange(views).repeat(len(done)),
            paths=tuple(path for _, path, _ in done for _ in range(views)),
            replaced=failures,
        )

    def _count(self, done: list[tuple[Any, str, list[Replaced]]]) -> list[Replaced]:
        """Take note of a batch's failures, and return them."""
        failures = [failure for _, _, failed in done for failure in failed]
        self.decoded += len(done)
        self.replaced += sum(1 for _, _, failed in done if failed)
        if failures:
            self.note(failures)
            self.judge()
        return failures

    def _fill(self, position: int, out: torch.Tensor) -> tuple[Any, str, list[Replaced]]:
        """Decode the clip of a position (or its first good replacement) into `out` [views, T, H, W, C]."""
        epoch = position // len(self.mixture)
        failures: list[Replaced] = []
        for attempt in range(self.data.max_attempts + 1):
            place = position
            if attempt:
                rng = counter_rng(self.seed, epoch, position, 0, Purpose.REPLACEMENT, attempt)
                place = epoch * len(self.mixture) + int(rng.randint(len(self.mixture)))
            number, index = self.mixture.record(place)
            source = self.sources[number]
            try:
                label, path = self._cut(source, index, out, Draw(self.seed, epoch, position, attempt))
            except DecodeError as error:
                failures.append(Replaced(position, source.path(source.manifest[index]), error.reason))
                continue
            return label, path, failures
        last = failures[-1]
        tried = f"no clip found for position {position} in {len(failures)} attempts"
        raise BadDataError(f"{tried}; last: {last.path}: {last.reason}")

    def _cut(self, source: Source, index: int, out: torch.Tensor, draw: Draw) -> tuple[Any, str]:
        """Decode clip `index` of a source into `out` [views, T, H, W, C]; its label and path. Raises DecodeError."""
        record = source.manifest[index]
        choose = functools.partial(
            self.planner.frame_ids, stride=source.stride, epoch=draw.epoch, position=draw.position, attempt=draw.attempt
        )
        video, path = self.read(source, record, choose)
        height, width = video.shape[1:3]
        plans = self.planner.view_plans(height, width, draw.epoch, draw.position, draw.attempt)
        cut_views(video, plans, self.size, out=out, threads=1)
        return record.label, path


class EvaluationLoader(_Reader):
    """Test views: every video once, in the order of the lists, decoded once for all its views.

    Args:
        data: sources; `sampling` "segment" gives interleaved segments, everything else dense windows.
        frames, size: T, and height and width of a clip in pixels.
        segments, crops: views in time and space; 1 is the centre.
        quarantine: JSONL file for videos that cannot be decoded: they are left out and counted in `stats`.
        rank, world: this loader yields the videos rank, rank + world, ...
        only: numbers of the videos to yield; None: all.
    """

    def __init__(
        self, data: DataConfig, *, frames: int, size: int, segments: int = 1, crops: int = 1,
        quarantine: str | os.PathLike[str] | None = None, rank: int = 0, world: int = 1, only: Sequence[int] | None = None,
    ) -> None:
        if segments < 1 or crops < 1 or not 0 <= rank < world:
            raise ValueError(f"segments={segments}, crops={crops}, rank={rank} of {world}: out of range")
        super().__init__(data, quarantine)
        self.frames, self.size, self.segments, self.crops, self.rank, self.world = frames, size, segments, crops, rank, world
        self._ends = np.cumsum([len(source.manifest) for source in self.sources])
        self._numbers: Sequence[int] = (range(self.num_videos) if only is None else only)[rank::world]

    @property
    def num_videos(self) -> int:
        """Videos of all ranks together."""
        return int(self._ends[-1])

    def __len__(self) -> int:
        return len(self._numbers)

    def __iter__(self) -> Iterator[Any]:
        return self._start(self._videos())

    def _videos(self) -> Generator[Any, None, None]:
        self.decoded = self.replaced = 0
        self.bad.clear()
        pool = ThreadPoolExecutor(max(self.data.workers, 1), thread_name_prefix="vmae2-decode")
        ahead: deque[Future[Any]] = deque()
        indices = iter(self._numbers)
        try:
            while True:
                while len(ahead) < self.data.workers + self.data.prefetch and (index := next(indices, None)) is not None:
                    ahead.append(pool.submit(self._views, index))
                if not ahead:
                    self.judge(final=True)
                    return
                result = ahead.popleft().result()
                self.decoded += 1
                if isinstance(result, Replaced):
                    self.replaced += 1
                    self.note([result])
                    self.judge()
                else:
                    yield result
        finally:
            pool.shutdown(wait=True, cancel_futures=True)

    def _ids(self, num_frames: int, stride: int) -> np.ndarray:
        if self.data.sampling == "segment":
            return sampling.segment_test_views(num_frames, self.frames, self.segments).reshape(-1)
        return sampling.dense_test_views(num_frames, self.frames, stride, self.segments).reshape(-1)

    def _views(self, index: int) -> Any:
        number = int(np.searchsorted(self._ends, index, side="right"))
        source = self.sources[number]
        record = source.manifest[index - (int(self._ends[number - 1]) if number else 0)]
        try:
            video, path = self.read(source, record, lambda n: self._ids(n, source.stride))
        except DecodeError as error:
            return Replaced(index, source.path(record), error.reason)
        clips = cut_test_views(video, segments=self.segments, size=self.size, crops=self.crops, threads=1)
        return VideoViews(clips, record.label, path, index)
