"""Compile every Triton configuration the package ships, for devices that need not be there, and read the machine code.

    python -m tests.aot_compile CACHE_DIR PATTERN ARCH...   # one JSON object a line: name, arch, registers, spills, ...

PATTERN is a regular expression for the beginning of the names of what is compiled.
Runs without TRITON_INTERPRET, in a process of its own: which kind a kernel is, is decided when it is defined. A result is
kept in CACHE_DIR under the hash of all that it depends on.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from vmae2_fast import ops

WIDTHS = {"U8": 8, "S8": 8, "U16": 16, "S16": 16, "64": 64, "128": 128}


def configurations() -> list[tuple[str, tuple[Any, ...]]]:
    """The `aot_configurations()` of all modules of Triton kernels, in the order of their names, each with its module's."""
    names = sorted(file.stem for file in Path(ops.__path__[0]).glob("_*_triton.py"))
    modules = {name: importlib.import_module(f"vmae2_fast.ops.{name}") for name in names}
    return [(name, configuration) for name, module in modules.items() for configuration in module.aot_configurations()]


def _attributes(signature: dict[str, Any]) -> tuple[dict[str, Any], dict[tuple[int, ...], list[list[Any]]]]:
    """The signature without its `:16` marks, and what they and aligned pointers say to the compiler."""
    plain, marks = {}, {}
    for position, (name, kind) in enumerate(signature.items()):
        plain[name] = kind
        if isinstance(kind, str):
            plain[name], _, divisor = kind.partition(":")
            if divisor or kind.startswith("*"):
                marks[(position,)] = [["tt.divisibility", 16]]
    return plain, marks


def _compile(configuration: tuple[Any, ...], arch: int) -> dict[str, Any]:
    name, kernel, signature, constexprs, warps, stages, options, _ = configuration
    plain, marks = _attributes(signature)
    source = ASTSource(kernel, plain, constexprs, marks)
    options = {"num_warps": warps, "num_stages": stages, **options}
    binary = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    return {"name": name, "arch": arch, "warps": warps, "shared": binary.metadata.shared, **_read(binary)}


def _read(binary: Any) -> dict[str, Any]:
    """Resources and memory accesses of a compiled kernel."""
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    environment = {**os.environ, "PATH": f"{tools}{os.pathsep}{os.environ['PATH']}"}
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(binary.asm["cubin"])
        cubin.flush()
        usage, sass = (
            subprocess.run(
                [str(tools / "cuobjdump"), option, cubin.name], env=environment, check=True, capture_output=True, text=True
            ).stdout
            for option in ("-res-usage", "-sass")
        )
    registers, stack = (int(re.search(rf"{what}:(\d+)", usage)[1]) for what in ("REG", "STACK"))

    def widest(instruction: str) -> int:
        found = re.findall(rf"\b{instruction}\.E(\S*)", sass)
        return max((next((WIDTHS[p] for p in suffix.split(".") if p in WIDTHS), 32) for suffix in found), default=0)

    return {
        "registers": registers,
        "spills": stack + len(re.findall(r"\b(?:STL|LDL)\b", sass)),
        "load": widest("LDG(?:STS)?"),
        "store": widest("STG"),
        "narrow": len(re.findall(r"\b(?:LDG|LDGSTS|STG)\.E\S*\.[US](?:8|16)\b", sass)),
        "mma": {name: len(re.findall(rf"\b{name}\b", sass)) for name in ("HMMA", "HGMMA", "UTCHMMA")},
        "fused": len(re.findall(r"\bfma\.", binary.asm["ptx"])),
    }


# Of this process: kernels do not travel between processes, positions in the list do.
_all: list[tuple[str, tuple[Any, ...]]] = []


def _start() -> None:
    _all.extend(configurations())


def _one(arguments: tuple[str, int, int]) -> dict[str, Any]:
    folder, position, arch = arguments
    module, configuration = _all[position]
    name, kernel, *rest = configuration
    key = json.dumps([name, kernel.cache_key, repr(rest), arch, triton.__version__, Path(__file__).read_text()])
    kept = Path(folder) / f"{hashlib.sha256(key.encode()).hexdigest()}.json"
    if not kept.exists():
        kept.parent.mkdir(parents=True, exist_ok=True)
        part = kept.with_suffix(f".{os.getpid()}")
        part.write_text(json.dumps(_compile(configuration, arch)))
        part.replace(kept)
    result: dict[str, Any] = json.loads(kept.read_text())
    return {"module": module, **result}


def main(folder: str, pattern: str, *archs: str) -> None:
    _start()
    work = [
        (folder, position, int(arch))
        for position, (_, configuration) in enumerate(_all)
        for arch in archs
        if re.match(pattern, configuration[0]) and (not configuration[-1] or int(arch) in configuration[-1])
    ]
    with ProcessPoolExecutor(os.cpu_count(), get_context("spawn"), _start) as pool:
        for result in pool.map(_one, work):
            print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
