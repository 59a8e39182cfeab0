"""What a model costs before anything runs: parameters, tokens, multiply-accumulates, optimiser and activation bytes.

Multiply-accumulates (MACs) are counted twice:

- `published`: as the papers count (VideoMAE V2, tables "decoder masking", "dual masking" and the downstream tables):
  every tubelet is embedded, every decoder block runs on the whole sequence, the head on all decoded tokens. What the
  tables call FLOPs are these MACs. Two printed figures are swapped in the paper: ViT-H with 64x288^2 clips and 12 views
  costs 184.2 TMACs (its K400 row prints 153.34), with 32x384^2 it costs 153.3 (its K600 row prints 184.24).
- `executed`: what our models run. Only visible tubelets are embedded; behind the last decoder block's attention only the
  loss tokens go on. `torch.utils.flop_counter.FlopCounterMode` counts exactly twice as many FLOPs in a forward.

One stack of L blocks of width D with MLP width M on N tokens: L * (N * (4 D^2 + 2 D M) + 2 N^2 D) MACs; the quadratic term
is the attention itself. Biases, norms, softmax and GELU are not counted, as usual.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import nn

from ..config import MaskConfig, ModelConfig, RunConfig
from ..models import build_model
from ..models.sizes import ModelSpec, StackSpec, resolve
from ..models.vit import autocast_weights
from ..ops.masks import mask_sizes
from .adamw import moment_bytes
from .batch import batch_unit

Precision = Literal["float32", "bfloat16", "float16"]
Implementation = Literal["auto", "vmae2", "torch", "apex", "torchao8bit"]
BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


def ledger(
    model: ModelConfig | str,
    mask: MaskConfig | None = None,
    *,
    precision: Precision = "bfloat16",
    views: int = 1,
    float8: bool = False,
    implementation: Implementation = "torch",
) -> dict[str, Any]:
    """The whole account of one model as plain JSON values; counts are per clip, bytes per clip or per model as named.

    model: a `ModelConfig` or an official name. mask: what is hidden (pre-training models only; None: the paper's default).
    precision: autocast dtype of activations; parameters and gradients are fp32. float8: as `train.float8`. views: clips of one
    multi-view test, which multiplies the MACs. implementation: of AdamW, see `OptimConfig`; a run in bfloat16 with "vmae2" (on
    a CPU) keeps shadows beside it. Raises ValueError as `resolve` and `mask_sizes` do.
    """
    config = ModelConfig(name=model) if isinstance(model, str) else model
    spec = resolve(config)
    if views < 1:
        raise ValueError(f"views must be at least 1, got {views}")
    tokens = token_counts(spec, mask or MaskConfig())
    parameters = parameter_counts(spec, config)
    activation = activation_bytes(spec, config, tokens, BYTES[precision], float8)
    published, executed = (macs(spec, config, tokens, executed=flag) for flag in (False, True))
    total = parameters["total"]
    return {
        "model": config.name,
        "clip": {"frames": spec.frames, "size": spec.size, "channels": spec.channels},
        "grid": list(spec.grid),
        "patch": [spec.tubelet, spec.patch, spec.patch],
        "parameters": parameters,
        "tokens": tokens,
        "macs": {"published": published, "executed": executed},
        "views": views,
        "macs_views": {"published": published["total"] * views, "executed": executed["total"] * views},
        # Forward, then twice that for the two gradients of each product; the clip needs none.
        "flops_step": 6 * executed["total"] - 2 * executed["patch_embed"],
        "optimizer": implementation,
        "optimizer_bytes": optimizer_bytes(config, total, implementation, precision),
        "activation_bytes": activation["parts"],
        "activation_bytes_block": activation["block"],
        "residual_dtype": config.residual_dtype,
        "activation_checkpoint": config.activation_checkpoint,
        "precision": precision,
    }


def optimizer_bytes(config: ModelConfig, total: int, implementation: Implementation, precision: Precision) -> dict[str, int]:
    """Bytes of the `total` parameters, their gradients, both moments, and the bfloat16 copies of weights that products under
    autocast take from our own AdamW; without the counts of steps, a number a tensor. All trained, none sharded."""
    out = {"parameters": 4 * total, "gradients": 4 * total, "moments": 8 * total, "shadows": 0}
    shadowed = implementation == "vmae2" and precision == "bfloat16"
    if shadowed or implementation == "torchao8bit":  # these look at every tensor by itself
        with torch.device("meta"):
            model = build_model(config)
        out["moments"] = moment_bytes(implementation, [p.shape for p in model.parameters()])
        out["shadows"] = 2 * sum(weight.numel() for weight in autocast_weights(model)) if shadowed else 0
    return {**out, "total": sum(out.values())}


def token_counts(spec: ModelSpec, mask: MaskConfig) -> dict[str, int]:
    """Tokens of one clip: all, and for pre-training visible, decoded, decoder sequence (visible + decoded) and loss."""
    if spec.decoder is None:
        return {"all": spec.tokens}
    visible, decoded, loss = mask_sizes(
        spec.grid, encoder_ratio=mask.encoder_ratio, decoder=mask.decoder, decoder_ratio=mask.decoder_ratio
    )
    return {"all": spec.tokens, "visible": visible, "decoded": decoded, "sequence": visible + decoded, "loss": loss}


def parameter_counts(spec: ModelSpec, config: ModelConfig) -> dict[str, int]:
    """Parameters by part, equal to those of the built model."""
    width = spec.encoder.width
    embed = width * spec.patch_values + width
    encoder = embed + _stack_parameters(spec.encoder, config) + 2 * width  # the last is encoder.norm, fc_norm or norm
    if spec.decoder is None:
        positions = spec.tokens * width if config.learnable_positions else 0
        head = config.num_classes * (width + 1)
        if config.pooling == "attentive":  # query, queries, keys, values, projection, MLP of 4 D, two norms and the biases
            head += 12 * width * width + 14 * width
        return {"encoder": encoder + positions, "head": head, "total": encoder + positions + head}
    inner = spec.decoder.width
    decoder = _stack_parameters(spec.decoder, config) + 2 * inner + spec.decoder_outputs * (inner + 1)
    between = width * inner + inner  # encoder_to_decoder and the mask token
    return {"encoder": encoder, "decoder": decoder, "between": between, "total": encoder + decoder + between}


def _stack_parameters(stack: StackSpec, config: ModelConfig) -> int:
    d, m = stack.width, stack.mlp_hidden
    block = 4 * d * d + d + 2 * d * m + m + d + 4 * d
    block += 2 * d * config.qkv_bias + 2 * d * (config.layer_scale > 0) + stack.heads * config.cosine_attention
    return stack.depth * block


def macs(spec: ModelSpec, config: ModelConfig, tokens: dict[str, int], *, executed: bool) -> dict[str, int]:
    """Multiply-accumulates of one forward of one clip, by part (see the head of this file)."""
    n, enc, dec = tokens["all"], spec.encoder, spec.decoder
    embed = enc.width * spec.patch_values
    if dec is None:
        # Pooling the first token only: behind the last attention one token is left.
        kept = 1 if executed and config.pooling == "first" else n
        head = enc.width * config.num_classes
        if config.pooling == "attentive":  # one query: keys and values of all tokens, the rest of one
            head += 2 * n * enc.width * enc.width + 2 * n * enc.width + 10 * enc.width * enc.width
        out = {"patch_embed": n * embed, **_stack_macs("encoder", enc, n, kept), "head": head}
        return {**out, "total": sum(out.values())}
    visible, sequence = tokens["visible"], tokens["sequence"]
    out = {
        "patch_embed": (visible if executed else n) * embed,
        **_stack_macs("encoder", enc, visible, visible),
        "encoder_to_decoder": visible * enc.width * dec.width,
        **_stack_macs("decoder", dec, sequence, tokens["loss"] if executed else sequence),
        "head": (tokens["loss"] if executed else tokens["decoded"]) * dec.width * spec.decoder_outputs,
    }
    return {**out, "total": sum(out.values())}


def _stack_macs(part: str, stack: StackSpec, tokens: int, kept: int) -> dict[str, int]:
    """Blocks on `tokens` tokens, of which `kept` go on behind the last block's attention."""
    d, m = stack.width, stack.mlp_hidden
    qkv, rest = 3 * d * d, d * d + 2 * d * m
    linear = stack.depth * tokens * (qkv + rest) - (tokens - kept) * rest
    return {f"{part}_linear": linear, f"{part}_attention": stack.depth * 2 * tokens * tokens * d}


def block_activation_bytes(
    stack: StackSpec, *, activation: int, residual: int, layer_scale: bool,
    checkpoint: Literal["none", "mlp", "block"] = "none", fused: bool = True,
) -> tuple[int, int]:  # fmt: skip
    """Bytes the attention half and the MLP half of one lean block keep for the backward, per token.

        residual D      in each half: the residual stream,  8  mean and 1/std of the norm, fp32
        3 activation D  packed qkv
        activation D    attention output,  4 heads  its log-sum-exp, fp32
        activation M    MLP pre-activation (GELU and the norms' outputs are recomputed)
        activation D    in each half: the branch, only with LayerScale, whose gradient needs it

    Not `fused` (`train.float8`), products keep their inputs too: activation D of each norm, activation M of GELU.
    `activation`, `residual`: bytes of one value (2 or 4). checkpoint="mlp": the MLP half keeps its inputs alone, of which the
    stream is the attention half's already; "block": the block keeps stream and branch. Cosine attention keeps more: it
    works on normalised copies of q and k.
    """
    d, m = stack.width, stack.mlp_hidden
    if checkpoint == "block":
        return residual * d + activation * d, 0
    shared = residual * d + 8 + (activation * d if layer_scale else 0)
    attention = shared + (4 if fused else 5) * activation * d + 4 * stack.heads
    inner = activation * m if fused else activation * (d + 2 * m)
    return attention, activation * d if checkpoint == "mlp" else shared + inner


def activation_bytes(
    spec: ModelSpec, config: ModelConfig, tokens: dict[str, int], activation: int, float8: bool = False
) -> dict[str, dict[str, int]]:
    """What one clip keeps between forward and backward, to the byte: {"parts": by part and in total, "block": of one encoder
    and one decoder block}.

    Counted are the distinct storages that autograd saves, less parameters and buffers: blocks, and the ends around them
    (patch rows, final norms, inputs of the heads, places of the loss tokens, drop-path scales). The pre-training loss is
    counted with its prediction, and so is the uint8 clip it reads again; a classification loss is not, nor dropout in front
    of the head. `activation`: bytes of a value under autocast.
    """
    policy = config.activation_checkpoint
    scaled = config.layer_scale > 0
    block: dict[str, int] = {}

    def stack_bytes(name: str, stack: StackSpec, count: int, kept: int, folded: bool = True, picked: bool = False) -> int:
        """Blocks on `count` tokens, of which `kept` go on behind the last block's attention, copied if `picked` by an index.
        `folded`: a norm follows, and its output is the input of the next product."""
        activation, residual = decoding if name == "decoder" else encoding
        attention, mlp = block_activation_bytes(
            stack, activation=activation, residual=residual, layer_scale=scaled, checkpoint=policy,
            fused=not float8 or (name == "decoder" and config.decoder_fp32),
        )  # fmt: skip
        block[name] = count * (attention + mlp)
        total = stack.depth * count * (attention + mlp) - (count - kept) * mlp
        if policy == "block":
            total -= count * activation * stack.width  # the first block has no branch to add
        else:
            if picked:  # the attention output is kept whole for its backward, and the picked rows for the projection
                total += kept * (activation + (residual if policy == "mlp" else 0)) * stack.width
            if scaled:  # the first block has no branch to add; what adds the last one keeps it
                total -= (count - kept) * activation * stack.width
        if policy == "block" and scaled:
            total += kept * activation * stack.width
        if config.drop_path > 0:
            total += 8 * (stack.depth - 1)  # two scales; the first block drops nothing
        return total + (kept * ((residual + activation) * stack.width + 8) if folded else 0)

    enc, dec, n = spec.encoder, spec.decoder, tokens["all"]
    encoding = (activation, BYTES[config.residual_dtype])
    decoding = (4, 4) if config.decoder_fp32 else encoding
    patch = spec.patch_values * activation
    if dec is None:
        first = config.pooling == "first"
        out = {"embed": n * patch, "encoder": stack_bytes("encoder", enc, n, 1 if first else n, folded=first)}
        if not first:  # the pooled tokens and their norm, both fp32, are the ends of it
            out["head"] = 4 * enc.width + 8 + (4 * enc.width if config.num_classes else 0)
        if config.pooling == "attentive":
            # of each token its stream, norm, key and value; of the query two fp32 ends of its norm, its projections and MLP
            out["head"] += n * (2 * (sum(encoding)) * enc.width + 8)
            out["head"] += (8 + 10 * activation) * enc.width + 8 + 4 * enc.heads
    else:
        visible, sequence, loss = tokens["visible"], tokens["sequence"], tokens["loss"]
        out = {
            "embed": visible * patch,
            "encoder": stack_bytes("encoder", enc, visible, visible),
            "decoder": stack_bytes("decoder", dec, sequence, loss, picked=True) + 8 * loss,
            # the prediction, mean and deviation of each target channel, the list of loss tokens
            "loss": loss * (spec.patch_values * decoding[0] + 8 * spec.channels + 4),
            "clip": spec.frames * spec.size**2 * spec.channels,
        }
    return {"parts": {**out, "total": sum(out.values())}, "block": block}


def saved_bytes(run: Callable[[], Any], model: nn.Module) -> int:
    """Bytes that autograd keeps of `run()` until a backward: distinct storages, less parameters and buffers of `model`.

    Works on real tensors and under FakeTensorMode, where nothing is allocated.
    """
    own = {tensor.untyped_storage()._cdata for tensor in (*model.parameters(), *model.buffers())}
    kept: dict[int, torch.UntypedStorage] = {}  # holds the storages, so that none is freed and another found at its address

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            kept[storage._cdata] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = run()
    total = sum(storage.nbytes() for storage in kept.values())
    del result
    return total


def knobs(run: RunConfig) -> str:
    """Flags that lower the memory of a step, those first that cost no time."""
    train = run.train
    micro = train.micro_batch  # 0: the smallest was tried
    lower = micro is None or micro > batch_unit(run)[1]
    offers = ["a lower --train.micro-batch (more of them a step)"] if lower else []
    if train.precision == "float32":
        offers.append("--train.precision bfloat16")
    if run.model.residual_dtype == "float32":
        offers.append("--model.residual-dtype bfloat16")
    if train.parallel == "ddp":
        offers.append("--train.parallel fsdp on several GPUs")
    if run.model.activation_checkpoint != "block":
        offers.append("--model.activation-checkpoint block (a slower step)")
    return ", ".join(offers) or "a smaller model or clip"


def table(account: dict[str, Any]) -> str:
    """A ledger for people: one aligned line for each figure."""
    clip, grid = account["clip"], account["grid"]
    lines = [
        f"{account['model']}: clip {clip['frames']}x{clip['size']}x{clip['size']}x{clip['channels']}, "
        f"patch {'x'.join(map(str, account['patch']))}, grid {'x'.join(map(str, grid))}",
        _row("parameters (M)", account["parameters"], 1e6, 3),
        _row("tokens of a clip", account["tokens"], 1, 0),
        "multiply-accumulates of a forward (G) " + " " * 6 + f"{'published':>12}{'executed':>12}",
    ]
    published, executed = account["macs"]["published"], account["macs"]["executed"]
    pairs = {part: (published[part], executed[part]) for part in published}
    if account["views"] > 1:
        pairs[f"total of {account['views']} views"] = tuple(account["macs_views"].values())
    lines += [f"  {part:<42}{counted / 1e9:>12.2f}{run / 1e9:>12.2f}" for part, (counted, run) in pairs.items()]
    flops = account["flops_step"] / 1e9
    lines += [
        f"training step: {flops:.1f} GFLOP a clip (forward and backward, 2 FLOP per multiply-accumulate)",
        _row(f"AdamW by {account['optimizer']} (MiB)", account["optimizer_bytes"], 2**20, 1),
        f"saved activations of a clip, {account['precision']}, residual stream {account['residual_dtype']}, "
        f"checkpoint {account['activation_checkpoint']}:",
        _row("  of a clip (MiB)", account["activation_bytes"], 2**20, 1),
        _row("  of a block (MiB)", account["activation_bytes_block"], 2**20, 2),
    ]
    return "\n".join(lines)


def _row(title: str, values: dict[str, int], unit: float, digits: int) -> str:
    return f"{title}: " + ", ".join(f"{name} {value / unit:,.{digits}f}" for name, value in values.items())
