"""Backend requests: parsing, errors, forward's choice in backward, native tensors checked before their address is taken."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from tests.support import NO_EDITABLE
from vmae2_fast import backend
from vmae2_fast.ops import _native, decoder_tokens, gather_patches, reconstruction_loss, roi_align_max, scatter_patches
from vmae2_fast.ops.attention import attention
from vmae2_fast.ops.mlp import norm_mlp
from vmae2_fast.ops.norm import norm_qkv, residual_norm

CPU = torch.device("cpu")
ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def toy() -> Iterator[str]:
    """An op of three implementations: `far` cannot run, `near` and `reference` can."""
    backend.register_op(
        "toy",
        {
            "far": backend.Implementation(lambda: "far", lambda device: f"no {device.type} here"),
            "near": backend.Implementation(lambda: "near"),
            "reference": backend.Implementation(lambda: "reference"),
        },
        {"cpu": ("far", "near", "reference"), "*": ("reference",)},
    )
    yield "toy"
    del backend._OPS["toy"]
    backend._environment_text.cache_clear()
    backend._from_environment.cache_clear()
    backend.forget_choices()


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """(op, backend) of every run, in order."""
    names: list[tuple[str, str]] = []
    run = backend.run

    def recorded(op: str, name: str, *args: object) -> object:
        names.append((op, name))
        return run(op, name, *args)

    monkeypatch.setattr(backend, "run", recorded)
    return names


def _compiled_steps() -> dict[str, tuple[Callable[[torch.Tensor], torch.Tensor], torch.Tensor]]:
    index = torch.tensor([[0, 3]], dtype=torch.int32)
    clip = torch.rand(1, 3, 4, 8, 8)
    boxes = torch.tensor([[0.0, 1.0, 1.0, 6.0, 6.0]])

    def patches(x: torch.Tensor) -> torch.Tensor:
        rows = gather_patches(x, index, patch=4, order="pixel")
        return reconstruction_loss(rows, clip, index, patch=4) + scatter_patches(rows, index, grid=(2, 2, 2), patch=4).sum()

    def decoder(x: torch.Tensor) -> torch.Tensor:
        return decoder_tokens(x, x[:, :1], torch.ones(8, 8), index, index + 1).sum()

    def boxed(x: torch.Tensor) -> torch.Tensor:
        return roi_align_max(x, boxes, size=2, scale=1.0).sum()

    def block(x: torch.Tensor) -> torch.Tensor:
        gain, weight, lengths = torch.ones(8), torch.eye(8), torch.tensor([3])
        x, qkv = norm_qkv(x, x, None, None, gain, gain, 1e-6, weight.repeat(3, 1), None, None)
        out = attention(qkv.unflatten(2, (3, 1, 8)), window=1, lengths=lengths).flatten(2)
        x, out = norm_mlp(x, out, None, None, gain, gain, 1e-6, weight, None, weight, None)
        return residual_norm(x, out, None, None, gain, gain, 1e-6)[1].square().sum()

    return {
        "patches": (patches, clip), "decoder": (decoder, torch.rand(1, 2, 8)), "boxes": (boxed, torch.rand(1, 8, 8, 4)),
        "block": (block, torch.rand(1, 4, 8)),
    }  # fmt: skip


@pytest.mark.parametrize("name", _compiled_steps())
def test_compiled_backward_runs_what_its_forward_ran(ran: list[tuple[str, str]], name: str) -> None:
    """Also under a request made after the first call, which ends before the backward."""
    function, value = _compiled_steps()[name]
    torch._dynamo.reset()
    compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
    runs = []
    for request in ("", "reference", ""):
        ran.clear()
        with backend.use_backend(request):
            expected = {op: backend.pick(op.removesuffix("_backward"), CPU) for op in backend.ops()}
            out = compiled(value.clone().requires_grad_())
        forward = len(ran)
        out.backward()
        assert 0 < forward < len(ran)
        assert all(expected[op] == used for op, used in ran), ran
        runs.append(list(ran))
    assert runs[0] == runs[2]


def test_default_is_the_first_that_runs(toy: str) -> None:
    assert backend.pick(toy, CPU) == "near"
    assert backend.pick(toy, torch.device("meta")) == "reference"
    assert backend.available(toy, CPU) == ["near", "reference"]
    assert backend.refusals(toy, "cpu") == {"far": "no cpu here", "near": None, "reference": None}


@pytest.mark.parametrize(
    ("request_", "picked"),
    [
        ("reference", "reference"),
        ("far,reference", "reference"),
        ("reference, near", "reference"),
        ("native,reference", "reference"),
        ("near,toy=reference", "reference"),
        ("toy=far+near", "near"),
        ("dual_mask=reference", "near"),
        ("", "near"),
    ],
)
def test_request(toy: str, request_: str, picked: str) -> None:
    with backend.use_backend(request_):
        assert backend.pick(toy, CPU) == picked
        assert backend.run(toy, backend.pick(toy, CPU)) == picked
    assert backend.pick(toy, CPU) == "near"


def test_nothing_left_is_an_error_that_names_what_runs(toy: str) -> None:
    with (
        backend.use_backend("toy=far"),
        pytest.raises(backend.BackendError, match=r"toy.*far: no cpu here.*Available: near, reference"),
    ):
        backend.pick(toy, CPU)


@pytest.mark.parametrize(
    ("request_", "message"),
    [("fast", "unknown backend 'fast'"), ("tyo=reference", "unknown op 'tyo'"), ("toy=sdpa", "toy has no backend 'sdpa'")],
)
def test_unknown_names(toy: str, request_: str, message: str) -> None:
    with pytest.raises(backend.BackendError, match=message), backend.use_backend(request_):
        pass


def test_environment_variable(toy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VMAE2_BACKEND", "reference")
    backend._environment_text.cache_clear()
    backend._from_environment.cache_clear()
    assert backend.pick(toy, CPU) == "reference"
    with backend.use_backend("near"):
        assert backend.pick(toy, CPU) == "near"
    monkeypatch.setenv("VMAE2_BACKEND", "nothing")
    assert backend.pick(toy, CPU) == "reference"  # read once
    backend._environment_text.cache_clear()
    backend._from_environment.cache_clear()
    backend.forget_choices()
    with pytest.raises(backend.BackendError, match="unknown backend 'nothing'"):
        backend.pick(toy, CPU)


def test_choices_are_remembered_unless_they_rest_on_a_switch(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.use_deterministic_algorithms takes effect on the next call, also with a choice made before."""
    flag: list[str] = []
    asked: list[str] = []

    def why_not(device: torch.device) -> str | None:
        asked.append("")
        return flag[0] if flag else None

    monkeypatch.setattr(backend, "_OPS", dict(backend._OPS))
    for name, remember in (("kept", True), ("asked", False)):
        implementations = {"near": backend.Implementation(str, why_not), "reference": backend.Implementation(str)}
        backend.register_op(name, implementations, {"*": ("near", "reference")}, remember=remember)
    try:
        assert [backend.pick(name, CPU) for name in ("kept", "kept", "asked", "asked")] == ["near"] * 4
        assert len(asked) == 3
        flag.append("deterministic algorithms are wanted")
        assert [backend.pick(name, CPU) for name in ("kept", "asked")] == ["near", "reference"]
        backend.forget_choices()
        assert backend.pick("kept", CPU) == "reference"
    finally:
        backend.forget_choices()
    assert not backend._OPS["attention"].remember
    assert not backend._OPS["attention_backward"].remember


def test_request_reaches_other_threads(toy: str) -> None:
    seen = []
    with backend.use_backend("reference"):
        thread = threading.Thread(target=lambda: seen.append(backend.pick(toy, CPU)))
        thread.start()
        thread.join()
    assert seen == ["reference"]


@pytest.mark.parametrize("name", backend.available("gather_patches", "cpu"))
def test_backward_runs_what_forward_ran(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    ran = []
    run = backend.run
    monkeypatch.setattr(backend, "run", lambda op, chosen, *arguments: ran.append((op, chosen)) or run(op, chosen, *arguments))
    clip = torch.randn(1, 3, 2, 4, 4, requires_grad=True)
    with backend.use_backend(name):
        rows = gather_patches(clip, torch.tensor([[0, 3]]), patch=2)
    with backend.use_backend("reference"):
        rows.sum().backward()
    assert ran == [("gather_patches", name), ("scatter_patches", name)]


def test_every_op_has_a_reference_on_every_device() -> None:
    assert backend.ops()
    for op in backend.ops():
        assert "reference" in backend.available(op, "cpu")
        assert backend.available(op, "meta")


@pytest.mark.parametrize(
    ("wish", "code", "expected"), [("off", 0, "None"), ("auto", 0, "None"), ("require", 1, "VMAE2_NATIVE=require")]
)
def test_native_wish(wish: str, code: int, expected: str) -> None:
    """With the extension hidden from import, as on a machine without a compiler."""
    script = "import sys; sys.modules['vmae2_fast._C'] = None\nfrom vmae2_fast import backend; print(backend.native())"
    done = subprocess.run(
        [sys.executable, "-c", script], env={**os.environ, "VMAE2_NATIVE": wish}, capture_output=True, text=True
    )
    assert done.returncode == code
    assert expected in done.stdout + done.stderr


def test_without_the_extension_ops_run_and_say_why() -> None:
    script = (
        "import torch; from vmae2_fast import backend; from vmae2_fast.ops import gather_patches\n"
        "clip, index = torch.zeros(1, 2, 4, 4, 3, dtype=torch.uint8), torch.zeros(1, 1, dtype=torch.int32)\n"
        "print(gather_patches(clip, index, patch=4).shape[2])\n"
        "print(backend.environment()['ops']['gather_patches']['cpu'])"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], env={**os.environ, "VMAE2_NATIVE": "off"}, capture_output=True, text=True, check=True
    )
    assert done.stdout.startswith("96\n")
    assert "'runs': 'reference'" in done.stdout
    assert "VMAE2_NATIVE=off" in done.stdout


def _why_not_native(folder, wish: str, broken: str | None) -> subprocess.CompletedProcess[str]:
    """`why_not_native` of a copy of the package's Python files, with `broken` as the text of its extension."""
    shutil.copytree(ROOT / "vmae2_fast", folder / "vmae2_fast", ignore=shutil.ignore_patterns("*.so", "*.pyd", "__pycache__"))
    if broken is not None:
        (folder / "vmae2_fast" / f"_C{EXTENSION_SUFFIXES[0]}").write_text(broken)
    script = NO_EDITABLE + "import torch; from vmae2_fast import backend; print(backend.why_not_native(torch.device('cpu')))"
    environment = {**os.environ, "VMAE2_NATIVE": wish, "PYTHONPATH": str(folder)}
    return subprocess.run([sys.executable, "-c", script], env=environment, cwd=folder, capture_output=True, text=True)


def test_an_extension_that_cannot_be_imported_is_told_from_one_not_built(tmp_path) -> None:
    absent = _why_not_native(tmp_path / "absent", "", None).stdout
    assert absent == "vmae2_fast._C was not built (no C++ compiler at install time)\n"
    broken = _why_not_native(tmp_path / "broken", "auto", "not a shared library").stdout
    assert broken.startswith("vmae2_fast._C cannot be imported: ")
    assert "_C" in broken.partition("imported: ")[2]
    assert "not built" not in broken


def test_an_unknown_native_wish_names_the_known_ones(tmp_path) -> None:
    done = _why_not_native(tmp_path, "on", None)
    assert done.returncode == 1
    assert "BackendError: VMAE2_NATIVE=on is unknown; it must be auto, require or off" in done.stderr


@pytest.mark.parametrize("request_", ["triton", "gather_patches=triton"])
def test_triton_on_the_cpu_runs_only_in_its_interpreter(request_: str, monkeypatch: pytest.MonkeyPatch) -> None:
    clip, index = torch.zeros(1, 2, 4, 4, 3, dtype=torch.uint8), torch.zeros(1, 1, dtype=torch.int32)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    message = r"gather_patches: none of the requested backends.*triton: .*TRITON_INTERPRET=1.*Available: .*reference"
    with backend.use_backend(request_), pytest.raises(backend.BackendError, match=message):
        gather_patches(clip, index, patch=4)
    with backend.use_backend(f"{request_}" + ("+reference" if "=" in request_ else ",reference")):
        assert gather_patches(clip, index, patch=4).shape == (1, 1, 96)


@pytest.mark.skipif(backend.native() is None, reason="no native extension")
def test_build_info() -> None:
    info = backend.native().build_info()
    assert set(info) == {"version", "compiler", "openmp", "flags", "cpu_features", "cpu_isa", "cuda"}
    assert info["cpu_isa"] in backend.native().supported_cpu_isas()
    assert info["cuda"] == backend.native().cuda_available()
    assert "-O3" in info["flags"]


def test_environment_report_is_plain_data() -> None:
    import json

    report = backend.environment()
    assert json.loads(json.dumps(report)) == report
    assert set(report["ops"]) == {op for op in backend.ops() if not op.endswith("_backward")}


class Subclass(torch.Tensor):
    pass


def test_address_checks() -> None:
    floats = (torch.float32,)
    plain = torch.zeros(4, 4)
    assert _native.address(plain, floats, "x") == plain.data_ptr()
    assert _native.address(torch.nn.Parameter(plain), floats, "x") == plain.data_ptr()
    with pytest.raises(TypeError, match=r"toy: x: dtype must be one of torch\.float32, got torch\.float64"):
        _native.address(plain.double(), floats, "toy: x")
    with pytest.raises(ValueError, match="must be contiguous"):
        _native.address(plain.T[:2], floats, "x")
    with pytest.raises(TypeError, match="plain dense tensors, got Subclass"):
        _native.address(plain.as_subclass(Subclass), floats, "x")
    with pytest.raises(TypeError, match="plain dense tensors"):
        _native.address(plain.to_sparse(), floats, "x")
    with pytest.raises(TypeError, match="plain dense tensors, got FakeTensor"), FakeTensorMode():
        _native.address(torch.empty(2), floats, "x")
