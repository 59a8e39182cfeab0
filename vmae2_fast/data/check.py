"""Is everything there? Every root, list and file of a run is looked for before anything starts."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from ..config import DataConfig
from .lists import ManifestError
from .manifest import Record, Source, open_sources
from .probing import DecodeError
from .sampling import Purpose, permutation

_TOGETHER = 256
_THREADS = 32  # looking at a file is waiting, most of all on network storage


class SourceCheck(NamedTuple):
    """What was found of one source."""

    source: str
    """Name and split."""
    clips: int
    looked_at: int
    missing: int
    examples: tuple[str, ...]
    """The first missing files, each once, or why the source cannot be opened."""


def check_sources(data: DataConfig, *, sample: int | None = None, examples: int = 10) -> list[SourceCheck]:
    """Look for every file of every source of `data`; raises nothing for what is missing.

    sample: look at that many clips of each source, spread evenly; None: at all. examples: named for each source.
    """
    if not data.sources:
        return [SourceCheck("(none)", 0, 0, 1, ("no data: the run names no source",))]
    return [_check_source(data, number, sample, examples) for number in range(len(data.sources))]


def _check_source(data: DataConfig, number: int, sample: int | None, examples: int) -> SourceCheck:
    wanted = data.sources[number]
    name = f"{wanted.name}/{wanted.split}"
    try:
        (source,) = open_sources(dataclasses.replace(data, sources=(wanted,)))
    except (ManifestError, ValueError) as error:
        return SourceCheck(name, 0, 0, 1, (str(error),))
    clips = len(source.manifest)
    numbers: Sequence[int] = range(clips)
    if sample is not None and sample < clips:
        numbers = np.sort(permutation(0, Purpose.SUBSET, 0, 0, clips)[:sample]).tolist()
    groups = [numbers[i : i + _TOGETHER] for i in range(0, len(numbers), _TOGETHER)]
    missing, known = 0, dict[str, None]()  # several clips are cut out of one folder of raw frames
    with ThreadPoolExecutor(_THREADS) as pool, tqdm(total=len(numbers), desc=name, unit="clip", disable=None) as bar:
        for group, found in zip(groups, pool.map(lambda group: list(_absent(source, group)), groups), strict=True):
            known.update(dict.fromkeys(found))
            missing += len(found)
            bar.update(len(group))
            bar.set_postfix(missing=missing)
    return SourceCheck(name, clips, len(numbers), missing, tuple(known)[:examples])


def _absent(source: Source, numbers: Iterable[int]) -> Iterable[str]:
    for number in numbers:
        record = source.manifest[number]
        path = missing_file(source, record)
        if path is not None:
            yield path


def missing_file(source: Source, record: Record) -> str | None:
    """The first file of a clip that is not there (of raw frames the folder, its first and its last frame are looked for)."""
    path = source.path(record)
    if record.total < 0:
        return None if os.path.isfile(path) else path
    if not os.path.isdir(path):
        return path
    try:
        files = source.frame_files(record)
    except DecodeError as error:
        return str(error)
    return next((file for file in (files[0], files[-1]) if not os.path.isfile(file)), None)
