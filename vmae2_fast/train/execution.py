"""How the forwards and backwards of a step are run: eagerly, through torch.compile, or each as one CUDA graph.

All three compute the same. A graph holds the launches of forward and backward with their addresses: a step fills the static
input, replays it, and finds loss and gradients where the capture wrote them. The optimiser stays outside, where the learning
rate of a step is a number on the host.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..data.loader import Batch
from ..models import Block
from ..tasks import Task
from .parallel import Loss, World

WARM_UP = 3  # micro-batches before the capture: libraries allocate their workspaces, autograd its buffers


def compile_model(model: nn.Module, what: Literal["none", "blocks", "model"]) -> None:
    """Hand every transformer block, or the whole model, to torch.compile; in place, so names in checkpoints stay."""
    if what == "model":
        model.compile()
    elif what == "blocks":
        for module in model.modules():
            if isinstance(module, Block):
                module.compile()


class Eager:
    """Forward and backward of a micro-batch as they come.

    loss, world: what `parallel.distribute` gave for the ranks of the run; None: the task's own, on one rank. scale: scalar on
    the device that the loss is multiplied by for its backward, read anew each time.
    """

    def __init__(
        self, task: Task[Any], loss: Loss | None = None, world: World | None = None, scale: Tensor | None = None
    ) -> None:
        self.task, self.world, self.scale = task, world or World(), scale
        self.loss: Loss = loss or (lambda batch, last: task.loss(batch))

    def __call__(self, batch: Batch, total: float | Tensor, last: bool = True) -> dict[str, Tensor]:
        """Add the (scaled) gradients of `batch`'s loss sum over `total` to the parameters; returns {"loss", and the task's
        sums}.

        total: the count of the global batch; last: whether it is the last of this rank's micro-batches in the step."""
        out = self.loss(batch, last)
        share = out.pop("loss_sum") / total
        driven = share * self.world.size  # the ranks' gradients are averaged
        (driven if self.scale is None else driven * self.scale).backward()
        return {"loss": share.detach(), **out}


class Graphed(Eager):
    """The same as a CUDA graph, captured after `WARM_UP` micro-batches that run eagerly.

    Every batch must have the shapes of the first, and `total` be the same number: both are part of the graph. Raises
    ValueError without a GPU, for a task whose loss looks at labels on the host, and for a batch of another shape.
    """

    def __init__(
        self, task: Task[Any], loss: Loss | None = None, world: World | None = None, scale: Tensor | None = None
    ) -> None:
        super().__init__(task, loss, world, scale)
        if self.world.size > 1:
            raise ValueError("train.cuda_graph runs on one rank: set train.cuda_graph=False, or launch with --gpus 1")
        if task.device.type != "cuda" or not torch.cuda.is_available():
            raise ValueError(f"train.cuda_graph needs a GPU, and this run is on {task.device}; set train.cuda_graph=False")
        if task.needs_labels():
            raise ValueError(
                f"{task.config.name}: train.cuda_graph works where no label is checked on the host (pre-training, "
                "distillation without labels); set train.cuda_graph=False"
            )
        train = task.config.train
        self.alone = train.micro_batch in (None, train.global_batch)
        self.seen = 0
        self.graph: torch.cuda.CUDAGraph | None = None

    def __call__(self, batch: Batch, total: float | Tensor, last: bool = True) -> dict[str, Tensor]:
        if isinstance(total, Tensor):
            raise ValueError(
                f"{self.task.config.name}: train.cuda_graph needs a constant number of loss tokens (running cell with a "
                "number of frames that is a multiple of 4 tubelets, or no decoder mask); set train.cuda_graph=False"
            )
        self.seen += 1
        if self.seen <= WARM_UP:
            with torch.cuda.stream(self._side()):
                out = super().__call__(batch, total)
            torch.cuda.current_stream().wait_stream(self.stream)
            return out
        if self.graph is None:
            self._capture(batch, total)
        assert self.graph is not None
        self._fill(batch)
        self.graph.replay()
        for parameter, gradient in zip(self.parameters, self.gradients, strict=True):
            if gradient is None or self.alone:
                parameter.grad = gradient
            else:  # the next micro-batch of this step overwrites the graph's gradients
                parameter.grad = gradient.clone() if parameter.grad is None else parameter.grad.add_(gradient)
        return {name: value.clone() for name, value in self.out.items()}

    def _side(self) -> torch.cuda.Stream:
        if self.seen == 1:
            self.stream = torch.cuda.Stream()
        self.stream.wait_stream(torch.cuda.current_stream())
        return self.stream

    def _capture(self, batch: Batch, total: float) -> None:
        device = self.task.device
        self.static = batch._replace(**{
            name: getattr(batch, name).to(device, copy=True) for name in ("clip", "label", "position", "view")
        })  # fmt: skip
        self.total = total
        self.parameters = [p for p in self.task.model.parameters() if p.requires_grad]
        before = [p.grad for p in self.parameters]
        for parameter in self.parameters:
            parameter.grad = None
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self.out = super().__call__(self.static, total)
        self.gradients = [p.grad for p in self.parameters]
        for parameter, gradient in zip(self.parameters, before, strict=True):
            parameter.grad = gradient
        self.graph = graph

    def _fill(self, batch: Batch) -> None:
        for name in ("clip", "label", "position", "view"):
            target, source = getattr(self.static, name), getattr(batch, name)
            if target.shape != source.shape:
                raise ValueError(
                    f"{self.task.config.name}: train.cuda_graph holds {name} {list(target.shape)}, this batch has "
                    f"{list(source.shape)}"
                )
            target.copy_(source, non_blocking=True)


def accumulate(
    task: Task[Any], batches: Iterator[Batch], micro_batches: int, clips: int, forward_backward: Eager | None = None
) -> tuple[dict[str, Tensor], list[str]]:
    """Gradients of one global batch of `clips` clips over all ranks, taken from `micro_batches` batches of this one.

    Every micro-batch's loss sum is divided by the count of the *whole* global batch before its backward, so gradients
    add up to those of one big batch whatever the split. Where the count depends on the masks, the micro-batches are
    held (uint8, on the host) until it is known. `forward_backward`: how each is run, and on how many ranks (None: eagerly,
    on this one). Returns ({"loss" and the task's sums} over all ranks, paths that were replaced on this one).
    """
    forward_backward = forward_backward or Eager(task)
    world = forward_backward.world
    total: float | Tensor | None = task.static_count(clips)
    if total is None:
        held = [next(batches) for _ in range(micro_batches)]
        total, batches = task.denominator(world.sum(task.count(held))), iter(held)
    sums: dict[str, Tensor] = {}
    replaced: list[str] = []
    for number in range(micro_batches):
        batch = next(batches)
        replaced += [failure.path for failure in batch.replaced]
        for name, value in forward_backward(batch, total, number == micro_batches - 1).items():
            sums[name] = sums[name] + value if name in sums else value
    if world.size > 1:
        totals = world.sum(torch.stack([value.float() for value in sums.values()]))
        sums = dict(zip(sums, totals.unbind()))
    return sums, replaced
