"""The micro-batch that fits: chosen from the free memory before the first step, and what to try where it did not."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from ..config import RunConfig
from .batch import batch_unit, split_batch
from .budget import SHARE, rank_bytes, sized
from .checkpoint import write_json
from .ledger import knobs
from .parallel import World

_CGROUP = Path("/sys/fs/cgroup")


def available_bytes(device: torch.device, world: World) -> int:
    """Memory this rank may still take on its device: of a GPU what is free, of a host its share of what the machine, or the
    container, has left."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    free = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/meminfo").read_text().splitlines()
        free = next(1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:"))
    with contextlib.suppress(OSError, ValueError):  # absent, or "max"
        limit, used = (int((_CGROUP / name).read_text()) for name in ("memory.max", "memory.current"))
        free = min(free, limit - used)
    return free // world.local_size


def with_micro_batch(config: RunConfig, plan: Path, device: torch.device, world: World) -> RunConfig:
    """`config` with `train.micro_batch` chosen where it is 0; all ranks call it together and get the same.

    Chosen is the largest that `budget.rank_bytes` puts within `budget.SHARE` of the memory free on every rank. It is
    written to `plan` (JSON), and taken from there by a run that goes on with as many ranks: sums keep their order.
    """
    if config.train.micro_batch != 0:
        return config
    split_batch(config, world.size)
    room = int(SHARE * min(world.gather(available_bytes(device, world))))
    known = world.on_first(lambda: _planned(plan, config, world))
    chosen: Any = sized(config, world.size, room, world.local_size) if known is None else _cut(config, known)  # type: ignore[arg-type]
    needed = rank_bytes(chosen, world.size, world.local_size)["total"]
    _, forwards = split_batch(chosen, world.size)
    entry = {
        "ranks": world.size, "global_batch": config.train.global_batch, "micro_batch": chosen.train.micro_batch,
        "micro_batches": forwards, "ledger_bytes": needed, "room_bytes": room,
    }  # fmt: skip
    if world.first:
        write_json(plan, entry)
        what = f"{config.name}: {forwards} x {chosen.train.micro_batch} clips a rank and step"
        print(f"{what}, {needed / 1e9:.2f} GB by the ledger of {room / 1e9:.2f}", file=sys.stderr)
        if needed > room:
            print(f"WARNING: {config.name}: that may not fit; try {knobs(chosen)}", file=sys.stderr)
    return chosen


def _cut(config: RunConfig, micro: int) -> RunConfig:
    return dataclasses.replace(config, train=dataclasses.replace(config.train, micro_batch=micro))


def _planned(plan: Path, config: RunConfig, world: World) -> int | None:
    """The micro-batch of an earlier sitting with the same ranks and batch."""
    try:
        entry = json.loads(plan.read_text())
        same = (entry["ranks"], entry["global_batch"]) == (world.size, config.train.global_batch)
        return int(entry["micro_batch"]) if same and entry["micro_batch"] % batch_unit(config)[1] == 0 else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


@contextlib.contextmanager
def naming_knobs(config: RunConfig, device: torch.device, micro: int) -> Iterator[None]:
    """Turn out-of-memory errors, of a GPU or of the host, into a ValueError that names the flags to try."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        text = str(error)
        if not isinstance(error, MemoryError | torch.OutOfMemoryError) and "can't allocate memory" not in text:
            raise
        raise ValueError(
            f"{config.name}: out of memory on {device} with {micro} clips a forward and rank "
            f"({(text or 'MemoryError').splitlines()[0]}); try {knobs(config)}"
        ) from error
