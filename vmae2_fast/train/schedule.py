"""Learning rate and weight decay as pure functions of the step: linear warm-up, then half a cosine.

Values equal the official `cosine_scheduler` (VideoMAE V2, utils.py) at every step, with its two habits: the peak
occurs twice (last warm-up step and first cosine step) and the final value is approached but not reached.
"""

from __future__ import annotations

import math


def warmup_length(warmup_epochs: float, steps_per_epoch: float, warmup_steps: int = -1) -> int:
    """Steps of warm-up: `warmup_steps` where positive, else `warmup_epochs` of `steps_per_epoch` steps.

    Raises ValueError for `warmup_steps` > 0 with `warmup_epochs` == 0: the official code reads that as "no warm-up"
    and then fails on the length of its own array.
    """
    if warmup_steps > 0 and warmup_epochs <= 0:
        raise ValueError(f"warmup_steps={warmup_steps} needs warmup_epochs > 0, got {warmup_epochs}; set warmup_epochs=1")
    return warmup_steps if warmup_steps > 0 else round(warmup_epochs * steps_per_epoch)


def cosine_schedule(step: int, *, base: float, final: float, total: int, warmup: int = 0, start: float = 0.0) -> float:
    """Value at `step` (0-based) of `total` steps: `start` to `base` over `warmup` steps, then a cosine towards `final`.

    Any step from `total` on gives `final`, so asking one step past the end is no error.
    Raises ValueError if the warm-up is longer than the run or the step is negative.
    """
    if not 0 <= warmup <= total:
        raise ValueError(f"warm-up of {warmup} steps does not fit a run of {total} steps; lower optim.warmup_epochs")
    if step < 0:
        raise ValueError(f"step must not be negative, got {step}")
    if step < warmup:
        if step == warmup - 1 and warmup > 1:
            return base
        return start + step * ((base - start) / max(1, warmup - 1))
    if step >= total:
        return final
    return final + 0.5 * (base - final) * (1 + math.cos(math.pi * (step - warmup) / (total - warmup)))
