"""Every shipped Triton configuration compiled to machine code without a GPU: resources, wide accesses, no fused roundings.

With VMAE2_AOT=all (`make aot`) for every architecture of the plan that the installed Triton targets; else for sm_90, and of
attention, whose kernels take longest, head dim 88 in bfloat16 alone.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ALL = os.environ.get("VMAE2_AOT") == "all"
if not ALL:  # make aot without Triton is a failure
    pytest.importorskip("triton")

ROOT = Path(__file__).resolve().parents[1]
SHARED_KIB = {80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99}  # that a block can have
TENSOR_CORE = {90: "HGMMA", 100: "UTCHMMA"}  # wgmma, tcgen05; elsewhere mma.sync, HMMA
ARCHS = list(SHARED_KIB) if ALL else [90]
PATTERN = "" if ALL else "(?!attention )|attention 88 bfloat16 sm_"
HEAD_DIMS = ("64", "80", "88", "96", "128") if ALL else ("88",)

# Bits of the widest load and store that a layout allows: lines and rows that start on 16-byte boundaries.
WIDE = [
    (r"gather_patches uint8 1x16x224x224x3 ", 128, 128),
    (r"gather_patches float\d+ \S+ -> float\d+ conv patch 2x16", 128, 128),
    (r"gather_patches \S*float\d+ ", 32, 128),
    (r"scatter_patches \S+ conv patch 2x16", 128, 128),
    (r"scatter_patches float32 pixel patch 2x16", 32, 128),
    (r"reconstruction_loss .*/loss_kernel", 128, 32),
    (r"reconstruction_loss .*/gradient_kernel", 128, 128),
    (r"decoder_tokens .*/assemble_kernel", 128, 128),
    (r"decoder_tokens_backward .*/column_sum_kernel 1", 128, 32),
    (r"residual_norm ", 128, 128),
    (r"residual_norm_backward ", 128, 128),
    (r"attention ", 128, 128),
]


@pytest.fixture(scope="module")
def compiled(pytestconfig: pytest.Config) -> list[dict]:
    assert pytestconfig.cache is not None
    folder = pytestconfig.cache.mkdir("aot")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-m", "tests.aot_compile", str(folder), PATTERN, *map(str, ARCHS)],
        cwd=ROOT,
        env={**environment, "TRITON_CACHE_DIR": str(folder / "triton")},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    kernels = [json.loads(line) for line in done.stdout.splitlines()]
    print(f"\n{'kernel':104} arch warps registers spills shared load store tensor core")
    for k in kernels:
        print(
            f"{k['name']:104} {k['arch']:4} {k['warps']:5} {k['registers']:9} {k['spills']:6} {k['shared']:6} "
            f"{k['load']:4} {k['store']:5} {' '.join(f'{count} {name}' for name, count in k['mma'].items() if count)}"
        )
    return kernels


def test_every_module_of_kernels_is_compiled(compiled: list[dict]) -> None:
    assert {k["module"] for k in compiled} == {file.stem for file in (ROOT / "vmae2_fast" / "ops").glob("_*_triton.py")}
    names = {k["name"].split()[0].split("/")[0] for k in compiled}
    patches = {"gather_patches", "scatter_patches", "reconstruction_loss"}
    assert {"dual_mask", *patches, "decoder_tokens", "residual_norm", "residual_norm_backward", "attention"} <= names
    assert {k["arch"] for k in compiled} == set(ARCHS)
    assert len({(k["name"], k["arch"]) for k in compiled}) == len(compiled)


def test_resources(compiled: list[dict]) -> None:
    for k in compiled:
        assert k["spills"] == 0, k
        assert k["registers"] <= 255, k
        assert k["registers"] * 32 * k["warps"] <= 65536, k
        assert k["shared"] <= SHARED_KIB[k["arch"]] * 1024, k


def test_accesses_are_as_wide_as_the_layout_allows(compiled: list[dict]) -> None:
    for k in compiled:
        for pattern, load, store in WIDE:
            if re.match(pattern, k["name"]):
                assert (k["load"] >= load, k["store"] >= store) == (True, True), k
                break
    for pattern, *_ in WIDE:
        assert any(re.match(pattern, k["name"]) for k in compiled), pattern


def test_attention_in_half_precision_runs_on_the_best_tensor_core_and_float32_on_none(compiled: list[dict]) -> None:
    attention = [k for k in compiled if k["name"].startswith("attention ")]
    kernels = ("forward", "backward_queries", "backward_keys")
    for arch in ARCHS:
        there = {(k["name"].split()[1], k["name"].split("/")[1]) for k in attention if k["arch"] == arch}
        assert there == {(d, kernel) for d in HEAD_DIMS for kernel in kernels}
    for k in attention:
        best = TENSOR_CORE.get(k["arch"], "HMMA")
        wanted = {best} if " bfloat16 " in k["name"] else set()
        assert {name for name, count in k["mma"].items() if count} == wanted, k
        assert k["narrow"] == 0, k  # log-sum-exp and delta are single words: narrower ones show a mistake


def test_normalisation_rounds_twice(compiled: list[dict]) -> None:
    """`x*scale + shift` has the reference's bits only without a fused multiply-add."""
    gathers = [k for k in compiled if k["name"].startswith("gather_patches")]
    assert gathers
    assert all(k["fused"] == 0 for k in gathers)
