"""Checkpoints beside the training: the loop is held for a copy to the host, a thread of rank 0 writes it.

A GPU's tensors are copied into pinned memory that stays for the next save: as much host memory as a checkpoint is large,
on rank 0. Files, order of writing and names are those of `checkpoint.save_checkpoint`, to the bit.
"""

from __future__ import annotations

import sys
import threading
import time
from pathlib import Path
from types import TracebackType
from typing import Any

from torch import Tensor, nn

from .checkpoint import Snapshot, commit, take_snapshot
from .optim import Optimizer
from .parallel import World


class Saver:
    """Saves into `root`, one checkpoint at a time; all ranks call `save` and `wait` together.

    background: return from `save` once all is copied; otherwise, once it is on disk. keep, keep_every: as `commit` takes
    them. While it is entered, leaving by any way but the death of the process waits for what is being written.
    """

    def __init__(
        self, root: Path, world: World, *, keep: int = 2, keep_every: int = 0, background: bool = True
    ) -> None:
        self.root, self.world, self.background = root, world, background
        self.keep, self.keep_every = keep, keep_every
        self.held_s = self.write_s = 0.0
        """Seconds `save` took of the loop, and seconds that went into writing."""
        self._buffers: dict[str, Tensor] | None = {} if background else None
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None

    @property
    def failed(self) -> bool:
        """Whether this rank could not write a checkpoint; `wait` raises why."""
        return self._error is not None

    def save(self, step: int, model: nn.Module, optimizer: Optimizer, state: dict[str, Any]) -> None:
        """Take a snapshot and commit it. Raises on every rank what the save before, or this one, failed with."""
        began = time.perf_counter()
        self.wait()
        snapshot = take_snapshot(step, model, optimizer, state, world=self.world, buffers=self._buffers)
        if self.world.first:
            # No daemon: the end of the interpreter waits for it.
            self._thread = threading.Thread(target=self._write, args=(snapshot,), name="vmae2-checkpoint", daemon=False)
            self._thread.start()
        if not self.background:
            self.wait()
        self.held_s += time.perf_counter() - began

    def wait(self) -> None:
        """Until nothing is being written. Raises CheckpointError on every rank if the last save failed."""
        self.world.on_first(self._join)

    def _write(self, snapshot: Snapshot) -> None:
        began = time.perf_counter()
        try:
            commit(self.root, snapshot, keep=self.keep, keep_every=self.keep_every)
        except Exception as error:
            self._error = error
        self.write_s += time.perf_counter() - began

    def _join(self) -> None:
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def __enter__(self) -> Saver:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        try:
            self._join()  # this rank alone: the others may not come
        except Exception as error:
            if kind is None:
                raise
            print(f"WARNING: {error}", file=sys.stderr)
