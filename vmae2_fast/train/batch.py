"""The global batch of a step, cut over ranks and micro-batches."""

from __future__ import annotations

from ..config import RunConfig, divisible


def batch_unit(config: RunConfig) -> tuple[str, int]:
    """What a micro-batch must be a multiple of: whole decodes with their views, in whole groups that are mixed."""
    mix, views = getattr(config, "mix", None), config.data.views
    return ("mix.clips x data.views", mix.clips * views) if mix is not None and mix.enabled else ("data.views", views)


def split_batch(config: RunConfig, ranks: int) -> tuple[int, int]:
    """(clips of one forward, forwards of one step) on each of `ranks` ranks; while `train.micro_batch` is 0, all at once.

    Raises ValueError with the nearest valid values if the global batch cannot be cut so.
    """
    train = config.train
    name, unit = batch_unit(config)
    divisible("train.global_batch", train.global_batch, f"ranks x {name}", ranks * unit)
    micro = train.micro_batch or train.global_batch // ranks
    divisible("train.global_batch", train.global_batch, "ranks x train.micro_batch", ranks * micro)
    return micro, train.global_batch // (ranks * micro)


def micro_batches(config: RunConfig, ranks: int) -> list[int]:
    """Every micro-batch the global batch can be cut into on `ranks` ranks, ascending. Raises ValueError as `split_batch`."""
    share, unit = split_batch(config, ranks)[0], batch_unit(config)[1]
    return [micro for micro in range(unit, share + 1, unit) if share % micro == 0]
