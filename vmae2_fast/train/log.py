"""Metrics as JSON lines, each step once however often a run is resumed, and a progress bar for people."""

from __future__ import annotations

import importlib.util
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tqdm import tqdm

ROLLED_BACK = ("rollback", "rolled_back")
"""Kinds of lines that going back to a checkpoint writes, at its step."""


class MetricsLog:
    """Append-only `metrics.jsonl`: one JSON object a line, each with at least `step`. Only rank 0's is `enabled`.

    board: gets the numbers of every line as well.
    """

    def __init__(self, path: Path, *, enabled: bool = True, board: Board | None = None) -> None:
        self.path, self.enabled, self.board = path, enabled, board

    def cut(self, step: int, *again: str) -> None:
        """Drop lines after `step`, and a last line that was cut off by a kill: those steps will be done again.

        Lines at `step` itself whose kind is among `again` are dropped too.
        """
        self._rewrite(
            lambda entry: entry if entry["step"] < step or (entry["step"] == step and entry.get("kind") not in again) else None
        )

    def set_aside(self, step: int) -> None:
        """Keep what was written after `step` when a run goes back to it: as lines of kind `rolled_back` that belong to `step`
        and have their own step as `lost_step`."""
        self._rewrite(
            lambda e: e if e["step"] <= step else {**e, "kind": "rolled_back", "step": step, "lost_step": e["step"]}
        )

    def _rewrite(self, change: Callable[[dict[str, Any]], dict[str, Any] | None]) -> None:
        if not self.enabled or not self.path.exists():
            return
        kept = [changed for e in read_lines(self.path) if "step" in e and (changed := change(e)) is not None]
        temporary = self.path.with_name(f".{self.path.name}.tmp")
        temporary.write_text("".join(json.dumps(entry) + "\n" for entry in kept))
        os.replace(temporary, self.path)

    def write(self, **entry: Any) -> None:
        """Append a line. Raises ValueError where the disk refuses (full, read-only)."""
        if not self.enabled:
            return
        try:
            with self.path.open("a") as file:
                file.write(json.dumps(entry) + "\n")
        except OSError as error:
            raise ValueError(
                f"cannot write {self.path}: {error.strerror or error}; make room and run the same command again, it goes on "
                "from the last checkpoint"
            ) from error
        if self.board is not None:
            self.board.write(entry)


class Board:
    """The lines of a metrics file as TensorBoard scalars `KIND/NAME`. What an earlier sitting wrote after `step` is hidden."""

    def __init__(self, folder: Path, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(folder), purge_step=step + 1)

    @staticmethod
    def check() -> None:
        """Raises ValueError where the package tensorboard is not installed."""
        if importlib.util.find_spec("tensorboard") is None:
            raise ValueError(
                "train.tensorboard: the package tensorboard is not installed; pip install 'vmae2_fast[report]', or set "
                "train.tensorboard=False"
            )

    def write(self, entry: dict[str, Any]) -> None:
        for name, value in entry.items():
            if name != "step" and isinstance(value, int | float):
                self.writer.add_scalar(f"{entry.get('kind')}/{name}", value, entry["step"])
        self.writer.flush()  # a kill takes nothing that a line of the file has


def _parse(line: str) -> dict[str, Any] | None:
    try:
        entry = json.loads(line)
    except json.JSONDecodeError:
        return None
    return entry if isinstance(entry, dict) else None


def read_lines(path: str | Path) -> list[dict[str, Any]]:
    """The objects of a file of JSON lines, in order; what a kill cut off is left out, and there need be no file."""
    path = Path(path)
    return [e for line in path.read_text().splitlines() if (e := _parse(line))] if path.is_file() else []


def read_metrics(path: str | Path, kind: str = "train") -> list[dict[str, Any]]:
    """Lines of a metrics file whose `kind` is "train" or "validation", in order."""
    return [entry for entry in read_lines(path) if entry.get("kind") == kind and "step" in entry]


def progress(name: str, total: int, done: int, *, shown: bool = True) -> tqdm[Any]:
    """Progress bar over optimiser steps with elapsed time and ETA; silent when stderr is not a terminal."""
    shown = shown and sys.stderr.isatty()
    return tqdm(total=total, initial=done, desc=name, unit="step", disable=not shown, dynamic_ncols=True)
