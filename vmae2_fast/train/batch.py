"""The global batch of a step, cut over ranks and micro-batches."""

from __future__ import annotations

from ..config import RunConfig


def batch_unit(config: RunConfig) -> tuple[str, int]:
    """What a micro-batch must be a multiple of: whole decodes with their views, in whole groups that are mixed."""
    mix, views = getattr(config, "mix", None), config.data.views
    return ("mix.clips x data.views", mix.clips * views) if mix is not None and mix.enabled else ("data.views", views)


def split_batch(config: RunConfig, ranks: int) -> tuple[int, int]:
    """(clips of one forward, forwards of one step) on each of `ranks` ranks; while `train.micro_batch` is 0, all at once.

    The global batch belongs to the recipe: where it cannot be cut so, ValueError names the ranks, groups of mixed clips and
    micro-batches that can.
    """
    train = config.train
    name, unit = batch_unit(config)
    if train.global_batch % (ranks * unit):
        raise ValueError(_uncut(config, ranks, name, unit))
    micro = train.micro_batch or train.global_batch // ranks
    if train.global_batch % (ranks * micro):
        raise ValueError(_uncut(config, ranks, "train.micro_batch", micro))
    return micro, train.global_batch // (ranks * micro)


def _uncut(config: RunConfig, ranks: int, name: str, unit: int) -> str:
    batch, views, mix = config.train.global_batch, config.data.views, getattr(config, "mix", None)
    fitting = [n for n in range(1, batch // unit + 1) if batch % (n * unit) == 0]  # 1 at least, which the config checks
    near = [*[n for n in fitting if n < ranks][-1:], *[n for n in fitting if n > ranks][:1]]
    ways = [f"{' or '.join(map(str, near))} ranks (--gpus, --nodes)"]
    step = ranks * unit
    batches = [n for n in (batch // step * step, (batch // step + 1) * step) if n]
    whole = batch // views // ranks if batch % (ranks * views) == 0 else 0
    if name == "train.micro_batch":
        own = batch_unit(config)[1]
        share = batch // ranks
        fits = [m for m in range(own, share + 1, own) if share % m == 0]
        near = [*[m for m in fits if m < unit][-1:], *[m for m in fits if m > unit][:1]]
        ways.append(f"--train.micro-batch {' or '.join(map(str, near))}, or 0 for what fits")
    elif whole and mix is not None:
        groups = [n for n in range(2, whole + 1) if whole % n == 0] or [1]
        ways.append(f"--mix.clips {min(groups, key=lambda n: abs(n - mix.clips))}")
    return (
        f"{config.name}: train.global_batch={batch} is not divisible by ranks x {name}={ranks} x {unit}; take "
        f"{'; or '.join(ways)}; or, where the batch is not a recipe's, train.global_batch {' or '.join(map(str, batches))}"
    )


def micro_batches(config: RunConfig, ranks: int) -> list[int]:
    """Every micro-batch the global batch can be cut into on `ranks` ranks, ascending. Raises ValueError as `split_batch`."""
    share, unit = split_batch(config, ranks)[0], batch_unit(config)[1]
    return [micro for micro in range(unit, share + 1, unit) if share % micro == 0]
