"""Batches of uint8 clips out of encoded video, decoded ahead by processes (`workers`) straight into shared memory.

What a batch holds is a pure function of (seed, position, view): the number of processes, how far they run ahead and where a
run was resumed change nothing. A clip that cannot be decoded, or not in time, is replaced by another one drawn from the same
position, counted, and named once in the quarantine file; too many of them end the run.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import time
import weakref
from collections import Counter, deque
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch

from ..config import DataConfig
from ..ops import resize_crop
from . import sampling
from .decode import DecodeError, FrameCache, repeated
from .manifest import Manifest, Source, open_sources
from .plan import Planner, cut_test_views
from .sampling import Purpose, counter_rng
from .schedule import Mixture
from .workers import DecodePool, Done, Job, MemoryPool, Place, Ticket

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
    padded: torch.Tensor | None = None
    """bool [B, T]: frames that only fill up the clip of a short video, repeating the one before. A loader always says."""


@dataclass(frozen=True)
class VideoViews:
    """Every test view of one video."""

    clips: torch.Tensor
    """uint8 [segments * crops, T, H, W, C]; segment-major."""
    label: int
    path: str
    index: int
    """Number of the video in the concatenated lists."""
    padded: torch.Tensor | None = None
    """bool [segments * crops, T]: frames that repeat the one before to fill up a view of a short video."""


class BadDataError(RuntimeError):
    """Too many clips cannot be decoded."""


class _Reader:
    """Sources, cache and quarantine: what training and evaluation share."""

    def __init__(self, data: DataConfig, quarantine: str | os.PathLike[str] | None) -> None:
        self.data = data
        self.sources: list[Source] = open_sources(data)
        self.cache = FrameCache(data.cache_mb << 20) if data.cache_mb else None
        self.decoded = self.replaced = 0
        self.decode_s = self.wait_s = 0.0
        self.bad: Counter[str] = Counter()
        self._quarantine = None if quarantine is None else os.fspath(quarantine)
        self._quarantined = self._known_bad()
        # weak: a loop that breaks off drops its iteration, which then ends its own processes
        self._running: weakref.WeakSet[Generator[Any, None, None]] = weakref.WeakSet()

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
        """Clips decoded and replaced so far, failures by path, seconds the decoders worked and the consumer waited."""
        return {
            "decoded": self.decoded, "replaced": self.replaced, "bad": dict(self.bad),
            "decode_s": self.decode_s, "wait_s": self.wait_s,
        }  # fmt: skip

    def close(self) -> None:
        """End running iterations and their processes. Closing twice is fine."""
        for iteration in list(self._running):
            iteration.close()

    def __enter__(self) -> Any:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _start(self, iteration: Generator[Any, None, None]) -> Generator[Any, None, None]:
        self._running.add(iteration)
        return iteration

    def _submit(self, pool: DecodePool, job: Job, out: torch.Tensor) -> Ticket:
        """Start a job, or cut its clips out of a video that was kept."""
        if self.cache is None:
            return pool.submit(job, out=out)
        video = self.cache.get(_key(job))
        keep = self.cache.capacity - self.cache.used
        return pool.submit(dataclasses.replace(job, keep=keep), out=out, video=video)

    def _wait(self, pool: DecodePool, ticket: Ticket) -> Done:
        """What a job came to. Raises DecodeError."""
        begin = time.perf_counter()
        try:
            done = pool.result(ticket)
        finally:
            self.wait_s += time.perf_counter() - begin
        self.decode_s += done.seconds
        if self.cache is not None and done.video is not None:
            self.cache.put(_key(ticket.job), done.video)
        return done

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


def _key(job: Job) -> tuple[str, int, int]:
    return job.source.path(job.record), job.record.start, job.record.total


def _single(source: Source, index: int) -> Source:
    """`source` with one clip of its list: what a process is told."""
    return dataclasses.replace(source, manifest=Manifest.of([source.manifest[index]]))


def _cut_planned(planner: Planner, epoch: int, position: int, attempt: int, video: torch.Tensor, out: torch.Tensor) -> None:
    height, width = video.shape[1:3]
    resize_crop(video, planner.windows(height, width, epoch, position, attempt), planner.size, out=out, threads=1)


def _cut_views(segments: int, crops: int, size: int, video: torch.Tensor, out: torch.Tensor) -> None:
    out.copy_(cut_test_views(video, segments=segments, size=size, crops=crops, threads=1))


def _pinned(clip: torch.Tensor) -> torch.Tensor:
    """Where there is a GPU, a copy in page-locked memory of torch's, which knows when a transfer is over."""
    if not torch.cuda.is_available():
        return clip
    return torch.empty(clip.shape, dtype=clip.dtype, pin_memory=True).copy_(clip)


def _test_ids(rule: str, num_frames: int, *, frames: int, stride: int, segments: int) -> np.ndarray:
    """Frame ids of all test views, int64 [segments * T]."""
    if rule == "segment":
        return sampling.segment_test_views(num_frames, frames, segments).reshape(-1)
    return sampling.dense_test_views(num_frames, frames, stride, segments).reshape(-1)


class _Ahead(NamedTuple):
    """A batch on its way."""

    clip: torch.Tensor
    positions: list[int]
    tickets: list[Ticket]


class VideoLoader(_Reader):
    """Training batches. Iterating goes on at `position` (first: `start`); breaking off or `close()` ends the processes.

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
            frames=frames, size=size, sampling=data.sampling, crop=data.crop, flip=data.flip, views=data.views, seed=seed)

    @property
    def num_clips(self) -> int:
        """Clips of an epoch."""
        return len(self.mixture)

    def __iter__(self) -> Iterator[Batch]:
        return self._start(self._batches())

    def _batches(self) -> Generator[Batch, None, None]:
        pool, memory = DecodePool(self.data.workers, self.data.timeout_s), MemoryPool()
        ahead: deque[_Ahead] = deque()
        submitted, step, begin = 0, self.clips_per_batch * self.world, self.position
        try:
            while True:
                while len(ahead) < max(self.data.prefetch, 1) and (self.steps is None or submitted < self.steps):
                    first = begin + submitted * step + self.rank * self.clips_per_batch
                    ahead.append(self._order(pool, memory, list(range(first, first + self.clips_per_batch))))
                    submitted += 1
                if not ahead:
                    return
                batch = self._collect(pool, ahead.popleft())
                self.position += step
                yield batch
        finally:
            pool.close()
            memory.close()

    def _order(self, pool: DecodePool, memory: MemoryPool, positions: list[int]) -> _Ahead:
        """Start the jobs of a batch."""
        shape = (self.data.views, self.frames, self.size, self.size, 3)
        clip, path = memory.tensor((len(positions) * shape[0], *shape[1:]))
        rows = clip.split(self.data.views)
        jobs = [self._job(p, 0, Place(path, i * rows[0].nbytes, shape)) for i, p in enumerate(positions)]
        return _Ahead(clip, positions, [self._submit(pool, job, row) for job, row in zip(jobs, rows)])

    def _job(self, position: int, attempt: int, place: Place) -> Job:
        """The job of a position, or of its `attempt`-th replacement."""
        epoch, drawn = position // len(self.mixture), position
        if attempt:
            rng = counter_rng(self.seed, epoch, position, 0, Purpose.REPLACEMENT, attempt)
            drawn = epoch * len(self.mixture) + int(rng.randint(len(self.mixture)))
        number, index = self.mixture.record(drawn)
        source = self.sources[number]
        return Job(
            source=_single(source, index), record=source.manifest[index], place=place,
            choose=functools.partial(
                self.planner.frame_ids, stride=source.stride, epoch=epoch, position=position, attempt=attempt
            ),
            cut=functools.partial(_cut_planned, self.planner, epoch, position, attempt),
        )  # fmt: skip

    def _collect(self, pool: DecodePool, ahead: _Ahead) -> Batch:
        views, rows = self.data.views, ahead.clip.split(self.data.views)
        failures: list[Replaced] = []
        finished = []
        for position, ticket, row in zip(ahead.positions, ahead.tickets, rows):
            job, done, failed = self._settle(pool, position, ticket, row)
            finished.append((job, done))
            failures += failed
            self.decoded += 1
            self.replaced += bool(failed)
        if failures:
            self.note(failures)
            self.judge()
        padded = torch.from_numpy(repeated(np.stack([done.ids for _, done in finished])))
        return Batch(
            clip=_pinned(ahead.clip),
            label=torch.tensor([job.record.label for job, _ in finished]).repeat_interleave(views),
            position=torch.tensor(ahead.positions).repeat_interleave(views),
            view=torch.arange(views).repeat(len(finished)),
            paths=tuple(job.source.path(job.record) for job, _ in finished for _ in range(views)),
            replaced=failures,
            padded=padded.repeat_interleave(views, dim=0),
        )

    def _settle(
        self, pool: DecodePool, position: int, ticket: Ticket, out: torch.Tensor
    ) -> tuple[Job, Done, list[Replaced]]:
        """Wait for the clip of a position, or for its first good replacement."""
        failures: list[Replaced] = []
        while True:
            try:
                return ticket.job, self._wait(pool, ticket), failures
            except DecodeError as error:
                failures.append(Replaced(position, ticket.job.source.path(ticket.job.record), error.reason))
            if len(failures) > self.data.max_attempts:
                last = failures[-1]
                self.note(failures)
                tried = f"no clip found for position {position} in {len(failures)} attempts"
                raise BadDataError(f"{tried}; last: {last.path}: {last.reason}")
            ticket = self._submit(pool, self._job(position, len(failures), ticket.job.place), out)


class EvaluationLoader(_Reader):
    """Test views: every video once, in the order of the lists, decoded once for all its views.

    Args:
        data: sources; `sampling` "segment" gives interleaved segments, everything else dense windows.
        frames, size: T, and height and width of a clip in pixels.
        segments, crops: views in time and space; 1 is the centre.
        quarantine: JSONL file for videos that cannot be decoded: they are left out and counted in `stats`.
        rank, world: this loader yields the videos rank, rank + world, ...
    """

    def __init__(
        self, data: DataConfig, *, frames: int, size: int, segments: int = 1, crops: int = 1,
        quarantine: str | os.PathLike[str] | None = None, rank: int = 0, world: int = 1,
    ) -> None:
        if segments < 1 or crops < 1 or not 0 <= rank < world:
            raise ValueError(f"segments={segments}, crops={crops}, rank={rank} of {world}: out of range")
        super().__init__(data, quarantine)
        self.frames, self.size, self.segments, self.crops, self.rank, self.world = frames, size, segments, crops, rank, world
        self._ends = np.cumsum([len(source.manifest) for source in self.sources])

    @property
    def num_videos(self) -> int:
        """Videos of all ranks together."""
        return int(self._ends[-1])

    def __len__(self) -> int:
        return len(range(self.rank, self.num_videos, self.world))

    def __iter__(self) -> Iterator[VideoViews]:
        return self._start(self._videos())

    def _videos(self) -> Generator[VideoViews, None, None]:
        self.decoded = self.replaced = 0
        self.bad.clear()
        pool, memory = DecodePool(self.data.workers, self.data.timeout_s), MemoryPool()
        ahead: deque[tuple[int, torch.Tensor, Ticket]] = deque()
        indices = iter(range(self.rank, self.num_videos, self.world))
        try:
            while True:
                while len(ahead) < self.data.workers + self.data.prefetch and (index := next(indices, None)) is not None:
                    clips, path = memory.tensor((self.segments * self.crops, self.frames, self.size, self.size, 3))
                    job = self._job(index, Place(path, 0, tuple(clips.shape)))
                    ahead.append((index, clips, self._submit(pool, job, clips)))
                if not ahead:
                    self.judge(final=True)
                    return
                index, clips, ticket = ahead.popleft()
                job = ticket.job
                self.decoded += 1
                path = job.source.path(job.record)
                try:
                    done = self._wait(pool, ticket)
                except DecodeError as error:
                    self.replaced += 1
                    self.note([Replaced(index, path, error.reason)])
                    self.judge()
                    continue
                padded = torch.from_numpy(repeated(done.ids.reshape(self.segments, -1)))
                padded = padded.repeat_interleave(self.crops, dim=0)
                yield VideoViews(_pinned(clips), job.record.label, path, index, padded)
        finally:
            pool.close()
            memory.close()

    def _job(self, index: int, place: Place) -> Job:
        number = int(np.searchsorted(self._ends, index, side="right"))
        source = self.sources[number]
        within = index - (int(self._ends[number - 1]) if number else 0)
        return Job(
            source=_single(source, within), record=source.manifest[within], place=place,
            choose=functools.partial(
                _test_ids, self.data.sampling, frames=self.frames, stride=source.stride, segments=self.segments
            ),
            cut=functools.partial(_cut_views, self.segments, self.crops, self.size),
        )  # fmt: skip
