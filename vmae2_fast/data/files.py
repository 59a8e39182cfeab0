"""Work on every file of a list, for days if need be: in processes, in shards, with a time limit for each file."""

from __future__ import annotations

import os
import re
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from concurrent.futures.process import BrokenProcessPool
from typing import Any, NamedTuple

import numpy as np
from pebble import ProcessExpired, ProcessPool
from tqdm import tqdm

from .decode import decode_timed
from .images import decode_images
from .lists import first_line
from .manifest import Manifest, Record, Source, line_format, open_tree
from .probing import DecodeError, probe
from .workers import decoder_context, start_worker

_ATTEMPTS = 3
"""Processes a file may take with it."""


class Listed(NamedTuple):
    """The clips of a list or of a folder tree."""

    source: Source
    format: str
    """Line format of the list; "video" for a folder tree."""


def open_list(path: str, *, root: str | None = None, template: str | None = None) -> Listed:
    """The clips of a list in one of the official line formats, or of a folder tree.

    root: what relative paths are relative to; by default the list's folder. Raises ManifestError.
    """
    if os.path.isdir(path):
        manifest, names, top = open_tree(path, "train", template)
        kind, base, classes = "video", top, len(names)
    else:
        kind, base, classes = line_format(first_line(path), labelled=template is not None), root or os.path.dirname(path), 0
        manifest = Manifest.read(path, kind)
    source = Source(
        name=path, manifest=manifest, root=base, weight=1.0, stride=1, template=template, classes=classes or None,
        label_names=None,
    )  # fmt: skip
    return Listed(source, kind)


def shard_of(text: str, count: int) -> range:
    """Clips of share "I/N", I from 0 to N - 1: every N-th from I on. Raises ValueError."""
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    if match is None or int(match[1]) >= int(match[2]):
        raise ValueError(f"--shard {text}: must be I/N with 0 <= I < N, as in 0/8 for the first of eight jobs")
    return range(int(match[1]), count, int(match[2]))


def in_processes(
    function: Callable[..., Any], jobs: Sequence[tuple[Any, ...]], *, workers: int, timeout_s: float, what: str
) -> Iterator[tuple[int, Any]]:
    """(number, result) of `function(*job)` in order, with a progress bar. `function` names a file first.

    The result is a DecodeError where the file is at fault: it raised one, took longer than `timeout_s`, or ended its process.
    """
    ahead: deque[tuple[int, Future[Any]]] = deque()
    waiting = iter(range(len(jobs)))
    pool = ProcessPool(workers, initializer=start_worker, context=decoder_context())
    try:
        with tqdm(total=len(jobs), desc=what, unit="file", disable=None, dynamic_ncols=True) as bar:
            while True:
                while len(ahead) < 4 * workers and (number := next(waiting, None)) is not None:
                    ahead.append((number, pool.schedule(function, args=jobs[number], timeout=timeout_s)))
                if not ahead:
                    return
                number, future = ahead.popleft()
                for attempt in range(_ATTEMPTS):
                    try:
                        # nobody hears of a file whose process is killed as it takes it: queue and limit bound the wait
                        result = future.result(timeout=(4 * workers + 1) * timeout_s)
                        break
                    except DecodeError as error:
                        result = error
                        break
                    except TimeoutError:
                        result = DecodeError(jobs[number][0], f"no result within {timeout_s:g} seconds")
                        if future.done():
                            break
                    except ProcessExpired as error:
                        result = DecodeError(jobs[number][0], f"ends the process that reads it (code {error.exitcode})")
                    except BrokenProcessPool:
                        raise RuntimeError(f"{what}: all processes were killed; is this machine out of memory?") from None
                    if attempt + 1 < _ATTEMPTS:
                        future = pool.schedule(function, args=jobs[number], timeout=timeout_s)
                bar.update()
                yield number, result
    finally:
        pool.stop()
        pool.join()


def verify_clip(path: str, source: Source, record: Record) -> int:
    """Number of frames of a clip whose first, middle and last ones decode. Raises DecodeError."""
    if record.total >= 0:
        decode_images(path, source.frame_files(record), np.array([0, record.total // 2, record.total - 1]))
        return record.total
    count = probe(path).num_frames
    decode_timed(path, np.array([0, count // 2, count - 1]))
    return count


def verify(listed: Listed, *, shard: str = "0/1", workers: int = 2, timeout_s: float = 60.0) -> dict[str, Any]:
    """Probe every file of a list. Returns files, frames, bad (number), and for every reason the paths."""
    source = listed.source
    numbers = shard_of(shard, len(source.manifest))
    jobs = [(source.path(record), source.alone(record), record) for record in map(source.manifest.__getitem__, numbers)]
    frames = 0
    reasons: dict[str, list[str]] = {}
    for number, result in in_processes(verify_clip, jobs, workers=workers, timeout_s=timeout_s, what="verifying"):
        if isinstance(result, DecodeError):
            reasons.setdefault(result.reason, []).append(jobs[number][0])
        else:
            frames += result
    bad = sum(map(len, reasons.values()))
    return {"files": len(jobs), "frames": frames, "bad": bad, "reasons": dict(sorted(reasons.items()))}
