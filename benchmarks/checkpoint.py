"""How long a save holds the training, beside it and in its way: `python -m benchmarks.checkpoint [MODEL] [ROUNDS]`.

Prints one JSON line: medians of seconds `save` takes of the loop, and of seconds a commit takes until it is on disk.
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from vmae2_fast.config import ModelConfig, OptimConfig
from vmae2_fast.models import build_model
from vmae2_fast.train.optim import Optimizer
from vmae2_fast.train.parallel import World
from vmae2_fast.train.saver import Saver


def measure(name: str, rounds: int, folder: Path) -> dict[str, Any]:
    """The two ways in turn, `rounds` times after one that allocates; CPU, one process."""
    model = build_model(ModelConfig(name=name))
    optimizer = Optimizer(model, OptimConfig(), global_batch=1, total_steps=10, steps_per_epoch=1)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step(0, torch.zeros(()))
    savers = {way: Saver(folder / way, World(), keep=1, background=way == "beside") for way in ("beside", "in the way")}
    held: dict[str, list[float]] = {way: [] for way in savers}
    written: list[float] = []
    for number in range(rounds + 1):
        for way, saver in savers.items():
            before = saver.held_s, saver.write_s
            saver.save(number, model, optimizer, {})
            after = saver.held_s
            saver.wait()
            if number:
                held[way].append(after - before[0])
                written.append(saver.write_s - before[1])
    size = sum(file.stat().st_size for file in (folder / "beside").rglob("*") if file.is_file())
    return {
        "model": name, "bytes": size, "rounds": rounds, "torch": torch.__version__, "threads": torch.get_num_threads(),
        "held_s": {way: round(statistics.median(times), 3) for way, times in held.items()},
        "write_s": round(statistics.median(written), 3),
    }  # fmt: skip


if __name__ == "__main__":
    with tempfile.TemporaryDirectory(dir=".") as place:
        name = sys.argv[1] if len(sys.argv) > 1 else "pretrain_videomae_small_patch16_224"
        print(json.dumps(measure(name, int(sys.argv[2]) if len(sys.argv) > 2 else 3, Path(place))))
