"""Checkpoints that are whole or absent: `step-XXXXXXXX/` directories of safetensors and JSON.

    model.safetensors      parameters under the official names
    optimizer.safetensors  AdamW moments and step counts
    rng.safetensors        torch generator states (drop path, dropout) of every rank
    state.json             step, data position, counters
    manifest.json          size and SHA-256 of the files above
    COMMITTED              SHA-256 of the manifest, written last

A checkpoint is written into a temporary directory, synced to disk, and renamed into place. Loading verifies every
hash; a damaged newest checkpoint is set aside with a message and the one before it is taken. No pickle is ever read.
Tensors are whole whatever they were split over, so any number of ranks goes on from any checkpoint; rank 0 writes.
`take_snapshot` copies all to the host, `commit` writes it: `saver.Saver` does that beside the training.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from .optim import Optimizer
from .parallel import World, local, regather, slice_like

TENSOR_FILES = ("model.safetensors", "optimizer.safetensors", "rng.safetensors")
STATE, MANIFEST, COMMITTED = "state.json", "manifest.json", "COMMITTED"
START_OVER = "start over with --restart (resume=False in a script)"


class CheckpointError(ValueError):
    """A checkpoint that cannot be written, is damaged, or belongs to something else."""


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_json(path: Path, value: Any) -> None:
    """Write JSON so that `path` is either the old file or the whole new one."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(json.dumps(value, indent=2) + "\n")
    _sync(temporary)
    os.replace(temporary, path)
    _sync(path.parent)


def sha256(path: Path) -> str:
    """SHA-256 of a file, as hexadecimal digits."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def rng_tensors() -> dict[str, Tensor]:
    """States of torch's generators, as uint8 tensors."""
    states = {"cpu": torch.get_rng_state()}
    for i in range(torch.cuda.device_count() if torch.cuda.is_initialized() else 0):
        states[f"cuda:{i}"] = torch.cuda.get_rng_state(i)
    return states


def set_rng(states: dict[str, Tensor]) -> None:
    """Put the generators back into the states of `rng_tensors`; devices that are not here are left out."""
    torch.set_rng_state(states["cpu"])
    for name, state in states.items():
        device = torch.device(name)
        if device.type == "cuda" and torch.cuda.is_available() and (device.index or 0) < torch.cuda.device_count():
            torch.cuda.set_rng_state(state, device)


class Snapshot(NamedTuple):
    """All of a checkpoint in the memory of rank 0 (elsewhere without tensors), in the order of `TENSOR_FILES`."""

    model: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    rng: dict[str, Tensor]
    state: dict[str, Any]


def take_snapshot(
    step: int,
    model: nn.Module,
    optimizer: Optimizer,
    state: dict[str, Any],
    *,
    world: World = World(),  # noqa: B008 (frozen)
    buffers: dict[str, Tensor] | None = None,
) -> Snapshot:
    """What a checkpoint of this moment holds; all ranks call it together.

    buffers: host memory by tensor name, filled where it is empty, that the tensors are copied into, so that training may go
    on; without it they may share the model's memory.
    """
    rng = world.gather(rng_tensors())
    return Snapshot(
        world.whole(model.state_dict(), buffers),
        world.whole(optimizer.state_tensors(), buffers),
        {f"{_of(rank)}{name}": value for rank, states in enumerate(rng) for name, value in states.items()},
        {"step": step, **state},
    )


def save_checkpoint(
    root: Path,
    step: int,
    model: nn.Module,
    optimizer: Optimizer,
    state: dict[str, Any],
    *,
    keep: int = 2,
    keep_every: int = 0,
    world: World = World(),  # noqa: B008 (frozen)
) -> Path:
    """Commit `root/step-XXXXXXXX` and delete older checkpoints; all ranks call it together.

    Kept are the newest `keep` and those whose step is a multiple of `keep_every`. `state` holds plain JSON values.
    Raises CheckpointError on every rank when the disk refuses (full, read-only); checkpoints that were there before
    are then untouched.
    """
    snapshot = take_snapshot(step, model, optimizer, state, world=world)
    world.on_first(lambda: commit(root, snapshot, keep=keep, keep_every=keep_every))
    return _place(root, step)


def _place(root: Path, step: int) -> Path:
    return root / f"step-{step:08d}"


def _of(rank: int) -> str:
    return f"rank{rank}." if rank else ""


def commit(root: Path, snapshot: Snapshot, *, keep: int = 2, keep_every: int = 0) -> None:
    """Write one checkpoint and delete those it makes superfluous, in this process alone. Raises CheckpointError.

    The one whose step the state calls `sound` stays as well.
    """
    final, temporary = _place(root, snapshot.state["step"]), None
    try:
        root.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=".tmp-", dir=root))
        for name, tensors in zip(TENSOR_FILES, snapshot[:3]):
            save_file(tensors, temporary / name)
        (temporary / STATE).write_text(json.dumps(snapshot.state, indent=1))
        files = {
            n: {"bytes": (temporary / n).stat().st_size, "sha256": sha256(temporary / n)} for n in (*TENSOR_FILES, STATE)
        }
        (temporary / MANIFEST).write_text(json.dumps(files, indent=1))
        for name in (*files, MANIFEST):
            _sync(temporary / name)
        (temporary / COMMITTED).write_text(sha256(temporary / MANIFEST))
        _sync(temporary / COMMITTED)
        _sync(temporary)
        if final.exists():
            _remove(final)
        os.replace(temporary, final)
        _sync(root)
    except (OSError, SafetensorError) as error:  # a full disk shows as one or the other
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)
        raise CheckpointError(f"cannot write checkpoint {final}: {error}; the checkpoints before it are untouched") from error
    for old in committed(root)[:-keep] if keep > 0 else []:
        if step_of(old) != snapshot.state.get("sound") and (not keep_every or step_of(old) % keep_every):
            _remove(old)


def step_of(checkpoint: Path) -> int:
    """The step of a checkpoint, from its name."""
    return int(checkpoint.name.removeprefix("step-"))


def remove_after(root: Path, step: int) -> None:
    """Delete the checkpoints of later steps. Raises CheckpointError where that is refused."""
    for path in [p for p in committed(root) if step_of(p) > step]:
        try:
            _remove(path)
        except OSError as error:
            raise CheckpointError(f"cannot delete {path}, which the run went back beyond: {error}") from error


def _remove(directory: Path) -> None:
    # Renamed first: a kill in the middle of the deletion must not leave half a checkpoint under a valid name.
    doomed = Path(tempfile.mkdtemp(prefix=".tmp-", dir=directory.parent))
    os.replace(directory, doomed / "old")
    shutil.rmtree(doomed, ignore_errors=True)


def present(root: Path) -> list[Path]:
    """Checkpoints of `root` by their name, whole or not, oldest first."""
    return sorted(root.glob("step-*"))


def committed(root: Path) -> list[Path]:
    """Checkpoints of `root` that carry the commit marker, oldest first."""
    return [p for p in present(root) if (p / COMMITTED).is_file()]


def clean(root: Path) -> None:
    """Delete what an interrupted save or deletion left behind."""
    for path in root.glob(".tmp-*"):
        shutil.rmtree(path, ignore_errors=True)


def verify(directory: Path) -> None:
    """Check every file of a checkpoint against its manifest. Raises CheckpointError naming the first bad one."""
    if not directory.is_dir():
        raise CheckpointError(f"{directory}: not a checkpoint directory of vmae2_fast (.pt and .pth pickles are never opened)")
    try:
        marker = (directory / COMMITTED).read_text()
        if marker != sha256(directory / MANIFEST):
            raise CheckpointError(f"{directory}: {MANIFEST} does not match {COMMITTED}")
        files = json.loads((directory / MANIFEST).read_text())
        if set(files) != {*TENSOR_FILES, STATE}:
            raise CheckpointError(f"{directory}: holds {sorted(files)}, expected {sorted([*TENSOR_FILES, STATE])}")
        for name, entry in files.items():
            path = directory / name
            if path.stat().st_size != entry["bytes"] or sha256(path) != entry["sha256"]:
                raise CheckpointError(f"{path}: damaged (size or SHA-256 differs from {MANIFEST})")
    except CheckpointError:
        raise
    except (OSError, KeyError, TypeError, ValueError) as error:  # a flipped byte may be no text any more
        raise CheckpointError(f"{directory}: damaged or incomplete checkpoint: {error}") from error


def load_checkpoint(
    directory: Path,
    model: nn.Module,
    optimizer: Optimizer,
    *,
    world: World = World(),  # noqa: B008 (frozen)
) -> dict[str, Any]:
    """Verify a checkpoint, put it into model, optimizer and torch's generators, and return its state.

    Every rank reads the files and keeps its slice. A rank the checkpoint does not know keeps its generators.
    Nothing is changed unless all of it fits. Raises CheckpointError: damaged, or of another architecture.
    """
    verify(directory)
    tensors = load_file(directory / "model.safetensors")
    here = model.state_dict()
    for name in sorted({*tensors, *here}):
        there, ours = tensors.get(name), here.get(name)
        if there is None or ours is None or there.shape != ours.shape:
            shapes = ["absent" if t is None else str(tuple(t.shape)) for t in (there, ours)]
            raise CheckpointError(
                f"{directory}: checkpoint of another architecture: {name} is {shapes[0]} in the checkpoint, {shapes[1]} in "
                "the model; use the run's own config.json, or start from these weights with init="
            )
    try:
        optimizer.load_state_tensors(load_file(directory / "optimizer.safetensors"))
    except ValueError as error:
        raise CheckpointError(f"{directory}: {error}") from error
    with torch.no_grad():
        for name, target in here.items():
            local(target).copy_(slice_like(tensors[name], target))
    regather(model)
    states, prefix = load_file(directory / "rng.safetensors"), _of(world.rank)
    mine = {n.removeprefix(prefix): t for n, t in states.items() if n.startswith(prefix) and (prefix or "." not in n)}
    if mine:
        set_rng(mine)
    return json.loads((directory / STATE).read_text())


def newest_intact(root: Path, up_to: int | None = None) -> Path | None:
    """The newest checkpoint (not after step `up_to`) whose hashes are right, or None if there is none at all.

    Damaged newer ones, and those without the commit marker, are renamed to `damaged-step-*` and reported on stderr.
    Raises CheckpointError when checkpoints exist and not one is intact.
    """
    candidates = [path for path in present(root) if up_to is None or step_of(path) <= up_to]
    damaged: list[tuple[Path, CheckpointError]] = []
    while candidates:
        directory = candidates.pop()
        try:
            verify(directory)
        except CheckpointError as error:
            damaged.append((directory, error))
            continue
        for bad, why in damaged:
            print(
                f"WARNING: {why}. Falling back to {directory}; the damaged one is kept as damaged-{bad.name}", file=sys.stderr
            )
            with contextlib.suppress(OSError):
                os.replace(bad, bad.with_name(f"damaged-{bad.name}"))
        return directory
    if damaged:
        why = damaged[0][1]
        raise CheckpointError(f"{root}: no intact checkpoint is left ({why}); {START_OVER}")
    return None
