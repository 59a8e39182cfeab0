"""What a launch will do to the machines it gets: sized for a card by the ledger, and told before anything starts."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import torch

from ..config import AvaConfig, Stage, TadConfig
from .batch import split_batch
from .budget import CARDS, SHARE, BudgetOptions, budget, card_name, card_of, epoch_clips, rank_bytes, sized
from .ledger import knobs
from .memory import available_bytes
from .parallel import World

_POLICIES: tuple[Literal["none", "mlp", "block"], ...] = ("none", "mlp", "block")


def fitted(stage: Stage, card: str, *, gpus: int = 1, nodes: int = 1) -> Stage:
    """The stage sized for a card (a name of `budget.CARDS`, or 24gb, 40gb, 80gb) by the ledger.

    Of activation checkpointing (none, mlp, block) and sharding (as the stage has it, then fsdp where there are several
    ranks) the first that fits is taken, in the order of what they cost in time: a stage is sharded before it recomputes
    more. A `train.micro_batch` of the stage is kept; where it is None or 0, the largest that fits is set. What is trained
    stays the same, up to the order of sums. Raises ValueError where nothing fits, and for detection: frames of an AVA batch
    have no one size, and a temporal detector is small.
    """
    if isinstance(stage, AvaConfig | TadConfig):
        raise ValueError(f"{stage.name}: detection is not sized by the ledger; set --train.micro-batch, and leave --card out")
    name, ranks = card_name(card), gpus * nodes
    room = SHARE * CARDS[name].memory * 1e9
    train = dataclasses.replace(stage.train, micro_batch=stage.train.micro_batch or 0)
    ways = [train] if ranks == 1 or train.parallel != "ddp" else [train, dataclasses.replace(train, parallel="fsdp")]
    candidate: Stage = stage
    for policy in _POLICIES[_POLICIES.index(stage.model.activation_checkpoint) :]:
        model = dataclasses.replace(stage.model, activation_checkpoint=policy)
        for way in ways:
            candidate = sized(dataclasses.replace(stage, model=model, train=way), ranks, room, gpus)
            if rank_bytes(candidate, ranks, gpus)["total"] <= room:
                return candidate
    least = rank_bytes(candidate, ranks, gpus)["total"] / 1e9
    raise ValueError(
        f"{stage.name}: needs {least:.1f} GB on each of {ranks} x {name}, which has {room / 1e9:.1f}, even sharded and "
        f"recomputed; take more GPUs, a larger card, or {knobs(candidate)}"
    )


def plan(stage: Stage, *, gpus: int, nodes: int = 1, card: str | None = None) -> tuple[list[str], dict[str, Any]]:
    """What the ledger says of a stage on `gpus` processes on each of `nodes` machines: few lines, and the same as JSON values.

    card: of the plan; None: the GPU that is here. On a CPU, or a GPU whose peaks are not known, bytes alone are told.
    Raises ValueError where the global batch cannot be cut over the processes.
    """
    ranks = gpus * nodes
    split_batch(stage, ranks)
    on_gpu = card is None and torch.cuda.is_available()
    card = card_of(torch.cuda.get_device_name()) if on_gpu else card
    if card is not None:
        told = budget(stage, BudgetOptions(card=card, gpus=gpus, nodes=nodes))
        sent = f"{told['step_seconds']:.3g} s a step at {told['mfu']:.0%} MFU"
        days = "" if told["days"] is None else f", {told['days']:.3g} days"
        demand = f"; a node decodes {told['decoded_clips_per_s_and_node']:.0f} clips/s"
        device, room = told["card"], told["card_bytes"]
    else:
        room = available_bytes(torch.device("cuda" if on_gpu else "cpu"), World(0, gpus, 0, gpus))
        stage = sized(stage, ranks, SHARE * room, gpus)
        micro, forwards = split_batch(stage, ranks)
        memory, clips = rank_bytes(stage, ranks, gpus), epoch_clips(stage)
        told = {
            "stage": stage.name, "card": None, "gpus": ranks, "micro_batch": micro, "micro_batches": forwards,
            "bytes_per_gpu": memory, "card_bytes": room, "fits": memory["total"] <= SHARE * room,
            "epochs": stage.train.epochs, "epoch_clips": clips,
        }  # fmt: skip
        sent, days, demand = "step time unknown here (--dry-run --card NAME)", "", ""
        device = torch.cuda.get_device_name() if on_gpu else "process on the CPU"
    gb = {name: value / 1e9 for name, value in told["bytes_per_gpu"].items()}
    parts = ", ".join(f"{name} {value:.2f}" for name, value in gb.items() if name != "total")
    epochs = f"{told['epochs']} epochs" + (f" of {told['epoch_clips']:,} clips" if told["epoch_clips"] else "")
    lines = [
        f"  {ranks} x {device}, {told['micro_batches']} x {told['micro_batch']} clips each a step, {stage.train.parallel}, "
        f"recomputed: {stage.model.activation_checkpoint}; {gb['total']:.2f} GB of {room / 1e9:.1f} by the ledger ({parts})",
        f"  {sent}, {epochs}{days}{demand}",
    ]
    if not told["fits"]:
        lines.append(f"  MAY NOT FIT: {knobs(stage)}, or --card to have it sized")
    return lines, told
