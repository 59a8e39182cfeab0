"""adamw: against torch's own kernel and float64, skipped steps, memory, and when a shadow counts."""

from __future__ import annotations

import copy
import gc
import math
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.ops.half_block import autocast
from tests.ops.test_cpu_isa import at_the_end
from tests.support import assert_within_budget, awkward, backends, opcheck
from vmae2_fast import backend
from vmae2_fast.ops import _shadow
from vmae2_fast.ops.linear import linear
from vmae2_fast.ops.mlp import norm_mlp
from vmae2_fast.ops.norm import norm_qkv
from vmae2_fast.ops.optim import adamw

SHAPES = [(), (1,), (15,), (16,), (17,), (5, 7), (3, 64, 33), (0, 4)]
HYPER: dict[str, Any] = {"lr": 0.02, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
native = pytest.mark.skipif("native" not in backends("adamw"), reason="no native extension")


def state(dtype: torch.dtype = torch.float32, shapes: Any = SHAPES) -> list[list[Tensor]]:
    """params, grads, exp_avgs, exp_avg_sqs and steps of a run under way; values of all sizes."""
    params = [torch.randn(s, dtype=torch.float64) for s in shapes]
    grads = [torch.randn(s, dtype=torch.float64) * torch.randn(s, dtype=torch.float64).exp() for s in shapes]
    firsts = [0.1 * torch.randn(s, dtype=torch.float64) for s in shapes]
    seconds = [0.01 * torch.rand(s, dtype=torch.float64) for s in shapes]
    lists = [[t.float().to(dtype) for t in tensors] for tensors in (params, grads, firsts, seconds)]
    return [*lists, [torch.tensor(float(i % 3)) for i in range(len(shapes))]]


def copies(lists: list[list[Tensor]], dtype: torch.dtype | None = None) -> list[list[Tensor]]:
    made = [[t.clone().to(dtype or t.dtype) for t in tensors] for tensors in lists[:4]]
    return [*made, [t.clone() for t in lists[4]]]


def torchs(lists: list[list[Tensor]], scale: Tensor | None = None) -> None:
    params, grads, firsts, seconds, steps = lists
    torch._foreach_add_(steps, 1)
    beta1, beta2 = HYPER["betas"]
    torch._fused_adamw_(
        params, [g.clone() for g in grads], firsts, seconds, [], steps, amsgrad=False, lr=HYPER["lr"], beta1=beta1,
        beta2=beta2, weight_decay=HYPER["weight_decay"], eps=HYPER["eps"], maximize=False, grad_scale=scale,
        found_inf=None if scale is None else torch.zeros(()),
    )  # fmt: skip


@pytest.mark.parametrize("scale", [None, 3.7])
@pytest.mark.parametrize("name", backends("adamw"))
def test_equals_torchs_fused_kernel_and_float64(name, scale):
    divisor = None if scale is None else torch.tensor(scale)
    ours = state()
    plain, truth = copies(ours), copies(ours, torch.float64)
    for _ in range(3):
        with backend.use_backend(f"adamw={name}"):
            adamw(*ours, **HYPER, scale=divisor, skipped=torch.zeros(()))
        torchs(plain, divisor)
        torchs(truth, None if divisor is None else divisor.clone())
    for which, actual, same, exact in zip(("param", "grad", "exp_avg", "exp_avg_sq"), ours, plain, truth):
        for a, s, t in zip(actual, same, exact):
            assert (a - s).norm() <= 1e-6 * s.norm(), which
            assert_within_budget(a, s, t, which)
    assert all(torch.equal(a, s) for a, s in zip(ours[4], plain[4]))


@pytest.mark.parametrize("name", backends("adamw"))
def test_a_skipped_step_changes_nothing_but_the_shadows(name):
    ours = state()
    ours[1][-3].fill_(math.inf)
    before = copies(ours)
    shadows = [torch.full(p.shape, math.nan, dtype=torch.bfloat16) for p in ours[0]]
    with backend.use_backend(f"adamw={name}"):
        adamw(*ours, **HYPER, scale=torch.tensor(math.nan), skipped=torch.ones(()), shadows=shadows)
    assert all(torch.equal(a, b) for pair in zip(ours, before) for a, b in zip(*pair))
    assert all(torch.equal(s, p.bfloat16()) for s, p in zip(shadows, ours[0]))


@pytest.mark.parametrize("name", backends("adamw"))
def test_shadows_are_the_weights_to_the_bit_and_cost_no_bit_of_them(name):
    ours = state()
    without = copies(ours)
    shadows = [torch.empty(p.shape, dtype=torch.bfloat16) if i % 2 else None for i, p in enumerate(ours[0])]
    with backend.use_backend(f"adamw={name}"):
        adamw(*ours, **HYPER, shadows=shadows)
        adamw(*without, **HYPER)
    assert all(torch.equal(a, b) for pair in zip(ours, without) for a, b in zip(*pair))
    assert all(torch.equal(s, p.bfloat16()) for s, p in zip(shadows, ours[0]) if s is not None)


@native
def test_the_same_bits_on_every_instruction_set_and_number_of_threads():
    extension = backend.native()
    start, results = state(shapes=[*SHAPES, (300, 700)]), []
    threads = torch.get_num_threads()
    try:
        for isa in extension.supported_cpu_isas():
            extension.set_cpu_isa(isa)
            for count in (1, 2, 7):
                torch.set_num_threads(count)
                ours = copies(start)
                shadows = [torch.empty(p.shape, dtype=torch.bfloat16) for p in ours[0]]
                adamw(*ours, **HYPER, scale=torch.tensor(3.0), shadows=shadows)
                results.append([t for tensors in (*ours, shadows) for t in tensors])
    finally:
        extension.set_cpu_isa(extension.supported_cpu_isas()[-1])
        torch.set_num_threads(threads)
    assert len(results) >= 6
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other))


@native
def test_nothing_is_touched_behind_a_tensor():
    keep: list[Any] = []
    start = state(shapes=[(15,), (16,), (33,)])
    plain = copies(start)
    ours = [*([at_the_end(t, keep) for t in tensors] for tensors in start[:4]), start[4]]
    shadows = [at_the_end(torch.empty(p.shape, dtype=torch.bfloat16), keep) for p in ours[0]]
    adamw(*ours, **HYPER, shadows=shadows)
    adamw(*plain, **HYPER)
    assert all(torch.equal(a, b) for pair in zip(ours[:4], plain) for a, b in zip(*pair))


@pytest.mark.parametrize("layout", ["strided", "transposed", "unaligned"])
@pytest.mark.parametrize("name", backends("adamw"))
def test_memory_layouts(name, layout):
    straight = state(shapes=[(5, 7)])
    twisted = [*([dict(awkward(t))[layout] for t in tensors] for tensors in straight[:4]), [straight[4][0].clone()]]
    with backend.use_backend(f"adamw={name}"):
        for lists in (straight, twisted):
            adamw(*lists, **HYPER)
    assert all(torch.equal(a, b) for pair in zip(straight, twisted) for a, b in zip(*pair))


@native
def test_float64_and_half_precision_have_the_reference_only():
    for dtype in (torch.float64, torch.bfloat16):
        assert backend.pick("adamw", torch.device("cpu"), dtype) == "reference"
        ours = state(dtype, [(5, 7)])
        plain = copies(ours)
        adamw(*ours, **HYPER)
        torchs(plain)
        torch.testing.assert_close(ours[0][0], plain[0][0])
        with pytest.raises(backend.BackendError, match="takes float32"), backend.use_backend("adamw=native"):
            adamw(*ours, **HYPER)


def test_opcheck():
    lists = state(shapes=[(5, 7), (3,)])
    shadows = [torch.empty(5, 7, dtype=torch.bfloat16), torch.empty(0, dtype=torch.bfloat16)]
    numbers = (torch.tensor(2.0), torch.zeros(()), 0.1, 0.9, 0.95, 1e-8, 0.1, "")
    opcheck(torch.ops.vmae2.adamw.default, (*lists, shadows, *numbers))


@pytest.mark.parametrize("name", backends("adamw"))
def test_a_graph_that_saved_the_weights_notices_the_step(name):
    weight = nn.Parameter(torch.randn(3, 3))
    loss = (weight * weight).sum()
    moments = [torch.zeros(3, 3), torch.zeros(3, 3)]
    with backend.use_backend(f"adamw={name}"):
        adamw([weight], [torch.ones(3, 3)], [moments[0]], [moments[1]], [torch.zeros(())], **HYPER)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"grads": []}, ValueError, "1 params, but 0 grads"),
        ({"grads": [torch.zeros(4)]}, ValueError, r"grads of shape \(4,\) on cpu for a parameter of shape \(3,\)"),
        ({"exp_avgs": [torch.zeros(3).bfloat16()]}, TypeError, "exp_avgs of torch.bfloat16 where torch.float32 is wanted"),
        ({"steps": [torch.zeros(3)]}, ValueError, "steps must hold one number each"),
        ({"shadows": [torch.zeros(3)]}, TypeError, "shadows of torch.float32 where torch.bfloat16 is wanted"),
        ({"shadows": [torch.zeros(6).bfloat16()[::2]]}, ValueError, r"shadows must be contiguous, got strides \(2,\)"),
        ({"exp_avg_sqs": [torch.zeros(3, device="meta")]}, ValueError, r"exp_avg_sqs of shape \(3,\) on meta"),
        ({"shadows": []}, None, ""),
        ({"shadows": [None, None]}, ValueError, "1 params, but 2 shadows"),
    ],
)
def test_bad_input(change, error, message):
    arguments = {"params": 3, "grads": 3, "exp_avgs": 3, "exp_avg_sqs": 3}
    arguments = {**{n: [torch.zeros(size)] for n, size in arguments.items()}, "steps": [torch.zeros(())], **change}
    if error is None:
        return adamw(**arguments, **HYPER)
    with pytest.raises(error, match=f"adamw: {message}"):
        adamw(**arguments, **HYPER)
    return None


# --- when a shadow counts -------------------------------------------------------------------------------------------------


class Shadowed:
    """A weight after a step, with a shadow."""

    def __init__(self, *shape: int) -> None:
        self.weight, self.shadow = nn.Parameter(torch.randn(shape)), torch.empty(shape, dtype=torch.bfloat16)
        self.lists = [[torch.randn(shape)], [torch.zeros(shape)], [torch.zeros(shape)], [torch.zeros(())]]
        self.step()

    def step(self, **options: Any) -> None:
        adamw([self.weight], *self.lists, **HYPER, shadows=[self.shadow], **options)

    @property
    def counts(self) -> bool:
        cast = _shadow.cast(self.weight, torch.bfloat16)
        assert torch.equal(cast, self.weight.detach().bfloat16()) or cast is self.shadow
        return cast is self.shadow


def _optimizer_step(s: Shadowed) -> None:
    s.weight.grad = torch.ones_like(s.weight)
    torch.optim.SGD([s.weight], lr=0.1).step()


def _swap_memory(s: Shadowed) -> None:
    s.weight.data = s.weight.detach() + 1


def _through_data(s: Shadowed) -> None:
    s.weight.data.mul_(1.5)


WRITES: list[Callable[[Shadowed], Any]] = [
    lambda s: nn.init.zeros_(s.weight),
    lambda s: s.weight.detach().add_(1),
    lambda s: s.weight.detach()[0, :1].add_(1),
    lambda s: nn.ParameterDict({"w": s.weight}).load_state_dict({"w": torch.zeros_like(s.weight)}),
    lambda s: adamw([s.weight], *s.lists, **HYPER),
    _optimizer_step,
    _swap_memory,
    _through_data,
]


@pytest.mark.parametrize("write", WRITES)
def test_every_write_to_the_weight_makes_its_shadow_stale_until_the_next_step(write):
    s = Shadowed(8, 8)
    assert s.counts
    write(s)
    assert not s.counts
    s.step()
    assert s.counts


@pytest.mark.parametrize("write", WRITES)
def test_a_skipped_step_revives_no_stale_values(write):
    s = Shadowed(8, 8)
    write(s)
    s.step(skipped=torch.ones(()))
    assert torch.equal(_shadow.cast(s.weight, torch.bfloat16), s.weight.detach().bfloat16())


def test_what_is_no_write_leaves_the_shadow():
    s = Shadowed(8, 8)
    for flag in (False, True):
        s.weight.requires_grad_(flag)
        assert s.counts
    s.weight.grad = torch.ones_like(s.weight)
    s.weight.detach().clone().add_(1)
    assert s.counts
    assert _shadow.cast(s.weight, torch.float32).dtype == torch.float32
    assert _shadow.cast(s.weight, torch.float16).dtype == torch.float16


def test_a_shadow_goes_with_its_owner_and_into_no_copy_of_the_weight():
    s = Shadowed(8, 8)
    twin = copy.deepcopy(s.weight)
    again = pickle.loads(pickle.dumps(s.weight))
    assert all(_shadow.cast(w, torch.bfloat16) is not s.shadow for w in (twin, again))
    weight = s.weight
    del s
    gc.collect()
    assert torch.equal(_shadow.cast(weight, torch.bfloat16), weight.detach().bfloat16())


def test_products_take_the_shadow_forward_and_backward_and_give_the_same_bits():
    c, hidden = 8, 12
    s = {name: Shadowed(*shape) for name, shape in {"qkv": (3 * c, c), "fc1": (hidden, c), "fc2": (c, hidden)}.items()}
    x, norm = torch.randn(2, 3, c, requires_grad=True), (torch.ones(c), torch.zeros(c))

    def run() -> list[Tensor]:
        with autocast("autocast"):
            qkv = norm_qkv(x, None, None, None, *norm, 1e-6, s["qkv"].weight, None, None)[1]
            out = norm_mlp(x, None, None, None, *norm, 1e-6, s["fc1"].weight, None, s["fc2"].weight, None)[1]
            plain = linear(out, s["fc1"].weight)
        loss = qkv.float().square().sum() + out.float().square().sum() + plain.float().square().sum()
        return [qkv, out, plain, *torch.autograd.grad(loss, [x, *(w.weight for w in s.values())])]

    fast = run()
    for w in s.values():  # the same values at another version: all are cast
        w.weight.detach().add_(0)
    assert all(torch.equal(a, b) for a, b in zip(fast, run(), strict=True))
    for name, w in s.items():
        w.step(skipped=torch.ones(()))
        honest = run()
        kept = w.shadow.view(-1)[1].clone()
        w.shadow.view(-1)[1] += 1  # no one may do so: it shows who reads it
        _shadow.SAMPLE, before = 1, _shadow.SAMPLE
        try:
            changed = run()
        finally:
            _shadow.SAMPLE = before
        w.shadow.view(-1)[1] = kept
        places = {"qkv": [0, 3], "fc1": [1, 2, 3], "fc2": [1, 3]}[name]
        assert all(not torch.equal(changed[i], honest[i]) for i in places), name
