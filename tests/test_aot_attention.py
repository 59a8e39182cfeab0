"""Every shipped attention configuration compiled to machine code without a GPU: tensor cores, resources, wide accesses.

For sm_90, or with VMAE2_AOT=all for every architecture of the plan. Compiles in a process of its own, without
TRITON_INTERPRET: which kind a kernel is, is decided when it is defined. A result is kept under the hash of all it depends on.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest

triton = pytest.importorskip("triton")

ROOT = Path(__file__).resolve().parents[1]
SHARED_KIB = {80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99}  # that a block can have
TENSOR_CORE = {90: "HGMMA", 100: "UTCHMMA"}  # wgmma, tcgen05; elsewhere mma.sync, HMMA
ARCHS = list(SHARED_KIB) if os.environ.get("VMAE2_AOT") == "all" else [90]


def _compile(folder: str, arch: int, position: int) -> dict[str, Any]:
    from vmae2_fast.ops._attention_triton import aot_configurations

    name, kernel, signature, constants, warps, stages = aot_configurations(arch)[position]
    parts = [name, kernel.cache_key, signature, constants, warps, stages, arch, triton.__version__, Path(__file__).read_text()]
    kept = Path(folder) / f"{hashlib.sha256(repr(parts).encode()).hexdigest()}.json"
    if not kept.exists():
        aligned = {(i,): [["tt.divisibility", 16]] for i, kind in enumerate(signature.values()) if kind.startswith("*")}
        source = triton.compiler.ASTSource(kernel, signature, constants, aligned)
        target = triton.backends.compiler.GPUTarget("cuda", arch, 32)
        binary = triton.compile(source, target=target, options={"num_warps": warps, "num_stages": stages})
        cubin = kept.with_suffix(".cubin")
        cubin.write_bytes(binary.asm["cubin"])
        found = {"name": name, "arch": arch, "warps": warps, "shared": binary.metadata.shared, **_read(cubin)}
        cubin.unlink()
        part = kept.with_suffix(f".{os.getpid()}")
        part.write_text(json.dumps(found))
        part.replace(kept)
    return json.loads(kept.read_text())


def _read(cubin: Path) -> dict[str, Any]:
    """Registers, spills, and how often which instruction occurs."""
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    environment = {**os.environ, "PATH": f"{tools}{os.pathsep}{os.environ['PATH']}"}

    def dump(option: str) -> str:
        command = [str(tools / "cuobjdump"), option, str(cubin)]
        return subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout

    usage, sass = dump("-res-usage"), dump("-sass")
    registers, stack = (int(re.search(rf"{what}:(\d+)", usage)[1]) for what in ("REG", "STACK"))

    def count(pattern: str) -> int:
        return len(re.findall(pattern, sass))

    return {
        "registers": registers,
        "spills": stack + count(r"\b(?:STL|LDL)\b"),
        "mma": {instruction: count(rf"\b{instruction}\b") for instruction in ("HMMA", "HGMMA", "UTCHMMA")},
        "load": count(r"\bLD(?:G|GSTS)\.E\S*\.128\b"),
        "narrow_load": count(r"\bLD(?:G|GSTS)\.E\S*\.(?:U8|S8|U16|S16)\b"),
        "store": count(r"\bSTG\.E\S*\.128\b"),
        "narrow_store": count(r"\bSTG\.E\S*\.(?:U8|S8|U16|S16)\b"),
    }


def main(folder: str, *archs: str) -> None:
    from vmae2_fast.ops._attention_triton import aot_configurations

    work = [(folder, int(arch), i) for arch in archs for i in range(len(aot_configurations(int(arch))))]
    with ProcessPoolExecutor(os.cpu_count(), get_context("spawn")) as pool:
        for result in pool.map(_compile, *zip(*work)):
            print(json.dumps(result), flush=True)


@pytest.fixture(scope="module")
def compiled(pytestconfig: pytest.Config) -> list[dict]:
    assert pytestconfig.cache is not None
    folder = pytestconfig.cache.mkdir("aot_attention")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-m", "tests.test_aot_attention", str(folder), *map(str, ARCHS)],
        cwd=ROOT,
        env={**environment, "TRITON_CACHE_DIR": str(folder / "triton")},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    kernels = [json.loads(line) for line in done.stdout.splitlines()]
    print(f"\n{'kernel':48} arch warps registers spills shared KB  tensor core instructions")
    for k in kernels:
        mma = " ".join(f"{count} {name}" for name, count in k["mma"].items() if count) or "none"
        print(
            f"{k['name']:48} {k['arch']:4} {k['warps']:5} {k['registers']:9} {k['spills']:6} {k['shared'] / 1024:9.1f}  {mma}"
        )
    return kernels


def test_every_head_dim_and_kernel_is_compiled(compiled: list[dict]) -> None:
    for arch in ARCHS:
        names = {tuple(k["name"].split("/")[1:3]) for k in compiled if k["arch"] == arch}
        kernels = ("forward", "backward_queries", "backward_keys")
        assert names >= {(kernel, d) for kernel in kernels for d in ("64", "80", "88", "96", "128")}
    assert len({(k["name"], k["arch"]) for k in compiled}) == len(compiled)


def test_resources(compiled: list[dict]) -> None:
    for k in compiled:
        assert k["spills"] == 0, k
        assert k["registers"] <= 255, k
        assert k["registers"] * 32 * k["warps"] <= 65536, k
        assert k["shared"] <= SHARED_KIB[k["arch"]] * 1024, k


def test_half_precision_runs_on_the_best_tensor_core_and_float32_on_none(compiled: list[dict]) -> None:
    for k in compiled:
        best = TENSOR_CORE.get(k["arch"], "HMMA")
        wanted = {best} if "bfloat16" in k["name"] else set()
        assert {name for name, count in k["mma"].items() if count} == wanted, k


def test_global_accesses_are_of_128_bits(compiled: list[dict]) -> None:
    """Matrices 128 bits at a time; log-sum-exp and delta are single words, so narrower ones than these show a mistake."""
    for k in compiled:
        assert k["load"] > 0, k
        assert k["store"] > 0, k
        assert (k["narrow_load"], k["narrow_store"]) == (0, 0), k


if __name__ == "__main__":
    main(*sys.argv[1:])
