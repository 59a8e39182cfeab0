"""Attention of other libraries, by fakes with their signatures that compute on the CPU: arguments, layouts, refusals; and the
table of measured orders. What the libraries themselves compute on a GPU, the tests marked `cuda` and `make gpu-check` see."""

from __future__ import annotations

import functools
import json
import sys
import types
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.support import assert_within_budget, compiles
from vmae2_fast import backend
from vmae2_fast.ops import _attention_libraries as libraries
from vmae2_fast.ops import _attention_reference as reference
from vmae2_fast.ops import _attention_table as table
from vmae2_fast.ops.attention import attention

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
LIBRARIES = ("flash2", "flash3", "flash4", "cudnn")


def _packed(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.stack((q, k, v), dim=2)


def _forward(q: Tensor, k: Tensor, v: Tensor, scale: float, left: int, right: int) -> tuple[Tensor, Tensor]:
    """[B, N, H, D] each -> out, natural log-sum-exp [B, H, N] in float32, as all these libraries give them."""
    assert left == right
    assert all(x.stride(-1) == 1 for x in (q, k, v))
    return reference.forward(_packed(q, k, v), scale, None if left < 0 else left, None)


def _backward(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scale: float, left: int) -> Any:
    assert all(x.stride(-1) == 1 for x in (grad, q, k, v, out))
    assert lse.dtype == torch.float32
    assert lse.is_contiguous()
    return reference.backward(grad, _packed(q, k, v), out, lse, scale, None if left < 0 else left, None).unbind(2)


def flash2(calls: list[dict[str, Any]]) -> types.ModuleType:
    """flash_attn.flash_attn_interface of flash-attn 2.8."""
    module = types.ModuleType("flash_attn.flash_attn_interface")

    def _flash_attn_forward(
        q, k, v, dropout_p, softmax_scale, causal, window_size_left, window_size_right, softcap, alibi_slopes, return_softmax
    ):
        assert (dropout_p, causal, softcap, alibi_slopes, return_softmax) == (0.0, False, 0.0, None, False)
        out, lse = _forward(q, k, v, softmax_scale, window_size_left, window_size_right)
        return out, lse, torch.empty(0), torch.empty(2, dtype=torch.int64)

    def _flash_attn_backward(
        dout, q, k, v, out, softmax_lse, dq, dk, dv, dropout_p, softmax_scale, causal, window_size_left, window_size_right,
        softcap, alibi_slopes, deterministic, rng_state=None,
    ):  # fmt: skip
        assert (dropout_p, causal, softcap, alibi_slopes, rng_state) == (0.0, False, 0.0, None, None)
        calls.append({"deterministic": deterministic})
        for into, value in zip((dq, dk, dv), _backward(dout, q, k, v, out, softmax_lse, softmax_scale, window_size_left)):
            assert into.stride(-1) == 1
            into.copy_(value)
        return torch.empty(0)

    wrapped = types.SimpleNamespace(_init_fn=_flash_attn_forward)  # torch.library.custom_op keeps the function so

    class Forward:
        _init_fn = staticmethod(wrapped._init_fn)

        def __call__(self, *args: Any, **keywords: Any) -> Any:
            return _flash_attn_forward(*args, **keywords)

    module._flash_attn_forward, module._flash_attn_backward = Forward(), _flash_attn_backward
    return module


FLASH3_FORWARD = (
    "fwd(Tensor q, Tensor k, Tensor v, Tensor(k_new!)? k_new = None, Tensor(v_new!)? v_new = None, Tensor? q_v = None, "
    "Tensor(out!)? out = None, Tensor? cu_seqlens_q = None, Tensor? cu_seqlens_k = None, Tensor? cu_seqlens_k_new = None, "
    "Tensor? seqused_q = None, Tensor? seqused_k = None, int? max_seqlen_q = None, int? max_seqlen_k = None, "
    "Tensor? page_table = None, Tensor? kv_batch_idx = None, Tensor? leftpad_k = None, Tensor? rotary_cos = None, "
    "Tensor? rotary_sin = None, Tensor? seqlens_rotary = None, Tensor? q_descale = None, Tensor? k_descale = None, "
    "Tensor? v_descale = None, float? softmax_scale = None, bool is_causal = False, int window_size_left = -1, "
    "int window_size_right = -1, int attention_chunk = 0, float softcap = 0.0, bool is_rotary_interleaved = False, "
    "Tensor? scheduler_metadata = None, int num_splits = 0, bool? pack_gqa = None, int sm_margin = 0) "
    "-> (Tensor(out!), Tensor, Tensor, Tensor)"
)
FLASH3_BACKWARD = (
    "bwd(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor softmax_lse, Tensor(dq!)? dq = None, "
    "Tensor(dk!)? dk = None, Tensor(dv!)? dv = None, Tensor? cu_seqlens_q = None, Tensor? cu_seqlens_k = None, "
    "Tensor? seqused_q = None, Tensor? seqused_k = None, int? max_seqlen_q = None, int? max_seqlen_k = None, "
    "float? softmax_scale = None, bool is_causal = False, int window_size_left = -1, int window_size_right = -1, "
    "float softcap = 0.0, bool deterministic = False, int sm_margin = 0) -> (Tensor, Tensor, Tensor, Tensor, Tensor)"
)


def flash3(library: torch.library.Library, calls: list[dict[str, Any]]) -> types.ModuleType:
    """What `import flash_attn_interface` registers: torch.ops.flash_attn_3."""
    library.define(FLASH3_FORWARD)
    library.define(FLASH3_BACKWARD)

    def fwd(q, k, v, *, softmax_scale, num_splits, window_size_left, window_size_right):
        assert num_splits == 1
        out, lse = _forward(q, k, v, softmax_scale, window_size_left, window_size_right)
        return out, lse, torch.empty(0), torch.empty(0)

    def positional(*args: Any) -> Any:
        """The dispatcher passes by position, without defaults at the end."""
        names = [a.name for a in torch.ops.flash_attn_3.fwd.default._schema.arguments]
        given = {n: a for n, a in zip(names, args) if a is not None}
        assert not given.pop("is_causal", False)
        for name in ("attention_chunk", "softcap", "is_rotary_interleaved", "sm_margin"):
            assert not given.pop(name, 0)
        sides = {"window_size_left": -1, "window_size_right": -1}
        return fwd(given.pop("q"), given.pop("k"), given.pop("v"), **{**sides, **given})

    def bwd(*args: Any) -> Any:
        names = [a.name for a in torch.ops.flash_attn_3.bwd.default._schema.arguments]
        given = dict(zip(names, args))
        calls.append({"deterministic": given.get("deterministic", False)})
        tensors = [given[n] for n in ("dout", "q", "k", "v", "out", "softmax_lse")]
        grads = _backward(*tensors, given["softmax_scale"], given.get("window_size_left", -1))
        for name, value in zip(("dq", "dk", "dv"), grads):
            given[name].copy_(value)
        return tuple(torch.empty(0) for _ in range(5))

    library.impl("fwd", positional, "CPU")
    library.impl("bwd", bwd, "CPU")
    return types.ModuleType("flash_attn_interface")


def flash4(calls: list[dict[str, Any]]) -> types.ModuleType:
    """flash_attn.cute.interface of flash-attn 4."""
    module = types.ModuleType("flash_attn.cute.interface")

    def _flash_attn_fwd(
        q, k, v, cu_seqlens_q=None, cu_seqlens_k=None, softmax_scale=None, causal=False, softcap=None, window_size_left=None,
        window_size_right=None, return_lse=False, out=None, lse=None,
    ):  # fmt: skip
        assert q.shape[-1] % 32 == 0
        assert return_lse
        return _forward(q, k, v, softmax_scale, -1, -1)

    def _flash_attn_bwd(q, k, v, out, dout, lse, softmax_scale=None, causal=False, softcap=0.0, deterministic=False):
        assert q.shape == out.shape == dout.shape
        assert q.shape[-1] % 32 == 0
        return _backward(dout, q, k, v, out, lse, softmax_scale, -1)

    module._flash_attn_fwd, module._flash_attn_bwd = _flash_attn_fwd, _flash_attn_bwd
    return module


def cudnn(monkeypatch: pytest.MonkeyPatch) -> None:
    """ATen's two functions, with the shapes their registered meta functions give."""

    def forward(query, key, value, attn_bias, compute_log_sumexp, dropout_p=0.0, is_causal=False, *, scale=None):
        assert attn_bias is None
        assert compute_log_sumexp
        out, lse = _forward(*(x.transpose(1, 2) for x in (query, key, value)), scale, -1, -1)
        return (out.transpose(1, 2), lse.unsqueeze(-1), *(None,) * 7)

    def backward(grad_out, query, key, value, out, logsumexp, *rest, scale=None):
        given = [x.transpose(1, 2) for x in (grad_out, query, key, value, out)]
        return tuple(x.transpose(1, 2) for x in _backward(*given, logsumexp.squeeze(-1), scale, -1))

    monkeypatch.setattr(libraries, "_cudnn", forward)
    monkeypatch.setattr(libraries, "_cudnn_backward", backward)
    monkeypatch.setattr(torch.backends.cudnn, "is_available", lambda: True)
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 91000)


@pytest.fixture
def fakes(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[dict[str, Any]]]:
    """All libraries present, and the CPU a device they run on; what their backwards were asked for. Torch is not asked for
    determinism, which some refuse."""
    strict = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(False)
    calls: list[dict[str, Any]] = []
    libraries.load.cache_clear()
    monkeypatch.setattr(libraries, "why_not_gpu", lambda device, what, majors: None)
    with torch.library._scoped_library("flash_attn_3", "DEF") as library:
        for name, module in (("flash2", flash2(calls)), ("flash3", flash3(library, calls)), ("flash4", flash4(calls))):
            monkeypatch.setitem(sys.modules, libraries.MODULES[name], module)
        cudnn(monkeypatch)
        yield calls
    torch.use_deterministic_algorithms(strict)
    libraries.load.cache_clear()


def _run(name: str, qkv: Tensor, window: int | None, upstream: Tensor) -> tuple[Tensor, Tensor]:
    qkv = qkv.detach().requires_grad_()
    with backend.use_backend(f"attention={name}"):
        out = attention(qkv, window=window)
    (grad,) = torch.autograd.grad(out, qkv, upstream.to(out.dtype))
    return out.detach(), grad


@pytest.mark.parametrize("d", [64, 88])
@pytest.mark.parametrize(("name", "window"), [*((n, None) for n in LIBRARIES), ("flash2", 3), ("flash3", 3)])
def test_libraries_are_called_as_they_want_to_be(fakes, name, window, d):
    qkv, upstream = torch.randn(2, 33, 3, 2, d).bfloat16(), torch.randn(2, 33, 2, d)
    ours, same, truth = (
        _run(n, x, window, upstream) for n, x in ((name, qkv), ("reference", qkv), ("reference", qkv.double()))
    )
    for what, a, b, t in zip(("out", "dqkv"), ours, same, truth):
        assert a.shape == b.shape
        assert a.is_contiguous()
        assert_within_budget(a, b, t, what)


@pytest.mark.parametrize("name", LIBRARIES)
def test_libraries_run_inside_a_compiled_program(fakes, name):
    qkv = torch.randn(1, 9, 3, 1, 64).bfloat16()
    traced = qkv.clone().requires_grad_()
    with backend.use_backend(f"attention={name}"):
        out = compiles(attention, traced)
    out.sum().backward()
    expected, grad = _run("reference", qkv, None, torch.ones(1, 9, 1, 64))
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(traced.grad, grad)


def test_aten_takes_the_arguments_for_cudnn():
    """The registered functions themselves, without data."""
    qkv = torch.empty(2, 33, 3, 4, 88, dtype=torch.bfloat16, device="meta")
    out, lse = libraries.cudnn_forward(qkv, 0.1, None, None)
    assert (out.shape, lse.shape, lse.dtype) == ((2, 33, 4, 88), (2, 4, 33), torch.float32)
    assert libraries.cudnn_backward(out, qkv, out, lse, 0.1, None, None).shape == qkv.shape


@pytest.mark.parametrize("name", ["flash2", "flash3"])
def test_deterministic_kernels_are_asked_for_where_torch_was(fakes, name):
    qkv, upstream = torch.randn(1, 5, 3, 1, 64).bfloat16(), torch.ones(1, 5, 1, 64)
    _run(name, qkv, None, upstream)
    torch.use_deterministic_algorithms(True)
    _run(name, qkv, None, upstream)
    for other in ("flash4", "cudnn"):
        with pytest.raises(backend.BackendError, match=f"{other}: .*no deterministic backward"):
            _run(other, qkv, None, upstream)
    assert [call["deterministic"] for call in fakes] == [False, True]


@pytest.mark.parametrize(
    ("name", "details", "message"),
    [
        ("flash2", (torch.float32, 64), "takes float16 and bfloat16, not float32"),
        ("flash2", (torch.bfloat16, 20), "multiples of 8 up to 256, not 20"),
        ("flash3", (torch.bfloat16, 264), "multiples of 8 up to 256, not 264"),
        ("flash4", (torch.bfloat16, 136), "multiples of 8 up to 128, not 136"),
        ("flash4", (torch.bfloat16, 64, 3), "no backward within a window"),
        ("flash2", (torch.bfloat16, 64, None, True), "lengths of packed sequences only"),
        ("cudnn", (torch.float32, 64), "takes float16 and bfloat16, not float32"),
        ("cudnn", (torch.bfloat16, 136), "multiples of 8 up to 128, not 136"),
        ("cudnn", (torch.bfloat16, 64, 3), "takes no window"),
        ("cudnn", (torch.bfloat16, 64, None, True), "takes no lengths"),
        ("cudnn", (torch.bfloat16, 64, None, False, 1), "more than one token"),
    ],
)
def test_refused_inputs(fakes, name, details, message):
    why = backend._OPS["attention"].implementations[name].why_not
    assert message in why(CPU, *details)
    assert why(CPU, torch.bfloat16, 88, None, False, 256) is None


@pytest.mark.parametrize("name", LIBRARIES)
def test_a_forced_backend_that_cannot_run_is_one_error(name):
    message = rf"attention: none of .*\({name}\).*{name}: .*cuda only, not on cpu.*Available"
    with backend.use_backend(f"attention={name}"), pytest.raises(backend.BackendError, match=message):
        attention(torch.zeros(1, 2, 3, 1, 64, dtype=torch.bfloat16))


def test_absent_libraries_say_how_to_get_them(monkeypatch):
    libraries.load.cache_clear()
    monkeypatch.setattr(libraries, "why_not_gpu", lambda device, what, majors: None)
    for name, module in libraries.MODULES.items():
        monkeypatch.setitem(sys.modules, module, None)
        monkeypatch.setitem(sys.modules, module.partition(".")[0], None)
        why = backend._OPS["attention"].implementations[name].why_not(CPU)
        assert why == f"{module} is not installed: {libraries.INSTALL[name]}"
    libraries.load.cache_clear()


def test_unusable_libraries_say_why(fakes, monkeypatch):
    why = backend._OPS["attention"].implementations["flash2"].why_not
    libraries.load.cache_clear()
    old = types.SimpleNamespace(_flash_attn_forward=lambda q, k, v, dropout_p, softmax_scale, causal, window_size: None)
    monkeypatch.setitem(sys.modules, libraries.MODULES["flash2"], old)
    assert "older than 2.7" in why(CPU)
    libraries.load.cache_clear()

    def broken(name: str) -> Any:
        raise OSError("undefined symbol: _ZN3c10")

    monkeypatch.setattr(libraries.importlib, "import_module", broken)
    assert why(CPU) == "flash_attn.flash_attn_interface cannot be imported: undefined symbol: _ZN3c10"


def test_unsupported_architectures_are_named(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (7, 5))
    assert "compute capability 9.x, not 7.x" in libraries.why_not_gpu(CUDA, "flash-attn 3", (9,))
    assert "8.x, 9.x" in libraries.why_not_cudnn(CUDA)
    assert libraries.why_not_gpu(CUDA, "ours", (7,)) is None


# The table of measured orders


def _entry(order: list[str], **changes: Any) -> dict[str, Any]:
    key = {"arch": "sm_90", "head_dim": 88, "upto": 2048, "dtype": "bfloat16", "direction": "forward"}
    return {**key, "device": "a card", "order": order, **changes}


@pytest.fixture
def measured(tmp_path, monkeypatch):
    """A table in a file, of the GPU that the CPU stands for: flash3 forward, flash2 backward."""
    monkeypatch.setattr(table, "PATH", tmp_path / "attention_table.json")
    monkeypatch.setattr(table, "architecture", lambda device: "sm_90")
    backward = _entry(["flash2", "reference"], direction="backward")
    table.write([_entry(["flash3", "flash4", "sdpa"]), backward])


def _pick(*details: Any) -> str:
    return backend.pick("attention", CPU, *details)


def test_the_measured_order_comes_before_the_documented_one(fakes, measured):
    case = (torch.bfloat16, 88, None, False, 2048)
    assert _pick(*case, "forward") == "flash3"
    assert _pick(*case, "backward") == "flash2"
    for other in (
        (torch.float16, *case[1:]), (torch.bfloat16, 64, *case[2:]), (*case[:2], 5, False, 2048), (*case[:3], True, 2048),
        (*case[:4], 256), (*case[:4], None),
    ):  # fmt: skip
        assert _pick(*other, "forward") == "sdpa"
    with backend.use_backend("attention=reference"):
        assert _pick(*case, "forward") == "reference"


def test_a_measured_backend_that_is_not_there_gives_way_to_the_next(fakes, measured, monkeypatch):
    monkeypatch.setitem(sys.modules, libraries.MODULES["flash3"], None)
    libraries.load.cache_clear()
    assert _pick(torch.bfloat16, 88, None, False, 2048, "forward") == "flash4"
    table.write([_entry(["gone", "flash3"])])
    assert _pick(torch.bfloat16, 88, None, False, 2048, "forward") == "sdpa"


def test_forward_and_backward_run_what_was_fastest_for_each(fakes, measured, monkeypatch):
    ran, run = [], backend.run
    monkeypatch.setattr(backend, "run", lambda op, name, *args: ran.append((op, name)) or run(op, name, *args))
    qkv = torch.randn(1, 1100, 3, 1, 88).bfloat16().requires_grad_()
    for function in (attention, functools.partial(compiles, attention)):
        out = function(qkv)
        with backend.use_backend("attention=sdpa"):  # what the forward resolved holds
            (grad,) = torch.autograd.grad(out.float().square().sum(), qkv)
        assert ran == [("attention", "flash3"), ("attention_backward", "flash2")]
        ran.clear()
    _, expected = _run("reference", qkv, None, 2 * out.detach().float())
    torch.testing.assert_close(grad, expected)


def test_the_report_says_what_the_order_rests_on(measured):
    text = backend._OPS["attention"].reason("cuda")
    assert "measured on a card (attention_table.json)" in text
    assert "bfloat16 head dim 88 up to 2048 tokens forward: flash3 > flash4 > sdpa" in text
    table.write([_entry(["sdpa"], arch="sm_100", upto=None)])
    assert "sm_100" not in backend._OPS["attention"].reason("cuda")


def test_an_unmeasured_card_keeps_the_documented_order(measured, monkeypatch):
    monkeypatch.setattr(table, "architecture", lambda device: "sm_80")
    assert backend._OPS["attention"].reason("cuda").startswith("sm_80 is not in attention_table.json: ATen's flash")
    assert table.measured_order(CUDA, torch.bfloat16, 88, None, False, 2048, "forward") is None


def test_the_table_of_the_package_is_readable_and_names_known_backends():
    for entry in table.read().values():
        assert set(entry["order"]) <= set(backend._OPS["attention"].implementations)
        assert entry["upto"] in (*table.LENGTHS, None)
        assert entry["direction"] in ("forward", "backward")


def test_writing_replaces_entries_of_the_same_key(tmp_path):
    path = tmp_path / "table.json"
    table.write([_entry(["a"]), _entry(["b"], arch="sm_80")], path)
    table.write([_entry(["c"])], path)
    assert sorted(entry["order"][0] for entry in table.read(path).values()) == ["b", "c"]
    assert [p.name for p in tmp_path.iterdir()] == ["table.json"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not a readable table"),
        ("[]", "not a table of attention backends of format 1"),
        (json.dumps({"format": 2, "entries": []}), "of format 1"),
        (json.dumps({"format": 1, "entries": [{"arch": "sm_90"}]}), "entry 0 must have arch, head_dim"),
    ],
)
def test_a_damaged_table_is_named(tmp_path, text, message):
    path = tmp_path / "table.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=rf"table\.json: .*{message}"):
        table.read(path)


def test_ranges_of_lengths():
    ends = {1: 1, 2: 256, 208: 256, 256: 256, 257: 1024, 1568: 2048, 4096: 4096, 4097: None}
    assert {n: table.length_range(n) for n in ends} == ends


@pytest.mark.cuda
@pytest.mark.parametrize("name", LIBRARIES)
@pytest.mark.parametrize(("n", "d"), [(208, 88), (65, 64)])
def test_libraries_on_a_gpu(name, n, d):
    details = (torch.bfloat16, d, None, False, table.length_range(n))
    if why := backend._OPS["attention"].implementations[name].why_not(CUDA, *details):
        pytest.skip(why)
    qkv, upstream = torch.randn(2, n, 3, 4, d).bfloat16(), torch.randn(2, n, 4, d)
    ours = _run(name, qkv.cuda(), None, upstream.cuda())
    same, truth = (_run("reference", x, None, upstream) for x in (qkv, qkv.double()))
    for what, a, b, t in zip(("out", "dqkv"), ours, same, truth):
        assert_within_budget(a.cpu(), b, t, what)


