"""`vmae2 ledger`: what a model or a recipe costs, before anything runs."""

from __future__ import annotations

from typing import Any, Literal

import tyro

from ..config import MaskConfig, ModelConfig, Progression
from .parsing import parse

_DUAL = MaskConfig()


def ledger(
    model: tyro.conf.Positional[str],
    *,
    frames: int = 16,
    size: int = 224,
    num_classes: int = 0,
    views: int = 1,
    precision: Literal["float32", "bfloat16", "float16"] = "bfloat16",
    residual_dtype: Literal["float32", "bfloat16"] = "float32",
    activation_checkpoint: Literal["none", "mlp", "block"] = "none",
    layer_scale: float = 0.0,
    drop_path: float = 0.0,
    decoder_fp32: bool = False,
    optimizer: Literal["auto", "vmae2", "torch", "apex", "torchao8bit"] = "torch",
    mask: MaskConfig = _DUAL,
) -> dict[str, Any]:
    """Print a model's parameters, tokens, multiply-accumulates and bytes before anything runs.

    Example: vmae2 ledger pretrain_videomae_giant_patch14_224
    Example: vmae2 ledger vit_giant_patch14_224 --num-classes 710 --residual-dtype bfloat16
    Example: vmae2 ledger pretrain:vit_giant_hybrid --card a100-80 --gpus 8 --nodes 8 --train.micro-batch 32

    With a recipe: its bytes on every GPU, step time, days, decoding and network for `--card` (rtx4090, a100-40, a100-80,
    h100, h200, or 24gb, 40gb, 80gb; `--fit` sizes the recipe for it), `--gpus` of a node, `--nodes`, `--mfu` (share of the
    card's peak, 0.4) and `--clips` (of an epoch, where the sources have no published number); the recipe's values are flags
    as in `launch` (`vmae2 ledger RECIPE --help`).

    Args:
        model: official name, or a recipe.
        frames: frames of a clip.
        size: height and width in pixels.
        num_classes: classes of the head.
        views: clips of one multi-view test.
        precision: autocast dtype of a step.
        residual_dtype: of the residual stream.
        activation_checkpoint: what is recomputed in the backward.
        layer_scale: initial value of the branch scales; above 0 a block keeps its branches.
        drop_path: of the last block.
        decoder_fp32: the decoder outside autocast.
        optimizer: who computes AdamW, `optim.implementation` of a recipe.
        mask: dual masking of pre-training models.
    """
    from ..train.ledger import ledger as account
    from ..train.ledger import table

    config = ModelConfig(
        name=model, frames=frames, size=size, num_classes=num_classes, residual_dtype=residual_dtype,
        activation_checkpoint=activation_checkpoint, layer_scale=layer_scale, drop_path=drop_path,
        decoder_fp32=decoder_fp32,
    )  # fmt: skip
    result = account(config, mask, precision=precision, views=views, implementation=optimizer)
    print(table(result))
    return result


def recipe_ledger(arguments: list[str]) -> dict[str, Any]:
    """`vmae2 ledger RECIPE [flags]`."""
    from .. import recipes_index
    from ..train.budget import BudgetOptions, budget, lines
    from ..train.plan import fitted
    from ..train.progression import check_stage

    run, options = recipes_index.with_options(arguments, BudgetOptions, "vmae2 ledger", parse)
    stages = run.stages if isinstance(run, Progression) else (run,)
    for stage in stages:
        check_stage(stage)
    if options.fit:
        stages = tuple(fitted(stage, options.card, gpus=options.gpus, nodes=options.nodes) for stage in stages)
    results = [budget(stage, options) for stage in stages]  # all of them, before the first is shown
    for stage, result in zip(stages, results, strict=True):
        print("\n".join(lines(stage, result)))
    return {"stages": results}


def names_a_recipe(arguments: list[str]) -> bool:
    from .. import recipes_index

    first = arguments[0] if arguments else ""
    return ":" in first or any(name.partition(":")[2] == first for name in recipes_index.all_recipes())
