"""Several processes, one run: joining them, splitting a model over them, and what they tell each other.

The same code runs on GPUs (NCCL) and CPUs (gloo). `train.parallel="ddp"` keeps the whole model on every rank,
`"fsdp"` (FSDP2, `fully_shard` of every block and of the rest) a slice of parameters, gradients and moments; blocks are
gathered and computed in the autocast dtype, their gradients summed in float32, slices and moments are float32.
`"hsdp"` does so within each machine and keeps a copy on every one. All average gradients over ranks; a step's loss is
divided by the count of its *global* batch, so each rank's loss is multiplied by the number of ranks before its backward and
the average becomes the gradient of the one global loss.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import re
import sys
import warnings
from collections.abc import Callable, Mapping
from typing import Any, Literal, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.parallel import DistributedDataParallel

from ..data.loader import Batch
from ..models.vit import Block
from ..sharded import is_sharded
from ..tasks import Task

T = TypeVar("T")
Loss = Callable[[Batch, bool], dict[str, Tensor]]
"""(batch, whether it is the last of its step) -> what `Task.loss` returns."""


@dataclasses.dataclass(frozen=True)
class World:
    """This process among those of the run. `World()` is a process on its own, for which nothing is communicated."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1
    """Processes of the run on this machine."""

    @property
    def first(self) -> bool:
        return self.rank == 0

    def sum(self, value: Tensor) -> Tensor:
        """Sum over all ranks, on the device of `value` (changed in place and returned)."""
        if self.size > 1:
            dist.all_reduce(value)
        return value

    def highest(self, value: int) -> int:
        """The highest of a small host number over all ranks."""
        if self.size == 1:
            return value
        shared = torch.tensor(value)
        dist.all_reduce(shared, dist.ReduceOp.MAX)
        return int(shared)

    def gather(self, value: T) -> list[T]:
        """A picklable value of every rank, in the order of ranks, on every rank."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=_host_group())
        return values

    def whole(self, tensors: Mapping[str, Tensor], buffers: dict[str, Tensor] | None = None) -> dict[str, Tensor]:
        """Sharded tensors put together on the host of rank 0, one at a time through the device; {} on the other ranks.

        buffers: host memory by name to copy into, allocated where it is missing (pinned for tensors of a GPU). Without it
        what lies whole on the host already is given as it is.
        """
        out = {}
        for name, tensor in tensors.items():
            value = tensor.detach()
            value = value.full_tensor() if is_sharded(value) else value
            if not self.first:
                continue
            if buffers is None:
                out[name] = value.cpu().contiguous()
                continue
            if name not in buffers:
                buffers[name] = torch.empty(value.shape, dtype=value.dtype, pin_memory=value.is_cuda)
            out[name] = buffers[name].copy_(value, non_blocking=True)
        if buffers is not None and torch.cuda.is_initialized():
            torch.cuda.synchronize()
        return out

    def on_first(self, action: Callable[[], T]) -> T:
        """Do `action` on rank 0 and give its result, or raise its error, on all: nobody waits for a rank that failed."""
        if self.size == 1:
            return action()
        outcome: list[Any] = [None, None]
        if self.first:
            try:
                outcome[0] = action()
            except Exception as error:
                outcome[1] = error
        dist.broadcast_object_list(outcome, src=0, group=_host_group())
        if outcome[1] is not None:
            raise outcome[1]
        return outcome[0]


_HOST_GROUP: list[Any] = []


def _host_group() -> Any:
    """A gloo group for host objects: NCCL would move them through GPU memory."""
    if dist.get_backend() == "gloo":
        return None
    if not _HOST_GROUP:
        _HOST_GROUP.append(dist.new_group(backend="gloo"))
    return _HOST_GROUP[0]


def placement() -> World:
    """Rank, number of ranks and rank on this machine, as torchrun or Slurm (srun) tell them; connects nothing.

    A Slurm job of several tasks needs MASTER_ADDR and MASTER_PORT in its environment. Raises ValueError without them.
    """
    env = os.environ
    if "RANK" in env and "WORLD_SIZE" in env:
        size = int(env["WORLD_SIZE"])
        return World(int(env["RANK"]), size, int(env.get("LOCAL_RANK", 0)), int(env.get("LOCAL_WORLD_SIZE", size)))
    if "SLURM_STEP_ID" in env and int(env.get("SLURM_STEP_NUM_TASKS", 1)) > 1:
        missing = [name for name in ("MASTER_ADDR", "MASTER_PORT") if name not in env]
        if missing:
            raise ValueError(f"this Slurm step has several tasks but no {' and '.join(missing)}; export the first node's")
        size = int(env["SLURM_STEP_NUM_TASKS"])
        # "8(x2),4": tasks of the nodes
        here = re.split(r"[(,]", env.get("SLURM_STEP_TASKS_PER_NODE", str(size)))[0]
        return World(int(env["SLURM_PROCID"]), size, int(env.get("SLURM_LOCALID", 0)), int(here))
    return World()


def join(device: torch.device | str | None = None) -> tuple[World, torch.device]:
    """Join the other processes of the run, once, and choose the device: this rank's GPU where there are GPUs."""
    world = placement()
    kind = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if world.size == 1:
        return world, kind
    if kind.type == "cuda":
        kind = torch.device("cuda", world.local_rank)
        torch.cuda.set_device(kind)
    if not dist.is_initialized():
        _warn_of_restarts(world)
        backend = "cpu:gloo,cuda:nccl" if kind.type == "cuda" else "gloo"
        dist.init_process_group(backend, rank=world.rank, world_size=world.size)
    return world, kind


def _warn_of_restarts(world: World) -> None:
    """torch 2.13's torchrun keeps one store over all restarts: ranks find addresses of processes that are gone."""
    shared = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    if world.first and shared and os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0") != "0":
        way_out = "export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 before torchrun"
        print(f"WARNING: ranks that torchrun starts again may wait for ever; {way_out}", file=sys.stderr)


_LEFT: list[Any] = []
"""Groups that were left, kept to the end of the process. DDP drops its reference while it holds Python's lock; were it the
last one, the group would wait for its threads, one of which may be waiting for the lock to give up a tensor (torch 2.13)."""


def leave() -> None:
    """Close the connection to the other processes, if there is one."""
    _HOST_GROUP.clear()
    if dist.is_initialized():
        _LEFT.append(dist.group.WORLD)
        dist.destroy_process_group()


class _LossModule(nn.Module):
    """A task as a module, for DistributedDataParallel to see forward and parameters."""

    def __init__(self, task: Task[Any]) -> None:
        super().__init__()
        self.task = task
        self.model = task.model

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        return self.task.loss(batch)


def shards(mode: Literal["ddp", "fsdp", "hsdp"], within: int | None, ranks: int, local_ranks: int) -> int:
    """Ranks that one copy of the model is split over. Raises ValueError where they do not divide `ranks`."""
    if mode != "hsdp":
        return ranks if mode == "fsdp" else 1
    count = within or local_ranks
    if ranks % count:
        raise ValueError(f"train.parallel=hsdp: {count} ranks a copy do not divide {ranks} ranks; set train.shard_within")
    return count


def distribute(task: Task[Any], world: World) -> Loss:
    """Spread `task.model`, whose parameters must be the same on all ranks, as `train.parallel` says; gives its loss function.

    A model on the meta device is split first, then gets memory for its slices and its initial values: the same as on one rank,
    drawn from torch's host generator, which must stand alike on all ranks.
    Gradients are averaged over ranks in the backward of a step's last batch only. Call before the optimiser is built.
    Raises ValueError as `shards` does.
    """
    train = task.config.train
    mode = train.parallel
    if world.size == 1:
        return lambda batch, last: task.loss(batch)
    if mode == "ddp":
        module = _LossModule(task)
        ids = [task.device.index] if task.device.type == "cuda" else None
        with warnings.catch_warnings():
            # torch 2.13 renames broadcast_buffers; 2.11 and 2.12 know no other name. Our buffers are constants.
            warnings.filterwarnings("ignore", "`broadcast_buffers`", FutureWarning)
            ddp = DistributedDataParallel(module, device_ids=ids, broadcast_buffers=False, gradient_as_bucket_view=True)

        def replicated(batch: Batch, last: bool) -> dict[str, Tensor]:
            with contextlib.nullcontext() if last else ddp.no_sync():
                return ddp(batch)

        return replicated
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    if mode == "hsdp":
        count = shards(mode, train.shard_within, world.size, world.local_size)
        mesh = init_device_mesh(task.device.type, (world.size // count, count), mesh_dim_names=("replicate", "shard"))
    else:
        mesh = init_device_mesh(task.device.type, (world.size,))
    for name, block in task.model.named_modules():
        if isinstance(block, Block):
            # Blocks are gathered and computed in the autocast dtype. What is around them is small and stays float32.
            exact = task.config.model.decoder_fp32 and name.startswith("decoder.")
            policy = MixedPrecisionPolicy(
                param_dtype=None if exact else task.dtype, reduce_dtype=torch.float32, cast_forward_inputs=False
            )
            # With LayerScale a block's gamma is used by the next one: it must outlive its block's forward.
            fully_shard(block, mesh=mesh, reshard_after_forward=block.gamma_2 is None, mp_policy=policy)
    fully_shard(task.model, mesh=mesh, mp_policy=MixedPrecisionPolicy(cast_forward_inputs=False))
    model: Any = task.model
    if task.on_meta:  # no rank ever holds more than its slices and one whole parameter
        model.to_empty(device=task.device)
        model.init_weights()

    def sharded(batch: Batch, last: bool) -> dict[str, Tensor]:
        model.set_requires_gradient_sync(last)
        return task.loss(batch)

    return sharded


def regather(model: nn.Module) -> None:
    """Have parameters that were changed gathered anew: FSDP2 keeps what a forward without a backward gathered for the next."""
    if not any(is_sharded(parameter) for parameter in model.parameters()):
        return
    from torch.distributed.fsdp import FSDPModule

    for part in model.modules():
        if isinstance(part, FSDPModule):
            part.reshard()


def local(tensor: Tensor) -> Tensor:
    """This rank's slice of a sharded tensor, sharing its memory; any other tensor as it is."""
    return tensor.to_local() if is_sharded(tensor) else tensor


def join_like(shard: Tensor, like: Tensor) -> Tensor:
    """This rank's slice of something split as `like` is, as one sharded tensor; as it is where `like` is whole."""
    if not is_sharded(like):
        return shard
    from torch.distributed.tensor import DTensor

    return DTensor.from_local(shard, like.device_mesh, like.placements, shape=like.shape, stride=like.stride())


def slice_like(value: Tensor, like: Tensor) -> Tensor:
    """This rank's slice of the whole tensor `value`, split as `like` is; nothing is communicated."""
    if not is_sharded(like):
        return value
    from torch.distributed.tensor import distribute_tensor

    placed = distribute_tensor(value.to(like.device), like.device_mesh, like.placements, src_data_rank=None)
    return placed.to_local()


def copies(parameter: Tensor) -> int:
    """How many copies of a sharded tensor the ranks hold together; 0: it is not sharded."""
    if not is_sharded(parameter):
        return 0
    return parameter.device_mesh.size(0) if parameter.device_mesh.ndim > 1 else 1


def norm(gradients: list[Tensor], copies: int, world: World) -> Tensor:
    """Euclidean norm over all gradients: of slices of which the ranks hold `copies` together, or, with 0, of this rank's;
    a device scalar."""
    value = torch.nn.utils.get_total_norm(gradients)
    return (world.sum(value.square()) / copies).sqrt() if copies else value
