"""The way past the dispatcher: the same results and errors, and only where the dispatcher has nothing to do."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from tests.support import backends
from vmae2_fast import backend
from vmae2_fast.ops import dual_mask, gather_patches, reconstruction_loss, scatter_patches
from vmae2_fast.ops._direct import shortcut

GENERATOR = torch.Generator().manual_seed(0)
CLIP = torch.randint(0, 256, (2, 4, 16, 16, 3), dtype=torch.uint8, generator=GENERATOR)
INDEX = torch.tensor([[0, 3, 5], [1, 6, -1]], dtype=torch.int32)
ROWS = torch.randn(2, 3, 2 * 64 * 3, generator=GENERATOR)
GRID = (2, 2, 2)

CALLS: dict[str, Callable[[], Any]] = {
    "gather_patches": lambda: gather_patches(CLIP, INDEX, patch=8),
    "scatter_patches": lambda: scatter_patches(ROWS, INDEX, grid=GRID, patch=8),
    "reconstruction_loss": lambda: reconstruction_loss(ROWS, CLIP, INDEX, patch=8),
    "dual_mask": lambda: tuple(dual_mask(torch.arange(3), torch.arange(3), grid=(4, 4, 4), seed=1)),
}


class Plain(TorchFunctionMode):
    """A mode that changes nothing: with it every call goes through the dispatcher."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


class Subclass(Tensor):
    """A tensor of another class that behaves as one."""


@pytest.mark.parametrize("op", CALLS)
@pytest.mark.parametrize("state", [contextlib.nullcontext, torch.no_grad, torch.inference_mode, lambda: torch.autocast("cpu")])
def test_same_results(op: str, state: Callable[[], Any]) -> None:
    with state():
        direct = CALLS[op]()
        with Plain():
            dispatched = CALLS[op]()
    for ours, theirs in zip(*(r if isinstance(r, tuple) else (r,) for r in (direct, dispatched)), strict=True):
        assert torch.equal(ours, theirs)
        assert (ours.dtype, ours.requires_grad, ours.is_inference()) == (theirs.dtype, False, theirs.is_inference())


@pytest.mark.parametrize("name", [n for n in backends("gather_patches") if n in ("native", "reference")])
@pytest.mark.parametrize(
    "call",
    [
        lambda: gather_patches(CLIP, INDEX + 7, patch=8),
        lambda: gather_patches(CLIP, INDEX, patch=8.0),
        lambda: gather_patches(CLIP, INDEX, patch="8"),
        lambda: gather_patches(CLIP, INDEX, patch=8, dtype=torch.float8_e4m3fn),
        lambda: gather_patches(CLIP.to("meta"), INDEX, patch=8),
        lambda: scatter_patches(ROWS, INDEX, grid=(2.0, 2, 2), patch=8),
        lambda: scatter_patches(ROWS, INDEX.new_zeros(2, 3), grid=GRID, patch=8),
        lambda: reconstruction_loss(ROWS, CLIP, INDEX - 5, patch=8),
        lambda: dual_mask(torch.arange(3), torch.arange(3), grid=(4.0, 4, 4), seed=1),
    ],
)
def test_same_errors(call: Callable[[], Any], name: str) -> None:
    def outcome() -> tuple[str, str]:
        try:
            return "result", str(call())
        except Exception as error:
            return type(error).__name__, str(error)

    with backend.use_backend(f"gather_patches={name}"):
        direct = outcome()
        with Plain():
            assert outcome() == direct


class Watched:
    """A shortcut around two functions that tell which of them ran."""

    def __init__(self) -> None:
        self.ran: list[str] = []

        class Overload:
            _schema = torch.ops.vmae2.gather_patches.default._schema

            def __call__(_, *arguments: Any) -> str:
                self.ran.append("dispatcher")
                return "dispatcher"

        def body(*arguments: Any) -> str:
            self.ran.append("body")
            return "body"

        self.call = shortcut(Overload(), body)


ARGUMENTS: tuple[Any, ...] = (CLIP, INDEX, 8, 2, [1.0] * 3, [0.0] * 3, torch.float32, "conv", "")


def test_plain_calls_go_to_the_body() -> None:
    it = Watched()
    floats = torch.zeros(2, 3, 4, 16, 16, requires_grad=True)
    assert it.call(*ARGUMENTS) == "body"
    for state in (torch.no_grad, torch.inference_mode, lambda: torch.autocast("cpu", torch.bfloat16)):
        with state():
            assert it.call(*ARGUMENTS) == "body"
    with torch.no_grad():
        assert it.call(floats, *ARGUMENTS[1:]) == "body"
        assert it.call(torch.nn.Parameter(floats.detach()), *ARGUMENTS[1:]) == "body"
    with torch.inference_mode():
        made_here = CLIP.clone()
        assert it.call(made_here, *ARGUMENTS[1:]) == "body"


@contextlib.contextmanager
def functionalized() -> Iterator[None]:
    torch._enable_functionalization(reapply_views=False)
    try:
        yield
    finally:
        torch._disable_functionalization()


STATES: dict[str, Callable[[], Any]] = {
    "torch-function mode": Plain, "default device": lambda: torch.device("cpu"), "fake tensors": FakeTensorMode,
    "FLOP counter": lambda: FlopCounterMode(display=False), "forward AD": torch.autograd.forward_ad.dual_level,
    "profiler": lambda: profile(activities=[ProfilerActivity.CPU]), "autograd profiler": torch.autograd.profiler.profile,
    "functionalization": functionalized,
}  # fmt: skip


@pytest.mark.parametrize("state", STATES)
def test_states_that_need_the_dispatcher(state: str) -> None:
    it = Watched()
    with STATES[state]():
        assert it.call(*ARGUMENTS) == "dispatcher"
    assert it.call(*ARGUMENTS) == "body"


@pytest.mark.parametrize("number", [0, 1])
@pytest.mark.parametrize(
    "change",
    [
        lambda t: t.as_subclass(Subclass),
        lambda t: t.to("meta"),
        torch._to_functional_tensor,
        lambda t: t.float().requires_grad_(),
        lambda t: torch.complex(t.float(), t.float()).conj().imag,
        lambda t: t.float().to_sparse(),
        lambda t: t.tolist(),
    ],
)
def test_tensors_that_need_the_dispatcher(change: Callable[[Tensor], Any], number: int) -> None:
    it = Watched()
    arguments = list(ARGUMENTS)
    arguments[number] = change(arguments[number])
    assert it.call(*arguments) == "dispatcher"


OTHERS = [(2, 8.0), (2, True), (2, torch.tensor(8)), (3, None), (4, (1.0,) * 3), (4, [1, 1, 1]), (6, None), (8, b"conv")]


@pytest.mark.parametrize(("place", "value"), OTHERS)
def test_arguments_that_need_the_dispatcher(place: int, value: Any) -> None:
    it = Watched()
    arguments = list(ARGUMENTS)
    arguments[place] = value
    for _ in range(2):  # what was seen once is remembered
        assert it.call(*arguments) == "dispatcher"
    assert it.call(*ARGUMENTS[:-1]) == "dispatcher"
    assert it.call(*ARGUMENTS) == "body"


@pytest.mark.parametrize("name", backends("reconstruction_loss"))
def test_recorded_calls_give_the_gradients_of_dispatched_ones(name: str) -> None:
    """The same values and gradients whichever way is taken, from a graph that does not hold the dispatcher's node."""
    results = []
    for mode in (contextlib.nullcontext(), Plain()):
        leaf = ROWS.clone().requires_grad_()
        with backend.use_backend(name):
            with mode:
                loss = reconstruction_loss(leaf, CLIP, INDEX, patch=8, denominator="paper", decoded=5)
            (loss * 3).backward()
        results.append((type(loss.grad_fn).__name__, loss.detach(), leaf.grad))
    (direct, *ours), (dispatched, *theirs) = results
    assert direct == "RecordedBackward"
    assert dispatched != direct
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_a_recorded_call_refuses_a_second_derivative() -> None:
    leaf = ROWS.clone().requires_grad_()
    (grad,) = torch.autograd.grad(reconstruction_loss(leaf, CLIP, INDEX, patch=8), leaf, create_graph=True)
    with pytest.raises(RuntimeError, match="double backward is not supported"):
        grad.sum().backward()


def test_tracers_need_the_dispatcher() -> None:
    it = Watched()

    def traced(x: Tensor) -> Tensor:
        it.call(*ARGUMENTS)
        return x + 1

    make_fx(traced)(torch.ones(2))
    make_fx(traced, pre_dispatch=True)(torch.ones(2))
    torch.jit.trace(traced, torch.ones(2), check_trace=False)
    torch.vmap(traced)(torch.ones(2))
    torch.func.grad(lambda x: traced(x).sum())(torch.ones(2))
    torch.func.functionalize(traced)(torch.ones(2))
    assert it.ran
    assert set(it.ran) == {"dispatcher"}


def test_graphs_and_traces_hold_the_op() -> None:
    def nodes(graph: Any) -> list[Any]:
        return [node.target for node in graph.nodes if node.op == "call_function"]

    wanted = torch.ops.vmae2.gather_patches.default

    def function(clip: Tensor) -> Tensor:
        return gather_patches(clip, INDEX, patch=8)

    assert wanted in nodes(make_fx(function)(CLIP).graph)
    seen: list[Any] = []

    def keep(module: Any, _: Any) -> Any:
        seen.extend(nodes(module.graph))
        return module.forward

    assert torch.equal(torch.compile(function, backend=keep, fullgraph=True)(CLIP), function(CLIP))
    assert wanted in seen
    with profile(activities=[ProfilerActivity.CPU]) as trace:
        function(CLIP)
    assert "vmae2::gather_patches" in {event.key for event in trace.key_averages()}
