"""Saved predictions of an evaluation: logits of every view in parts that appear whole or not at all.

A folder holds `evaluation.json`, which says what was evaluated on what, and parts `part-RRRR-NNNNNN.safetensors` (rank,
number), each with the views of some videos: video, chunk, split, label int64 [R], logits float32 [R, C], and the paths of
the videos in its header. A video is in one part with all its views, so an interrupted evaluation goes on with the videos
that are in none, on any number of processes.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from ..whole import write_json, write_whole
from .metrics.classification import Predictions

HEADER = "evaluation.json"
_PART = re.compile(r"part-(\d{4,})-(\d{6,})\.safetensors")
_COLUMNS = ("video", "chunk", "split", "label", "logits")


class Saved(NamedTuple):
    """Predictions read back."""

    predictions: Predictions
    paths: dict[int, str]
    """Number of the video -> its path."""


class PredictionStore:
    """The folder of one evaluation, written by any number of ranks."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)

    def open(self, about: dict[str, Any], *, restart: bool = False) -> None:
        """Begin an evaluation described by `about` (JSON values), or take it up again.

        Raises ValueError if the folder holds predictions of another evaluation (naming the keys that differ) or cannot be
        written. restart: delete them first.
        """
        about = json.loads(json.dumps(about))
        header = self.folder / HEADER
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            if restart:
                for path in [*self.parts(), header]:
                    path.unlink(missing_ok=True)
            if header.exists():
                before = self.about()
                keys = [k for k in sorted({*about, *before}) if about.get(k) != before.get(k)]
                if keys:
                    told = "; ".join(f"{k}: {before.get(k)!r} there, {about.get(k)!r} now" for k in keys[:3])
                    raise ValueError(
                        f"{self.folder} holds predictions of another evaluation ({told}); choose another --out, or --restart"
                    )
            else:
                write_json(header, about, indent=2)
        except OSError as error:
            raise ValueError(f"cannot write {self.folder}: {error.strerror or error}; choose another --out") from error

    def about(self) -> dict[str, Any]:
        """What was evaluated. Raises ValueError if the folder holds no evaluation."""
        path = self.folder / HEADER
        try:
            return json.loads(path.read_text())
        except (OSError, ValueError) as error:
            raise ValueError(f"{path}: no evaluation was saved here: {error}") from error

    def parts(self) -> list[Path]:
        return sorted(path for path in self.folder.iterdir() if _PART.fullmatch(path.name)) if self.folder.is_dir() else []

    def finished(self) -> set[int]:
        """Numbers of the videos whose views are saved."""
        return {int(v) for part in self.parts() for v in np.unique(_read(part, ("video",))[0]["video"])}

    def append(self, predictions: Predictions, paths: dict[int, str], rank: int = 0) -> None:
        """Save the views of some videos: all of a video's in one call."""
        numbers = [int(m[2]) for path in self.parts() if (m := _PART.fullmatch(path.name)) and int(m[1]) == rank]
        path = self.folder / f"part-{rank:04d}-{max(numbers, default=-1) + 1:06d}.safetensors"
        tensors = {name: np.ascontiguousarray(column) for name, column in zip(_COLUMNS, predictions)}
        header = {"paths": json.dumps({str(number): where for number, where in paths.items()})}
        try:
            write_whole(path, lambda temporary: save_file(tensors, temporary, header))
        except SafetensorError as error:
            raise OSError(f"{path}: cannot be written: {error}") from error

    def read(self) -> Saved:
        """All saved views. Raises ValueError for a folder without any and for a damaged part, naming it."""
        parts = [_read(path) for path in self.parts()]
        if not parts:
            raise ValueError(f"{self.folder}: holds no predictions; run `vmae2 eval ... --out {self.folder}` first")
        columns = [np.concatenate([tensors[name] for tensors, _ in parts]) for name in _COLUMNS]
        return Saved(Predictions(*columns), {int(k): v for _, paths in parts for k, v in paths.items()})


def _read(path: Path, columns: Sequence[str] = _COLUMNS) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    try:
        with safe_open(path, framework="np") as file:
            tensors = {name: file.get_tensor(name) for name in columns}
            return tensors, json.loads((file.metadata() or {})["paths"])
    except (SafetensorError, OSError, ValueError, KeyError) as error:
        raise ValueError(f"{path}: damaged ({error}); delete it and run `vmae2 eval` again to fill the gap") from error


_LINE = re.compile(r"(.*) \[([^\]]*)\] (-?\d+) (\d+) (\d+)")


def read_official(files: Sequence[str | Path]) -> Saved:
    """Predictions in the official text format: lines `id [logits] label chunk split` behind a first line that is skipped.

    Ids are the official ones, names rather than paths. Raises ValueError naming file and line.
    """
    number: dict[str, int] = {}
    columns: list[tuple[int, int, int, int]] = []
    logits: list[np.ndarray] = []
    for file in files:
        try:
            lines = Path(file).read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"{file}: cannot read the predictions: {error}") from error
        for place, line in enumerate(lines[1:], 2):
            if not line.strip():
                continue
            match = _LINE.fullmatch(line.strip())
            try:
                if match is None:
                    raise ValueError("expected `id [logits] label chunk split`")
                row = np.array(match[2].replace(",", " ").split(), dtype=np.float64)
                if logits and len(row) != len(logits[0]):
                    raise ValueError(f"has {len(row)} logits, the lines before have {len(logits[0])}")
            except ValueError as error:
                raise ValueError(f"{file}:{place}: not a line of saved predictions: {error}") from None
            columns.append((number.setdefault(match[1], len(number)), int(match[4]), int(match[5]), int(match[3])))
            logits.append(row)
    if not logits:
        raise ValueError(f"{', '.join(map(str, files))}: no predictions in it")
    table = np.asarray(columns, dtype=np.int64)
    video, chunk, split, label = table.T
    return Saved(
        Predictions(video, chunk, split, label, np.stack(logits)), {place: name for name, place in number.items()}
    )


def write_official(saved: Saved, file: str | Path) -> None:
    """Write predictions in the official text format, one file for all ranks; ids are the videos' paths."""
    lines = [f"{len(saved.predictions.video)}, 0"]
    for video, chunk, split, label, row in zip(*saved.predictions):
        numbers = ", ".join(repr(float(x)) for x in row)
        lines.append(f"{saved.paths[int(video)]} [{numbers}] {label} {chunk} {split}")
    write_whole(Path(file), lambda path: path.write_text("\n".join(lines) + "\n", encoding="utf-8"))
