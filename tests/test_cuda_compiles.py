"""Every CUDA source compiles for the architectures of a build, within their limits and without a spilled register.

`make aot` prints the table. Compiled results are kept under build/ by the hash of the sources and the compiler.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
from dataclasses import asdict, dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SOURCES = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))
ARCHITECTURES = ("sm_80", "sm_90")
REGISTERS_OF_A_BLOCK = 65536
LARGEST_BLOCK = 512  # threads of any launch
STATIC_SHARED = 48 << 10  # also the most that a launch may ask for without raising the kernel's limit
NVCC = shutil.which("nvcc")


@dataclass(frozen=True)
class Kernel:
    name: str
    registers: int
    shared: int
    """Static bytes; the kernels take theirs at launch."""
    spilled: int
    """Bytes stored and loaded."""
    stack: int


def parse(text: str) -> list[Kernel]:
    """The kernels of `nvcc -Xptxas -v`'s report."""
    kernels = []
    for part in text.split("Compiling entry function '")[1:]:
        stack, stores, loads = map(
            int, re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", part).groups()
        )
        registers = int(re.search(r"Used (\d+) registers", part).group(1))
        shared = re.search(r"(\d+) bytes smem", part)
        kernels.append(
            Kernel(part[: part.index("'")], registers, int(shared.group(1)) if shared else 0, stores + loads, stack)
        )
    return kernels


def demangled(names: list[str]) -> list[str]:
    tool = shutil.which("c++filt")
    if tool is None:
        return names
    text = subprocess.run([tool], input="\n".join(names), capture_output=True, text=True, check=True).stdout
    plain = text.replace("(anonymous namespace)::", "").replace("vmae2::cuda::", "")
    return [re.sub(r"^void |\(.*", "", line) for line in plain.splitlines()]


def compiled(source: Path, architecture: str) -> list[Kernel]:
    assert NVCC is not None, "make aot compiles the CUDA sources: nvcc is not on PATH"
    command = [NVCC, "-std=c++17", "-O3", f"-arch={architecture}", "-Xptxas", "-v", "-c", "-o", "/dev/null", str(source)]
    version = subprocess.run([NVCC, "--version"], capture_output=True, text=True, check=True).stdout
    digest = hashlib.sha256(repr((command, version)).encode())
    headers = [f for f in (ROOT / "csrc").rglob("*") if f.suffix in (".h", ".cuh")]
    for file in (source, *sorted(headers)):
        digest.update(file.read_bytes())
    kept = ROOT / "build" / "cuda" / f"{source.stem}-{architecture}-{digest.hexdigest()[:16]}.json"
    if not kept.exists():
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert "warning" not in done.stderr, done.stderr
        kept.parent.mkdir(parents=True, exist_ok=True)
        kept.write_text(json.dumps([asdict(kernel) for kernel in parse(done.stderr)]))
    return [Kernel(**item) for item in json.loads(kept.read_text())]


@pytest.mark.skipif(NVCC is None and os.environ.get("VMAE2_AOT") != "all", reason="nvcc not found")
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.name)
def test_compiles_within_the_limits(source: Path, architecture: str) -> None:
    kernels = compiled(source, architecture)
    assert kernels
    print(f"\n{source.name} for {architecture}\n{'registers':>10}{'shared':>8}{'spilled':>9}{'stack':>7}  kernel")
    for kernel, name in zip(kernels, demangled([kernel.name for kernel in kernels]), strict=True):
        print(f"{kernel.registers:10}{kernel.shared:8}{kernel.spilled:9}{kernel.stack:7}  {name}")
    for kernel in kernels:
        assert kernel.spilled == 0, kernel
        assert kernel.stack == 0, kernel
        assert kernel.registers * LARGEST_BLOCK <= REGISTERS_OF_A_BLOCK, kernel
        assert kernel.shared <= STATIC_SHARED, kernel


def test_every_family_has_both_implementations() -> None:
    host = {f.stem for f in (ROOT / "csrc" / "cpu").glob("*.cpp")}
    assert SOURCES
    assert {f.stem for f in SOURCES} <= host
