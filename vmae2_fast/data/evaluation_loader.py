"""Test views of every video once, decoded ahead as training clips are (see `loader`)."""

from __future__ import annotations

import functools
import os
from collections import deque
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ..config import DataConfig
from ..ops.yuv import Yuv420
from . import sampling
from .loader import Reader, Replaced, pinned
from .plan import cut_test_views
from .probing import DecodeError
from .workers import ClipMemory, Done, Job, Place


@dataclass(frozen=True)
class VideoViews:
    """Every test view of one video."""

    clips: torch.Tensor
    """uint8 [segments * crops, T, H, W, C]; segment-major; on the device of its decoder, as in `Batch`."""
    label: int
    path: str
    index: int
    """Number of the video in the concatenated lists."""
    padded: torch.Tensor | None = None
    """bool [segments * crops, T]: frames that repeat the one before to fill up a view of a short video."""


def _cut_views(segments: int, crops: int, size: int, video: torch.Tensor | Yuv420, out: torch.Tensor) -> None:
    cut_test_views(video, segments=segments, size=size, crops=crops, out=out, threads=1)


def _test_ids(rule: str, num_frames: int, *, frames: int, stride: int, segments: int) -> np.ndarray:
    """Frame ids of all test views, int64 [segments * T]."""
    if rule == "segment":
        return sampling.segment_test_views(num_frames, frames, segments).reshape(-1)
    return sampling.dense_test_views(num_frames, frames, stride, segments).reshape(-1)


class EvaluationLoader(Reader):
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
        for counts in (self.bad, self.fallback, self.rgb):
            counts.clear()
        pool, memory = self._decoders()
        ahead: deque[tuple[int, torch.Tensor | None, Any]] = deque()
        numbers = iter(self._numbers)
        width = self.data.workers if self._dali is None else self.data.pipelines
        try:
            while True:
                while len(ahead) < width + self.data.prefetch and (index := next(numbers, None)) is not None:
                    job, out = self._job(index, memory)
                    ahead.append((index, out, self._submit(pool, job, out)))
                if not ahead:
                    self.judge(final=True)
                    return
                index, out, ticket = ahead.popleft()
                self.decoded += 1
                try:
                    done = self._wait(pool, ticket)
                except DecodeError as error:
                    self.replaced += 1
                    self.note([Replaced(index, ticket.job.source.path(ticket.job.record), error.reason)])
                    self.judge()
                    continue
                yield self._views(index, ticket.job, out, done)
        finally:
            pool.close()
            memory.close()

    def _job(self, index: int, memory: ClipMemory) -> tuple[Job, torch.Tensor | None]:
        """The job of a video, and its place as this process sees it."""
        number = int(np.searchsorted(self._ends, index, side="right"))
        source = self.sources[number]
        record = source.manifest[index - (int(self._ends[number - 1]) if number else 0)]
        clips, path = memory.tensor((self.segments * self.crops, self.frames, self.size, self.size, 3))
        choose = functools.partial(
            _test_ids, self.data.sampling, frames=self.frames, stride=source.stride, segments=self.segments
        )
        cut = functools.partial(_cut_views, self.segments, self.crops, self.size)
        place = Place(path, 0, tuple(clips.shape))
        return Job(source=source.alone(record), record=record, choose=choose, cut=cut, place=place), clips

    def _views(self, index: int, job: Job, out: torch.Tensor | None, done: Done) -> Any:
        assert out is not None
        padded = torch.from_numpy(sampling.repeated(done.ids.reshape(self.segments, -1))).repeat_interleave(self.crops, dim=0)
        return VideoViews(pinned(out), job.record.label, job.source.path(job.record), index, padded)
