from __future__ import annotations

import itertools

import pytest

from vmae2_fast.train.schedule import cosine_schedule, warmup_length


def test_peak_twice_and_final_only_past_the_end():
    values = [cosine_schedule(s, base=1.0, final=0.1, total=20, warmup=5) for s in range(21)]
    assert values[0] == 0.0
    assert values[4] == values[5] == 1.0
    assert max(values) == 1.0
    assert all(a > b for a, b in itertools.pairwise(values[5:]))
    assert values[19] > 0.1
    assert values[20] == 0.1


def test_warmup_may_fill_the_run():
    assert [cosine_schedule(s, base=4.0, final=1.0, total=3, warmup=3) for s in range(4)] == [0.0, 2.0, 4.0, 1.0]


def test_bad_lengths_are_errors():
    with pytest.raises(ValueError, match="warm-up of 11 steps does not fit a run of 10"):
        cosine_schedule(0, base=1.0, final=0.0, total=10, warmup=11)
    with pytest.raises(ValueError, match="warmup_steps=10 needs warmup_epochs > 0"):
        warmup_length(0, 100, warmup_steps=10)
    assert warmup_length(1, 100, warmup_steps=10) == 10
    assert warmup_length(0.5, 100) == 50
