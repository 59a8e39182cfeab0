"""Lists of the two hybrid sets of VideoMAE V2 (paper section 4.1 and appendix), out of the lists of their parts.

Labelled (Kinetics-710): the union of K400, K600 and K700. A YouTube video is taken once, the first set that has it giving
path and label; labels become K710's. A video that is in a training and in a validation list stays in one of them only.

Unlabelled: K710's training videos, SSv2 at stride 2, AVA's training films cut every 300 frames, and random subsets of
250,000 clips of WebVid2M and of a collection of own web videos. The authors' own collection (from Instagram) was never
released: sources that are not there are named, with the shares of those that are.

Both read tables of `datasets.toml` files and write a folder with lists and a `datasets.toml` of their own.
"""

from __future__ import annotations

import csv
import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from tqdm import tqdm

from ..config import DataConfig, SourceConfig, unknown
from .lists import ManifestError, first_line
from .manifest import Source, dataset_table, open_sources, read_datasets
from .sampling import Purpose, permutation

PARTS = (400, 600, 700)
LABELLED_CLIPS = {"train": 658_340, "val": 66_803}
"""Published sizes of Kinetics-710."""
_LABEL_MAPS = Path(__file__).parents[1] / "models" / "label_maps"
_ANNOTATIONS = b"label,youtube_id,time_start,time_end"
_TIMES = re.compile(r"_\d{6}_\d{6}$")
CUT_FRAMES = 300
_SHORTEST_CUT = 64
"""Frames a last piece must have: one clip of 16 frames at stride 4."""


@dataclass(frozen=True, kw_only=True)
class Part:
    """One source of the unlabelled set."""

    title: str
    clips: int
    """Published, in clips of the mixture."""
    stride: int = 4
    subset: int | None = None
    """Clips drawn at random from the source's list; None: all."""
    cut: bool = False
    """Cut into pieces of `CUT_FRAMES` frames."""


UNLABELLED = {
    "k710": Part(title="Kinetics-710, training videos", clips=658_340),
    "ssv2": Part(title="Something-Something V2, training videos", clips=168_913, stride=2),
    "ava": Part(title="AVA, training films", clips=21_000, cut=True),
    "webvid": Part(title="WebVid2M", clips=250_000, subset=250_000),
    "own_web": Part(title="own web videos (the authors': from Instagram, never released)", clips=250_000, subset=250_000),
}


class Clip(NamedTuple):
    """One labelled video of a Kinetics set."""

    path: str
    label: int
    """Of K710."""


def video_id(path: str) -> str:
    """The YouTube id in a Kinetics file name: `ID.mp4` or `ID_000010_000020.mp4`."""
    return _TIMES.sub("", os.path.splitext(os.path.basename(path))[0])


def merged_names() -> tuple[str, ...]:
    """The class names of K710, by number."""
    return tuple((_LABEL_MAPS / "k710.txt").read_text(encoding="utf-8").splitlines())


def label_map(classes: int) -> list[int]:
    """K710's number for each class of K400, K600 or K700."""
    return json.loads((_LABEL_MAPS / f"k710_to_k{classes}.json").read_text())


def label_numbers(classes: int, names: Iterable[str], where: str) -> dict[str, int]:
    """K710's number for each class name of K400, K600 or K700, in the set's own or K710's spelling.

    Raises ManifestError for a name of none of them; `where` is the file it names.
    """
    merged = merged_names()
    own = {merged[number]: number for number in label_map(classes)}
    spelled = json.loads((_LABEL_MAPS / "k710_merged_names.json").read_text())
    folded = {name.casefold(): number for name, number in own.items()}
    numbers = {}
    for name in names:
        number = own.get(name, own.get(spelled.get(name, ""), folded.get(name.casefold())))
        if number is None:
            raise ManifestError(f"{where}: K{classes}: {unknown('class', name, list(own))}")
        numbers[name] = number
    return numbers


def build_labelled(
    datasets: Sequence[str], out: str, *, keep: Literal["val", "train"] = "val",
    clip_path: str = "{id}_{start:06}_{end:06}.mp4",
) -> dict[str, Any]:
    """Write the lists of Kinetics-710 from tables k400, k600 and k700 of `datasets` (paths of `datasets.toml` files).

    Lists are lines `path label` (labels numbered as in the official lists, or by the table's own `labels` file) or the raw
    annotations (CSV `label,youtube_id,time_start,time_end,split`), whose files are named by `clip_path`.

    keep: where a video that is in a training and in a validation list stays.
    Returns counts; see `_written`. Raises ManifestError, and FileExistsError where `out` holds something.
    """
    tables = _tables(datasets)
    parts = [(classes, *tables[name]) for classes in PARTS if (name := f"k{classes}") in tables]
    if not parts:
        raise ManifestError(f"{', '.join(datasets)}: no table k400, k600 or k700 to merge")
    roots = {classes: os.path.abspath(os.path.join(toml.parent, table.get("root", "."))) for classes, toml, table in parts}
    common = os.path.commonpath(list(roots.values()))
    counts: dict[str, Any] = {"sources": [f"k{classes}" for classes, *_ in parts]}
    counts["missing"] = [f"k{classes}" for classes in PARTS if classes not in roots]
    found: dict[str, dict[str, Clip]] = {}
    for split in ("train", "val"):
        videos: dict[str, Clip] = {}
        repeated = relabelled = read = 0
        for classes, toml, table in parts:
            prefix = os.path.relpath(roots[classes], common)
            for path, label in tqdm(
                _labelled(classes, split, toml, table, roots[classes], clip_path), desc=f"k{classes} {split}", unit="clip",
                disable=None,
            ):  # fmt: skip
                read += 1
                name = video_id(path)
                before = videos.get(name)
                if before is None:
                    videos[name] = Clip(os.path.normpath(os.path.join(prefix, path)), label)
                else:
                    repeated += 1
                    relabelled += before.label != label
        found[split] = videos
        counts[split] = {"read": read, "repeated": repeated, "repeated_with_another_label": relabelled}
    other = "train" if keep == "val" else "val"
    both = found["train"].keys() & found["val"].keys()
    found[other] = {name: clip for name, clip in found[other].items() if name not in both}
    counts[other]["also_in_" + keep] = len(both)
    for split, videos in found.items():
        if not videos:
            raise ManifestError(f"{', '.join(datasets)}: no video is left for split {split!r}")
        counts[split].update(clips=len(videos), published=LABELLED_CLIPS[split])
    lists = {f"k710_{split}.csv": [f"{clip.path} {clip.label}" for clip in videos.values()] for split, videos in found.items()}
    lists["k710_classes.txt"] = list(merged_names())
    table = {
        "root": common, "train": "k710_train.csv", "val": "k710_val.csv", "kind": "video", "format": "video", "stride": 4,
        "classes": len(merged_names()), "labels": "k710_classes.txt",
    }  # fmt: skip
    return {**counts, "datasets": _write(out, lists, {"k710": table})}


def _tables(datasets: Sequence[str]) -> dict[str, tuple[Path, dict[str, Any]]]:
    """Every table of some `datasets.toml` files, with its file. Raises ManifestError for a name that is there twice."""
    tables: dict[str, tuple[Path, dict[str, Any]]] = {}
    for path in datasets:
        for name, table in read_datasets(path).items():
            if name in tables:
                raise ManifestError(f"{path}: [{name}] is already a table of {tables[name][0]}")
            tables[name] = Path(path), table
    return tables


def _labelled(
    classes: int, split: str, toml: Path, table: dict[str, Any], root: str, clip_path: str
) -> Iterator[tuple[str, int]]:
    """Path and K710 label of the clips of one list."""
    if split not in table:
        raise ManifestError(f"{toml}: [k{classes}] has no list for split {split!r}")
    path = os.path.join(root, table[split])
    if first_line(path).startswith(_ANNOTATIONS):
        yield from _annotated(path, classes, clip_path)
        return
    source = open_sources(
        DataConfig(sources=(SourceConfig(name=f"k{classes}", split=split),), datasets=str(toml), sampling="dense")
    )[0]
    manifest, numbers = source.manifest, label_map(classes)
    if source.label_names is not None:
        numbers = list(label_numbers(classes, source.label_names, str(toml)).values())
    if manifest.labels.max() >= len(numbers):
        raise ManifestError(f"{path}: label {manifest.labels.max()} is out of range for K{classes}")
    for record in (manifest[i] for i in range(len(manifest))):
        yield record.path, numbers[record.label]


def _annotated(path: str, classes: int, clip_path: str) -> Iterator[tuple[str, int]]:
    numbers: dict[str, int] = {}
    with open(path, newline="", encoding="utf-8-sig") as file:
        for line, row in enumerate(csv.DictReader(file), 2):
            try:
                name, start, end = row["label"], int(float(row["time_start"])), int(float(row["time_end"]))
                clip = clip_path.format(id=row["youtube_id"], start=start, end=end, label=name, split=row.get("split", ""))
            except (TypeError, ValueError, KeyError, IndexError) as error:
                what = f"not an annotation, or not one for --clip-path {clip_path!r}"
                raise ManifestError(f"{path}:{line}: {what}: {error!r}") from error
            if name not in numbers:
                numbers.update(label_numbers(classes, [name], f"{path}:{line}"))
            yield clip, numbers[name]


def build_unlabelled(datasets: Sequence[str], out: str, *, seed: int = 0) -> dict[str, Any]:
    """Write the lists of UnlabeledHybrid from the tables of `datasets` that have the names of `UNLABELLED`.

    seed: of the random subsets. Returns clips and share of every source, and what is missing. Raises ManifestError, and
    FileExistsError where `out` holds something.
    """
    tables = _tables(datasets)
    present = [name for name in UNLABELLED if name in tables]
    if not present:
        raise ManifestError(f"{', '.join(datasets)}: none of the tables {', '.join(UNLABELLED)}")
    lists: dict[str, list[str]] = {}
    written: dict[str, dict[str, Any]] = {}
    for number, name in enumerate(present):
        part, (toml, _) = UNLABELLED[name], tables[name]
        source = open_sources(DataConfig(sources=(SourceConfig(name=name),), datasets=str(toml)))[0]
        lines = list(tqdm(_pieces(source, part, str(toml)), desc=name, unit="clip", disable=None))
        if part.subset is not None and part.subset < len(lines):
            chosen = np.sort(permutation(seed, Purpose.SUBSET, number, 0, len(lines))[: part.subset])
            lines = [lines[i] for i in chosen]
        lists[f"{name}.csv"] = lines
        raw = source.template is not None
        written[name] = {
            "root": os.path.abspath(source.root), "train": f"{name}.csv", "kind": "frames" if raw else "video",
            "format": "pretrain", "stride": part.stride, **({"template": source.template} if raw else {}),
        }  # fmt: skip
    total = sum(len(lines) for lines in lists.values())
    published = sum(part.clips for part in UNLABELLED.values())
    sources = {
        name: {
            "clips": len(lines), "share": round(len(lines) / total, 4), "published": UNLABELLED[name].clips,
            "published_share": round(UNLABELLED[name].clips / published, 4),
        }
        for name, lines in ((name, lists[f"{name}.csv"]) for name in present)
    }  # fmt: skip
    missing = {name: part.title for name, part in UNLABELLED.items() if name not in tables}
    result = {"clips": total, "published": published, "sources": sources, "missing": missing}
    return {**result, "datasets": _write(out, lists, written)}


def _pieces(source: Source, part: Part, toml: str) -> Iterator[str]:
    """Lines `path start total` of a source's clips."""
    manifest = source.manifest
    for record in (manifest[i] for i in range(len(manifest))):
        if not part.cut:
            yield f"{record.path} {record.start if record.total >= 0 else 0} {record.total}"
            continue
        if record.total < 0:
            raise ManifestError(
                f"{toml}: [{source.name}]: {record.path}: films are cut by frame numbers: list their raw frames (`path start "
                'total`, format = "pretrain", with a template)'
            )
        for first in range(0, record.total, CUT_FRAMES):
            frames = min(CUT_FRAMES, record.total - first)
            if frames >= min(_SHORTEST_CUT, record.total):
                yield f"{record.path} {record.start + first} {frames}"


def _write(out: str, lists: dict[str, list[str]], tables: dict[str, dict[str, Any]]) -> str:
    """Write a folder of lists and its `datasets.toml`, all or nothing, and return the path of the latter."""
    folder = Path(out).resolve()
    if folder.exists() and any(folder.iterdir()):
        raise FileExistsError(f"{out} holds something already; remove it or choose another --out")
    work = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(work, ignore_errors=True)
    try:
        work.mkdir(parents=True)
        for name, lines in lists.items():
            with open(work / name, "w", encoding="utf-8", errors="surrogateescape") as file:
                file.writelines(line + "\n" for line in lines)
        text = []
        for name, table in tables.items():
            # lists are given by their whole path: what is relative is relative to the root of the videos
            whole = {key: str(folder / value) if key in ("train", "val", "labels") else value for key, value in table.items()}
            text.append(dataset_table(name, whole))
        (work / "datasets.toml").write_text("\n".join(text), encoding="utf-8")
        if folder.exists():
            folder.rmdir()
        os.replace(work, folder)
    except OSError:
        shutil.rmtree(work, ignore_errors=True)
        raise
    return str(folder / "datasets.toml")
