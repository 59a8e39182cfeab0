"""`make sanitize`: the native kernels under AddressSanitizer and UndefinedBehaviorSanitizer.

C++ and the emulated CUDA kernels are compiled with both, and the tests of their ops run against them. The first report
ends the run with its stack and a failure. Needs GCC's sanitizer libraries, which come with g++.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from tests.cuda_emulator import build, emulated

SHARED = [f"tests/ops/test_{op}.py" for op in ("masks", "patches", "reconstruction", "norm", "resize", "roi_align", "misuse")]
"""Tests of all backends."""
NATIVE = "native or emulated or not (triton or reference)"
"""Which of these are run: those of a native kernel, and those of no one backend."""
OWN = [f"tests/ops/test_{op}.py" for op in ("cuda_kernels", "cpu_isa")]
"""Tests of native kernels only."""


def library(cxx: list[str], name: str) -> str:
    path = subprocess.run([*cxx, f"-print-file-name={name}"], capture_output=True, text=True, check=True).stdout.strip()
    if not Path(path).is_absolute():
        raise SystemExit(f"make sanitize: {cxx[0]} has no {name}; it needs GCC with its sanitizer libraries (CXX=g++)")
    return path


def main() -> int:
    cxx = build.compiler()
    if cxx is None:
        raise SystemExit("make sanitize: no C++ compiler found")
    preload = " ".join(library(cxx, name) for name in ("libasan.so", "libubsan.so"))
    build.build(build.SANITIZED)
    environment = {
        **os.environ,
        emulated.SANITIZE: "1",
        "LD_PRELOAD": preload,  # before the interpreter, which is not instrumented
        "ASAN_OPTIONS": "detect_leaks=0",  # the interpreter frees little at its end
        "UBSAN_OPTIONS": "print_stacktrace=1",
    }
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-s", "-p", "no:cacheprovider", "-m", "not cuda"]
    command += ["-n", "auto", "--maxprocesses", "4"]
    for chosen in ([*OWN], ["-k", NATIVE, *SHARED]):
        rc = subprocess.run([*command, *chosen, *sys.argv[1:]], env=environment).returncode
        if rc:
            return rc
    return 0


if __name__ == "__main__":
    sys.exit(main())
