"""attention and cosine_attention against their definitions."""

from __future__ import annotations

import dataclasses
import sys
from typing import Any

import pytest
import torch
import torch._dynamo.testing
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from tests.ops.half_block import saved_bytes
from tests.support import assert_within_budget, awkward, backends, compiles, error, expanded, opcheck
from vmae2_fast import backend
from vmae2_fast.ops import _attention_backends as choice
from vmae2_fast.ops.attention import attention, cosine_attention

module = sys.modules["vmae2_fast.ops.attention"]  # the package's attribute of this name is the function
CPU = torch.device("cpu")

# Batch, tokens, heads, head dim. Triton's blocks hold 32 and 64 rows; its interpreter takes a second for each such head.
SHAPES = [(2, 1, 2, 8), (1, 63, 1, 80), (1, 70, 1, 88), (1, 33, 1, 96), (1, 17, 1, 64), (1, 40, 2, 4), (1, 65, 1, 128)]
BACKENDS = backends("attention")


def _runs(*head_dims: int, dtype: torch.dtype = torch.float32) -> list[str]:
    """The implementations that take these inputs."""
    cpu = torch.device("cpu")
    return [name for name in BACKENDS if all(name in backend.available("attention", cpu, dtype, d) for d in head_dims)]


def _plain(qkv: Tensor, scale: float | None = None, window: int | None = None) -> Tensor:
    """The official module: scaled queries, materialised scores, softmax."""
    q, k, v = qkv.permute(2, 0, 3, 1, 4)
    scores = (q * (q.shape[-1] ** -0.5 if scale is None else scale)) @ k.transpose(-2, -1)
    if window is not None:
        token = torch.arange(qkv.shape[1])
        scores = scores.masked_fill((token[:, None] - token).abs() > window, -torch.inf)
    return (scores.softmax(-1) @ v).transpose(1, 2)


def _plain_sdpa(qkv: Tensor, scale: float | None = None, window: int | None = None) -> Tensor:
    mask = None
    if window is not None:
        token = torch.arange(qkv.shape[1])
        mask = (token[:, None] - token).abs() <= window
    return F.scaled_dot_product_attention(*qkv.permute(2, 0, 3, 1, 4), attn_mask=mask, scale=scale).transpose(1, 2)


def _same_in_plain_torch(name: str, *args: Any, **keywords: Any) -> Tensor:
    """ATen's own kernel cannot be held to the error of another algorithm: its plain torch is ATen's public function."""
    return (_plain_sdpa if name == "sdpa" else _plain)(*args, **keywords)


def _plain_cosine(qkv: Tensor, log_scale: Tensor) -> Tensor:
    q, k, v = qkv.permute(2, 0, 3, 1, 4)
    scores = F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).transpose(-2, -1)
    scores = scores * torch.clamp(log_scale, max=4.6052).exp()
    return (scores.softmax(-1) @ v).transpose(1, 2)


def _qkv(b, n, h, d, dtype=torch.float32) -> Tensor:
    return torch.randn(b, n, 3, h, d).to(dtype)


@pytest.mark.parametrize("mode", ["float32", "bfloat16", "float16", "autocast"])
@pytest.mark.parametrize(("name", "shape"), [(name, shape) for shape in SHAPES for name in _runs(shape[3])], ids=str)
def test_matches_plain_torch(name, mode, shape):
    dtype = torch.float32 if mode == "autocast" else getattr(torch, mode)
    ours = _qkv(*shape, dtype=dtype).requires_grad_()
    same, truth = ours.detach().clone().requires_grad_(), ours.detach().double().requires_grad_()
    with backend.use_backend(f"attention={name}"), torch.autocast("cpu", torch.bfloat16, enabled=mode == "autocast"):
        a, b, t = attention(ours), _same_in_plain_torch(name, same), _plain(truth)
    assert a.is_contiguous()
    assert a.dtype == (torch.bfloat16 if mode == "autocast" else dtype)
    upstream = torch.randn(t.shape).to(torch.bfloat16)
    for out in (a, b, t):
        out.backward(upstream.to(out.dtype))
    assert_within_budget(a, b.to(a.dtype), t, "out")
    # The softmax of a single score has no error in plain torch; a flash backward computes the score again, in another order.
    if not (name == "triton" and mode == "float32" and shape[1] == 1):
        assert_within_budget(ours.grad, same.grad, truth.grad, "dqkv")
    if mode == "float32":  # the gate of the recorded official results
        for actual, expected in ((a, t), (ours.grad, truth.grad)):
            assert float((actual - expected).detach().norm() / expected.detach().norm()) < 1e-6


@pytest.mark.parametrize(
    ("name", "n", "d"),
    [(name, n, d) for n, d in ((208, 88), (1232, 64), (2048, 88)) for name in _runs(d) if name != "triton" or n == 208],
    ids=str,
)
def test_lengths_of_real_models(name, n, d):
    ours = _qkv(1, n, 1, d).requires_grad_()
    same, truth = ours.detach().clone().requires_grad_(), ours.detach().double().requires_grad_()
    with backend.use_backend(f"attention={name}"):
        a = attention(ours)
    b, t = _same_in_plain_torch(name, same), _plain(truth)
    upstream = torch.randn(t.shape)
    for out in (a, b, t):
        out.backward(upstream.to(out.dtype))
    assert_within_budget(a, b, t, "out")
    assert_within_budget(ours.grad, same.grad, truth.grad, "dqkv")


@pytest.mark.parametrize(
    ("dtype", "name"),
    [(kind, name) for kind in (torch.float32, torch.bfloat16, torch.float64) for name in _runs(16, dtype=kind)],
    ids=str,
)
def test_log_sum_exp_is_natural_and_in_fp32_at_least(name, dtype):
    qkv = _qkv(2, 65, 3, 16, dtype)
    with backend.use_backend(f"attention={name}"):
        _, lse = torch.ops.vmae2.attention(qkv, 0.3, None, None, "", "")
    q, k, _ = qkv.double().permute(2, 0, 3, 1, 4)
    assert lse.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert lse.shape == (2, 3, 65)
    assert lse.is_contiguous()
    torch.testing.assert_close(lse.double(), torch.logsumexp(0.3 * q @ k.mT, -1), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", BACKENDS)
def test_large_scores(name):
    """No overflow; and gradients as exact as plain torch's, or as rounded scores let them be.

    A flash backward computes the scores again and subtracts a log-sum-exp that was rounded. Where it adds in another order,
    as Triton's interpreter does (its products are BLAS calls of other shapes), a score of size s differs by eps * s, and so
    does, relatively, a probability.
    """
    qkv = (40 * _qkv(1, 9, 1, 16)).requires_grad_()
    same, truth = qkv.detach().clone().requires_grad_(), qkv.detach().double().requires_grad_()
    with backend.use_backend(f"attention={name}"):
        out = attention(qkv)
    reference, exact = _same_in_plain_torch(name, same), _plain(truth)
    upstream = torch.randn(out.shape)
    for result in (out, reference, exact):
        result.backward(upstream.to(result.dtype))
    assert_within_budget(out, reference, exact)
    if name != "triton":
        assert_within_budget(qkv.grad, same.grad, truth.grad, "dqkv")
    q, k, _ = qkv.detach().double().permute(2, 0, 3, 1, 4)
    largest = float((q @ k.mT).abs().max()) / 4
    allowed = 2 * torch.finfo(torch.float32).eps * largest * float(truth.grad.abs().max())
    assert error(qkv.grad, truth.grad) <= allowed


@pytest.mark.parametrize("layout", ["strided", "transposed", "unaligned", "expanded"])
@pytest.mark.parametrize("name", BACKENDS)
def test_memory_layouts(name, layout):
    straight = _qkv(2, 7, 2, 8)
    if layout == "expanded":
        twisted, straight = expanded(straight), expanded(straight).contiguous()
    else:
        twisted = dict(awkward(straight))[layout]
    results = []
    with backend.use_backend(f"attention={name}"):
        for qkv in (straight, twisted):
            qkv = qkv.detach().requires_grad_()
            out = attention(qkv)
            results.append((out, *torch.autograd.grad(out.sum(), qkv, retain_graph=True)))  # gradient of stride 0
            results[-1] += torch.autograd.grad(
                out, qkv, dict(awkward(torch.linspace(-1, 1, 224).view(2, 7, 2, 8)))["transposed"]
            )
    for a, b in zip(*results):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_opcheck(dtype, name):
    with backend.use_backend(f"attention={name}"):
        opcheck(torch.ops.vmae2.attention.default, (_qkv(2, 5, 2, 8, dtype).requires_grad_(), 0.4, None, None, "", ""))
        lengths = torch.tensor([3, 5], dtype=torch.int32)
        opcheck(torch.ops.vmae2.attention.default, (_qkv(2, 5, 2, 8, dtype).requires_grad_(), 0.4, 1, lengths, "", ""))


@pytest.mark.parametrize("window", [None, 1])
@pytest.mark.parametrize("name", _runs(4, dtype=torch.float64))
def test_gradcheck(name, window):
    qkv = _qkv(1, 5, 2, 4, torch.float64).requires_grad_()
    with backend.use_backend(f"attention={name}"):
        assert torch.autograd.gradcheck(lambda qkv: attention(qkv, window=window), [qkv])


@pytest.mark.parametrize(
    ("n", "scale", "window", "mode"),
    [
        (40, -0.4, None, "float32"), (40, 0.0, None, "float32"), (40, 0.7, None, "float32"),
        (1, None, 5, "float32"), (70, None, 10, "float32"), (70, None, 40, "float32"), (70, -1.0, 200, "float32"),
        (130, None, 10, "bfloat16"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("name", BACKENDS)
def test_any_scale_and_window(name, n, scale, window, mode):
    ours = _qkv(1, n, 1, 16, getattr(torch, mode)).requires_grad_()
    same, truth = ours.detach().clone().requires_grad_(), ours.detach().double().requires_grad_()
    with backend.use_backend(f"attention={name}"):
        a = attention(ours, scale, window)
    b, t = _same_in_plain_torch(name, same, scale, window), _plain(truth, scale, window)
    upstream = torch.randn(t.shape).to(torch.bfloat16)
    for out in (a, b, t):
        out.backward(upstream.to(out.dtype))
    assert_within_budget(a, b, t, "out")
    assert_within_budget(ours.grad, same.grad, truth.grad, "dqkv")


@pytest.mark.parametrize("name", BACKENDS)
def test_window_of_nothing_but_the_token_returns_its_value(name):
    qkv = _qkv(1, 70, 1, 16)
    with backend.use_backend(f"attention={name}"):
        assert torch.equal(attention(qkv, window=0), qkv[:, :, 2])


@pytest.mark.skipif("triton" not in BACKENDS, reason="no interpreter of Triton")
def test_triton_never_reads_blocks_outside_of_the_window():
    """Where a block is read, not a number times a probability of 0 shows."""
    qkv = _qkv(1, 200, 1, 16)
    qkv[:, 128:] = torch.nan  # whole blocks; no token below 64 - window may see them
    qkv.requires_grad_()
    with backend.use_backend("attention=triton"):
        out = attention(qkv, window=5)
    (grad,) = torch.autograd.grad(out[:, :64].sum(), qkv)
    assert out[:, :64].isfinite().all()
    assert grad[:, :59].isfinite().all()


@pytest.mark.skipif("triton" not in BACKENDS, reason="no interpreter of Triton")
def test_triton_backward_is_deterministic_over_batch_splits():
    qkv, grad = _qkv(2, 40, 1, 16, torch.bfloat16), torch.randn(2, 40, 1, 16).bfloat16()
    with backend.use_backend("attention=triton"):
        whole = torch.autograd.grad(attention(whole_input := qkv.clone().requires_grad_()), whole_input, grad)[0]
        for b in range(2):
            part = qkv[b : b + 1].clone().requires_grad_()
            assert torch.equal(torch.autograd.grad(attention(part), part, grad[b : b + 1])[0], whole[b : b + 1])


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("cast", [False, True], ids=["float32", "autocast"])
def test_compiles_as_one_graph(cast, name):
    log_scale = torch.randn(2, 1, 1)

    def function(qkv):
        with torch.autocast("cpu", torch.bfloat16, enabled=cast):
            return attention(qkv), cosine_attention(qkv, log_scale)

    eager = _qkv(2, 5, 2, 8).requires_grad_()
    traced = eager.detach().clone().requires_grad_()
    with backend.use_backend(f"attention={name}"):
        results = function(eager), compiles(function, traced)
        for outputs in results:
            sum(o.float().square().sum() for o in outputs).backward()
    assert all(torch.equal(a, b) for a, b in zip(*results))
    torch.testing.assert_close(traced.grad, eager.grad)


@pytest.mark.parametrize("name", BACKENDS)
def test_saves_qkv_out_and_log_sum_exp(name):
    b, n, h, d = 2, 6, 3, 8
    qkv = _qkv(b, n, h, d, torch.bfloat16).requires_grad_()
    with backend.use_backend(f"attention={name}"):
        named, others = saved_bytes(lambda: attention(qkv), {"qkv": qkv})
    assert named == {"qkv"}
    assert others == sorted([b * n * h * d * 2, b * h * n * 4])


def test_flop_count():
    qkv = _qkv(2, 6, 3, 8).requires_grad_()
    gemm = 2 * 2 * 3 * 6 * 6 * 8
    with FlopCounterMode(display=False) as forward:
        out = attention(qkv)
    assert forward.get_total_flops() == 2 * gemm
    with FlopCounterMode(display=False) as backward:
        out.sum().backward()
    assert backward.get_total_flops() == 5 * gemm  # the scores are computed again


@pytest.mark.parametrize(("window", "pairs"), [(0, 6), (1, 16), (4, 34), (5, 36), (9, 36)])
def test_flop_count_within_a_window(window, pairs):
    qkv = _qkv(2, 6, 3, 8).requires_grad_()
    with FlopCounterMode(display=False) as count:
        attention(qkv, window=window).sum().backward()
    assert count.get_total_flops() == 7 * 2 * 2 * 3 * 8 * pairs


@pytest.mark.parametrize(("first", "second"), [("reference", "sdpa"), ("sdpa", "reference")])
def test_backward_runs_the_forwards_backend(first, second, monkeypatch):
    calls, run = [], backend.run
    monkeypatch.setattr(backend, "run", lambda op, name, *args: calls.append((op, name)) or run(op, name, *args))
    with backend.use_backend(f"attention={first}"):
        out = attention(_qkv(1, 5, 1, 8).requires_grad_())
    with backend.use_backend(f"attention={second}"):
        out.sum().backward()
    assert calls == [("attention", first), ("attention_backward", first)]


def test_one_program_serves_a_range_of_lengths():
    """The choice of a backend looks at the length: it may not tie a compiled program to one."""
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(lambda qkv: attention(qkv), backend=counter, fullgraph=True, dynamic=True)
    for n in (5, 9, 17):
        qkv = _qkv(1, n, 1, 8)
        assert torch.equal(compiled(qkv), attention(qkv))
    assert counter.frame_count == 1


def _plain_lengths(qkv: Tensor, window: int | None, lengths: Tensor) -> Tensor:
    """Each sample by itself, cut to its length."""
    outs = []
    for sample, length in zip(qkv, lengths.tolist()):
        whole = sample.new_zeros(sample.shape[0], *sample.shape[2:])
        outs.append(whole if not length else torch.cat((_plain(sample[None, :length], window=window)[0], whole[length:])))
    return torch.stack(outs)


@pytest.mark.parametrize("mode", ["float32", "bfloat16"])
@pytest.mark.parametrize(("n", "window"), [(70, None), (70, 0), (70, 5), (150, 17)])
@pytest.mark.parametrize("name", BACKENDS)
def test_lengths(name, n, window, mode):
    lengths = torch.tensor([n, 33, 0, 1, n - 1, 2 * n] if name != "triton" else [33, 0], dtype=torch.int32)
    ours = _qkv(len(lengths), n, 1, 16, getattr(torch, mode)).requires_grad_()
    same, truth = ours.detach().clone().requires_grad_(), ours.detach().double().requires_grad_()
    with backend.use_backend(f"attention={name}"):
        a = attention(ours, window=window, lengths=lengths)
    b, t = (_plain_lengths(x, window, lengths.clamp(max=n)) for x in (same, truth))
    upstream = torch.randn(t.shape).to(torch.bfloat16)
    for out in (a, b, t):
        out.backward(upstream.to(out.dtype))
    assert_within_budget(a, b, t, "out")
    if window != 0:  # rows of one score have no error in plain torch, see test_matches_plain_torch
        assert_within_budget(ours.grad, same.grad, truth.grad, "dqkv")
    for i, length in enumerate(lengths.clamp(max=n).tolist()):
        assert not a[i, length:].any()
        assert not ours.grad[i, length:].any()


@pytest.mark.parametrize("name", BACKENDS)
def test_nothing_reaches_beyond_a_length(name):
    """What lies in the padding, and what comes back for it, changes nothing, however large."""
    qkv, upstream, lengths = _qkv(2, 70, 1, 16), torch.randn(2, 70, 1, 16), torch.tensor([40, 65])
    results = []
    for padding in (0.0, 1e4):
        ours, grad = qkv.clone(), upstream.clone()
        for i, length in enumerate(lengths.tolist()):
            ours[i, length:] = padding
            grad[i, length:] = padding
        ours.requires_grad_()
        with backend.use_backend(f"attention={name}"):
            out = attention(ours, window=9, lengths=lengths)
        results.append((out, torch.autograd.grad(out, ours, grad)[0]))
    for a, b in zip(*results):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("lengths", "message"),
    [
        (torch.tensor([1.0, 2.0]), r"lengths must be int32 or int64 \[B\] = \[2\] on cpu, got torch.float32 \(2,\) on cpu"),
        (torch.tensor([1]), r"got torch.int64 \(1,\)"),
        (torch.zeros(2, 5, dtype=torch.bool), r"got torch.bool \(2, 5\)"),
    ],
)
def test_bad_lengths(lengths, message):
    with pytest.raises(ValueError, match=f"attention: .*{message}"):
        attention(_qkv(2, 5, 1, 8), lengths=lengths)


def test_double_backward_is_refused():
    qkv = _qkv(1, 5, 1, 8).requires_grad_()
    (grad,) = torch.autograd.grad(attention(qkv).square().sum(), qkv, create_graph=True)
    with pytest.raises(RuntimeError, match="attention_backward has no gradient of its own: double backward is not supported"):
        grad.sum().backward()


def test_torch_func_is_refused():
    with pytest.raises(RuntimeError, match=r"vmae2::attention does not run under torch.func transforms"):
        torch.func.vmap(attention)(_qkv(1, 5, 2, 8)[None])


def test_what_one_backend_saved_another_can_finish():
    qkv, grad = _qkv(2, 9, 2, 8), torch.randn(2, 9, 2, 8)
    results = []
    for name in BACKENDS:
        with backend.use_backend(f"attention={name}"):
            out, lse = torch.ops.vmae2.attention(qkv, 0.3, None, None, "", "")
        results += [torch.ops.vmae2.attention_backward(grad, qkv, out, lse, 0.3, None, None, other) for other in BACKENDS]
    for other in results[1:]:
        torch.testing.assert_close(other, results[0])


def test_sdpa_says_which_inputs_it_refuses_on_cuda():
    cuda = torch.device("cuda")
    assert choice.why_not_sdpa(cuda, torch.bfloat16, 88) is None
    assert "not float32" in choice.why_not_sdpa(cuda, torch.float32, 64)
    assert "not 20" in choice.why_not_sdpa(cuda, torch.float16, 20)
    assert "no window" in choice.why_not_sdpa(cuda, torch.float16, 64, 3)
    assert choice.why_not_sdpa(torch.device("cpu"), torch.float64, 20, 3) is None
    assert "mps" in backend.refusals("attention", "mps")["sdpa"]


@pytest.mark.parametrize(
    ("shape", "dtype", "message"),
    [
        ((1, 2, 3, 1, 20), torch.float32, "multiples of 8 up to 128, not 20"),
        ((1, 2, 3, 1, 136), torch.bfloat16, "multiples of 8 up to 128, not 136"),
        ((1, 2, 3, 1, 64), torch.float64, "float16, bfloat16 and float32, not float64"),
    ],
)
def test_triton_says_which_inputs_it_refuses(shape, dtype, message):
    with backend.use_backend("attention=triton"), pytest.raises(backend.BackendError, match=message):
        attention(torch.zeros(shape, dtype=dtype))


def test_default_order_on_cuda():
    """SDPA for what it takes, Triton for windows and float32, the materialised reference for the rest."""
    assert backend._OPS["attention"].order["cuda"] == ("sdpa", "triton", "reference")


def test_environment_explains_the_choice():
    assert "measured" in backend.environment()["ops"]["attention"]["cpu"]["because"]
    assert "measured" in backend._OPS["attention"].reason("cuda")
    with backend.use_backend("attention=reference"):
        asked = backend.environment()["ops"]["attention"]["cpu"]
    assert (asked["runs"], asked["because"]) == ("reference", "it was asked for")


@pytest.mark.skipif("triton" not in BACKENDS, reason="no interpreter of Triton")
def test_every_architecture_has_tiles_of_its_family():
    from vmae2_fast.ops import _attention_triton as launchers

    for family, archs in launchers.FAMILIES.items():
        for arch in archs:
            for dtype in (torch.bfloat16, torch.float32):
                assert launchers.tiles(arch, 88, dtype) == launchers.tiles(family, 88, dtype)
    assert launchers.tiles(103, 88, torch.bfloat16) == launchers.tiles(100, 88, torch.bfloat16)


@pytest.mark.skipif("triton" not in BACKENDS, reason="no interpreter of Triton")
def test_triton_refuses_samples_of_more_than_31_bits():
    from vmae2_fast.ops import _attention_triton

    huge = torch.empty(1, 2**31 // 192 + 1, 3, 1, 64, device="meta")
    with pytest.raises(ValueError, match=r"attention=triton: one sample.*fewer than 2\*\*31"):
        _attention_triton.forward(huge, 1.0, None, None)


def test_refused_input_falls_to_the_reference_only_when_nothing_else_was_asked(monkeypatch):
    def refuse(device, dtype=None, head_dim=None, *_):
        return f"it takes no head dim {head_dim}" if head_dim == 4 else None

    entry = backend._OPS["attention"].implementations
    monkeypatch.setitem(entry, "sdpa", dataclasses.replace(entry["sdpa"], why_not=refuse))
    assert backend.pick("attention", CPU, torch.float32, 8) == "sdpa"
    assert backend.pick("attention", CPU, torch.float32, 4) == "reference"
    with backend.use_backend("attention=sdpa+reference"):
        assert backend.pick("attention", CPU, torch.float32, 4) == "reference"
    message = "sdpa: it takes no head dim 4. Available: reference"
    with backend.use_backend("attention=sdpa"), pytest.raises(backend.BackendError, match=message):
        attention(_qkv(1, 2, 1, 4))


def _cosine_case(dtype=torch.float32) -> tuple[Tensor, Tensor]:
    # One head above the official clamp: its scale gets no gradient.
    return _qkv(2, 21, 3, 16, dtype), torch.tensor([2.3, 5.0, -1.0], dtype=dtype).view(3, 1, 1)


@pytest.mark.parametrize("name", BACKENDS)
def test_cosine_attention_matches_its_definition(name):
    """1e-5 in relative L2 is the gate of the recorded official results."""
    ours = [t.requires_grad_() for t in _cosine_case()]
    truth = [t.detach().double().requires_grad_() for t in ours]
    with backend.use_backend(f"attention={name}"):
        a, t = cosine_attention(*ours), _plain_cosine(*truth)
    upstream = torch.randn_like(a)
    a.backward(upstream)
    t.backward(upstream.double())
    for actual, expected in ((a, t), (ours[0].grad, truth[0].grad)):
        assert float((actual - expected).detach().norm() / expected.detach().norm()) < 1e-5
    # The scale's gradient is a sum over tokens of terms that nearly cancel: rounding is measured by the terms.
    q, k, v = truth[0].detach().unbind(2)
    q = F.normalize(q, dim=-1) * truth[1].detach().clamp(max=4.6052).exp().squeeze(-1)
    packed = torch.stack((q, F.normalize(k, dim=-1), v), dim=2).requires_grad_()
    _plain(packed, 1.0).backward(upstream.double())
    terms = (packed.grad[:, :, 0] * q).sum(-1).abs().sum((0, 1))
    assert ((ours[1].grad - truth[1].grad).abs().flatten() <= 1e-6 * terms).all()
    assert ours[1].grad[1] == 0


def test_cosine_attention_gradcheck_and_dtypes():
    with backend.use_backend("attention=reference"):
        qkv, log_scale = (
            _qkv(1, 4, 2, 4, torch.float64).requires_grad_(),
            torch.randn(2, 1, 1, dtype=torch.float64).requires_grad_(),
        )
        assert torch.autograd.gradcheck(cosine_attention, [qkv, log_scale])
    qkv, log_scale = _cosine_case()
    with torch.autocast("cpu", torch.bfloat16):
        assert cosine_attention(qkv, log_scale).dtype == torch.bfloat16
    assert cosine_attention(qkv.bfloat16(), log_scale).dtype == torch.bfloat16


@pytest.mark.parametrize(
    "function", [attention, lambda qkv: cosine_attention(qkv, torch.zeros(2, 1, 1))], ids=["attention", "cosine"]
)
def test_bad_input(function):
    with pytest.raises(ValueError, match=r"attention: qkv must be a floating-point \[B, N, 3, H, D\].*\(2, 5, 48\)"):
        function(torch.zeros(2, 5, 48))
    with pytest.raises(ValueError, match=r"got torch.int64"):
        function(torch.zeros(2, 5, 3, 2, 8, dtype=torch.long))


def test_bad_window():
    with pytest.raises(ValueError, match=r"attention: window must be None or a number of tokens from 0, got -1"):
        attention(_qkv(1, 2, 2, 8), window=-1)


def test_bad_log_scale():
    with pytest.raises(ValueError, match=r"log_scale must be \[H, 1, 1\] = \[2, 1, 1\], got \(2,\)"):
        cosine_attention(_qkv(1, 2, 2, 4), torch.zeros(2))
