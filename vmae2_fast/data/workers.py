"""Decoder processes: clips are written by them into memory the loader shares with them, and a job can neither hang nor
take the run down.

Pebble runs the processes, ends a job at its time limit and starts a new process for one that died. They are forked from a
server that imported this package once, so that a restart takes milliseconds, that they may be started after CUDA, and
that the caller's script is not run again in them. The shared memory is anonymous (`memfd_create`): it is not bounded by the
size of /dev/shm, and nothing is left of it however a process ends.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import multiprocessing
import multiprocessing.context
import multiprocessing.forkserver
import os
import signal
import sys
import tempfile
import threading
import time
import types
import weakref
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from pebble import ProcessExpired, ProcessPool

from ..ops.yuv import Yuv420
from .manifest import Record, Source
from .planes import Frames, folder_frames, video_frames
from .probing import DecodeError, probe

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h
DEATHS = 2
"""Processes a job may take with it before its clip is held to be the cause."""
_WATCH_S = 0.5
"""Seconds between two looks at the processes while waiting for a job."""
_RESTARTS = 16
"""Times all processes may be started anew without a clip finished in between."""


class Memory:
    """Anonymous memory other processes can open by `path`; unmapped when the last array on it is gone."""

    def __init__(self, size: int) -> None:
        self.size = size
        if hasattr(os, "memfd_create"):
            self._file: Any = os.fdopen(os.memfd_create("vmae2-clips"), "r+b")
            self.path = f"/proc/{os.getpid()}/fd/{self._file.fileno()}"
        else:
            self._file = tempfile.NamedTemporaryFile(prefix="vmae2-clips-")  # noqa: SIM115  closed by its finalizer
            self.path = self._file.name
        os.ftruncate(self._file.fileno(), size)
        self._map = mmap.mmap(self._file.fileno(), size)

    def array(self) -> np.ndarray:
        return np.frombuffer(self._map, dtype=np.uint8)


class MemoryPool:
    """Tensors on shared memory, which is used again once a tensor and all its views are gone.

    The consumer paces the loader, so at most prefetch + what the consumer holds is ever in use.
    """

    def __init__(self) -> None:
        self._free: dict[int, list[Memory]] = {}
        self._closed = False

    def tensor(self, shape: tuple[int, ...]) -> tuple[torch.Tensor, str]:
        """Uninitialised uint8 tensor of `shape` and the path of its memory."""
        size = max(int(np.prod(shape)), 1)
        free = self._free.setdefault(size, [])
        memory = free.pop() if free else Memory(size)
        array = memory.array()
        weakref.finalize(array, self._release, memory).atexit = False
        return torch.from_numpy(array)[: int(np.prod(shape))].view(shape), memory.path

    def _release(self, memory: Memory) -> None:
        if not self._closed:
            self._free[memory.size].append(memory)

    def close(self) -> None:
        self._closed = True
        self._free.clear()


class Place(NamedTuple):
    """Where a job's clips go: bytes `offset` on of the shared memory at `path`."""

    path: str
    offset: int
    shape: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Job:
    """One clip to decode, as plain data: everything that was drawn at random comes from `choose` and `cut`."""

    source: Source
    """Holds this one clip."""
    record: Record
    choose: Callable[[int], np.ndarray]
    """Length of the video -> frame ids."""
    cut: Callable[[torch.Tensor | Yuv420, Any], Any]
    """Frames uint8 [T, H, W, C] or in YUV 4:2:0, out -> what is to come back beside the clips: fills `out` with the views. It
    must not give back tensors, which torch would send through files of their own."""
    place: Place | None
    """None: what `cut` gives back is all, and `out` is None."""
    keep: int = 0
    """Bytes a whole decoded video may have to be sent back beside its clips; 0: never."""


class Done(NamedTuple):
    """What is known of a finished job beside its clips."""

    ids: np.ndarray
    """Frames of the clip."""
    seconds: float
    """Time of decoding, with reading the file."""
    video: Frames | None
    """The whole video, where it is worth keeping."""
    cut: Any
    """What the job's `cut` gave back."""
    why_rgb: str | None = None
    """Why PyAV converted the frames to RGB; None: it did not."""


def run_job(job: Job, out: torch.Tensor | None = None, video: Frames | None = None) -> Done:
    """Decode a clip (or take its frames from the kept `video`) and write its views to `out`, by default the job's place.

    Raises DecodeError.
    """
    begin = time.perf_counter()
    whole = None
    if video is not None:
        ids = job.choose(len(video))
        frames = video.take(ids)
    else:
        read, count = _reader(job)
        ids = job.choose(count)
        frames = read(ids)
        if job.keep and frames.nbytes // len(frames) * count <= job.keep:
            with contextlib.suppress(DecodeError):  # damaged outside the planned frames: a good clip of a video not kept
                whole = read(np.arange(count))
    seconds = time.perf_counter() - begin
    if out is None and job.place is not None:
        out = _open(job.place)
    return Done(ids, seconds, whole, job.cut(frames.tensor(), out), frames.why_rgb)


def _reader(job: Job) -> tuple[Callable[[np.ndarray], Frames], int]:
    """ids -> frames of the job's clip, and its number of frames."""
    path, record = job.source.path(job.record), job.record
    if record.total < 0:
        return lambda ids: video_frames(path, ids), probe(path).num_frames
    files = job.source.frame_files(record)
    return lambda ids: folder_frames(path, files, ids), record.total


def _open(place: Place) -> torch.Tensor:
    size, skipped = int(np.prod(place.shape)), place.offset % mmap.ALLOCATIONGRANULARITY
    flags = mmap.MAP_SHARED | getattr(mmap, "MAP_POPULATE", 0)  # at once: a fault for every page costs more than the call
    with open(place.path, "r+b") as file:
        mapped = mmap.mmap(file.fileno(), skipped + size, flags=flags, offset=place.offset - skipped)
    return torch.from_numpy(np.frombuffer(mapped, dtype=np.uint8, count=size, offset=skipped)).view(place.shape)


def start_worker() -> None:
    """One thread per process, no life after the loader's, and deaf to warnings a scheduler sends to all processes of a job."""
    for number in (signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
    torch.set_num_threads(1)
    _keep_freed_memory()
    threading.Thread(target=_end_with_the_loader, daemon=True, name="vmae2-parent").start()


def _keep_freed_memory() -> None:
    """Have glibc keep up to 64 MiB of freed memory: the frames of every clip would else be mapped and zeroed anew, page by
    page, which is a few per cent of a decode."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_TRIM_THRESHOLD, 64 << 20)
        mallopt(_M_MMAP_THRESHOLD, 32 << 20)


def _end_with_the_loader() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


class _Process(multiprocessing.context.ForkServerProcess):
    _hidden = threading.Lock()

    @staticmethod
    def _Popen(process_obj: Any) -> Any:
        # a decoder needs nothing of the caller's script, which multiprocessing would run in it once more
        with _Process._hidden:
            main = sys.modules["__main__"]
            sys.modules["__main__"] = types.ModuleType("__main__")
            try:
                return multiprocessing.context.ForkServerProcess._Popen(process_obj)
            finally:
                sys.modules["__main__"] = main


class _Context(multiprocessing.context.ForkServerContext):
    Process = _Process


def decoder_context() -> Any:
    """How decoder processes are started: a `multiprocessing` context."""
    context = _Context()
    context.set_forkserver_preload([__name__, "av"])
    return context


class Ticket:
    """A submitted job."""

    def __init__(self, job: Job, future: Future[Done]) -> None:
        self.job, self.future = job, future
        self.deaths = 0
        """Processes that ended while they ran this job."""


class Decoders(Protocol):
    """What a loader's jobs run on: `DecodePool`, or `dali_pool.DaliPool`."""

    def submit(self, job: Job, *, out: torch.Tensor | None) -> Any: ...

    def result(self, ticket: Any) -> Done: ...

    def close(self) -> None: ...


class ClipMemory(Protocol):
    """Where clips are written: `MemoryPool`, or `dali_pool.DeviceMemory`."""

    def tensor(self, shape: tuple[int, ...]) -> tuple[torch.Tensor, str]: ...

    def close(self) -> None: ...


class DecodePool:
    """`workers` decoder processes, or with 0 a thread of this one, which nothing can end.

    Args:
        workers: processes.
        timeout_s: seconds a clip may take.
    """

    def __init__(self, workers: int, timeout_s: float) -> None:
        self.timeout_s = timeout_s
        self._workers = workers
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="vmae2-decode")
        self._waiting: list[Ticket] = []
        self._restarts = 0
        self._processes: ProcessPool | None = self._start() if workers else None

    def _start(self) -> ProcessPool:
        self._known: set[int] | None = None
        return ProcessPool(self._workers, initializer=start_worker, context=decoder_context())

    def submit(self, job: Job, *, out: torch.Tensor | None, video: Frames | None = None) -> Ticket:
        """Run a job; one whose `video` is kept here needs no process, `out` is this process's view of the job's place."""
        if self._processes is None or video is not None:
            return Ticket(job, self._thread.submit(run_job, job, out, video))
        ticket = Ticket(job, Future())
        self._waiting.append(ticket)
        self._schedule(ticket)
        return ticket

    def _schedule(self, ticket: Ticket) -> None:
        assert self._processes is not None
        try:
            ticket.future = self._processes.schedule(run_job, args=(ticket.job,), timeout=self.timeout_s)
        except RuntimeError:  # the pool noticed only now that its idle processes were killed
            self._restart()

    def result(self, ticket: Ticket) -> Done:
        """What a job came to. Raises DecodeError; a job whose process was killed is run again."""
        path = ticket.job.source.path(ticket.job.record)
        while ticket.deaths <= DEATHS:
            try:
                done = ticket.future.result(timeout=None if self._processes is None else _WATCH_S)
            except TimeoutError:
                if ticket.future.done():
                    self._finish(ticket)
                    self._known = None  # the pool replaces the process it ended
                    raise DecodeError(path, f"no result within data.timeout_s={self.timeout_s:g} seconds") from None
                if self._someone_died():
                    self._restart()
            except (ProcessExpired, BrokenProcessPool):
                self._restart()
            except DecodeError:
                self._finish(ticket)
                raise
            else:
                self._finish(ticket)
                return done
        self._finish(ticket)
        raise DecodeError(path, f"every process that decodes it ends ({ticket.deaths} tried)")

    def _finish(self, ticket: Ticket) -> None:
        self._restarts = 0
        if ticket in self._waiting:
            self._waiting.remove(ticket)

    def _someone_died(self) -> bool:
        """Whether a process has been replaced that was not ended by a time limit. Pebble loses a job whose process is killed
        in the moment it takes it: without a look nobody would ever hear of it."""
        now = set(self._pids())
        if len(now) < self._workers:  # just being replaced: the next look will tell
            return False
        before, self._known = self._known, now
        return before is not None and before != now

    def _restart(self) -> None:
        """All processes anew, and what was not finished again: nobody of before writes into the shared memory any more."""
        assert self._processes is not None
        self._restarts += 1
        if self._restarts > _RESTARTS:
            raise RuntimeError(
                f"decoder processes were killed {self._restarts} times in a row without finishing one clip; "
                "is this machine out of memory? Lower data.workers"
            )
        self._stop()
        self._processes = self._start()
        for ticket in self._waiting:
            error = ticket.future.exception() if ticket.future.done() else None
            ticket.deaths += isinstance(error, ProcessExpired)
            if not ticket.future.done() or isinstance(error, (ProcessExpired, BrokenProcessPool)):
                self._schedule(ticket)

    def _pids(self) -> list[int]:
        assert self._processes is not None
        return list(self._processes._pool_manager.worker_manager.workers)

    def _stop(self) -> None:
        if self._processes is not None:
            self._processes.stop()
            self._processes.join()

    def close(self) -> None:
        """End all jobs and processes, and wait for them."""
        self._thread.shutdown(wait=True, cancel_futures=True)
        self._stop()
