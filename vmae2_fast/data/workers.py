"""Decoder processes: clips are written by them into memory the loader shares with them, and a job can neither hang nor
take the run down.

Pebble runs the processes, ends a job at its time limit and starts a new process for one that died. They are forked from a
server that imported this package once, so that a restart takes milliseconds, that they may be started after CUDA, and
that the caller's script is not run again in them. The shared memory is anonymous (`memfd_create`): it is not bounded by the
size of /dev/shm, and nothing is left of it however a process ends.
"""

from __future__ import annotations

import contextlib
import mmap
import multiprocessing
import multiprocessing.context
import multiprocessing.forkserver
import os
import sys
import tempfile
import threading
import time
import types
import weakref
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as JobTimeout
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from pebble import ProcessExpired, ProcessPool

from .decode import DecodeError, decode_images, decode_video, probe
from .manifest import Record, Source

DEATHS = 2
"""Processes a job may take with it before its clip is held to be the cause."""


class Memory:
    """Anonymous memory other processes can open by `path`; unmapped when the last array on it is gone."""

    def __init__(self, size: int) -> None:
        self.size = size
        if hasattr(os, "memfd_create"):
            self._file = os.fdopen(os.memfd_create("vmae2-clips"), "r+b")
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
    cut: Callable[[torch.Tensor, torch.Tensor], None]
    """Frames uint8 [T, H, W, C], out -> None: fills `out` with the views."""
    place: Place
    keep: int = 0
    """Bytes a whole decoded video may have to be sent back beside its clips; 0: never."""


class Done(NamedTuple):
    """What is known of a finished job beside its clips."""

    ids: np.ndarray
    """Frames of the clip."""
    seconds: float
    """Time of decoding, with reading the file."""
    video: np.ndarray | None
    """The whole video uint8 [N, H, W, C], where it is worth keeping."""


def run_job(job: Job, out: torch.Tensor | None = None, video: np.ndarray | None = None) -> Done:
    """Decode a clip (or take its frames from the kept `video`) and write its views to `out`, by default the job's place.

    Raises DecodeError.
    """
    begin = time.perf_counter()
    whole = None
    if video is not None:
        ids = job.choose(len(video))
        frames = video[ids]
    else:
        read, count = _reader(job)
        ids = job.choose(count)
        frames = read(ids)
        if job.keep and frames[0].nbytes * count <= job.keep:
            with contextlib.suppress(DecodeError):  # damaged outside the planned frames: a good clip of a video not kept
                whole = read(np.arange(count))
    seconds = time.perf_counter() - begin
    job.cut(torch.from_numpy(frames), _open(job.place) if out is None else out)
    return Done(ids, seconds, whole)


def _reader(job: Job) -> tuple[Callable[[np.ndarray], np.ndarray], int]:
    """ids -> frames of the job's clip, and its number of frames."""
    path, record = job.source.path(job.record), job.record
    if record.total < 0:
        return lambda ids: decode_video(path, ids), probe(path).num_frames
    files = job.source.frame_files(record)
    return lambda ids: decode_images(path, files, ids), record.total


def _open(place: Place) -> torch.Tensor:
    size = int(np.prod(place.shape))
    with open(place.path, "r+b") as file:
        shared = np.frombuffer(mmap.mmap(file.fileno(), 0), dtype=np.uint8, count=size, offset=place.offset)
    return torch.from_numpy(shared).view(place.shape)


def _start_worker() -> None:
    """One thread per process, and no life after the loader's."""
    torch.set_num_threads(1)
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True, name="vmae2-parent").start()


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
        self._processes: ProcessPool | None = None
        if workers:
            self._start()

    def _start(self) -> None:
        context = _Context()
        context.set_forkserver_preload([__name__])
        self._processes = ProcessPool(self._workers, initializer=_start_worker, context=context)

    def submit(self, job: Job, *, out: torch.Tensor, video: np.ndarray | None = None) -> Future[Done]:
        """Run a job; one whose `video` is kept here needs no process, `out` is this process's view of the job's place."""
        if self._processes is None or video is not None:
            return self._thread.submit(run_job, job, out, video)
        return self._schedule(job)

    def _schedule(self, job: Job) -> Future[Done]:
        assert self._processes is not None
        try:
            return self._processes.schedule(run_job, args=(job,), timeout=self.timeout_s)
        except RuntimeError:  # the pool noticed only now that its idle processes were killed
            self._restart()
            return self._processes.schedule(run_job, args=(job,), timeout=self.timeout_s)

    def _restart(self) -> None:
        assert self._processes is not None
        self._processes.stop()
        self._processes.join()
        self._start()

    def result(self, job: Job, future: Future[Done]) -> Done:
        """The result of a submitted job. Raises DecodeError; a job whose process was killed is run again."""
        for death in range(DEATHS + 1):
            try:
                return future.result()
            except JobTimeout:
                path = job.source.path(job.record)
                raise DecodeError(path, f"no result within data.timeout_s={self.timeout_s:g} seconds") from None
            except ProcessExpired as error:
                if death == DEATHS:
                    path = job.source.path(job.record)
                    raise DecodeError(path, f"ends the process that decodes it (exit code {error.exitcode})") from None
            except BrokenProcessPool:
                if self._processes is not None and not self._processes.active:
                    self._restart()
            future = self._schedule(job)
        raise RuntimeError("decoder processes are killed as fast as they start: is this machine out of memory?")

    @property
    def pids(self) -> list[int]:
        """Process ids of the decoders that run."""
        return [] if self._processes is None else list(self._processes._pool_manager.worker_manager.workers)

    def close(self) -> None:
        """End all jobs and processes, and wait for them."""
        self._thread.shutdown(wait=True, cancel_futures=True)
        if self._processes is not None:
            self._processes.stop()
            self._processes.join()
