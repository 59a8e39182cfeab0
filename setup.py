"""Builds vmae2_fast._C by CMake and lays recipes/ and benchmarks/ into the package. All else is in pyproject.toml.

Environment: VMAE2_NATIVE=off builds no extension, =require makes a missing C++ compiler an error (otherwise the package is
installed without it and runs on its reference path); VMAE2_CUDA=OFF leaves out the CUDA kernels, =require makes a missing
nvcc an error, VMAE2_CUDA_ARCHS ("80-real;90") names their architectures; CXX and MAX_JOBS as usual.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
COMPILERS = ("c++", "g++", "clang++", "icpx", "CC")


def compiler() -> str | None:
    """The C++ compiler that CMake will use, or None."""
    names = [shlex.split(os.environ["CXX"])[0]] if os.environ.get("CXX") else COMPILERS
    return next(filter(None, map(shutil.which, names)), None)


def tool(name: str) -> str | None:
    """A build tool from PATH, or beside the running interpreter where an environment is used without being activated."""
    return shutil.which(name) or shutil.which(name, path=sysconfig.get_path("scripts"))


class CMakeBuild(build_ext):
    def run(self) -> None:
        wish = os.environ.get("VMAE2_NATIVE", "auto")
        if wish == "off":
            self.extensions = []
        elif compiler() is None:
            sought = os.environ.get("CXX") or ", ".join(COMPILERS)
            if wish == "require":
                raise SystemExit(f"vmae2_fast: VMAE2_NATIVE=require, but no C++ compiler was found (looked for {sought})")
            line = "!" * 100
            print(
                f"{line}\nvmae2_fast: no C++ compiler found (looked for {sought}).\n"
                "Installing WITHOUT the native extension: every op will run its much slower reference implementation.\n"
                f"Install a compiler (Debian/Ubuntu: apt install g++) and install vmae2_fast again.\n{line}",
                file=sys.stderr,
            )
            self.extensions = []
        super().run()

    def build_extension(self, ext: Extension) -> None:
        import pybind11

        cmake, ninja = tool("cmake"), tool("ninja")
        if cmake is None:
            raise SystemExit("vmae2_fast: a C++ compiler is there, but cmake is not; pip install cmake ninja pybind11")
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        build = Path(self.build_temp).resolve() / "cmake"
        build.mkdir(parents=True, exist_ok=True)
        target.parent.mkdir(parents=True, exist_ok=True)
        configure = [
            cmake,
            "-S", str(ROOT),
            "-B", str(build),
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={target.parent}",
            f"-DVMAE2_VERSION={self.distribution.get_version()}",
            f"-DVMAE2_CUDA={os.environ.get('VMAE2_CUDA', 'ON')}",
        ]  # fmt: skip
        if archs := os.environ.get("VMAE2_CUDA_ARCHS"):
            configure.append(f"-DCMAKE_CUDA_ARCHITECTURES={archs}")
        if ninja:
            configure += ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}"]
        jobs = os.environ.get("MAX_JOBS") or str(os.cpu_count() or 1)
        for command in (configure, [cmake, "--build", str(build), "--parallel", jobs]):
            try:
                subprocess.run(command, check=True)
            except (OSError, subprocess.CalledProcessError) as error:
                raise SystemExit(
                    f"vmae2_fast: building the native extension failed ({error}). The messages above say why; "
                    "VMAE2_NATIVE=off installs without it."
                ) from error


setup(
    packages=[*find_packages(include=["vmae2_fast", "vmae2_fast.*"]), "vmae2_fast.recipes", "vmae2_fast.benchmarks"],
    package_dir={"vmae2_fast.recipes": "recipes", "vmae2_fast.benchmarks": "benchmarks"},
    ext_modules=[Extension("vmae2_fast._C", sources=[])],
    cmdclass={"build_ext": CMakeBuild},
)
