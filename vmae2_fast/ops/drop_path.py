"""Which samples run a residual branch when dropped ones are skipped instead of multiplied by 0 (stochastic depth).

A branch of drop probability p keeps a sample when its Philox word is at least p * 2^32: an exact Bernoulli draw for each
sample and branch, independent of all others. Drawn on the host, where the shapes of what follows are needed: nothing is read
back from a GPU. Key and counter are those of `ops.masks`, purpose 3; word k belongs to branch k.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ._register import check
from .masks import philox_words

PURPOSE = 3  # ops.masks has 1 and 2


def kept_samples(position: Tensor, view: Tensor, *, seed: int, probabilities: Sequence[float]) -> list[Tensor]:
    """For each branch the samples that run it: ascending int64 indices into the batch, on the host.

    Args:
        position, view: int64 [B] on the CPU: the global consumed position and the view of each clip.
        seed: in [0, 2**63).
        probabilities: of dropping, in [0, 1), one for each branch.

    The draws are a pure function of (seed, position, view, branch), whatever the batch split.
    Raises ValueError on tensors that are elsewhere or of another shape, and on probabilities outside [0, 1).
    """
    for name, tensor in (("position", position), ("view", view)):
        check(tensor.device.type == "cpu", f"kept_samples: {name} is on {tensor.device}, it must be on the host: no sync here")
        check(tensor.ndim == 1, f"kept_samples: {name} must be int64 [B], got {tuple(tensor.shape)}")
    check(position.shape == view.shape, f"kept_samples: position {tuple(position.shape)} and view {tuple(view.shape)} differ")
    check(0 <= seed < 2**63, f"kept_samples: seed must be in [0, 2**63), got {seed}")
    check(all(0 <= p < 1 for p in probabilities), f"kept_samples: probabilities must lie in [0, 1), got {list(probabilities)}")
    words = philox_words(position.long(), view.long(), seed=seed, purpose=PURPOSE, count=len(probabilities))
    return [(words[:, k] >= round(p * 2**32)).nonzero()[:, 0] for k, p in enumerate(probabilities)]
