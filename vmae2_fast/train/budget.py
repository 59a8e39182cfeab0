"""What a recipe needs on given cards: bytes of each, time of a step, days, clips a node must decode, bytes it must send.

All of it is arithmetic on the exact account of `ledger`; workspace, MFU (share of a card's peak that the model's own
products reach, recomputation not counted) and so step time and days are estimates. `launch --check` measures. Of a temporal
detector the account is that of ActionFormer on one sequence; taking the features before is a forward of the trunk a window.
"""

from __future__ import annotations

import dataclasses
import re
from typing import Any, NamedTuple

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from ..config import ClassifyConfig, DistillConfig, MaskConfig, PretrainConfig, Stage, TadConfig, unknown
from ..data.labelled_sets import PUBLISHED_CLIPS
from ..models import VisionTransformer, build_model
from ..models.actionformer import ActionFormer
from ..models.sizes import resolve
from .adamw import moment_bytes
from .batch import micro_batches as possible_micro_batches
from .batch import split_batch
from .ledger import BYTES, knobs, ledger, saved_bytes
from .parallel import shards


class Card(NamedTuple):
    """Peaks of dense products by the vendors' data sheets, TFLOP/s (float32: not TF32, which a run does not turn on), and
    memory, GB (10^9 bytes)."""

    bfloat16: float
    float32: float
    memory: float


CARDS = {
    "rtx4090": Card(165, 82.6, 24),
    "a100-40": Card(312, 19.5, 40),
    "a100-80": Card(312, 19.5, 80),
    "h100": Card(989, 67, 80),
    "h200": Card(989, 67, 141),
}


CARDS_BY_MEMORY = {"24gb": "rtx4090", "40gb": "a100-40", "80gb": "a100-80"}
"""A card of each size, for who asks by memory: the slowest here of 80 GB."""
_NAMES = {
    "rtx4090": r"RTX 4090$", "a100-40": r"A100.*40GB", "a100-80": r"A100.*80GB", "h100": r"H100 80GB HBM3", "h200": r"H200$",
}  # fmt: skip


def card_name(name: str) -> str:
    """The name in `CARDS` of a card, or of a memory such as 24gb. Raises ValueError with close matches."""
    found = CARDS_BY_MEMORY.get(name, name)
    if found not in CARDS:
        raise ValueError(unknown("card", name, [*CARDS, *CARDS_BY_MEMORY]))
    return found


def card_of(device: str) -> str | None:
    """The name in `CARDS` of a GPU by what its driver calls it; None for one that is not there."""
    return next((name for name, pattern in _NAMES.items() if re.search(pattern, device)), None)


SHARE = 0.95
"""Of a card's memory that a run may count on: the driver and fragments take the rest."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class BudgetOptions:
    """The machines of a budget."""

    card: str = "h100"
    """rtx4090, a100-40, a100-80, h100, h200; or by memory: 24gb, 40gb, 80gb."""
    gpus: int = 8
    """Of a node."""
    nodes: int = 1
    mfu: float = 0.4
    """Share of the card's peak that forward and backward reach."""
    fit: bool = False
    """Choose micro-batch, recomputation and sharding so that the recipe fits the card, as `launch --card` does."""
    clips: int | None = None
    """Clips of an epoch; default the published number of the recipe's sources."""
    json: bool = False
    """Print the budget as the last line on stdout."""

    def __post_init__(self) -> None:
        card_name(self.card)
        if self.gpus < 1 or self.nodes < 1:
            raise ValueError(f"--gpus {self.gpus} --nodes {self.nodes}: must be at least 1")
        if not 0 < self.mfu <= 1:
            raise ValueError(f"--mfu {self.mfu}: must lie above 0 and be at most 1")


def epoch_clips(stage: Stage) -> int | None:
    """Clips of an epoch by the published sizes of its sources; None where one is not published."""
    sizes = [(s.weight, PUBLISHED_CLIPS.get(s.name)) for s in stage.data.sources]
    if not sizes or any(size is None for _, size in sizes):
        return None
    return round(sum(weight * size for weight, size in sizes if size is not None))


def rank_bytes(stage: Stage, ranks: int, local_ranks: int | None = None) -> dict[str, int]:
    """Bytes of one of `ranks` GPUs: parameters, gradients, optimizer, activations, workspace, total.

    Parameters and gradients are fp32, moments as `optim.implementation` keeps them; with "fsdp" split over the ranks, with
    "hsdp" over the `local_ranks` of a machine (default: all). Activations are those of a micro-batch
    (see `ledger.activation_bytes`). Workspace, an estimate: 16-bit copies of the weights under autocast, whole blocks while
    they are gathered ("fsdp", "hsdp", in the autocast dtype), the widest gradients of one block's MLP, a teacher's weights.
    Raises ValueError as `split_batch` does.
    """
    account, train = _account(stage), stage.train
    micro, _ = split_batch(stage, ranks)
    spec = resolve(stage.model)
    total = account["parameters"]["total"]
    trained = _trained(stage, total)
    frozen = trained < total
    split = shards(train.parallel, train.shard_within, ranks, local_ranks or ranks)
    width = BYTES[train.precision]
    stacks = []
    if not isinstance(stage, TadConfig):  # the trunk of a detector is not trained
        stacks.append((spec.encoder, account["tokens"].get("visible", account["tokens"]["all"])))
    if spec.decoder is not None:
        stacks.append((spec.decoder, account["tokens"]["sequence"]))
    # A frozen trunk keeps nothing, and gradients are those of the head.
    kept = 0 if frozen else micro * account["activation_bytes"]["total"]
    widest = max((micro * tokens * (2 * s.mlp_hidden + 2 * s.width) * width for s, tokens in stacks), default=0)
    block = max((4 * s.width * s.width + 2 * s.width * s.mlp_hidden for s, _ in stacks), default=0)
    copies = 2 * width * block if split > 1 else width * total if width < 4 else 0
    workspace = widest + copies
    if isinstance(stage, DistillConfig):
        workspace += 4 * ledger(stage.teacher)["parameters"]["total"]
    out = {
        "parameters": -(-4 * total // split),
        "gradients": -(-4 * trained // split),
        "optimizer": -(-(_moments(stage, trained) + 4 * trained * (stage.optim.ema_decay is not None)) // split),
        "activations": kept,
        "workspace": workspace,
    }
    return {**out, "total": sum(out.values())}


def sized(stage: Stage, ranks: int, available: float, local_ranks: int | None = None) -> Stage:
    """The stage with a `train.micro_batch` in place of 0: the largest whose `rank_bytes` are at most `available`, or else the
    smallest there is."""
    if stage.train.micro_batch != 0:
        return stage

    def cut(micro: int) -> Stage:
        return dataclasses.replace(stage, train=dataclasses.replace(stage.train, micro_batch=micro))

    smallest, *larger = [cut(micro) for micro in possible_micro_batches(stage, ranks)]
    return next((s for s in reversed(larger) if rank_bytes(s, ranks, local_ranks)["total"] <= available), smallest)


def budget(stage: Stage, options: BudgetOptions) -> dict[str, Any]:
    """The budget of one stage as plain JSON values; bytes, seconds and FLOPs in those units, days as days.

    epoch_clips, steps, days: None where the number of clips is not known (`options.clips`).
    Raises ValueError where the global batch cannot be cut over the GPUs.
    """
    name = card_name(options.card)
    card, ranks = CARDS[name], options.gpus * options.nodes
    room = SHARE * card.memory * 1e9
    stage = sized(stage, ranks, room, options.gpus)
    train = stage.train
    account = _account(stage)
    memory = rank_bytes(stage, ranks, options.gpus)
    micro, micro_batches = split_batch(stage, ranks)
    flops, exact = account["flops_step"], _float32_flops(stage, account)
    if isinstance(stage, ClassifyConfig) and stage.frozen:
        flops = 2 * account["macs"]["executed"]["total"]
    if isinstance(stage, DistillConfig):
        teacher = 2 * ledger(stage.teacher)["macs"]["executed"]["total"]
        flops, exact = flops + teacher, exact + teacher * (stage.teacher_precision == "float32")
    rest = flops - exact
    peak = card.float32 if train.precision == "float32" else card.bfloat16
    seconds = (rest / peak + exact / card.float32) * train.global_batch / (1e12 * ranks * options.mfu)
    decodes = train.global_batch // stage.data.views
    clips = options.clips or epoch_clips(stage)
    steps = None if clips is None else train.epochs * clips // decodes
    sent = 4 * _trained(stage, account["parameters"]["total"])
    if train.parallel == "fsdp":  # gradients once a step; weights for the forward and the backward of each micro-batch
        gathered = sent * BYTES[train.precision] // 4
        traffic = (sent + 2 * micro_batches * gathered) * (options.nodes - 1) / options.nodes
    else:  # a ring passes each byte twice; "hsdp" gathers weights inside a node
        traffic = 2 * sent * (options.nodes - 1) / options.nodes
    return {
        "stage": stage.name,
        "model": f"ActionFormer on {stage.model.name}" if isinstance(stage, TadConfig) else stage.model.name,
        "card": name,
        "gpus": ranks,
        "micro_batch": micro,
        "micro_batches": micro_batches,
        "bytes_per_gpu": memory,
        "card_bytes": int(card.memory * 1e9),
        "fits": memory["total"] <= room,
        "macs_clip": account["macs"]["executed"]["total"],
        "macs_clip_published": account["macs"]["published"]["total"],
        "flops_step": flops * train.global_batch,
        "mfu": options.mfu,
        "step_seconds": seconds,
        "epochs": train.epochs,
        "epoch_clips": clips,
        "steps": steps,
        "days": None if steps is None else steps * seconds / 86400,
        "decoded_clips_per_s_and_node": decodes / seconds / options.nodes,
        "network_bytes_per_s_and_node": traffic / seconds,
    }


def _trained_shapes(stage: Stage) -> list[torch.Size]:
    """Shapes of the parameters that get gradients."""
    with torch.device("meta"):
        if isinstance(stage, TadConfig):
            model: Any = _detector(stage)
        else:
            model = build_model(stage.model)
            if isinstance(stage, ClassifyConfig) and stage.frozen:
                assert isinstance(model, VisionTransformer)
                model.freeze_trunk()
    return [p.shape for p in model.parameters() if p.requires_grad]


def _float32_flops(stage: Stage, account: dict[str, Any]) -> int:
    """FLOPs a clip and step of a decoder that is kept in float32 (`model.decoder_fp32`): projection, blocks, prediction."""
    if not stage.model.decoder_fp32 or "decoder_linear" not in account["macs"]["executed"]:
        return 0
    parts = ("encoder_to_decoder", "decoder_linear", "decoder_attention", "head")
    return 6 * sum(account["macs"]["executed"][part] for part in parts)


def _trained(stage: Stage, total: int) -> int:
    """Parameters that get gradients, of `total`."""
    if not (isinstance(stage, ClassifyConfig) and stage.frozen):
        return total
    return sum(shape.numel() for shape in _trained_shapes(stage))


def _moments(stage: Stage, trained: int) -> int:
    """Bytes of the moments of `trained` parameters; of 8-bit ones as if each tensor were whole."""
    if stage.optim.implementation != "torchao8bit":
        return 8 * trained
    return moment_bytes(stage.optim.implementation, _trained_shapes(stage))


def _account(stage: Stage) -> dict[str, Any]:
    if isinstance(stage, TadConfig):
        return _detector_account(stage)
    mask: MaskConfig | None = stage.mask if isinstance(stage, PretrainConfig | DistillConfig) else None
    return ledger(stage.model, mask, precision=stage.train.precision, float8=stage.train.float8)


def _features(stage: TadConfig) -> int:
    return stage.detector.inputs or resolve(stage.model).encoder.width


def _detector(stage: TadConfig) -> ActionFormer:
    return ActionFormer(dataclasses.replace(stage.detector, inputs=_features(stage)))


def _detector_account(stage: TadConfig) -> dict[str, Any]:
    """The account of an ActionFormer on one padded sequence, counted by running it without memory."""
    with FakeTensorMode(), FlopCounterMode(display=False) as counter:
        model = _detector(stage)
        features = torch.zeros(1, stage.detector.max_length, _features(stage))
        kept = saved_bytes(lambda: model(features, torch.ones(features.shape[:2], dtype=torch.bool)), model)
    macs = {"total": counter.get_total_flops() // 2}
    return {
        "parameters": {"total": sum(p.numel() for p in model.parameters())},
        "macs": {"executed": macs, "published": macs},
        "flops_step": 6 * macs["total"],
        "activation_bytes": {"total": kept},
    }


def lines(stage: Stage, result: dict[str, Any]) -> list[str]:
    """A budget for people."""
    gb = {name: value / 1e9 for name, value in result["bytes_per_gpu"].items()}
    parts = ", ".join(f"{name} {value:.2f}" for name, value in gb.items() if name != "total")
    run = f"  {result['step_seconds']:.3f} s a step at {result['mfu']:.0%} MFU"
    if result["steps"] is None:
        run += f", {result['epochs']} epochs; days need --clips, the clips of an epoch"
    else:
        run += f", {result['epochs']} epochs of {result['epoch_clips']:,} clips, {result['steps']:,} steps"
        run += f", {result['days']:.2f} days"
    out = [
        f"{result['stage']}: {result['model']} on {result['gpus']} x {result['card']}, "
        f"{result['micro_batches']} x {result['micro_batch']} clips a GPU and step, {stage.train.parallel}",
        f"  {gb['total']:.2f} GB of {result['card_bytes'] / 1e9:.0f} a GPU: {parts}",
        f"  {result['macs_clip'] / 1e9:.2f} GMAC a clip (as published: {result['macs_clip_published'] / 1e9:.2f}), "
        f"{result['flops_step'] / 1e15:.3f} PFLOP a step",
        run,
        f"  a node decodes {result['decoded_clips_per_s_and_node']:.0f} clips/s and sends "
        f"{result['network_bytes_per_s_and_node'] / 1e9:.2f} GB/s to others",
    ]
    if not result["fits"]:
        out.append(f"  DOES NOT FIT: {knobs(stage)}")
    return out
