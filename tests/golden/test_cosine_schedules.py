"""Learning-rate schedules recorded from the official code."""

from __future__ import annotations

import json

import pytest

from tests.golden.support import golden_root
from vmae2_fast.train.schedule import cosine_schedule, warmup_length

GOLDEN = golden_root()
FILE = GOLDEN / "parity" / "meta" / "cosine_schedules.json"
CASES = json.loads(FILE.read_text())["cases"] if FILE.exists() else []


@pytest.mark.parametrize("case", CASES, ids=lambda c: f"{c['base']}-{c['epochs']}x{c['niter_per_ep']}")
def test_values_equal_the_official_schedule(case):
    total = case["epochs"] * case["niter_per_ep"]
    warmup = warmup_length(case["warmup_epochs"], case["niter_per_ep"], case["warmup_steps"])
    ours = [
        cosine_schedule(
            step, base=case["base"], final=case["final"], total=total, warmup=warmup, start=case["start_warmup_value"]
        )
        for step in range(total)
    ]
    assert len(case["values"]) == total
    # Exact but for the last bit of cos(): numpy and libm may round it differently.
    assert ours == pytest.approx(case["values"], rel=1e-14, abs=0.0)
