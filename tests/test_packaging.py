"""Real builds from a copy of the sources: what a wheel holds, that it runs elsewhere, what happens without a compiler."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from tests.support import NO_EDITABLE
from vmae2_fast import backend

ROOT = Path(__file__).resolve().parents[1]
SOURCES = ["setup.py", "pyproject.toml", "CMakeLists.txt", "MANIFEST.in", "README.md", "CHANGELOG.md", "constraints.txt"]
SOURCES += ["csrc", "vmae2_fast", "recipes", "benchmarks"]
SOURCES += [p.name for pattern in ("*LICENSE*", "THIRD_PARTY*") for p in ROOT.glob(pattern)]


def copy_sources(to: Path) -> Path:
    to.mkdir()
    ignore = shutil.ignore_patterns("__pycache__", "*.so", "*.pyd")
    for name in SOURCES:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, to / name, ignore=ignore)
        else:
            shutil.copy2(source, to / name)
    return to


def files(root: Path) -> set[str]:
    return {str(p.relative_to(root)) for p in root.rglob("*") if p.is_file()}


def build(tree: Path, out: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """`pip wheel` of a source tree with what is installed; verbose, so that the build's own words can be read."""
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "-v",
        "--no-build-isolation",
        "--no-deps",
        "--no-index",
        "-w",
        str(out),
        str(tree),
    ]
    # Whether nvcc is there, and what is optimised, changes minutes of compiling and nothing that these tests look at.
    clean = {k: v for k, v in os.environ.items() if k != "VMAE2_NATIVE"}
    clean |= {"VMAE2_CUDA": "OFF", "CMAKE_BUILD_TYPE": "Debug"}
    return subprocess.run(command, env={**clean, **environment}, capture_output=True, text=True)


def install(wheel: Path, target: Path) -> None:
    subprocess.run(
        [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-index", "--target", str(target), str(wheel)],
        check=True,
    )


def run(target: Path, code: str, cwd: Path) -> str:
    """What `code` prints in a fresh interpreter that sees the installed copy and nothing of the source tree."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("VMAE2_")}
    done = subprocess.run(
        [sys.executable, "-c", NO_EDITABLE + code],
        env={**environment, "PYTHONPATH": str(target)},
        cwd=cwd,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def nowhere(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """An environment without any compiler."""
    return {"PATH": str(tmp_path_factory.mktemp("empty")), "CXX": "/nonexistent/c++"}


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory, nowhere: dict[str, str]) -> tuple[Path, set[str], set[str]]:
    """A wheel, the files of its source tree and those the build left there; native where this environment's package is."""
    folder = tmp_path_factory.mktemp("built")
    tree = copy_sources(folder / "tree")
    before = files(tree)
    done = build(tree, folder / "out", **({"VMAE2_NATIVE": "require"} if backend.native() else nowhere))
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = (folder / "out").iterdir()
    return wheel, before, files(tree) - before


def contents(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


def test_wheel_holds_the_package_and_nothing_else(built: tuple[Path, set[str], set[str]]) -> None:
    names = contents(built[0])
    expected = {f for f in built[1] if f.startswith("vmae2_fast/")}  # data files included: one left out breaks at run time
    expected |= {
        f"vmae2_fast/{f}" for f in built[1] if f.startswith(("recipes/", "benchmarks/")) and f.endswith((".py", ".json"))
    }
    package = {n for n in names if ".dist-info/" not in n}
    extension = {n for n in package if n.startswith("vmae2_fast/_C.")}
    assert package - extension == expected
    assert len(extension) == (backend.native() is not None)
    assert any(n.endswith("LICENSE") for n in names)


def test_build_leaves_only_ignored_files(built: tuple[Path, set[str], set[str]]) -> None:
    ignored = (ROOT / ".gitignore").read_text().split()
    tops = {Path(f).parts[0] for f in built[2]}
    assert tops <= {"build", "vmae2_fast.egg-info"}
    assert {"build/", "*.egg-info/"} <= set(ignored)


def test_metadata_pins_nothing(built: tuple[Path, set[str], set[str]]) -> None:
    """No exact version: installing never replaces a torch (or anything) that is new enough."""
    with zipfile.ZipFile(built[0]) as archive:
        (name,) = (n for n in archive.namelist() if n.endswith(".dist-info/METADATA"))
        text = archive.read(name).decode()
        scripts = archive.read(name.replace("METADATA", "entry_points.txt")).decode()
    requirements = [Requirement(line.partition(":")[2]) for line in text.splitlines() if line.startswith("Requires-Dist:")]
    assert all(s.operator == ">=" for r in requirements for s in r.specifier)
    plain = {r.name: r for r in requirements if "extra" not in str(r.marker)}
    assert set(plain) == {"torch", "triton", "numpy", "safetensors", "av", "pebble", "tyro", "tqdm", "tomli"}
    assert plain["torch"].specifier.contains(metadata.version("torch"), prereleases=True)
    assert "sys_platform == 'linux'" in str(plain["triton"].marker).replace('"', "'")
    assert "vmae2 = vmae2_fast.cli:main" in scripts


RUN_AN_OP = """
import torch, vmae2_fast
from vmae2_fast import backend
from vmae2_fast.ops import gather_patches
rows = gather_patches(torch.full((1, 2, 4, 4, 3), 255, dtype=torch.uint8), torch.zeros(1, 1, dtype=torch.int32), patch=4)
print(vmae2_fast.__file__)
print(tuple(rows.shape), backend.pick("gather_patches", torch.device("cpu")), backend.environment()["native"] is not None)
"""


def test_installed_package_runs_from_another_directory(built: tuple[Path, set[str], set[str]], tmp_path: Path) -> None:
    install(built[0], tmp_path / "site")
    native = backend.native() is not None
    output = run(tmp_path / "site", RUN_AN_OP, tmp_path).splitlines()
    assert output[0].startswith(str(tmp_path / "site"))
    assert output[1] == f"(1, 1, 96) {'native' if native else 'reference'} {native}"
    recipes = sorted(p.stem for p in (ROOT / "recipes").glob("*.py") if p.stem != "__init__")
    imports = (
        "".join(f"import vmae2_fast.recipes.{name}\n" for name in recipes)
        + "import vmae2_fast.benchmarks; print(vmae2_fast.benchmarks.__file__)"
    )
    assert run(tmp_path / "site", imports, tmp_path).startswith(str(tmp_path / "site"))
    assert files(tmp_path) == {f for f in files(tmp_path) if f.startswith("site/")}, "running it wrote beside itself"


def test_without_a_compiler_it_installs_and_says_so(tmp_path: Path, nowhere: dict[str, str]) -> None:
    tree = copy_sources(tmp_path / "tree")
    done = build(tree, tmp_path / "out", **nowhere)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "no C++ compiler found" in done.stdout + done.stderr
    (wheel,) = (tmp_path / "out").iterdir()
    assert not [n for n in contents(wheel) if "/_C." in n]
    install(wheel, tmp_path / "site")
    assert run(tmp_path / "site", RUN_AN_OP, tmp_path).splitlines()[1] == "(1, 1, 96) reference False"


def test_without_a_compiler_require_fails(tmp_path: Path, nowhere: dict[str, str]) -> None:
    done = build(copy_sources(tmp_path / "tree"), tmp_path / "out", VMAE2_NATIVE="require", **nowhere)
    assert done.returncode != 0
    assert "VMAE2_NATIVE=require, but no C++ compiler was found" in done.stdout + done.stderr


def break_source(tree: Path) -> None:
    source = tree / "csrc" / "bindings.cpp"
    source.write_text("this is no C++\n" + source.read_text())


def break_cmake(tree: Path) -> None:
    (tree / "CMakeLists.txt").write_text("no_such_command()\n")


@pytest.mark.skipif(backend.native() is None, reason="needs a C++ compiler")
@pytest.mark.parametrize("damage", [break_source, break_cmake])
def test_a_build_error_fails_the_install(damage: Callable[[Path], None], tmp_path: Path) -> None:
    tree = copy_sources(tmp_path / "tree")
    damage(tree)
    done = build(tree, tmp_path / "out", MAX_JOBS="1")  # one by one: stops at the first error
    assert done.returncode != 0
    assert "building the native extension failed" in done.stdout + done.stderr
    assert not list((tmp_path / "out").glob("*.whl"))
