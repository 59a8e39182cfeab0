"""residual_norm and norm_qkv against torch's own modules."""

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
from tests.support import assert_within_budget, awkward, cases, compiles, expanded, opcheck
from vmae2_fast import backend
from vmae2_fast.ops.norm import norm_qkv, residual_norm


def _residual(x, branch, gamma, drop, norm_weight, norm_bias):
    return residual_norm(x, branch, gamma, drop, norm_weight, norm_bias, EPS)


def _qkv(x, branch, gamma, drop, norm_weight, norm_bias, qkv_weight, q_bias=None, v_bias=None):
    return norm_qkv(x, branch, gamma, drop, norm_weight, norm_bias, EPS, qkv_weight, q_bias, v_bias)


def _plain_qkv(x, branch, gamma, drop, norm_weight, norm_bias, qkv_weight, q_bias=None, v_bias=None):
    x, h = plain_stream(x, branch, gamma, drop, norm_weight, norm_bias)
    bias = None if q_bias is None else torch.cat((q_bias, torch.zeros_like(q_bias), v_bias))
    return x, F.linear(h, qkv_weight, bias)


def _qkv_arguments(shape, kind, mode="float32", biased=True) -> dict[str, Tensor | None]:
    c = shape[2]
    arguments = {**stream(shape, kind, mode), "qkv_weight": weight(3 * c, c, mode)}
    if biased:
        arguments |= {
            "q_bias": torch.randn(c).to(arguments["qkv_weight"].dtype),
            "v_bias": torch.randn(c).to(arguments["qkv_weight"].dtype),
        }
    return arguments


@pytest.mark.parametrize(("name", "shape"), cases("residual_norm", SHAPES, INTERPRETED), ids=str)
@pytest.mark.parametrize("kind", BRANCHES)
@pytest.mark.parametrize("mode", MODES)
def test_residual_norm_matches_plain_torch(mode, kind, name, shape):
    with backend.use_backend(f"residual_norm={name}"):
        assert_op_matches(_residual, plain_stream, stream(shape, kind, mode), mode)


@pytest.mark.parametrize(("name", "shape"), cases("norm_qkv", SHAPES, INTERPRETED), ids=str)
@pytest.mark.parametrize("kind", BRANCHES)
@pytest.mark.parametrize("mode", MODES)
def test_norm_qkv_matches_plain_torch(mode, kind, name, shape):
    with backend.use_backend(f"norm_qkv={name}"):
        assert_op_matches(_qkv, _plain_qkv, _qkv_arguments(shape, kind, mode, biased=shape[1] != 16), mode)


KERNELS = [n for n in ("native", "triton") if n in backend.available("residual_norm", "cpu")]


@pytest.mark.parametrize("shape", [(1, 1, 1), (0, 3, 8), (2, 0, 8), (2, 7, 16), (2, 2, 1408)], ids=str)
@pytest.mark.parametrize("name", KERNELS)
def test_kernels_at_the_edges_of_shapes(name, shape, monkeypatch):
    """No rows, one column, more rows than lines of partial sums, a block that is not full."""
    if name == "triton":
        monkeypatch.setattr("vmae2_fast.ops._norm_triton.PARTS", 4)
    _assert_kernel_matches(name, shape, torch.float32)


@pytest.mark.parametrize(("shape", "dtype"), [((3, 700, 5), torch.float32), ((4, 40, 1408), torch.float16)], ids=str)
@pytest.mark.skipif("native" not in KERNELS, reason="no native extension")
def test_native_adds_up_many_rows(shape, dtype):
    """More rows than sixteen for each of 64 lines of sums, and half-precision rows of ViT-g."""
    _assert_kernel_matches("native", shape, dtype)


def _assert_kernel_matches(name, shape, dtype):
    """Outputs and all gradients of a kernel in the budget of the reference in the same dtype."""
    arguments = leaves(stream(shape, "gamma+drop"), dtype)
    if shape[0] > 3:
        arguments["drop"] = torch.tensor([1.25, 0.0, 1.25, 1.25], dtype=dtype)
    same, truth = leaves(arguments), leaves(arguments, torch.float64)
    with backend.use_backend(f"residual_norm={name}"):
        out = _residual(**arguments)
    with backend.use_backend("reference"):
        out_same, out_truth = _residual(**same), _residual(**truth)
    upstream = [torch.randn(shape).to(dtype) for _ in out]
    grads = [list(gradients(o, a, upstream).values())
             for o, a in ((out, arguments), (out_same, same), (out_truth, truth))]  # fmt: skip
    for actual, plain, exact in (*zip(out, out_same, out_truth), *zip(*grads)):
        assert_within_budget(actual, plain, exact)


@pytest.mark.parametrize("frozen", [("norm_weight",), ("norm_bias",), ("gamma",), ("norm_weight", "norm_bias")], ids=str)
@pytest.mark.parametrize("name", KERNELS)
def test_frozen_parameters_change_no_other_gradient(name, frozen):
    arguments = stream((2, 5, 24), "gamma+drop")
    found = []
    for keep in ((), frozen):
        made = leaves(arguments)
        for parameter in keep:
            made[parameter].requires_grad_(False)
        with backend.use_backend(f"residual_norm={name}"):
            out = _residual(**made)
        found.append(gradients(out, made, [torch.linspace(-1, 1, t.numel()).view(t.shape) for t in out]))
    assert set(found[1]) == set(found[0]) - set(frozen)
    for parameter, gradient in found[1].items():
        torch.testing.assert_close(gradient, found[0][parameter], msg=f"{parameter}: {{}}".format)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["reference", *KERNELS])
def test_the_norm_sees_the_stream_as_it_is_stored(name, dtype):
    """And not the sum before it was rounded: a backward that computes the norm again would see another one."""
    x, branch = torch.randn(2, 5, 33).to(dtype), torch.randn(2, 5, 33).to(dtype)
    weight, bias = torch.randn(33), torch.randn(33)
    with backend.use_backend(f"residual_norm={name}"):
        x_new, h = residual_norm(x, branch, None, None, weight, bias, EPS)
        assert torch.equal(h, residual_norm(x_new, None, None, None, weight, bias, EPS)[1])


def test_dtypes_no_kernel_takes_run_on_the_reference():
    """A branch, or the weights behind the norm, may be float64 where the stream is not."""
    x, branch, norm = torch.randn(2, 3, 8), torch.randn(2, 3, 8, dtype=torch.float64), (torch.ones(8), torch.zeros(8))
    h = residual_norm(x, branch, None, None, *norm, EPS)[1]
    torch.testing.assert_close(h, F.layer_norm((x + branch).float(), (8,), *norm, EPS))
    qkv = norm_qkv(x, None, None, None, *norm, EPS, torch.eye(8, dtype=torch.float64).repeat(3, 1), None, None)[1]
    torch.testing.assert_close(qkv[..., :8], F.layer_norm(x, (8,), *norm, EPS).double())
    if "native" in KERNELS:
        with pytest.raises(backend.BackendError, match=r"not torch\.float64"), backend.use_backend("residual_norm=native"):
            residual_norm(x, branch, None, None, *norm, EPS)


@pytest.mark.skipif("native" not in KERNELS, reason="no native extension")
@pytest.mark.parametrize(("place", "name"), [(1, "branch"), (2, "gamma"), (3, "drop"), (4, "norm weight"), (5, "norm bias")])
def test_shapes_are_looked_at_behind_the_public_function_too(place, name):
    arguments = [torch.randn(2, 3, 8), torch.randn(2, 3, 8), torch.ones(8), torch.ones(2), torch.ones(8), torch.zeros(8)]
    arguments[place] = arguments[place][:1]
    with pytest.raises(ValueError, match=rf"residual_norm: {name} must be \["):
        torch.ops.vmae2.residual_norm(*arguments, EPS, torch.float32, "native")


@pytest.mark.parametrize("name", KERNELS)
def test_kernels_take_expanded_gradients_and_strided_streams(name):
    arguments = leaves(stream((2, 5, 8), "gamma"))
    twisted = {**arguments, "x": dict(awkward(arguments["x"].detach()))["strided"].requires_grad_()}
    results = []
    for which, chosen in (("reference", arguments), (name, twisted)):
        with backend.use_backend(f"residual_norm={which}"):
            x_new, h = _residual(**chosen)
        results.append(torch.autograd.grad(x_new.sum() + h.sum(), [t for t in chosen.values() if t is not None]))
    for ours, expected in zip(*results):
        torch.testing.assert_close(ours, expected)


@pytest.mark.parametrize("name", KERNELS)
def test_kernels_leave_float64_to_the_reference(name):
    with pytest.raises(backend.BackendError, match="float64"), backend.use_backend(f"residual_norm={name}"):
        _residual(**leaves(stream((2, 3, 8), "none"), torch.float64))


def test_fp32_reference_equals_torch_modules_to_rounding():
    """Where a step differs from torch's modules at all, it is by the order of one sum."""
    arguments = _qkv_arguments((2, 63, 32), "gamma")
    ours, plain = leaves(arguments), leaves(arguments)
    with backend.use_backend("norm_qkv=reference"):
        a = _qkv(**ours)
    b = _plain_qkv(**plain)
    upstream = [torch.randn_like(t) for t in a]
    pairs = [*zip(a, b), *zip(gradients(a, ours, upstream).values(), gradients(b, plain, upstream).values())]
    assert max(float((p - q).detach().norm() / q.detach().norm()) for p, q in pairs) < 3e-7


@pytest.mark.parametrize(
    ("mode", "stream_dtype", "result_dtype"),
    [
        ("float32", torch.float32, torch.float32),
        ("bfloat16", torch.bfloat16, torch.bfloat16),
        ("autocast", torch.float32, torch.bfloat16),
        ("autocast-bf16-stream", torch.bfloat16, torch.bfloat16),
    ],
)
def test_dtypes(mode, stream_dtype, result_dtype):
    with autocast(mode):
        for x_new, result in (
            _residual(**stream((2, 3, 8), "branch", mode)),
            _qkv(**_qkv_arguments((2, 3, 8), "branch", mode)),
        ):
            assert (x_new.dtype, result.dtype) == (stream_dtype, result_dtype)


def test_bf16_stream_without_autocast_computes_in_the_weights_dtype():
    arguments = _qkv_arguments((2, 3, 8), "none", "autocast-bf16-stream")
    assert _qkv(**arguments)[1].dtype == torch.float32
    assert (
        residual_norm(arguments["x"], None, None, None, arguments["norm_weight"], arguments["norm_bias"], EPS)[1].dtype
        == torch.bfloat16
    )


def test_fp64_is_not_touched_by_autocast():
    with autocast("autocast"):
        assert _qkv(**leaves(_qkv_arguments((2, 3, 8), "gamma"), torch.float64))[1].dtype == torch.float64


def test_autocast_does_not_reach_into_the_op():
    """A backward pass under autocast computes in the dtype its forward chose."""
    results = []
    for cast in (False, True):
        torch.manual_seed(0)
        arguments = leaves(_qkv_arguments((2, 5, 8), "gamma"))
        qkv = _qkv(**arguments)[1]
        with torch.autocast("cpu", torch.bfloat16, enabled=cast):
            qkv.backward(torch.ones_like(qkv))
        results.append(arguments["qkv_weight"].grad)
    assert torch.equal(*results)


def test_without_a_branch_the_stream_is_the_input_itself():
    arguments = stream((2, 3, 8), "none")
    assert _residual(**arguments)[0] is arguments["x"]


@pytest.mark.parametrize("layout", ["strided", "transposed", "unaligned", "expanded"])
def test_memory_layouts(layout):
    arguments = leaves(_qkv_arguments((2, 5, 8), "gamma+drop"))
    twisted = dict(arguments)
    for name in ("x", "branch", "qkv_weight"):
        source = arguments[name].detach()
        if layout == "expanded":
            arguments[name] = expanded(source).contiguous().requires_grad_()
            twisted[name] = expanded(source).requires_grad_()
        else:
            twisted[name] = dict(awkward(source))[layout].requires_grad_()
    a, b = _qkv(**arguments), _qkv(**twisted)
    # .sum() hands back a gradient of stride 0
    first = torch.autograd.grad(a[0].sum() + a[1].sum(), [arguments[n] for n in ("x", "branch", "qkv_weight", "gamma")])
    second = torch.autograd.grad(b[0].sum() + b[1].sum(), [twisted[n] for n in ("x", "branch", "qkv_weight", "gamma")])
    for p, q in (*zip(a, b), *zip(first, second)):
        torch.testing.assert_close(p, q)


@pytest.mark.parametrize("used", [0, 1])
def test_one_unused_output(used):
    arguments = leaves(_qkv_arguments((2, 5, 8), "gamma"))
    plain = leaves(arguments)
    _qkv(**arguments)[used].square().sum().backward()
    _plain_qkv(**plain)[used].square().sum().backward()
    torch.testing.assert_close(arguments["branch"].grad, plain["branch"].grad)
    torch.testing.assert_close(arguments["x"].grad, plain["x"].grad)
    expected = plain["norm_weight"].grad if used else torch.zeros(8)
    torch.testing.assert_close(arguments["norm_weight"].grad, expected)


def test_frozen_parameters_get_no_gradient_and_cost_no_gemm():
    arguments = leaves(_qkv_arguments((2, 5, 8), "branch"))
    for name in ("norm_weight", "norm_bias", "qkv_weight", "q_bias", "v_bias"):
        arguments[name].requires_grad_(False)
    with FlopCounterMode(display=False) as frozen:
        _qkv(**arguments)[1].sum().backward()
    assert arguments["x"].grad is not None
    assert arguments["qkv_weight"].grad is None
    assert frozen.get_total_flops() == 2 * (2 * 2 * 5 * 8 * 24)  # forward and the gradient of the rows


def test_flop_count_equals_plain_torch():
    arguments, plain = leaves(_qkv_arguments((2, 5, 8), "branch")), leaves(_qkv_arguments((2, 5, 8), "branch"))
    with FlopCounterMode(display=False) as ours:
        _qkv(**arguments)[1].sum().backward()
    with FlopCounterMode(display=False) as torchs:
        _plain_qkv(**plain)[1].sum().backward()
    assert ours.get_total_flops() == torchs.get_total_flops() == 3 * (2 * 2 * 5 * 8 * 24)


@pytest.mark.parametrize("kind", BRANCHES)
def test_saves_only_the_stream_its_statistics_and_parameters(kind):
    b, n, c = 2, 6, 8
    arguments = leaves(_qkv_arguments((b, n, c), kind, "autocast"))
    with autocast("autocast"):
        for op, names in ((_residual, list(arguments)[:6]), (_qkv, list(arguments))):
            chosen = {name: arguments[name] for name in names}
            named, others = saved_bytes(lambda op=op, chosen=chosen: op(**chosen), chosen)
            expected = {name for name in names if arguments[name] is not None} - {"x", "branch"}
            if kind == "none":
                expected.add("x")
            if "gamma" in kind:
                expected.add("branch")
            assert named == expected
            statistics = [b * n * 4] * 2
            assert others == statistics + ([] if kind == "none" else [b * n * c * 4])


@pytest.mark.parametrize("kind", ["none", "branch", "gamma+drop"])
def test_opcheck(kind):
    arguments = leaves(_qkv_arguments((2, 5, 8), kind))
    s = [arguments[name] for name in ("x", "branch", "gamma", "drop", "norm_weight", "norm_bias")]
    opcheck(torch.ops.vmae2.residual_norm.default, (*s, EPS, torch.float32, ""))
    opcheck(torch.ops.vmae2.residual_norm.default, (*s, EPS, torch.bfloat16, ""))
    opcheck(
        torch.ops.vmae2.norm_qkv.default,
        (*s, EPS, arguments["qkv_weight"], arguments["q_bias"], arguments["v_bias"], torch.float32, ""),
    )
    opcheck(torch.ops.vmae2.norm_qkv.default, (*s, EPS, arguments["qkv_weight"], None, None, torch.bfloat16, ""))


@pytest.mark.parametrize("kind", ["none", "branch", "gamma", "gamma+drop"])
def test_gradcheck(kind):
    arguments = leaves(_qkv_arguments((2, 3, 4), kind), torch.float64)
    names = [name for name, t in arguments.items() if t is not None and t.requires_grad]

    def function(*tensors):
        return _qkv(**{**arguments, **dict(zip(names, tensors))})

    assert torch.autograd.gradcheck(function, [arguments[name] for name in names])


@pytest.mark.parametrize("mode", ["float32", "autocast"])
@pytest.mark.parametrize("kind", ["none", "gamma"])
def test_compiles_as_one_graph(kind, mode):
    eager = leaves(_qkv_arguments((2, 5, 8), kind, mode))
    traced = leaves(eager)

    def function(arguments):
        with torch.autocast("cpu", torch.bfloat16, enabled=mode == "autocast"):
            x, qkv = _qkv(**arguments)
            return _residual(x, qkv[..., :8], arguments["gamma"], None, arguments["norm_weight"], arguments["norm_bias"])[
                1
            ], qkv

    for arguments, outputs in ((eager, function(eager)), (traced, compiles(function, traced))):
        (outputs[0].float().square().sum() + outputs[1].float().sum()).backward()
        arguments["outputs"] = outputs
    assert all(torch.equal(a, b) for a, b in zip(eager.pop("outputs"), traced.pop("outputs")))
    for name, tensor in eager.items():
        if tensor is not None:
            torch.testing.assert_close(traced[name].grad, tensor.grad)


@pytest.mark.parametrize("op", ["residual_norm", "norm_qkv"])
def test_backward_runs_the_forwards_backend(op, monkeypatch):
    calls = other_backend(op, monkeypatch)
    arguments = leaves(_qkv_arguments((2, 5, 8), "branch"))
    with backend.use_backend(f"{op}=other"):
        result = (_qkv(**arguments) if op == "norm_qkv" else _residual(*list(arguments.values())[:6]))[1]
    result.sum().backward()
    assert calls == [op, f"{op}_backward"]


def test_unknown_backend():
    with pytest.raises(backend.BackendError, match="norm_qkv has no backend 'sdpa'"), backend.use_backend("norm_qkv=sdpa"):
        pass


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(5, 8)}, r"x must be a floating-point \[B, N, C\].*\(5, 8\)"),
        ({"x": torch.zeros(2, 5, 8, dtype=torch.long)}, "x must be a floating-point"),
        ({"norm_weight": torch.zeros(7)}, r"norm weight must be \[C\] = \[8\], got \(7,\)"),
        ({"gamma": torch.zeros(7)}, r"gamma must be \[C\] = \[8\]"),
        ({"branch": torch.zeros(2, 4, 8)}, r"branch must have x's shape \(2, 5, 8\), got \(2, 4, 8\)"),
        ({"branch": None}, "gamma and drop scale a branch"),
        ({"drop": torch.ones(3)}, r"drop must be \[B\] = \[2\], got \(3,\)"),
        ({"qkv_weight": torch.zeros(16, 8)}, r"qkv weight must be \[24, 8\], got \(16, 8\)"),
        ({"v_bias": None}, "both q_bias and v_bias"),
        ({"q_bias": torch.zeros(24)}, r"q_bias must be \[C\] = \[8\], got \(24,\)"),
    ],
)
def test_bad_input(change, message):
    with pytest.raises(ValueError, match=f"norm_qkv: .*{message}"):
        _qkv(**{**_qkv_arguments((2, 5, 8), "gamma+drop"), **change})
