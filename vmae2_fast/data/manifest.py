"""Lists of clips: the official line formats, `datasets.toml`, and plain folder trees.

A manifest holds the clips of a list as a table and one block of paths, memory-mapped where the list is long (`lists.py`).
Line formats (space separated; paths may hold spaces; blank lines and CRLF are fine):

    pretrain   `path start total`    total < 0: a video file; else raw frames, `start` the number of the first
    video      `path label`
    frames     `path total label`    raw frames numbered from 1
    paths      `path`                a video file; must be named as the format, nothing shows it

`datasets.toml` says where data lives, one table per data set; paths are relative to the file, lists to `root`:

    [ssv2]
    root = "data/ssv2"
    train = "train.csv"
    val = "val.csv"
    kind = "frames"                  # or "video"
    format = "frames"                # the line format; default "auto": raw frames are labelled where classes are declared
    template = "img_{:05}.jpg"
    stride = 2
    classes = 174
    labels = "labels.txt"            # class names, one a line
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ..config import DataConfig, SourceConfig, unknown
from .images import IMAGE_SUFFIXES, decode_image, image_files, natural_key
from .labels import read_labels
from .lists import COLUMNS, ROW, ClipTable, ManifestError, first_line, line_of, open_list
from .probing import VIDEO_SUFFIXES, DecodeError, probe

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

_KEYS = ("root", "train", "val", "test", "kind", "format", "template", "stride", "classes", "labels")
_NUMBERS = ("stride", "classes")
_SPLITS = ("train", "val", "test")


class Record(NamedTuple):
    """One clip of a list."""

    path: str
    """Video file, or folder of raw frames; relative paths are relative to the source's root."""
    start: int
    """Number of the first raw frame."""
    total: int
    """Number of raw frames; negative for a video file."""
    label: int
    """-1 where the list has none."""


class Manifest:
    """The clips of one list, read-only. `len(manifest)`, `manifest[i]` -> Record."""

    def __init__(self, table: ClipTable) -> None:
        self.table = table
        self.totals: np.ndarray = table.rows["total"]
        self.labels: np.ndarray = table.rows["label"]

    def __len__(self) -> int:
        return len(self.totals)

    def __getitem__(self, index: int) -> Record:
        first, length, start, total, label = self.table.rows[index].item()
        path = self.table.paths[first : first + length].tobytes().decode("utf-8", "surrogateescape")
        return Record(path, start, total, label)

    @staticmethod
    def read(path: str | os.PathLike[str], format: str, *, classes: int | None = None) -> Manifest:
        """Read a list file in one of the formats of `lists.COLUMNS`.

        Raises ManifestError naming the file (and 1-based line) for an unreadable or empty list, wrong columns, or a label
        outside [0, classes).
        """
        manifest = Manifest(open_list(path, format))
        if classes is not None and manifest.labels.max() >= classes:
            clip = int(np.argmax(manifest.labels >= classes))
            where = f"{path}:{line_of(path, clip)}"
            raise ManifestError(f"{where}: label {manifest.labels[clip]} is out of range, labels must be in 0..{classes - 1}")
        return manifest

    @staticmethod
    def of(records: list[Record]) -> Manifest:
        """A manifest of records made in memory."""
        paths = [record.path.encode("utf-8", "surrogateescape") for record in records]
        ends = np.cumsum([len(path) for path in paths], dtype=np.int64)
        rows = np.empty(len(records), dtype=ROW)
        rows["length"] = [len(path) for path in paths]
        rows["first"] = ends - rows["length"]
        for name in ("start", "total", "label"):
            rows[name] = [getattr(record, name) for record in records]
        return Manifest(ClipTable(rows, np.frombuffer(b"".join(paths), dtype=np.uint8)))


def line_format(line: bytes, *, labelled: bool = True) -> str:
    """The format a list is in, judged by a line of it: two numbers at the end make three columns.

    `path start total` and `path total label` look alike: a negative second number says "pretrain", else `labelled` decides.
    """
    numbers = [column for column in line.split()[1:][-2:] if column.removeprefix(b"-").isdigit()]
    if len(numbers) < 2:
        return "video"
    return "frames" if labelled and not numbers[1].startswith(b"-") else "pretrain"


@dataclass(frozen=True, kw_only=True)
class Source:
    """One opened source: its clips and how to read them."""

    name: str
    manifest: Manifest
    root: str
    weight: float
    stride: int
    template: str | None
    """None: frame k is the k-th image file of the folder."""
    classes: int | None
    label_names: tuple[str, ...] | None

    def alone(self, record: Record) -> Source:
        """This source with one clip: what is sent to a process that decodes it."""
        return dataclasses.replace(self, manifest=Manifest.of([record]), label_names=None)

    def path(self, record: Record) -> str:
        return os.path.join(self.root, record.path) if self.root else record.path

    def frame_files(self, record: Record) -> list[str]:
        """Paths of the raw frames of a clip. Raises DecodeError where a folder holds fewer than the list says."""
        folder = self.path(record)
        if self.template is not None:
            return [os.path.join(folder, self.template.format(record.start + k)) for k in range(record.total)]
        files = image_files(folder)
        if len(files) < record.total:
            raise DecodeError(folder, f"holds {len(files)} images, {record.total} were expected")
        return files


def read_datasets(path: str | os.PathLike[str]) -> dict[str, dict[str, Any]]:
    """The tables of a `datasets.toml`, checked. Raises ManifestError naming the file and the key."""
    try:
        tables = tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ManifestError(f"{path}: cannot read the data sets: {error.strerror or error}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ManifestError(f"{path}: not valid TOML: {error}") from error
    for name, table in tables.items():
        if not isinstance(table, dict):
            raise ManifestError(f"{path}: {name} must be a table, as in [{name}]")
        for key in table:
            if key not in _KEYS:
                raise ManifestError(f"{path}: [{name}]: {unknown('key', key, list(_KEYS))}")
            value = table[key]
            if key in _NUMBERS:
                if type(value) is not int or value < 1:  # a TOML `true` is an int to isinstance
                    raise ManifestError(f"{path}: [{name}]: {key} must be a positive whole number, got {value!r}")
            elif not isinstance(value, str):
                raise ManifestError(f"{path}: [{name}]: {key} must be a string, got {value!r}")
        for key, allowed in (("kind", ("video", "frames")), ("format", ("auto", *COLUMNS))):
            if key in table and table[key] not in allowed:
                raise ManifestError(f"{path}: [{name}]: {unknown(key, table[key], list(allowed))}")
    return tables


def dataset_table(name: str, table: dict[str, Any]) -> str:
    """One table of a `datasets.toml` as text."""
    # a JSON string is a TOML string as long as it keeps characters beyond 16 bits as they are
    lines = [f"{key} = {json.dumps(value, ensure_ascii=False)}" for key, value in table.items()]
    return "\n".join([f"[{name}]", *lines, ""])


def open_sources(data: DataConfig) -> list[Source]:
    """Open every source of `data`. Missing roots and lists are all named in one error before anything starts."""
    if not data.sources:
        raise ManifestError("no data: give at least one source (a table of datasets.toml, or a root folder)")
    tables: dict[str, dict[str, Any]] = {}
    toml = Path(data.datasets or os.environ.get("VMAE2_DATASETS") or "datasets.toml")
    if any(source.root is None and source.list is None for source in data.sources):
        tables = read_datasets(toml)
    opened, problems = [], []
    for source in data.sources:
        try:
            opened.append(_open_source(source, data, tables, toml))
        except ManifestError as error:
            problems.append(str(error))
    if problems:
        raise ManifestError("; ".join(problems))
    return opened


def _open_source(source: SourceConfig, data: DataConfig, tables: dict[str, dict[str, Any]], toml: Path) -> Source:
    if source.weight <= 0:
        raise ManifestError(f"source {source.name}: weight must be positive, got {source.weight}")
    table: dict[str, Any] = {}
    if source.root is None and source.list is None:
        if source.name not in tables:
            raise ManifestError(f"{toml}: {unknown('data set', source.name, list(tables))}")
        table = tables[source.name]
        root = str(toml.parent / table.get("root", "."))
        listed = table.get(source.split)
        if listed is None and any(split in table for split in _SPLITS):
            there = ", ".join(split for split in _SPLITS if split in table)
            raise ManifestError(f"{toml}: [{source.name}] has no list for split {source.split!r}; it has: {there}")
    else:
        root, listed = source.root or "", source.list
    if root and not os.path.isdir(root):
        raise ManifestError(f"source {source.name}: the root folder {root} does not exist")
    template = source.template or table.get("template")
    if template is not None:
        try:
            ok = template.format(1) != template.format(2)
        except (ValueError, IndexError, KeyError):
            ok = False
        if not ok:
            raise ManifestError(f"source {source.name}: template {template!r} must hold one number, as in img_{{:05}}.jpg")
    names = read_labels(os.path.join(root, table["labels"])) if "labels" in table else None
    classes = table.get("classes", None if names is None else len(names))
    if names is not None and len(names) != classes:
        raise ManifestError(f"{toml}: [{source.name}]: classes = {classes}, but {table['labels']} names {len(names)}")
    if listed is None:
        manifest, names, root = open_tree(root, source.split, template)
        classes = len(names)
    else:
        path = os.path.join(root, listed)
        form = table.get("format", "auto")
        if form == "auto":
            # a pre-training recipe may read labelled lists too: those of a table that declares its classes
            form = line_format(first_line(path), labelled=classes is not None or data.sampling != "pretrain")
            if table.get("kind") == "video" and form == "frames":
                form = "video"
            elif table.get("kind") == "frames" and form == "video":
                form = "frames"
            if table and form == "frames" and classes is None:
                raise ManifestError(
                    f"{path}: three columns can be `path start total` or `path total label`: give [{source.name}] of {toml} "
                    'a format ("pretrain" or "frames"), or the number of its classes'
                )
        manifest = Manifest.read(path, form, classes=classes)
        if template is None and (manifest.totals >= 0).any():
            raise ManifestError(f"{path}: lists raw frames: give the source a template, as in img_{{:05}}.jpg")
    stride = source.stride or table.get("stride") or data.stride
    return Source(
        name=source.name, manifest=manifest, root=root, weight=source.weight, stride=stride,
        template=template, classes=classes, label_names=names,
    )  # fmt: skip


def open_tree(root: str, split: str, template: str | None = None) -> tuple[Manifest, tuple[str, ...], str]:
    """The clips of a plain folder tree: sub-folder = label, or the file's own name where it lies directly in `root`.

    A folder that holds only images is one clip (with `template`: any folder that holds its first frame). If the tree's
    sub-folders are splits (`train`, `val`, `test` and nothing else), clips come from the split's and labels are numbered
    over all of them. Labels are numbered in natural order of their names.

    Returns: (manifest, label names, root of the paths). Raises ManifestError for a folder without a decodable video.
    """
    folders = [name for name in os.listdir(root) if os.path.isdir(os.path.join(root, name)) and not name.startswith(".")]
    tops = {split: root}
    if folders and set(folders) <= set(_SPLITS):
        if split not in folders:
            raise ManifestError(f"{root}: has no folder for split {split!r}; it has: {', '.join(sorted(folders))}")
        tops = {name: os.path.join(root, name) for name in folders}
    trees = {name: _scan(folder, template) for name, folder in tops.items()}
    top, clips = tops[split], trees[split]
    if not clips:
        suffixes = " ".join(sorted(VIDEO_SUFFIXES))
        raise ManifestError(f"{top}: no video in this folder (looked for {suffixes} and folders of images)")
    if not any(_decodable(os.path.join(top, path), total) for path, _, total in clips):
        raise ManifestError(f"{top}: none of the {len(clips)} clips in this folder can be decoded")
    names = tuple(sorted({label for tree in trees.values() for _, label, _ in tree}, key=natural_key))
    number = {name: i for i, name in enumerate(names)}
    start = 0 if template is None else _first_number(os.path.join(top, next((p for p, _, n in clips if n >= 0), "")), template)
    return Manifest.of([Record(path, start, total, number[label]) for path, label, total in clips]), names, top


def _scan(top: str, template: str | None) -> list[tuple[str, str, int]]:
    """(path relative to `top`, label, number of raw frames or -1) of every clip, in natural order."""
    clips = []
    for folder, subfolders, files in os.walk(top, followlinks=True):
        subfolders[:] = [name for name in subfolders if not name.startswith(".")]
        files = [name for name in files if not name.startswith(".")]
        relative = os.path.relpath(folder, top)
        parts = [] if relative == "." else relative.split(os.sep)
        images = [name for name in files if os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES]
        if template is not None:
            count = _count(folder, template) if images else 0
        else:
            count = len(images) if not subfolders and len(images) == len(files) else 0
        if count and parts:
            clips.append((relative, parts[0], count))
            continue
        for name in files:
            stem, suffix = os.path.splitext(name)
            if suffix.lower() in VIDEO_SUFFIXES:
                clips.append((os.path.join(*parts, name), parts[0] if parts else stem, -1))
    return sorted(clips, key=lambda clip: natural_key(clip[0]))


def _first_number(folder: str, template: str) -> int:
    return 0 if os.path.exists(os.path.join(folder, template.format(0))) else 1


def _count(folder: str, template: str) -> int:
    """Frames named by `template`, without a hole, from number 0 or 1."""
    first = number = _first_number(folder, template)
    while os.path.exists(os.path.join(folder, template.format(number))):
        number += 1
    return number - first


def _decodable(path: str, total: int) -> bool:
    try:
        if total >= 0:
            decode_image(image_files(path)[0])
        else:
            probe(path)
    except DecodeError:
        return False
    return True
