"""The run directory OUT/NAME: whose it is, whether it is finished, and one clear error where it cannot be used.

config.json        the resolved config         environment.json   machine, versions, backends
metrics.jsonl      train and validation lines  checkpoints/       see `vmae2_fast.train.checkpoint`
quarantine.jsonl   clips that were replaced    weights.safetensors, done.json   only once the run is finished
plan.json          the micro-batch that was chosen, where train.micro_batch=0
spikes.jsonl       steps with an unusual loss and the clips they saw   pictures/, tensorboard/, profile/   for people
inputs.json        digests of the weights it starts and learns from
best.safetensors   weights of the best validation, of tasks that keep them
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

from .. import backend
from ..config import RunConfig, to_dict
from .checkpoint import START_OVER, clean, present, sha256, write_json

# What may change between two sittings of one run: where things lie, how often it is saved or shown, and how the work is
# cut up. None of it changes the maths (micro_batch: and parallel: up to the order of summation).
_LOADING = ("workers", "prefetch", "cache_mb", "timeout_s", "datasets")
FREE = {
    "out", "cites", "views.batch", "teacher_cache", "model.activation_checkpoint",
    *(f"train.{key}" for key in ("micro_batch", "parallel", "shard_within", "threads", "checkpoint_every")),
    *(f"train.{key}" for key in ("keep_checkpoints", "log_every", "keep_every", "async_checkpoint", "max_rollbacks")),
    *(f"train.{key}" for key in ("max_skipped", "stuck_after", "picture_every", "spike_factor", "tensorboard")),
    *(f"{data}.{key}" for data in ("data", "validation") for key in _LOADING),
}  # fmt: skip


def flatten(value: Any, prefix: str = "") -> dict[str, Any]:
    """Leaves of nested objects by dotted name; a list is a leaf."""
    if isinstance(value, dict):
        items = [(f"{prefix}.{k}" if prefix else k, v) for k, v in value.items()]
        return {name: leaf for key, v in items for name, leaf in flatten(v, key).items()}
    return {prefix: value}


def _placed(config: dict[str, Any]) -> dict[str, Any]:
    """`config` with weight paths as they lie relative to `out`, so that a moved or otherwise spelled `out` is the same run."""
    placed = dict(config)
    for key in WEIGHT_KEYS:
        path = placed.get(key)
        if path and not path.startswith("hf:") and path != "random":
            inside = os.path.relpath(path, config["out"])
            placed[key] = os.path.abspath(path) if inside.startswith("..") else inside
    return placed


def differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """Keys that differ between two configs as `to_dict` gives them, those of `FREE` left out; "key: old -> new"."""
    a, b = flatten(_placed(old)), flatten(_placed(new))
    keys = sorted(k for k in {*a, *b} if k not in FREE and a.get(k) != b.get(k))
    return [f"{k}: {a.get(k)!r} there, {b.get(k)!r} now" for k in keys]


WEIGHT_KEYS = ("init", "teacher_weights", "trunk_weights")
"""Keys of a configuration that name weights a run starts from, learns from, or takes features with."""


def _digests(config: RunConfig) -> dict[str, str | None]:
    """SHA-256 of the weights of `WEIGHT_KEYS`: None where they are no local file."""
    out: dict[str, str | None] = {}
    for key in WEIGHT_KEYS:
        path = Path(getattr(config, key, None) or os.devnull)
        path = path / "weights.safetensors" if path.is_dir() else path
        out[key] = sha256(path) if path.is_file() else None
    return out


class RunDirectory:
    """Paths of one run. `open` checks before anything expensive happens."""

    def __init__(self, config: RunConfig) -> None:
        self.path = Path(config.out) / config.name
        self.checkpoints = self.path / "checkpoints"
        self.config, self.environment = self.path / "config.json", self.path / "environment.json"
        self.inputs, self.plan = self.path / "inputs.json", self.path / "plan.json"
        self.fresh = not self.path.exists()
        self.metrics, self.quarantine = self.path / "metrics.jsonl", self.path / "quarantine.jsonl"
        self.weights, self.done = self.path / "weights.safetensors", self.path / "done.json"
        self.best, self.spikes = self.path / "best.safetensors", self.path / "spikes.jsonl"
        self.pictures, self.tensorboard, self.profile = (self.path / n for n in ("pictures", "tensorboard", "profile"))

    @classmethod
    def open(cls, config: RunConfig, *, resume: bool) -> RunDirectory:
        """Make the directory, or take it up again. `resume=False` deletes an earlier run of the same name first.

        A directory in which nothing was trained yet is taken over whatever its config.
        Raises ValueError: not writable, or it holds a run with another config (naming the first differing keys).
        """
        self = cls(config)
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=self.path):
                pass
        except OSError as error:
            why = error.strerror or error
            raise ValueError(f"cannot write the run directory {self.path}: {why}; choose another --out") from error
        if not resume:
            self._clear()
        now, inputs = to_dict(config), _digests(config)
        if self.config.exists() and (self.done.exists() or present(self.checkpoints)):
            different = differences(_read_json(self.config), json.loads(json.dumps(now)))
            if different:
                shown = "; ".join(different[:3]) + (f" and {len(different) - 3} more" if len(different) > 3 else "")
                raise ValueError(
                    f"{self.path} holds a run with another config ({shown}); give this one another name or out, "
                    f"or {START_OVER}"
                )
            before = _read_json(self.inputs) if self.inputs.exists() else inputs
            changed = [key for key in inputs if before.get(key) != inputs[key]]
            if changed:
                raise ValueError(f"{self.path}: {' and '.join(changed)} changed since this run began; {START_OVER}")
        clean(self.checkpoints)
        write_json(self.config, now)
        write_json(self.inputs, inputs)
        return self

    def abandon(self) -> None:
        """Remove what a run left that could not begin, unless the directory was there before."""
        if self.fresh:
            shutil.rmtree(self.path, ignore_errors=True)

    def write_environment(self) -> None:
        write_json(self.environment, backend.environment())

    def summary(self) -> dict[str, Any] | None:
        """The summary of a finished run, None while it is unfinished."""
        return _read_json(self.done) if self.done.exists() and self.weights.exists() else None

    def finish(self, summary: dict[str, Any]) -> None:
        write_json(self.done, summary)

    def _clear(self) -> None:
        # done.json goes first: whatever a kill leaves, it does not pass for a finished run.
        files = (self.done, self.weights, self.best, self.metrics, self.quarantine, self.environment, self.plan, self.spikes)
        for path in files:
            path.unlink(missing_ok=True)
        for folder in (self.checkpoints, self.pictures, self.tensorboard, self.profile):
            shutil.rmtree(folder, ignore_errors=True)
        self.config.unlink(missing_ok=True)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text())
    except (OSError, json.JSONDecodeError) as error:
        raise ValueError(f"{path}: cannot be read as JSON ({error}); {START_OVER}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path}: not an object; {START_OVER}")
    return value
