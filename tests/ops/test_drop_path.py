"""kept_samples: the distribution, and what the draws depend on."""

from __future__ import annotations

import pytest
import torch

from vmae2_fast.ops.drop_path import PURPOSE, kept_samples
from vmae2_fast.ops.masks import DECODER, ENCODER, philox_words

PROBABILITIES = [0.0, 0.25, 0.9]


def draw(count: int, seed: int = 0, start: int = 0, view: int = 0) -> list[torch.Tensor]:
    position = torch.arange(start, start + count)
    return kept_samples(position, torch.full_like(position, view), seed=seed, probabilities=PROBABILITIES)


def test_keeps_each_sample_with_its_probability() -> None:
    count = 20000
    for kept, p in zip(draw(count), PROBABILITIES, strict=True):
        deviation = (count * p * (1 - p)) ** 0.5
        assert abs(len(kept) - count * (1 - p)) <= 5 * deviation
    first, second = (torch.zeros(count).index_fill(0, kept, 1.0) for kept in draw(count)[1:])
    assert abs(float(torch.corrcoef(torch.stack((first, second)))[0, 1])) < 5 / count**0.5


def test_is_a_function_of_seed_position_view_and_branch() -> None:
    whole, parts = draw(64), (draw(40), draw(24, start=40))
    for branch in range(3):
        assert whole[branch].tolist() == parts[0][branch].tolist() + (parts[1][branch] + 40).tolist()
    for other in (draw(64, seed=1), draw(64, view=1), draw(64, start=2**33)):
        assert whole[1].tolist() != other[1].tolist()
    assert PURPOSE not in (ENCODER, DECODER)
    words = philox_words(torch.arange(64), torch.zeros(64, dtype=torch.int64), seed=0, purpose=PURPOSE, count=2)
    assert whole[1].tolist() == [i for i, word in enumerate(words[:, 1].tolist()) if word / 2**32 >= 0.25]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"view": torch.zeros(3, dtype=torch.int64)}, "position .* and view .* differ"),
        ({"position": torch.zeros(2, 1, dtype=torch.int64)}, r"position must be int64 \[B\]"),
        ({"position": torch.zeros(2, dtype=torch.int64, device="meta")}, "position is on meta, it must be on the host"),
        ({"seed": -1}, "seed must be in"),
        ({"probabilities": [1.0]}, r"must lie in \[0, 1\), got \[1.0\]"),
    ],
)
def test_bad_input(change, message) -> None:
    arguments = {"position": torch.arange(2), "view": torch.arange(2), "seed": 0, "probabilities": [0.5]}
    with pytest.raises(ValueError, match=message):
        kept_samples(**{**arguments, **change})
