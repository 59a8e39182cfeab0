"""DALI pipelines that take the jobs of a loader: the counterpart of `workers.DecodePool` with clips on a device.

Each pipeline belongs to a thread, which takes the jobs that have piled up, decodes them in one run and cuts the views on its
own stream. A clip that is not for DALI, and every clip of a run that failed, is decoded by PyAV in processes instead and
counted; which decoder a clip meets depends on the clip alone, unless a run fails.
"""

from __future__ import annotations

import contextlib
import dataclasses
import queue
import threading
import time
import warnings
from collections import Counter
from concurrent.futures import CancelledError, Future
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from ..config import DataConfig
from .dali import DaliDecoder, DaliError, Encoded, UnsupportedError, read_images, read_video, why_not_dali
from .probing import DecodeError
from .workers import DecodePool, Done, Job, MemoryPool, Place, Ticket

_FAILURES = 16
"""Runs that may fail in a row before DALI itself is held to be the cause."""
_LOOK_S = 0.5
"""Seconds between two looks at the clock while waiting for a job."""


class Refused(NamedTuple):
    """A job that is left to PyAV."""

    reason: str


@dataclass(eq=False)
class DaliTicket:
    """A submitted job."""

    job: Job
    out: torch.Tensor | None
    ready: torch.cuda.Event | None
    """After it nobody uses what `out` was before."""
    future: Future[Done | Refused] = field(default_factory=Future)
    elsewhere: tuple[Ticket, torch.Tensor | None] | None = None
    """PyAV's ticket and where it writes."""


class DeviceMemory:
    """`workers.MemoryPool` for a device: torch's allocator, and no path, since no other process writes there."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def tensor(self, shape: tuple[int, ...]) -> tuple[torch.Tensor, str]:
        return torch.empty(shape, dtype=torch.uint8, device=self._device), ""

    def close(self) -> None: ...


class DaliPool:
    """`pipelines` DALI pipelines on one device, and PyAV's processes once a clip needs them.

    Args:
        device: "cuda", where the clips are decoded and stay, or "cpu".
        pipelines: decoders side by side; one drives about one of the engines of a GPU.
        workers, timeout_s: of the `DecodePool` for clips that are not for DALI; `timeout_s` is also the time a DALI run may
            take. A hung run cannot be ended: it ends the training run.
        fallback: counts the clips PyAV decoded, by reason.
        batch: clips of one run at most.

    Raises ImportError, saying how to get it, where DALI is not installed.
    """

    def __init__(
        self, device: torch.device | str, *, pipelines: int, workers: int, timeout_s: float, fallback: Counter[str],
        batch: int = 8,
    ) -> None:
        self.timeout_s, self.fallback = timeout_s, fallback
        self._workers, self._batch = workers, batch
        self._jobs: queue.SimpleQueue[DaliTicket | None] = queue.SimpleQueue()
        self._refused: queue.SimpleQueue[tuple[DaliTicket, str]] = queue.SimpleQueue()
        self._running: dict[int, tuple[float, list[str]]] = {}
        self._failures = 0
        self._closed = False
        self._pyav: tuple[DecodePool, MemoryPool] | None = None
        decoders = [DaliDecoder(device, batch=batch) for _ in range(pipelines)]
        self.device = decoders[0].device
        self._threads = [
            threading.Thread(target=self._work, args=(i, decoder), name=f"vmae2-dali-{i}", daemon=True)
            for i, decoder in enumerate(decoders)
        ]
        for thread in self._threads:
            thread.start()

    def submit(self, job: Job, *, out: torch.Tensor | None) -> DaliTicket:
        """Run a job, which writes its views to `out`, on the pool's device; the job's place is not used."""
        ready = torch.cuda.current_stream(self.device).record_event() if self.device.type == "cuda" else None
        ticket = DaliTicket(job, out, ready)
        self._jobs.put(ticket)
        self._hand_over()
        return ticket

    def result(self, ticket: DaliTicket) -> Done:
        """What a job came to; `out` holds its views, for the current stream. Raises DecodeError."""
        found = self._await(ticket)
        if isinstance(found, Done):
            return found
        self._hand_over()
        assert ticket.elsewhere is not None
        assert self._pyav is not None
        other, clips = ticket.elsewhere
        done = self._pyav[0].result(other)
        if ticket.out is not None and clips is not None:
            ticket.out.copy_(clips)
        return done

    def _await(self, ticket: DaliTicket) -> Done | Refused:
        while True:
            with contextlib.suppress(TimeoutError):
                return ticket.future.result(timeout=_LOOK_S)
            for begin, paths in list(self._running.values()):
                if time.monotonic() - begin > self.timeout_s:
                    raise RuntimeError(
                        f"DALI gave no frames within data.timeout_s={self.timeout_s:g} seconds of any of: {', '.join(paths)}. "
                        "A decode on a GPU cannot be ended alone: choose data.backend=pyav, or take the file out of the list"
                    )

    def _hand_over(self) -> None:
        """Give PyAV what DALI refused so far; called by the consumer, since PyAV's pool is for one thread."""
        while not self._refused.empty():
            ticket, reason = self._refused.get()
            if not self.fallback[reason]:
                path = ticket.job.source.path(ticket.job.record)
                warnings.warn(f"{path} is decoded by PyAV, not DALI: {reason}", stacklevel=2)
            self.fallback[reason] += 1
            if self._pyav is None:
                self._pyav = DecodePool(self._workers, self.timeout_s), MemoryPool()
            pool, memory = self._pyav
            job, clips = ticket.job, None
            if ticket.out is not None:
                clips, path = memory.tensor(tuple(ticket.out.shape))
                job = dataclasses.replace(job, place=Place(path, 0, tuple(clips.shape)))
            ticket.elsewhere = pool.submit(job, out=clips), clips

    def _work(self, number: int, decoder: DaliDecoder) -> None:
        stream = torch.cuda.Stream(decoder.device) if decoder.device.type == "cuda" else None
        while tickets := self._take():
            self._running[number] = time.monotonic(), [t.job.source.path(t.job.record) for t in tickets]
            try:
                with torch.cuda.stream(stream) if stream is not None else contextlib.nullcontext():
                    self._run(tickets, decoder)
            except BaseException as error:  # a fault of ours or of the machine: the consumer's to raise
                for ticket in tickets:
                    if not ticket.future.done():
                        ticket.future.set_exception(error)
            finally:
                del self._running[number]

    def _take(self) -> list[DaliTicket]:
        """The jobs that wait, at least one; none: the pool is closed."""
        tickets: list[DaliTicket] = []
        with contextlib.suppress(queue.Empty):
            while len(tickets) < self._batch:
                ticket = self._jobs.get(block=not tickets)
                if self._closed or ticket is None:
                    self._jobs.put(None)  # for the next thread
                    for taken in (*tickets, ticket):
                        if taken is not None:
                            taken.future.set_exception(CancelledError())
                    return []
                tickets.append(ticket)
        return tickets

    def _run(self, tickets: list[DaliTicket], decoder: DaliDecoder) -> None:
        begin = time.perf_counter()
        groups: dict[str, list[tuple[DaliTicket, Encoded]]] = {}
        for ticket in tickets:
            if ticket.ready is not None:
                torch.cuda.current_stream().wait_event(ticket.ready)
            try:
                encoded = _read(ticket.job, decoder.device)
            except DecodeError as error:
                ticket.future.set_exception(error)
            except UnsupportedError as error:
                self._refuse(ticket, str(error))
            else:
                groups.setdefault(encoded.kind, []).append((ticket, encoded))
        for group in groups.values():
            try:
                with decoder.decode([encoded for _, encoded in group]) as clips:
                    cuts = [ticket.job.cut(frames, ticket.out) for (ticket, _), frames in zip(group, clips, strict=True)]
            except DaliError as error:
                self._failures += 1
                if self._failures > _FAILURES:
                    raise RuntimeError(
                        f"DALI failed {self._failures} times in a row, the last time with: {error}. "
                        "If its clips are sound, choose data.backend=pyav"
                    ) from error
                for ticket, _ in group:
                    self._refuse(ticket, f"a DALI run failed: {error}")
                continue
            self._failures = 0
            seconds = (time.perf_counter() - begin) / len(tickets)
            for (ticket, encoded), cut in zip(group, cuts, strict=True):  # now, since the block's end waited for `out`
                ticket.future.set_result(Done(encoded.ids, seconds, None, cut))

    def _refuse(self, ticket: DaliTicket, reason: str) -> None:
        self._refused.put((ticket, reason))
        ticket.future.set_result(Refused(reason))

    def close(self) -> None:
        """Drop what waits, and end all threads and processes. A hung run is not waited for longer than `timeout_s`."""
        self._closed = True
        self._jobs.put(None)
        last = time.monotonic() + self.timeout_s
        for thread in self._threads:
            thread.join(max(last - time.monotonic(), 0))
        if self._pyav is not None:
            for part in self._pyav:
                part.close()


def _read(job: Job, device: torch.device) -> Encoded:
    """A job's bytes and frames. Raises DecodeError, UnsupportedError."""
    path, record = job.source.path(job.record), job.record
    if record.total < 0:
        return read_video(path, job.choose, device)
    return read_images(path, job.source.frame_files(record), job.choose(record.total))


def dali_device(data: DataConfig) -> torch.device | None:
    """Where DALI decodes for a configuration, or None: PyAV does. Raises ValueError where it is asked for and missing."""
    gpu = torch.cuda.is_available()
    if data.backend == "pyav" or (data.backend == "auto" and (not gpu or data.cache_mb or why_not_dali() is not None)):
        return None
    why = why_not_dali()
    if why is not None:
        raise ValueError(f"data.backend=dali: {why}; or choose auto or pyav")
    return torch.device("cuda", torch.cuda.current_device()) if gpu else torch.device("cpu")
