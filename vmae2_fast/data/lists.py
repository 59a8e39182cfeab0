"""List files of clips as a table and one block of paths, indexed once and memory-mapped from then on.

A list is parsed in chunks by array operations: lines are found, whole numbers read backwards from the ends of lines, and
what is left is the path. Lists above `INDEXED_BYTES` get an index file beside them (`.LIST.vmae2`: header, table, paths),
which is mapped instead of read: opening 1.35 million clips then costs a checksum of the list and no memory of its own, and
all processes share the pages. The index is written under another name and renamed, is never changed afterwards, and is made
anew when the list's checksum, its format or this file's version differs. Where the folder cannot be written, the table is
kept in memory.
"""

from __future__ import annotations

import contextlib
import json
import os
import uuid
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

COLUMNS: dict[str, tuple[str, ...]] = {
    "pretrain": ("path", "start", "total"),
    "video": ("path", "label"),
    "frames": ("path", "total", "label"),
    "paths": ("path",),
}
ROW = np.dtype([("first", "<i8"), ("length", "<i4"), ("start", "<i4"), ("total", "<i4"), ("label", "<i4")])
"""A clip: its bytes in the block of paths, number of the first raw frame, raw frames (negative: a video file), label or -1."""
INDEXED_BYTES = 1 << 20
_CHUNK = 1 << 23
_HEADER = 512
_VERSION = 1
_DIGITS = 10
_SPACE = np.isin(np.arange(256), list(b" \t\r\n\v\f"))


class ManifestError(ValueError):
    """A list, a folder or `datasets.toml` that cannot be used; names the file, and the line where there is one."""


class ClipTable(NamedTuple):
    """The clips of a list."""

    rows: np.ndarray
    """`ROW` [clips]."""
    paths: np.ndarray
    """uint8: the paths, UTF-8, one after the other without separators."""


def open_list(path: str | os.PathLike[str], format: str) -> ClipTable:
    """The clips of a list file. Raises ManifestError naming file and 1-based line for what is not a clip."""
    index = Path(path).with_name(f".{Path(path).name}.vmae2")
    try:
        size = os.path.getsize(path)
        if size < INDEXED_BYTES:
            return read_list(path, format)
        stamp = {"version": _VERSION, "format": format, "bytes": size, "crc32": _checksum(path)}
        table = _mapped(index, stamp)
        if table is None:
            table = read_list(path, format)
            with contextlib.suppress(OSError):  # a folder that cannot be written: only slower next time
                _write_index(index, stamp, table)
    except OSError as error:
        raise ManifestError(f"{path}: cannot read the list: {error.strerror or error}") from error
    return table


def _checksum(path: str | os.PathLike[str]) -> int:
    value = 0
    with open(path, "rb") as file:
        while chunk := file.read(_CHUNK):
            value = zlib.crc32(chunk, value)
    return value


def _mapped(index: Path, stamp: dict[str, Any]) -> ClipTable | None:
    """The table of an index file, or None where it is missing, of another list, or cut off."""
    try:
        with open(index, "rb") as file:
            header = json.loads(file.read(_HEADER))
        count, size = header.pop("clips"), header.pop("path_bytes")
        if header != stamp or os.path.getsize(index) != _HEADER + count * ROW.itemsize + size:
            return None
        rows = np.memmap(index, dtype=ROW, mode="r", offset=_HEADER, shape=(count,))
        paths = np.memmap(index, dtype=np.uint8, mode="r", offset=_HEADER + rows.nbytes, shape=(size,))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return ClipTable(rows, paths)


def _write_index(index: Path, stamp: dict[str, Any], table: ClipTable) -> None:
    header = json.dumps({**stamp, "clips": len(table.rows), "path_bytes": len(table.paths)}).encode()
    partial = index.with_name(f"{index.name}.{uuid.uuid4().hex}")
    try:
        with open(partial, "wb") as file:
            file.write(header.ljust(_HEADER))
            file.write(table.rows.data)
            file.write(table.paths.data)
        os.replace(partial, index)
    except OSError:
        partial.unlink(missing_ok=True)
        raise


def read_list(path: str | os.PathLike[str], format: str) -> ClipTable:
    """Parse a list file without its index. Raises OSError, and ManifestError as `open_list`."""
    rows, paths, before = [], [], 0
    numbers = COLUMNS[format][1:]
    for text, line in _chunks(path):
        table, block = _parse(text, line, numbers, format, path)
        table["first"] += before
        before += len(block)
        rows.append(table)
        paths.append(block)
    merged = np.concatenate(rows) if rows else np.empty(0, ROW)
    if not len(merged):
        raise ManifestError(f"{path}: the list is empty")
    return ClipTable(merged, np.concatenate(paths))


def _chunks(path: str | os.PathLike[str]) -> Iterator[tuple[bytes, int]]:
    """Whole lines of a file, some MiB at a time, each with the number of its first line (from 1)."""
    line, rest = 1, b""
    with open(path, "rb") as file:
        while chunk := file.read(_CHUNK):
            if line == 1 and not rest:
                chunk = chunk.removeprefix(b"\xef\xbb\xbf")
            cut = chunk.rfind(b"\n") + 1
            if not cut:
                rest += chunk
                continue
            yield rest + chunk[:cut], line
            line += chunk.count(b"\n", 0, cut)
            rest = chunk[cut:]
    if rest:
        yield rest, line


def _parse(
    text: bytes, line: int, numbers: tuple[str, ...], format: str, path: str | os.PathLike[str]
) -> tuple[np.ndarray, np.ndarray]:
    """Rows and paths of some whole lines, the first of which has number `line`."""
    buffer = np.frombuffer(text, dtype=np.uint8)
    ends = np.flatnonzero(buffer == ord("\n"))
    if not len(ends) or ends[-1] != len(buffer) - 1:
        ends = np.append(ends, len(buffer))
    starts = np.concatenate(([0], ends[:-1] + 1))
    starts = _skip(buffer, starts, ends, 1)
    ends = _skip(buffer, ends, starts, -1)
    number = line + np.flatnonzero(ends > starts)
    starts, ends = starts[ends > starts], ends[ends > starts]
    rows = np.zeros(len(starts), dtype=ROW)
    rows["start"], rows["total"], rows["label"] = int(format == "frames"), -1, -1
    good, column_ends = np.ones(len(starts), dtype=bool), ends
    for name in reversed(numbers):
        rows[name], column_ends, valid = _number(buffer, starts, column_ends)
        good &= valid
    good &= column_ends > starts
    if not good.all():
        first = int(np.argmin(good))
        shown = text[starts[first]:ends[first]].decode("utf-8", "replace")
        expected = " ".join(COLUMNS[format])
        raise ManifestError(f"{path}:{number[first]}: expected `{expected}` separated by spaces, got {shown!r}")
    _check_numbers(rows, number, numbers, path)
    rows["length"] = column_ends - starts
    rows["first"] = np.cumsum(rows["length"]) - rows["length"]
    inside = np.zeros(len(buffer) + 1, dtype=np.int8)
    inside[starts] = 1
    inside[column_ends] -= 1  # a path never ends where the next begins: a separator lies between
    return rows, buffer[np.cumsum(inside[:-1], dtype=np.int8).view(bool)]


def _skip(buffer: np.ndarray, place: np.ndarray, limit: np.ndarray, step: int) -> np.ndarray:
    """Places moved over white space towards `limit`: the first byte that is none (step 1), or one behind it (-1)."""
    place = place.copy()
    moving = np.arange(len(place))
    offset = 0 if step > 0 else -1
    while len(moving):
        moving = moving[place[moving] < limit[moving]] if step > 0 else moving[place[moving] > limit[moving]]
        moving = moving[_SPACE[buffer[place[moving] + offset]]]
        place[moving] += step
    return place


def _number(buffer: np.ndarray, starts: np.ndarray, ends: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The whole number in front of each end, where the column before it ends, and whether there is one that fits."""
    value = np.zeros(len(ends), dtype=np.int64)
    place = ends - 1
    scale, running = 1, np.ones(len(ends), dtype=bool)
    for _ in range(_DIGITS):
        byte = buffer[np.maximum(place, 0)]
        running = running & (place > starts) & (byte >= ord("0")) & (byte <= ord("9"))
        value += np.where(running, byte.astype(np.int64) - ord("0"), 0) * scale
        place = place - running
        scale *= 10
    digits = place < ends - 1
    minus = (place > starts) & (buffer[np.maximum(place, 0)] == ord("-"))
    value, place = np.where(minus, -value, value), place - minus
    separated = (place > starts) & _SPACE[buffer[np.maximum(place, 0)]]
    fits = abs(value) < 1 << 31
    return np.where(fits, value, 0), _skip(buffer, place + 1, starts, -1), digits & separated & fits


def _check_numbers(rows: np.ndarray, line: np.ndarray, numbers: tuple[str, ...], path: str | os.PathLike[str]) -> None:
    empty = np.flatnonzero(rows["total"] == 0)
    if len(empty):
        raise ManifestError(f"{path}:{line[empty[0]]}: a clip of 0 frames (a negative total means a video file)")
    negative = np.flatnonzero(rows["label"] < 0)
    if "label" in numbers and len(negative):
        label = rows["label"][negative[0]]
        raise ManifestError(f"{path}:{line[negative[0]]}: label {label} is out of range, labels must be not negative")


def line_of(path: str | os.PathLike[str], clip: int) -> int:
    """The 1-based line of a list on which its clip number `clip` (from 0) stands."""
    seen = -1
    with open(path, "rb") as lines:
        for number, line in enumerate(lines, 1):
            seen += bool(line.strip())
            if seen == clip:
                return number
    raise ValueError(f"{path}: has no clip {clip}")


def first_line(path: str | os.PathLike[str]) -> bytes:
    """The first line of a list that is not blank, stripped; empty if there is none. Raises ManifestError."""
    try:
        with open(path, "rb") as lines:
            return next((line for raw in lines if (line := raw.removeprefix(b"\xef\xbb\xbf").strip())), b"")
    except OSError as error:
        raise ManifestError(f"{path}: cannot read the list: {error.strerror or error}") from error
