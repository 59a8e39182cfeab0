"""norm_mlp against torch's own modules."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from tests.ops.half_block import (
    BRANCHES,
    EPS,
    INTERPRETED,
    MODES,
    SHAPES,
    assert_op_matches,
    autocast,
    gradients,
    leaves,
    other_backend,
    plain_stream,
    saved_bytes,
    stream,
    weight,
)  # fmt: skip
from tests.support import awkward, cases, compiles, opcheck
from vmae2_fast import backend
from vmae2_fast.ops.mlp import norm_mlp


def _mlp(x, branch, gamma, drop, norm_weight, norm_bias, fc1_weight, fc1_bias, fc2_weight, fc2_bias):
    return norm_mlp(x, branch, gamma, drop, norm_weight, norm_bias, EPS, fc1_weight, fc1_bias, fc2_weight, fc2_bias)


def _plain(x, branch, gamma, drop, norm_weight, norm_bias, fc1_weight, fc1_bias, fc2_weight, fc2_bias):
    x, h = plain_stream(x, branch, gamma, drop, norm_weight, norm_bias)
    return x, F.linear(F.gelu(F.linear(h, fc1_weight, fc1_bias)), fc2_weight, fc2_bias)


def _arguments(shape, kind, mode="float32", hidden=20, biased=True) -> dict[str, Tensor | None]:
    c = shape[2]
    fc1, fc2 = weight(hidden, c, mode), weight(c, hidden, mode)
    return {
        **stream(shape, kind, mode),
        "fc1_weight": fc1,
        "fc1_bias": torch.randn(hidden).to(fc1.dtype) if biased else None,
        "fc2_weight": fc2,
        "fc2_bias": torch.randn(c).to(fc1.dtype) if biased else None,
    }


@pytest.mark.parametrize(("name", "shape"), cases("norm_mlp", SHAPES, INTERPRETED), ids=str)
@pytest.mark.parametrize("kind", BRANCHES)
@pytest.mark.parametrize("mode", MODES)
def test_matches_plain_torch(mode, kind, name, shape):
    with backend.use_backend(f"norm_mlp={name}"):
        assert_op_matches(_mlp, _plain, _arguments(shape, kind, mode, biased=shape[1] != 16), mode)


def test_fp32_reference_equals_torch_modules_to_rounding():
    arguments = _arguments((2, 63, 32), "gamma", hidden=128)
    ours, plain = leaves(arguments), leaves(arguments)
    with backend.use_backend("norm_mlp=reference"):
        a = _mlp(**ours)
    b = _plain(**plain)
    upstream = [torch.randn_like(t) for t in a]
    pairs = [*zip(a, b), *zip(gradients(a, ours, upstream).values(), gradients(b, plain, upstream).values())]
    assert max(float((p - q).detach().norm() / q.detach().norm()) for p, q in pairs) < 3e-7


@pytest.mark.parametrize("layout", ["strided", "transposed", "unaligned"])
def test_memory_layouts(layout):
    arguments = leaves(_arguments((2, 5, 8), "drop"))
    twisted = dict(arguments)
    for name in ("x", "branch", "fc1_weight", "fc2_weight"):
        twisted[name] = dict(awkward(arguments[name].detach()))[layout].requires_grad_()
    names = [n for n, t in arguments.items() if t is not None and t.requires_grad]
    a, b = _mlp(**arguments), _mlp(**twisted)
    first = torch.autograd.grad(a[0].sum() + a[1].sum(), [arguments[n] for n in names])
    second = torch.autograd.grad(b[0].sum() + b[1].sum(), [twisted[n] for n in names])
    for p, q in (*zip(a, b), *zip(first, second)):
        torch.testing.assert_close(p, q)


@pytest.mark.parametrize("used", [0, 1])
def test_one_unused_output(used):
    ours = leaves(_arguments((2, 5, 8), "drop"))
    plain = leaves(ours)
    _mlp(**ours)[used].square().sum().backward()
    _plain(**plain)[used].square().sum().backward()
    torch.testing.assert_close(ours["branch"].grad, plain["branch"].grad)
    torch.testing.assert_close(ours["fc1_weight"].grad, plain["fc1_weight"].grad if used else torch.zeros(20, 8))


def test_flop_count():
    """Equal to plain torch's; frozen weights leave their GEMMs out."""
    counts = []
    for op, frozen in ((_mlp, ()), (_plain, ()), (_mlp, ("fc1_weight",)), (_mlp, ("fc1_weight", "fc2_weight"))):
        arguments = leaves(_arguments((2, 5, 8), "branch"))
        for name in frozen:
            arguments[name].requires_grad_(False)
        with FlopCounterMode(display=False) as counter:
            op(**arguments)[1].sum().backward()
        counts.append(counter.get_total_flops())
    gemm = 2 * 2 * 5 * 8 * 20
    assert counts == [6 * gemm, 6 * gemm, 5 * gemm, 4 * gemm]


@pytest.mark.parametrize("kind", BRANCHES)
def test_saves_only_the_stream_its_statistics_pre_activation_and_parameters(kind):
    b, n, c, hidden = 2, 6, 8, 20
    arguments = leaves(_arguments((b, n, c), kind, "autocast", hidden))
    with autocast("autocast"):
        named, others = saved_bytes(lambda: _mlp(**arguments), arguments)
    expected = {name for name, t in arguments.items() if t is not None} - {"x", "branch"}
    expected |= {"x"} if kind == "none" else set()
    expected |= {"branch"} if "gamma" in kind else set()
    assert named == expected
    assert others == sorted([b * n * 4] * 2 + [b * n * hidden * 2] + ([] if kind == "none" else [b * n * c * 4]))


@pytest.mark.parametrize("kind", ["none", "branch", "gamma+drop"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_opcheck(dtype, kind):
    arguments = leaves(_arguments((2, 5, 8), kind))
    values = list(arguments.values())
    opcheck(torch.ops.vmae2.norm_mlp.default, (*values[:6], EPS, *values[6:], dtype, ""))


@pytest.mark.parametrize("kind", ["none", "branch", "gamma+drop"])
def test_gradcheck(kind):
    arguments = leaves(_arguments((2, 3, 4), kind, hidden=5), torch.float64)
    names = [name for name, t in arguments.items() if t is not None and t.requires_grad]

    def function(*tensors):
        return _mlp(**{**arguments, **dict(zip(names, tensors))})

    assert torch.autograd.gradcheck(function, [arguments[name] for name in names])


@pytest.mark.parametrize("mode", ["float32", "autocast"])
def test_compiles_as_one_graph(mode):
    eager = leaves(_arguments((2, 5, 8), "gamma", mode))
    traced = leaves(eager)

    def function(arguments):
        with torch.autocast("cpu", torch.bfloat16, enabled=mode == "autocast"):
            return _mlp(**arguments)

    results = function(eager), compiles(function, traced)
    for outputs in results:
        (outputs[0].float().square().sum() + outputs[1].float().square().sum()).backward()
    assert all(torch.equal(a, b) for a, b in zip(*results))
    for name, tensor in eager.items():
        if tensor is not None:
            torch.testing.assert_close(traced[name].grad, tensor.grad)


def test_backward_runs_the_forwards_backend(monkeypatch):
    calls = other_backend("norm_mlp", monkeypatch)
    with backend.use_backend("norm_mlp=other"):
        out = _mlp(**leaves(_arguments((2, 5, 8), "branch")))[1]
    out.sum().backward()
    assert calls == ["norm_mlp", "norm_mlp_backward"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(5, 8)}, r"x must be a floating-point \[B, N, C\]"),
        ({"branch": torch.zeros(2, 4, 8)}, r"branch must have x's shape"),
        ({"fc1_weight": torch.zeros(20, 7)}, r"fc1 weight must be \[outputs, 8\], got \(20, 7\)"),
        ({"fc1_bias": torch.zeros(8)}, r"fc1 bias must be \[20\], got \(8,\)"),
        ({"fc2_weight": torch.zeros(8, 21)}, r"fc2 weight must be \[outputs, 20\], got \(8, 21\)"),
    ],
)
def test_bad_input(change, message):
    with pytest.raises(ValueError, match=f"norm_mlp: {message}"):
        _mlp(**{**_arguments((2, 5, 8), "branch"), **change})
