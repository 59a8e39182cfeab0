"""`vmae2 launch`: a recipe on one process or on all GPUs."""

from __future__ import annotations

import dataclasses
import os
import sys
from pathlib import Path
from typing import Annotated, Any

import tyro

from .. import __version__, backend
from ..config import Progression
from . import slurm
from .parsing import parse


@dataclasses.dataclass(frozen=True, kw_only=True)
class LaunchOptions:
    """What `launch` takes beside the recipe's own arguments and values."""

    start: Annotated[str | None, tyro.conf.arg(name="from")] = None
    """First stage of a progression to run."""
    until: str | None = None
    """Last stage of a progression to run."""
    weights: Annotated[str | None, tyro.conf.arg(name="init-weights")] = None
    """Weights the first stage starts from, instead of its own `init`."""
    smoke: bool = False
    """Shrink the recipe to CPU seconds: small model, small clips, few moving scenes, one epoch."""
    restart: bool = False
    """Run the named stages from their start, in place of what is there."""
    dry_run: bool = False
    """Print the plan and stop."""
    check: bool = False
    """Read the lists, train three steps of every stage, write and read their checkpoint, and stop."""
    profile: bool = False
    """Record three steps of every stage: a trace in RUN/profile and a table of the slowest ops. The run goes on."""
    card: str | None = None
    """Size every stage for this card by the ledger (micro-batch, recomputation, sharding), and plan for it: 24gb, 40gb, 80gb,
    or rtx4090, a100-40, a100-80, h100, h200; default: the recipe's own values, planned for what is here."""
    gpus: int | None = None
    """Processes on this machine, one on each GPU (without GPUs: on the CPU); default all visible GPUs. Under torchrun or
    srun the processes that are there join."""
    restarts: int = 0
    """Times the processes are started again from the last checkpoint when one of them fails."""
    slurm: str | None = None
    """Submit the launch to this Slurm partition and return: a process on each of `gpus` GPUs of each of `nodes` machines. The
    job is warned before it must end, saves, queues again and goes on."""
    nodes: int = 1
    """Machines of the Slurm job, or of a plan (--dry-run)."""
    hours: float = 24.0
    """Time limit of one sitting of the Slurm job."""
    requeues: int = 100
    """Times the Slurm job queues again after it has reached its time limit."""
    cpus: int | None = None
    """CPUs of each process of the Slurm job."""
    sbatch: tuple[str, ...] = ()
    """More options of sbatch as KEY=VALUE, such as account=vision qos=high."""
    json: bool = False
    """Print the summary as the last line on stdout."""


def launch(arguments: list[str]) -> dict[str, Any]:
    """Run a recipe: one stage or a whole progression.

    Example: vmae2 launch demo:progressive --out runs/demo
    Example: vmae2 launch pretrain:vit_base_hybrid --optim.lr 3e-4 --train.global-batch 256
    Example: vmae2 launch finetune:vit_huge_ssv2 --card 24gb --gpus 4 --dry-run
    Example: vmae2 launch pretrain:vit_giant_hybrid --slurm gpu --nodes 8 --gpus 8 --hours 48 --sbatch account=vision
    """
    from .. import recipes_index

    if not arguments or arguments[0].startswith("-"):
        print(launch.__doc__)
        print("Recipes:\n" + recipes_index.listing())
        parse(LaunchOptions, ["--help"], "vmae2 launch RECIPE")
    return _run(*recipes_index.with_options(arguments, LaunchOptions, "vmae2 launch", parse), arguments)


def _spread(options: LaunchOptions, arguments: list[str]) -> None:
    """Run the same command in one process a GPU and leave with its exit code; returns where one process is enough."""
    import torch

    from ..train.parallel import placement

    wanted = torch.cuda.device_count() if options.gpus is None else options.gpus
    present = torch.cuda.device_count()
    if options.gpus is not None and (wanted < 1 or (present and wanted > present)):
        raise ValueError(f"--gpus {wanted}: must be at least 1 and at most {present or 'the cores'} here")
    if options.restarts < 0:
        raise ValueError(f"--restarts {options.restarts}: must be at least 0")
    if placement().size > 1 or "TORCHELASTIC_RUN_ID" in os.environ or (wanted <= 1 and not options.restarts):
        return
    # c10d rendezvous: with a static one a restart after a crash does not come together again.
    agent = ["--nnodes=1", f"--nproc-per-node={max(wanted, 1)}", "--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0"]
    agent += [f"--max-restarts={options.restarts}", "--module", "vmae2_fast", "launch"]
    sys.stdout.flush()
    sys.stderr.flush()
    raise SystemExit(_torchrun([*agent, *arguments]))


def _torchrun(arguments: list[str]) -> int:
    """torch.distributed.run in this process; returns the exit code of the rank that failed first, 128 + n after signal n."""
    from torch.distributed import run
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    # By environment: not every torch knows the flags. SIGUSR1 is passed on like the others, ranks have the time of a step
    # and a checkpoint until they are killed, and those started again meet in a store of their own (see `parallel.join`).
    os.environ.setdefault("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")
    os.environ.setdefault("PET_SIGNALS_TO_HANDLE", "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1")
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "600")
    try:
        run.main(arguments)
    except SignalException as stop:
        return 128 + stop.sigval
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        code = failure.exitcode if failure.exitcode > 0 else 128 - failure.exitcode
        print(f"rank {rank} ended with exit code {code}; what it said is above", file=sys.stderr)
        return code
    return 0


def _run(run: Any, options: LaunchOptions, arguments: list[str]) -> dict[str, Any]:
    from ..pages import missing
    from ..train.batch import split_batch
    from ..train.parallel import leave, placement
    from ..train.plan import fitted, plan
    from ..train.progression import check_stage, describe, selected
    from ..train.smoke import smoke

    if options.smoke:
        run = smoke(run)
    if isinstance(run, Progression) and missing():
        print(
            f"no pictures and no report: {', '.join(missing())} not installed (pip install 'vmae2_fast[report]')",
            file=sys.stderr,
        )
    if not isinstance(run, Progression) and (options.start or options.until):
        raise ValueError(f"--from and --until choose stages of a progression, and {run.name} is a single one; leave them out")
    stages = selected(run, options.start, options.until) if isinstance(run, Progression) else [run]
    gpus, nodes = _machines(options)
    for stage in stages:
        check_stage(stage)
        split_batch(stage, gpus * nodes)
    if options.card is not None:
        stages = [fitted(stage, options.card, gpus=gpus, nodes=nodes) for stage in stages]
        run = _with_stages(run, stages)
    lines = [f"progression {run.name} -> {run.out}"] if isinstance(run, Progression) else []
    budgets = []
    for stage in stages:
        costs, account = plan(stage, gpus=gpus, nodes=nodes, card=options.card)
        budgets.append(account)
        lines += [*describe(stage), *costs]
    built = backend.native() is not None
    kernels = "with native kernels" if built else "WITHOUT native kernels (not built): reference implementations, slower"
    print(f"vmae2_fast {__version__} {kernels}; `vmae2 env` tells more", file=sys.stderr)
    world = placement()
    if world.first:
        for line in lines:
            print(line, file=sys.stderr)
    if options.dry_run:
        return {"plan": lines, "stages": budgets}
    if options.slurm is not None and not slurm.submitted():
        return _submit(run, options, arguments)
    _spread(options, arguments)
    try:
        return _check(run, options, stages) if options.check else _train(run, options, stages)
    finally:
        leave()


def _machines(options: LaunchOptions) -> tuple[int, int]:
    """(processes on each machine, machines) the run will have."""
    import torch

    from ..train.parallel import placement

    world = placement()
    if world.size > 1:
        return world.local_size, max(world.size // world.local_size, 1)
    gpus = max(torch.cuda.device_count(), 1) if options.gpus is None else options.gpus
    nodes = options.nodes if options.slurm is not None or options.dry_run else 1
    for flag, count in (("--gpus", gpus), ("--nodes", nodes)):
        if count < 1:
            raise ValueError(f"{flag} {count}: must be above 0")
    return gpus, nodes


def _with_stages(run: Any, stages: list[Any]) -> Any:
    """The run with the given stages in place of its own of the same names."""
    if not isinstance(run, Progression):
        return stages[0]
    new = {stage.name: stage for stage in stages}
    return dataclasses.replace(run, stages=tuple(new.get(stage.name, stage) for stage in run.stages))


def _submit(run: Any, options: LaunchOptions, arguments: list[str]) -> dict[str, Any]:
    if options.gpus is None:
        raise ValueError("--slurm needs --gpus, the GPUs of each machine")
    if options.restarts:
        raise ValueError("--restarts is for processes started here; a Slurm job queues again by itself (--requeues)")
    folder = Path(run.out) / "slurm" / "%j"
    made = slurm.executor(
        folder, partition=str(options.slurm), name=run.name, nodes=options.nodes, gpus=options.gpus, cpus=options.cpus,
        hours=options.hours, requeues=options.requeues, options=options.sbatch,
    )  # fmt: skip
    return slurm.submit(arguments, made, folder)


def _check(run: Any, options: LaunchOptions, stages: list[Any]) -> dict[str, Any]:
    from ..train.parallel import join
    from ..train.preflight import lines, preflight, standing_alone
    from ..train.progression import prepare, starting_from

    world, _ = join()
    if options.weights:
        stages = [starting_from(stages[0], options.weights), *stages[1:]]
    if isinstance(run, Progression):
        world.on_first(lambda: prepare(run))
        stages = [dataclasses.replace(standing_alone(stage), out=run.out) for stage in stages]
    results = []
    for stage in stages:
        results.append(preflight(stage))
        if world.first:
            print("\n".join(lines(results[-1])), file=sys.stderr)
    return {"check": results}


def _train(run: Any, options: LaunchOptions, stages: list[Any]) -> dict[str, Any]:
    from ..pages import missing
    from ..report import summarise, write_report, write_summary
    from ..train.loop import train
    from ..train.parallel import placement
    from ..train.progression import run_progression

    first = placement().first
    if not isinstance(run, Progression):
        return train(run, init=options.weights, resume=not options.restart, profile=options.profile)
    results = run_progression(
        run, start=options.start, until=options.until, init=options.weights, resume=not options.restart,
        profile=options.profile,
    )  # fmt: skip
    if not first:
        return {}
    if len(stages) < len(run.stages):
        summary = summarise(run, results)
        write_summary(summary, Path(run.out))
        return summary
    summary = write_report(run, results)
    if not missing():
        print(f"report: {Path(run.out) / 'report.html'}", file=sys.stderr)
    return summary
