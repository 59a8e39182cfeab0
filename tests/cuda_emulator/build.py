"""Builds the extension with csrc/cuda compiled for the emulator beside this file: a `_C` whose CUDA ops run on host memory.

Kept under build/ by the hash of what goes into it, so only the first run after a change compiles.
"""

from __future__ import annotations

import fcntl
import hashlib
import importlib.util
import os
import shlex
import shutil
import subprocess
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parents[2]
HERE = Path(__file__).resolve().parent
FLAGS = [
    "-std=c++17", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off", "-pthread", "-fopenmp",
    "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas",
    "-fno-strict-aliasing",  # vectors of 16 bytes lie over arrays, as CUDA allows
    "-DVMAE2_WITH_CUDA", '-DVMAE2_VERSION="emulated"', '-DVMAE2_FLAGS="emulated"',
]  # fmt: skip
PLAIN = ("-O1",)
SANITIZED = ("-O1", "-g", "-fno-omit-frame-pointer", "-fsanitize=address,undefined", "-fno-sanitize-recover=all")


def compiler() -> list[str] | None:
    """The C++ compiler to use, as the package's build looks for it, or None."""
    given = shlex.split(os.environ.get("CXX", "c++"))
    return given if shutil.which(given[0]) else next(([n] for n in ("g++", "clang++") if shutil.which(n)), None)


def build(options: tuple[str, ...] = PLAIN) -> Path:
    """Path of the built module. Raises RuntimeError with the compiler's words if it does not compile."""
    import pybind11

    cxx = compiler()
    if cxx is None:
        raise RuntimeError("no C++ compiler found")
    include = [HERE, ROOT / "csrc", pybind11.get_include(), sysconfig.get_paths()["include"]]
    command = [*cxx, *FLAGS, *options, *(f"-I{folder}" for folder in include)]
    csrc, suffixes = ROOT / "csrc", (".h", ".cpp", ".cu", ".cuh")
    inputs = sorted(f for folder in (csrc, HERE) for f in folder.rglob("*") if f.suffix in suffixes and f.stem != "selftest")
    digest = hashlib.sha256(repr(command).encode())
    for file in inputs:
        digest.update(file.read_bytes())
    target = ROOT / "build" / "emulator" / digest.hexdigest()[:16]
    module = target / f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"
    target.parent.mkdir(parents=True, exist_ok=True)
    with (target.parent / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # of several test processes one compiles, on all cores
        if not module.exists():
            _compile(command, [*cxx, "-shared", "-pthread", "-fopenmp", *options], inputs, module)
    return module


def _compile(command: list[str], link: list[str], inputs: list[Path], module: Path) -> None:
    target = module.parent
    scratch = target.with_name(f"{target.name}.{os.getpid()}")  # a module is complete or absent
    scratch.mkdir()
    sources = [f for f in inputs if f.suffix in (".cpp", ".cu")]

    def compiled(number: int) -> str:
        source, obj = sources[number], str(scratch / f"{number}.o")
        # C++ kernels are there to be linked; only the sanitizers' build runs them.
        quick = ["-O0"] if source.suffix == ".cpp" and not any(o.startswith("-fsanitize") for o in command) else []
        _run([*command, *quick, "-x", "c++", "-c", str(source), "-o", obj])
        return obj

    try:
        with ThreadPoolExecutor(int(os.environ.get("MAX_JOBS", os.cpu_count() or 1))) as pool:
            objects = list(pool.map(compiled, range(len(sources))))
        _run([*link, *objects, "-o", str(scratch / module.name)])
        target.mkdir(exist_ok=True)
        (scratch / module.name).replace(module)
    finally:
        shutil.rmtree(scratch)


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{shlex.join(command)}\n{done.stderr}")


def load(path: Path) -> ModuleType:
    """The module at `path`; the interpreter's own `_C` stays what it is."""
    spec = importlib.util.spec_from_file_location("vmae2_fast_emulated._C", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
