"""Probes of the official position tables."""

from __future__ import annotations

import json

import numpy as np
import pytest

from tests.golden.support import golden_root
from vmae2_fast.models.positions import sincos_table

FILE = golden_root() / "parity" / "meta" / "sincos_probes.json"
PROBES = json.loads(FILE.read_text()) if FILE.is_file() else {}


@pytest.mark.parametrize("name", PROBES)
def test_table(name):
    probe = PROBES[name]
    tokens, width = map(int, name.split("x"))
    table = sincos_table(tokens, width)
    assert table.shape == (tokens, width)
    assert table.dtype == np.float32
    assert table[probe["rows"], probe["cols"]].tolist() == probe["values"]
    assert table.sum(dtype=np.float64) == pytest.approx(probe["sum"], rel=1e-9)
    assert np.abs(table).sum(dtype=np.float64) == pytest.approx(probe["abs_sum"], rel=1e-9)
