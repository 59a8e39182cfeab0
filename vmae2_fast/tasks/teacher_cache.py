"""The logits a frozen teacher gave, kept by the place of a clip in the run: (position, view).

What a clip holds is a pure function of (seed, position, view) and of the data's configuration, so a teacher need see it
only once: later runs of the same data, and the same run started again, read what it said. One file of records of equal
size, one a row, holds float32 logits as they were computed and a checksum over them and the clip's path. A row that was
never written, or only in part when a process died, or belongs to another clip, fails its checksum and counts as absent.
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..whole import write_json

HEADER = "cache.json"
FREE = ("workers", "prefetch", "cache_mb", "datasets")
"""Keys of the data's configuration that do not change what a clip holds."""


class TeacherCache:
    """Logits [classes] by row, in `folder`. Several processes may read and write at the same time."""

    def __init__(self, folder: str | Path, about: dict[str, Any], classes: int, views: int) -> None:
        """`about`: all that the logits depend on (JSON values). Raises ValueError naming what differs if the folder holds
        logits of other clips or another teacher, or cannot be written."""
        folder = Path(folder)
        self.classes, self.views = classes, views
        self.record = 4 + 4 * classes
        about = json.loads(json.dumps({**about, "classes": classes, "views": views}))
        header = folder / HEADER
        try:
            folder.mkdir(parents=True, exist_ok=True)
            if header.exists():
                before = json.loads(header.read_text())
                keys = [key for key in sorted({*about, *before}) if about.get(key) != before.get(key)]
                if keys:
                    raise ValueError(
                        f"teacher_cache {folder} holds logits of other clips or another teacher ({', '.join(keys)} differ); "
                        "choose another folder or delete it"
                    )
            else:
                write_json(header, about, indent=2)
            self._file = os.open(folder / "logits.bin", os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise ValueError(f"teacher_cache {folder} cannot be used: {error.strerror or error}") from error

    def close(self) -> None:
        os.close(self._file)

    def read(self, position: Tensor, view: Tensor, paths: Sequence[str]) -> Tensor | None:
        """Logits float32 [B, classes] of clips `position` [B], `view` [B] int64, or None unless all of them are there."""
        out = np.empty((len(paths), self.classes), dtype=np.float32)
        for place, (row, path) in enumerate(zip(self._rows(position, view), paths)):
            record = os.pread(self._file, self.record, row * self.record)
            if len(record) != self.record or record[:4] != _checksum(path, record[4:]):
                return None
            out[place] = np.frombuffer(record, dtype=np.float32, offset=4)
        return torch.from_numpy(out)

    def write(self, position: Tensor, view: Tensor, paths: Sequence[str], logits: Tensor) -> None:
        """Keep logits [B, classes]. Raises OSError when the disk is full."""
        rows = logits.detach().float().cpu().contiguous().numpy()
        for row, path, values in zip(self._rows(position, view), paths, rows):
            data = values.tobytes()
            os.pwrite(self._file, _checksum(path, data) + data, row * self.record)

    def _rows(self, position: Tensor, view: Tensor) -> list[int]:
        return (position.cpu() * self.views + view.cpu()).tolist()


def _checksum(path: str, data: bytes) -> bytes:
    # never zero, so that a hole in the file, which reads as zeros, is no record
    return (zlib.crc32(data, zlib.crc32(path.encode("utf-8", "surrogateescape"))) | 1).to_bytes(4, "little")
