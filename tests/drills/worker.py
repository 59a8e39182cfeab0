"""What every process of a drill runs: one tiny run of `tests.tiny_runs`, with code of the drill in front of it.

    python -m torch.distributed.run ... -m tests.drills.worker CLIPS OUT OPTIONS   a rank of torchrun's
    python -m tests.drills.worker                                                  a server that forks ranks, see `ranks.Forks`

OPTIONS: JSON of {"kind": pretrain | classify, "train", "data", "model": {key: value} to change in the config, "before": code}.
`before` may change the config, and finds the ranks and the modules it may want to patch among its names.
"""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import sys
import time
import traceback
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from tests import tiny_runs as tiny
from vmae2_fast.config import SourceConfig
from vmae2_fast.tasks.pretrain import PretrainTask
from vmae2_fast.train import checkpoint, loop, parallel
from vmae2_fast.train.optim import Optimizer


def work(clips: Path, out: Path, options: dict[str, Any]) -> None:
    torch.set_num_threads(1)
    config = tiny.with_train(getattr(tiny, f"{options['kind']}_config")(clips, out), **options["train"])
    if "sources" in options["data"]:
        options["data"]["sources"] = tuple(SourceConfig(**source) for source in options["data"]["sources"])
    for part in ("data", "model"):
        config = dataclasses.replace(config, **{part: dataclasses.replace(getattr(config, part), **options[part])})
    names = {
        "os": os, "signal": signal, "sys": sys, "time": time, "json": json, "Path": Path, "torch": torch,
        "checkpoint": checkpoint, "loop": loop, "Optimizer": Optimizer, "Task": PretrainTask,
        "config": config, "out": out, "run": out / config.name,
        "rank": int(os.environ.get("RANK", 0)), "attempt": int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)),
    }  # fmt: skip
    exec(options["before"], names)
    try:
        loop.train(names["config"], device="cpu")
    finally:
        parallel.leave()


def _rank(number: int, request: dict[str, Any]) -> None:
    """One of the forked ranks; never returns. They meet through a file: ports may be taken by others."""
    log = os.open(request["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    ranks = request["ranks"]
    os.environ |= {"RANK": str(number), "WORLD_SIZE": str(ranks), "LOCAL_RANK": str(number)}
    code: Any = 0
    try:
        if ranks > 1:
            store = dist.FileStore(request["store"], ranks)
            dist.init_process_group("gloo", store=store, rank=number, world_size=ranks)
        work(Path(request["clips"]), Path(request["out"]), request)
    except SystemExit as stop:
        code = stop.code
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _serve() -> None:
    """For every request, a line of JSON, as many processes as it has ranks; answers with their exit statuses."""
    import torch._dynamo  # noqa: F401  paid here once: AdamW imports it

    for line in sys.stdin:
        request = json.loads(line)
        pids = []
        for number in range(request["ranks"]):
            pids.append(os.fork())
            if not pids[-1]:
                _rank(number, request)
        print(json.dumps([os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]), flush=True)


if __name__ == "__main__":
    if len(sys.argv) > 1:
        work(Path(sys.argv[1]), Path(sys.argv[2]), json.loads(sys.argv[3]))
    else:
        _serve()
