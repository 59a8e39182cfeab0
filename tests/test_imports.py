"""Imports point down the stairs only, and no optional dependency is needed to import anything."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "vmae2_fast"

# What each floor may import of ours, besides itself. Files of the package's root that are no floor (the command line and
# what it prints) stand at the top and may import everything.
BESIDE = {"backend", "config", "sharded", "whole"}
BELOW = {
    "config": set(),
    "whole": set(),
    "sharded": set(),
    "backend": {"_C"},
    "ops": {"backend", "_C"},
    "models": {"ops", *BESIDE},
    "data": {"ops", *BESIDE},
    "tasks": {"models", "data", "ops", *BESIDE},
    "train": {"tasks", "models", "data", "ops", *BESIDE},
}
SOFT = [
    "triton",
    "av",
    "nvidia.dali",
    "matplotlib",
    "jinja2",
    "tensorboard",
    "flash_attn",
    "apex",
    "torchao",
    "huggingface_hub",
]
SOFT += ["submitit", "timm", "torchvision", "onnx", "onnxscript", "onnxruntime"]


def imported(file: Path) -> set[str]:
    """First component below vmae2_fast of every import in a file, wherever it stands; "" for the package itself."""
    package = ("vmae2_fast", *file.relative_to(PACKAGE).parent.parts)
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join((*base, *([node.module] if node.module else [])))
            names = [f"{module}.{alias.name}" for alias in node.names] if module == "vmae2_fast" else [module]
        found |= {name.split(".")[1] if "." in name else "" for name in names if name.split(".")[0] == "vmae2_fast"}
    return found


@pytest.mark.parametrize("floor", BELOW)
def test_imports_point_down(floor: str) -> None:
    files = sorted((PACKAGE / floor).rglob("*.py")) or [PACKAGE / f"{floor}.py"]
    allowed = {floor, *BELOW[floor]}
    upward = {str(f.relative_to(ROOT)): sorted(imported(f) - allowed) for f in files}
    assert not {f: names for f, names in upward.items() if names}


def test_only_ops_and_backend_touch_the_extension() -> None:
    users = {
        f.relative_to(PACKAGE).parts[0] for f in PACKAGE.rglob("*.py") if "_C" in imported(f) or "extension()" in f.read_text()
    }
    assert users <= {"ops", "backend.py"}


def test_one_binding_file_and_no_torch_in_csrc() -> None:
    files = [f for f in (ROOT / "csrc").rglob("*") if f.suffix in (".h", ".cpp", ".cu", ".cuh")]
    included = {f.name: [line for line in f.read_text().splitlines() if line.startswith("#include")] for f in files}
    assert [name for name, lines in included.items() if any("pybind11" in line or "Python.h" in line for line in lines)] == [
        "bindings.cpp"
    ]
    assert not [
        name for name, lines in included.items() if any("torch" in line or "ATen" in line or "c10" in line for line in lines)
    ]


def modules() -> list[str]:
    """Every module of the package and its recipes; not the ones that run on import, nor Triton kernels, which ops import
    when they are first asked for."""
    inside = [f.relative_to(ROOT) for f in PACKAGE.rglob("*.py")]
    recipes = [Path("vmae2_fast") / f.relative_to(ROOT) for f in (ROOT / "recipes").rglob("*.py")]
    names = {".".join(f.with_suffix("").parts).removesuffix(".__init__") for f in inside + recipes}
    kernels = ("_triton", "._triton_launch", "._attention_kernels")
    return sorted(name for name in names if not name.endswith(("__main__", *kernels)))


def test_everything_imports_without_any_soft_dependency() -> None:
    """All optional dependencies blocked at once, PyAV and triton among them: torch's own optional use of triton included."""
    script = f"""
import importlib, sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if any(name == soft or name.startswith(soft + ".") for soft in {SOFT!r}):
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Block())
for name in {modules()!r}:
    importlib.import_module(name)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr


def test_import_loads_no_soft_dependency() -> None:
    script = "import sys, torch; before = set(sys.modules); import vmae2_fast; print(*sorted(set(sys.modules) - before))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT, check=True)
    loaded = done.stdout.split()
    assert "vmae2_fast" in loaded
    assert not set(loaded) & set(SOFT)


def test_public_names() -> None:
    script = "import vmae2_fast as vf; print([n for n in vf.__all__ if getattr(vf, n, None) is None])"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.strip() == "[]"
