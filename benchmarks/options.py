"""What `vmae2 bench` takes. Light to import: the command line reads it before it knows which command will run."""

from __future__ import annotations

import dataclasses
from typing import Annotated, Any, Literal

import tyro


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ops:
    """Single ops on this processor in float32, against plain (official) and strong (index-first, compiled) torch.

    Example: vmae2 bench ops --only gather_vit_b masks
    """

    only: tuple[str, ...] = ()
    """Keys to measure, for example gather_vit_b; all without."""
    rounds: int = 15
    """Times each variant has its turn; medians count."""
    threads: int = 0
    """Threads of torch and of our kernels; 0: all cores this process may use."""
    toy: bool = False
    """Toy sizes, to see that it runs: the figures mean nothing."""

    def run(self) -> tuple[dict[str, Any], str]:
        """The result and its table."""
        from . import ops, report

        result = ops.bench_ops(self.only, rounds=self.rounds, threads=self.threads, toy=self.toy)
        return result, report.render(result)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Step:
    """Whole pre-training steps on this processor, and their peak memory.

    Example: vmae2 bench step --model vit_base --batch 2 --json
    """

    model: str = "vit_base"
    """vit_small, vit_base, vit_large, vit_huge, vit_giant, or an official pre-training name."""
    batch: int = 2
    """Clips of a step."""
    rounds: int = 5
    """Times each variant has its turn; medians count."""
    threads: int = 0
    """Threads of torch and of our kernels; 0: all cores this process may use."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Autocast dtype of ours; auto: bfloat16 where the processor has instructions for it."""
    toy: bool = False
    """A toy model, to see that it runs: the figures mean nothing."""

    def run(self) -> tuple[dict[str, Any], str]:
        """The result and its table."""
        from . import report, step

        result = step.bench_step(**dataclasses.asdict(self))
        return result, report.render(result)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes a training step keeps for its backward, counted for each clip, beside the official way in fp32.

    Example: vmae2 bench memory --json
    """

    models: tuple[str, ...] = ("pretrain_videomae_giant_patch14_224", "vit_giant_patch14_224")
    """Official names."""

    def run(self) -> tuple[dict[str, Any], str]:
        """The result and its table."""
        from . import memory, report

        result = memory.bench_memory(self.models)
        return result, report.render(result)


Suite = (
    Annotated[Ops, tyro.conf.subcommand("ops")]
    | Annotated[Step, tyro.conf.subcommand("step")]
    | Annotated[Memory, tyro.conf.subcommand("memory")]
)
