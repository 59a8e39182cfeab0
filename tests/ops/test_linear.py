"""linear against torch's own, in value, gradients and what is kept."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from tests.ops.half_block import assert_op_matches, autocast, leaves, saved_bytes, weight
from tests.support import compiles, expanded, opcheck
from vmae2_fast.ops.linear import linear


def _arguments(shape=(2, 5, 7), outputs=6, biased=True):
    return {"x": torch.randn(shape), "weight": weight(outputs, shape[-1]), "bias": torch.randn(outputs) if biased else None}


@pytest.mark.parametrize("shape", [(7,), (3, 7), (2, 5, 7), (2, 0, 7), (2, 3, 1, 1)], ids=str)
@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("mode", ["float32", "autocast"])
def test_matches_plain_torch(mode, biased, shape):
    arguments = _arguments(shape, biased=biased)
    assert_op_matches(lambda **a: (linear(**a),), lambda **a: (F.linear(**a),), arguments, mode)


def test_keeps_input_and_parameter_but_no_cast_copy():
    arguments = leaves(_arguments())
    x = arguments["x"].detach().to(torch.bfloat16).requires_grad_()
    with autocast("autocast"):
        named, others = saved_bytes(lambda: linear(x, arguments["weight"], arguments["bias"]), {**arguments, "x": x})
    assert named == {"x", "weight", "bias"}
    assert others == []


def test_opcheck_and_gradcheck():
    arguments = leaves(_arguments(), torch.float64)
    opcheck(torch.ops.vmae2.linear.default, (*leaves(_arguments()).values(), torch.bfloat16))
    opcheck(torch.ops.vmae2.linear.default, (*list(leaves(_arguments()).values())[:2], None, torch.float32))
    assert torch.autograd.gradcheck(linear, tuple(arguments.values()))


def test_compiles_and_takes_expanded_gradients():
    arguments = leaves(_arguments())
    x, w, b = arguments.values()
    upstream = expanded(torch.randn(2, 5, 6))
    for run in (linear, lambda *a: compiles(linear, *a)):
        ours = torch.autograd.grad(run(x, w, b), (x, w, b), upstream)
        for a, e in zip(ours, torch.autograd.grad(F.linear(x, w, b), (x, w, b), upstream)):
            torch.testing.assert_close(a, e)


def test_frozen_weight_costs_no_product():
    x, w, b = leaves(_arguments()).values()
    with FlopCounterMode(display=False) as counter:
        linear(x, w.detach(), b).sum().backward()
    assert counter.get_total_flops() == 2 * (2 * 10 * 7 * 6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(2, 7, dtype=torch.long)}, "x must be floating-point"),
        ({"weight": torch.zeros(6, 8)}, r"weight must be \[outputs, 7\], got \(6, 8\)"),
        ({"bias": torch.zeros(5)}, r"bias must be \[6\], got \(5,\)"),
    ],
)
def test_bad_input(change, message):
    with pytest.raises(ValueError, match=f"linear: .*{message}"):
        linear(**{**_arguments(), **change})
