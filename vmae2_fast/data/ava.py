"""The files of AVA and AVA-Kinetics: annotations, exclusions, label map, person boxes, results.

    annotations   video,second,x1,y1,x2,y2,action,person    one row a (person, action); 7 columns (no person) and, for a key
                                                            frame without people, 2 columns in AVA-Kinetics
    results       video,second,x1,y1,x2,y2,action,score
    exclusions    video,second
    label map     pbtxt blocks of `name: "..."` and `id:` or `label_id:`
    person boxes  video,second,x1,y1,x2,y2[,action],score as CSV; a COCO list of {image_id, bbox (x, y, w, h in pixels), score}
                  with a JSON of its images; a pickled {"video,second": [n, 5]}, read without running anything

Boxes are shares of the frame, actions are numbered from 1 to 80. A key frame's name is "video,%04d". Whatever a file holds
that cannot be meant is one `AvaError` with file and line.
"""

from __future__ import annotations

import csv
import json
import math
import os
import pickle
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from . import boxes as geometry

ACTIONS = 80
_LOOSE = 0.5
"""How far outside 0..1 a coordinate may lie before it is taken for a mistake."""

Path_ = str | os.PathLike[str]


class AvaError(ValueError):
    """A file of AVA that cannot be used; names the file, and the line where there is one."""


class Rows(NamedTuple):
    """Rows of an annotation or result file, in its order."""

    frames: list[str]
    """Key frame of each row."""
    boxes: np.ndarray
    """float64 [n, 4], shares of the frame."""
    actions: np.ndarray
    """int64 [n], 1 .. 80."""
    scores: np.ndarray
    """float64 [n]; 1 in annotations."""
    empty: frozenset[str]
    """Key frames named without a box."""


class KeyFrame(NamedTuple):
    """One annotated moment of a video."""

    name: str
    video: str
    second: float
    boxes: np.ndarray
    """float64 [n, 4], shares of the frame; one row a person."""
    labels: np.ndarray
    """float32 [n, 80], 1 where the person does action column + 1."""


def key_name(video: str, second: float) -> str:
    """Name of a key frame: "video,0902" (AVA-Kinetics: "video,12.5" where the second is no whole number)."""
    return f"{video},{int(second):04d}" if second == int(second) else f"{video},{second:g}"


def _lines(path: Path_) -> Iterator[tuple[str, list[str]]]:
    """("file:line", columns) of every line of a CSV file that is not blank."""
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            for number, columns in enumerate(csv.reader(file), 1):
                if any(column.strip() for column in columns):
                    yield f"{path}:{number}", [column.strip() for column in columns]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise AvaError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}") from error


def _numbers(where: str, columns: Iterable[str], what: str) -> list[float]:
    try:
        values = [float(column) for column in columns]
    except ValueError:
        raise AvaError(f"{where}: {what} must be numbers, got {','.join(columns)!r}") from None
    if not all(map(math.isfinite, values)):
        raise AvaError(f"{where}: {what} must be finite, got {','.join(columns)!r}")
    return values


def _frame(where: str, columns: list[str]) -> str:
    if not columns[0]:
        raise AvaError(f"{where}: the video's name is empty")
    return key_name(columns[0], _numbers(where, columns[1:2], "the second")[0])


def _box(where: str, columns: list[str]) -> list[float]:
    box = _numbers(where, columns, "box coordinates")
    if min(box) < -_LOOSE or max(box) > 1 + _LOOSE:
        given = ",".join(columns)
        raise AvaError(f"{where}: box {given} lies outside the frame; coordinates are shares of it (0..1), not pixels")
    return box


def _rows(path: Path_, allowed: tuple[int, ...], scored: bool) -> Rows:
    frames: list[str] = []
    rows: list[list[float]] = []
    empty: set[str] = set()
    form = "video,second,x1,y1,x2,y2,action," + ("score" if scored else "person")
    for where, columns in _lines(path):
        if len(columns) not in allowed:
            raise AvaError(f"{where}: expected `{form}`, got {len(columns)} columns")
        frame = _frame(where, columns)
        if len(columns) == 2:
            empty.add(frame)
            continue
        box = _box(where, columns[2:6])
        if not (columns[6].isdigit() and 1 <= int(columns[6]) <= ACTIONS):
            raise AvaError(f"{where}: action {columns[6]!r} is unknown; actions are numbered 1..{ACTIONS}")
        score = _numbers(where, columns[7:8], "the score")[0] if scored else 1.0
        frames.append(frame)
        rows.append([*box, float(columns[6]), score])
    table = np.asarray(rows, dtype=np.float64).reshape(-1, 6)
    return Rows(frames, table[:, :4], table[:, 4].astype(np.int64), table[:, 5], frozenset(empty - set(frames)))


def read_annotations(path: Path_) -> Rows:
    """Ground truth. Raises AvaError for a file that cannot be read or is empty, and for the first line that is not one."""
    rows = _rows(path, (2, 7, 8), scored=False)
    if not rows.frames and not rows.empty:
        raise AvaError(f"{path}: holds no annotation")
    return rows


def read_results(path: Path_) -> Rows:
    """Detections with an action and a score each; none at all is a valid result. Raises AvaError as `read_annotations`."""
    return _rows(path, (8,), scored=True)


def write_results(path: Path_, rows: Iterable[tuple[str, np.ndarray, int, float]]) -> int:
    """Write (key frame, box, action, score) rows as a result file with five decimals; returns how many. Atomic."""
    target, count = Path(path), 0
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "w", encoding="utf-8") as file:
            for frame, box, action, score in rows:
                file.write(f"{frame},{','.join(f'{v:.5f}' for v in box)},{action},{score:.5f}\n")
                count += 1
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)
    return count


def read_exclusions(path: Path_) -> frozenset[str]:
    """Names of the key frames that count for nothing."""
    found = set()
    for where, columns in _lines(path):
        if len(columns) != 2:
            raise AvaError(f"{where}: expected `video,second`, got {len(columns)} columns")
        found.add(_frame(where, columns))
    return frozenset(found)


def read_label_map(path: Path_) -> dict[int, str]:
    """Action number -> name of a .pbtxt label map. Raises AvaError for a block without both, or a number given twice."""
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise AvaError(f"{path}: cannot read the label map: {getattr(error, 'strerror', None) or error}") from error
    if text.count("{") != text.count("}"):
        raise AvaError(f"{path}: a block is not closed: {text.count('{')} times '{{', {text.count('}')} times '}}'")
    names: dict[int, str] = {}
    for block in re.findall(r"\{(.*?)\}", text, re.DOTALL):
        name = re.search(r"""name\s*:\s*["'](.*?)["']\s*$""", block, re.MULTILINE)
        number = re.search(r"\b(?:label_)?id\s*:\s*(\d+)\s*(?:$|[,;#]|name)", block, re.MULTILINE)
        if name is None or number is None or not 1 <= int(number[1]) <= ACTIONS:
            raise AvaError(f"{path}: a block needs a name and an id in 1..{ACTIONS}, got {' '.join(block.split())!r}")
        if int(number[1]) in names:
            raise AvaError(f"{path}: id {number[1]} is given twice")
        names[int(number[1])] = name[1]
    if not names:
        raise AvaError(f"{path}: holds no label; expected blocks of `name:` and `id:`")
    return names


def key_frames(rows: Rows, exclusions: frozenset[str] = frozenset()) -> list[KeyFrame]:
    """The key frames of an annotation file in their order, excluded ones left out; the rows of one box are one person."""
    people: dict[str, dict[tuple[float, ...], list[int]]] = {}
    for frame, box, action in zip(rows.frames, rows.boxes.tolist(), rows.actions.tolist()):
        people.setdefault(frame, {}).setdefault(tuple(box), []).append(action - 1)
    found = []
    for name in [*people, *sorted(rows.empty)]:
        if name in exclusions:
            continue
        persons = people.get(name, {})
        labels = np.zeros((len(persons), ACTIONS), dtype=np.float32)
        for row, actions in enumerate(persons.values()):
            labels[row, actions] = 1
        video, _, second = name.rpartition(",")
        found.append(KeyFrame(name, video, float(second), np.asarray(list(persons), dtype=np.float64).reshape(-1, 4), labels))
    return found


def unannotated(names: Iterable[str]) -> list[KeyFrame]:
    """Key frames of which nothing but their name is known."""
    parts = [(name, *name.rpartition(",")[::2]) for name in names]
    nobody, nothing = np.zeros((0, 4)), np.zeros((0, ACTIONS), dtype=np.float32)
    return [KeyFrame(name, video, float(second), nobody, nothing) for name, video, second in parts]


def read_person_boxes(path: Path_, images: Path_ | None = None) -> dict[str, np.ndarray]:
    """Detected people: key frame -> float64 [n, 5] (x1, y1, x2, y2 as shares, score), in the order of the file.

    path: .csv, .json (then `images` is the JSON that names each image_id's movie, timestamp, width and height) or .pkl.
    Raises AvaError for a file that is none of these, boxes that lie outside their frame, scores outside 0..1, and for pickles
    that hold more than arrays and plain values.
    """
    ending = Path(path).suffix.lower()
    if ending == ".json":
        found = _coco(path, images)
    elif ending in (".pkl", ".pickle"):
        found = _pickled(path)
    else:
        found = {}
        for where, columns in _lines(path):
            if len(columns) not in (7, 8):
                raise AvaError(f"{where}: expected `video,second,x1,y1,x2,y2,score`, got {len(columns)} columns")
            row = [*_box(where, columns[2:6]), *_numbers(where, columns[-1:], "the score")]
            found.setdefault(_frame(where, columns), []).append(row)
    people = {frame: np.asarray(rows, dtype=np.float64).reshape(-1, 5) for frame, rows in found.items()}
    for frame, rows in people.items():
        if (np.abs(rows[:, :4] - 0.5) > 0.5 + _LOOSE).any():
            raise AvaError(f"{path}: {frame}: a box lies outside the frame")
        if (np.abs(rows[:, 4] - 0.5) > 0.5).any():
            raise AvaError(f"{path}: {frame}: the score of a person must lie in 0..1, got {rows[:, 4].max():g}")
    return people


def _json(path: Path_) -> Any:
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise AvaError(f"{path}: cannot be read as JSON: {error}") from error


def _coco(path: Path_, images: Path_ | None) -> dict[str, list[list[float]]]:
    if images is None:
        raise AvaError(f"{path}: a JSON of boxes needs the JSON of its images (box_images)")
    known: dict[Any, tuple[str, int, int]] = {}
    try:
        for image in _json(images)["images"]:
            name = key_name(str(image["movie"]), float(image["timestamp"]))
            known[image["id"]] = name, int(image["width"]), int(image["height"])
    except (KeyError, TypeError, ValueError) as error:
        raise AvaError(f"{images}: expected images with id, movie, timestamp, width and height ({error!r})") from error
    found: dict[str, list[list[float]]] = {}
    for number, row in enumerate(_json(path)):
        try:
            name, width, height = known[row["image_id"]]
            box = geometry.from_xywh(np.asarray([row["bbox"]], dtype=np.float64).reshape(1, 4))
            share = geometry.to_shares(box, width, height)[0]
            found.setdefault(name, []).append([*share.tolist(), float(row["score"])])
        except (KeyError, TypeError, ValueError) as error:
            raise AvaError(f"{path}: entry {number} is no box of a known image ({error!r})") from error
        if not np.isfinite(found[name][-1]).all():
            raise AvaError(f"{path}: entry {number} holds a value that is not finite")
    return found


class _ArraysOnly(pickle.Unpickler):
    """Builds numpy arrays and plain values; any other name in the pickle is refused before it is looked up."""

    _ALLOWED = frozenset(
        (module, name)
        for module in ("numpy", "numpy.core.multiarray", "numpy._core.multiarray", "numpy.core.numeric", "numpy._core.numeric")
        for name in ("ndarray", "dtype", "_reconstruct", "scalar", "_frombuffer")
    ) | {("collections", "OrderedDict"), ("_codecs", "encode")}

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self._ALLOWED:
            raise pickle.UnpicklingError(f"{module}.{name} is not allowed")
        return super().find_class(module, name)


def _pickled(path: Path_) -> dict[str, Any]:
    try:
        with open(path, "rb") as file:
            table = _ArraysOnly(file, encoding="latin1").load()
        found = {}
        for key, rows in table.items():
            video, _, second = str(key).rpartition(",")
            array = np.asarray(rows, dtype=np.float64).reshape(-1, 5)
            if not video or not np.isfinite(array).all():
                raise ValueError(f"{key!r} is no key frame with boxes as shares of it")
            found[key_name(video, float(second))] = array
    except (OSError, ValueError, TypeError, AttributeError, EOFError, ImportError, pickle.UnpicklingError) as error:
        raise AvaError(f"{path}: no pickled table of boxes: {error}") from error
    return found
