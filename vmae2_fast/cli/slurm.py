"""`vmae2 launch RECIPE --slurm PARTITION --gpus 8 --nodes 4`: the launch as one Slurm job, through submitit.

Slurm starts a process a GPU, each of which runs the same command again and joins the others. Before the time limit, or when
the job has to make room, all of them are warned by SIGUSR2: they save after the step they are in, submitit puts the job back
into the queue, and there it goes on from that checkpoint.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import signal
import sys
from pathlib import Path
from typing import Any

_WARNINGS = (signal.SIGUSR1, signal.SIGUSR2)
_JOB = "VMAE2_SUBMITTED"
"""Set in the processes of a submitted job: there the command trains instead of submitting itself again."""


class Job:
    """What every process of the job calls; pickled by submitit. arguments: of `vmae2 launch`."""

    def __init__(self, arguments: list[str]) -> None:
        self.arguments = arguments

    def __call__(self) -> dict[str, Any]:
        from submitit.helpers import TorchDistributedEnvironment

        from .launch import launch

        here = TorchDistributedEnvironment().export(set_cuda_visible_devices=False, overwrite=True)
        os.environ[_JOB] = "1"
        try:
            return launch(self.arguments)
        except SystemExit as stop:
            number = stop.code - 128 if isinstance(stop.code, int) else 0
            if number not in _WARNINGS:
                raise
            # Saved: now the warning is for submitit, whose first process requeues the job. The others end as if all were
            # well, or Slurm might kill the first one for their sake.
            if here.rank == 0 and callable(signal.getsignal(number)):
                signal.raise_signal(number)
            raise SystemExit(0) from None

    def checkpoint(self) -> Any:
        """What submitit puts into the queue again."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(Job(self.arguments))


def submitted() -> bool:
    """Whether this process belongs to a job that was submitted."""
    return _JOB in os.environ


def executor(
    folder: Path, *, partition: str, name: str, nodes: int, gpus: int, cpus: int | None, hours: float, requeues: int,
    options: tuple[str, ...], cluster: str = "slurm",
) -> Any:  # fmt: skip
    """A submitit executor for one process a GPU. cluster: "slurm", or "local" to run the job on this machine.

    Raises ValueError: submitit is not installed, no Slurm here, values that make no sense, options not written KEY=VALUE.
    """
    if importlib.util.find_spec("submitit") is None:
        raise ValueError("--slurm needs submitit: pip install 'vmae2_fast[slurm]'")
    if cluster == "slurm" and shutil.which("sbatch") is None:
        raise ValueError("--slurm: no sbatch here; run this on a machine that submits Slurm jobs")
    for flag, value in (("nodes", nodes), ("gpus", gpus), ("cpus", cpus), ("hours", hours), ("requeues", requeues + 1)):
        if value is not None and value <= 0:
            raise ValueError(f"--{flag} {value}: must be {'at least 0' if flag == 'requeues' else 'above 0'}")
    if wrong := [option for option in options if "=" not in option]:
        raise ValueError(f"--sbatch {wrong[0]}: must be KEY=VALUE, an option of sbatch without its dashes")
    import submitit

    made = submitit.AutoExecutor(folder, cluster=cluster, **{f"{cluster}_max_num_timeout": requeues})
    made.update_parameters(
        name=name, nodes=nodes, tasks_per_node=gpus, gpus_per_node=gpus, timeout_min=max(1, round(60 * hours)),
        slurm_partition=partition, slurm_signal_delay_s=300, slurm_wckey="vmae2_fast",
        slurm_additional_parameters={"requeue": True, **dict(option.split("=", 1) for option in options)},
        **({} if cpus is None else {"cpus_per_task": cpus}),
    )  # fmt: skip
    return made


def submit(arguments: list[str], made: Any, folder: Path) -> dict[str, Any]:
    """Hand the launch to Slurm. Returns {"job", "logs"}."""
    from submitit.helpers import clean_env

    try:
        with clean_env():
            job = made.submit(Job(arguments))
    except Exception as error:
        if "sbatch" not in str(error).lower() and type(error).__name__ != "FailedJobError":
            raise
        raise ValueError(f"sbatch refused the job: {' '.join(str(error).split())}") from error
    print(f"job {job.job_id}, its output goes to {folder}; `squeue -j {job.job_id}` tells how it does", file=sys.stderr)
    return {"job": job.job_id, "logs": str(folder)}
