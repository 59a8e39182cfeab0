"""Batches of uint8 clips out of encoded video, decoded ahead: by processes (`workers`) straight into shared memory, or by
DALI pipelines (`dali_pool`) on the GPU, where the clips stay.

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
from collections.abc import Callable, Generator, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch

from ..config import DataConfig
from ..ops.yuv import Yuv420, frame_size
from .dali_pool import DaliPool, DeviceMemory, dali_device
from .manifest import Source, open_sources
from .plan import Planner, cut_views
from .planes import FrameCache
from .probing import DecodeError
from .sampling import Purpose, counter_rng, repeated
from .schedule import Mixture
from .workers import ClipMemory, DecodePool, Decoders, Done, Job, MemoryPool, Place

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
    """uint8 [B, T, H, W, C], contiguous; on the GPU where DALI decodes there, else on the CPU."""
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


class Draw(NamedTuple):
    """What the random numbers of a clip depend on."""

    seed: int
    epoch: int
    position: int
    attempt: int


class BadDataError(RuntimeError):
    """Too many clips cannot be decoded."""


class Reader:
    """Sources, cache and quarantine: what training and evaluation share."""

    def __init__(self, data: DataConfig, quarantine: str | os.PathLike[str] | None) -> None:
        self.data = data
        self.sources: list[Source] = self._open(data)
        self.cache = FrameCache(data.cache_mb << 20) if data.cache_mb else None
        self.decoded = self.replaced = 0
        self.decode_s = self.wait_s = 0.0
        self.bad: Counter[str] = Counter()
        self.fallback: Counter[str] = Counter()
        self.rgb: Counter[str] = Counter()
        self._dali = dali_device(data)
        self._quarantine = None if quarantine is None else os.fspath(quarantine)
        self._quarantined = self._known_bad()
        # weak: a loop that breaks off drops its iteration, which then ends its own processes
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
        """Clips decoded and replaced so far, failures by path, clips PyAV decoded in DALI's place by reason, clips it had to
        convert to RGB before they were cut by reason, seconds the decoders worked and the consumer waited."""
        return {
            "decoded": self.decoded, "replaced": self.replaced, "bad": dict(self.bad), "fallback": dict(self.fallback),
            "rgb": dict(self.rgb),
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

    def _decoders(self) -> tuple[Decoders, ClipMemory]:
        """New decoders, and the memory they write to."""
        data = self.data
        if self._dali is None:
            return DecodePool(data.workers, data.timeout_s), MemoryPool()
        pool = DaliPool(self._dali, pipelines=data.pipelines, workers=data.workers, timeout_s=data.timeout_s,
                        fallback=self.fallback)  # fmt: skip
        return pool, DeviceMemory(self._dali)

    def _submit(self, pool: Decoders, job: Job, out: torch.Tensor | None) -> Any:
        """Start a job, or cut its clips out of a video that was kept."""
        if self.cache is None:
            return pool.submit(job, out=out)
        assert isinstance(pool, DecodePool)
        video = self.cache.get(_key(job))
        keep = self.cache.capacity - self.cache.used
        return pool.submit(dataclasses.replace(job, keep=keep), out=out, video=video)

    def _wait(self, pool: Decoders, ticket: Any) -> Done:
        """What a job came to. Raises DecodeError."""
        begin = time.perf_counter()
        try:
            done = pool.result(ticket)
        finally:
            self.wait_s += time.perf_counter() - begin
        self.decode_s += done.seconds
        if done.why_rgb is not None:
            self.rgb[done.why_rgb] += 1
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


def pinned(clip: torch.Tensor) -> torch.Tensor:
    """Where there is a GPU, a copy of what is not on it in page-locked memory of torch's, which knows when a transfer is
    over."""
    if clip.is_cuda or not torch.cuda.is_available():
        return clip
    return torch.empty(clip.shape, dtype=clip.dtype, pin_memory=True).copy_(clip)


def _cut_planned(planner: Planner, draw: Draw, video: torch.Tensor | Yuv420, out: torch.Tensor) -> None:
    plans = planner.view_plans(*frame_size(video), draw.epoch, draw.position, draw.attempt)
    cut_views(video, plans, planner.size, out=out, threads=1)


class _Ahead(NamedTuple):
    """A batch on its way."""

    clip: torch.Tensor
    positions: list[int]
    tickets: list[Any]


class Finished(NamedTuple):
    """A clip that was decoded."""

    position: int
    job: Job
    done: Done

    @property
    def path(self) -> str:
        return self.job.source.path(self.job.record)


class VideoLoader(Reader):
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
            frames=frames, size=size, sampling=data.sampling, crop=data.crop, flip=data.flip, views=data.views, seed=seed,
            augment=data.augment)

    @property
    def num_clips(self) -> int:
        """Clips of an epoch."""
        return len(self.mixture)

    def __iter__(self) -> Iterator[Any]:
        return self._start(self._batches())

    def _batches(self) -> Generator[Any, None, None]:
        pool, memory = self._decoders()
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

    def _order(self, pool: Decoders, memory: ClipMemory, positions: list[int]) -> _Ahead:
        """Start the jobs of a batch."""
        shape = (self.data.views, self.frames, self.size, self.size, 3)
        clip, path = memory.tensor((len(positions) * shape[0], *shape[1:]))
        rows = clip.split(self.data.views)
        jobs = [self._job(p, 0, Place(path, i * rows[0].nbytes, shape)) for i, p in enumerate(positions)]
        return _Ahead(clip, positions, [self._submit(pool, job, row) for job, row in zip(jobs, rows)])

    def _job(self, position: int, attempt: int, place: Place | None) -> Job:
        """The job of a position, or of its `attempt`-th replacement."""
        epoch, drawn = position // len(self.mixture), position
        if attempt:
            rng = counter_rng(self.seed, epoch, position, 0, Purpose.REPLACEMENT, attempt)
            drawn = epoch * len(self.mixture) + int(rng.randint(len(self.mixture)))
        number, index = self.mixture.record(drawn)
        source = self.sources[number]
        choose, cut = self._work(source, index, Draw(self.seed, epoch, position, attempt))
        record = source.manifest[index]
        return Job(source=source.alone(record), record=record, choose=choose, cut=cut, place=place)

    def _work(self, source: Source, index: int, draw: Draw) -> tuple[Callable[..., Any], Callable[..., Any]]:
        """`Job.choose` and `Job.cut` of clip `index` of a source; both must pickle."""
        choose = functools.partial(
            self.planner.frame_ids, stride=source.stride, epoch=draw.epoch, position=draw.position, attempt=draw.attempt
        )
        return choose, functools.partial(_cut_planned, self.planner, draw)

    def _collect(self, pool: Decoders, ahead: _Ahead) -> Any:
        """Wait for the clips of a batch, take note of its failures, and put it together."""
        failures: list[Replaced] = []
        finished = []
        for position, ticket, row in zip(ahead.positions, ahead.tickets, ahead.clip.split(self.data.views)):
            clip, failed = self._settle(pool, position, ticket, row)
            finished.append(clip)
            failures += failed
            self.decoded += 1
            self.replaced += bool(failed)
        if failures:
            self.note(failures)
            self.judge()
        return self._batch(pinned(ahead.clip), finished, failures)

    def _batch(self, clip: torch.Tensor, finished: list[Finished], failures: list[Replaced]) -> Any:
        views = self.data.views
        padded = torch.from_numpy(repeated(np.stack([one.done.ids for one in finished])))
        return Batch(
            clip=clip,
            label=torch.tensor([one.job.record.label for one in finished]).repeat_interleave(views),
            position=torch.tensor([one.position for one in finished]).repeat_interleave(views),
            view=torch.arange(views).repeat(len(finished)),
            paths=tuple(one.path for one in finished for _ in range(views)),
            replaced=failures,
            padded=padded.repeat_interleave(views, dim=0),
        )

    def _settle(
        self, pool: Decoders, position: int, ticket: Any, out: torch.Tensor
    ) -> tuple[Finished, list[Replaced]]:
        """Wait for the clip of a position, or for its first good replacement."""
        failures: list[Replaced] = []
        while True:
            try:
                return Finished(position, ticket.job, self._wait(pool, ticket)), failures
            except DecodeError as error:
                failures.append(Replaced(position, ticket.job.source.path(ticket.job.record), error.reason))
            if len(failures) > self.data.max_attempts:
                last = failures[-1]
                self.note(failures)
                tried = f"no clip found for position {position} in {len(failures)} attempts"
                raise BadDataError(f"{tried}; last: {last.path}: {last.reason}")
            ticket = self._submit(pool, self._job(position, len(failures), ticket.job.place), out)
