"""What a measurement must say of where it was made (machine, processor flags, versions, commit), and its record on disk."""

from __future__ import annotations

import contextlib
import json
import os
import platform
import re
import subprocess
from pathlib import Path
from typing import Any

import torch

FLAGS = ("sse4_2", "avx", "avx2", "fma", "f16c", "asimd", "bf16", "sve")  # and everything that begins with avx512, avx_ or amx


def repo_root() -> Path:
    """The checkout the command was started in: the nearest folder upwards with `benchmarks/results`, else this one."""
    here = Path.cwd()
    return next((p for p in (here, *here.parents) if (p / "benchmarks" / "results").is_dir()), here)


def commit(repo: Path) -> str:
    """VMAE2_COMMIT, or what git says, `-dirty` if files differ, or `unknown` (an exported tree)."""
    if os.environ.get("VMAE2_COMMIT"):
        return os.environ["VMAE2_COMMIT"]
    git = ["git", "-C", str(repo), "describe", "--always", "--abbrev=40", "--dirty", "--exclude=*"]
    try:
        return subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _cpuinfo(key: str) -> str | None:
    with contextlib.suppress(OSError):  # Linux names the processor
        found = re.search(rf"^{key}\s*:\s*(.*)", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
        return found.group(1) if found else None
    return None


def cpu_flags() -> list[str]:
    """Vector and matrix instructions this process sees, as Linux names them; empty where /proc does not tell."""
    seen = (_cpuinfo("flags") or _cpuinfo("Features") or "").split()
    return sorted(flag for flag in set(seen) if flag in FLAGS or flag.startswith(("avx512", "avx_", "amx")))


def machine(device: torch.device) -> dict[str, Any]:
    cpu = _cpuinfo("model name") or platform.processor() or platform.machine()
    out: dict[str, Any] = {
        "cpu": cpu, "cpu_flags": cpu_flags(), "cores": os.cpu_count(), "threads": torch.get_num_threads(),
        "load": list(os.getloadavg()) if hasattr(os, "getloadavg") else None, "platform": platform.platform(),
    }  # fmt: skip
    if device.type == "cuda":
        p = torch.cuda.get_device_properties(device)
        out |= {"gpu": p.name, "gpu_memory": p.total_memory, "multiprocessors": p.multi_processor_count}
        out["capability"] = f"{p.major}.{p.minor}"
    return out


def versions() -> dict[str, Any]:
    from importlib import metadata

    out: dict[str, Any] = {"python": platform.python_version(), "torch": torch.__version__, "cuda": torch.version.cuda}
    for name in ("vmae2-fast", "triton", "numpy", "pytest"):
        try:
            out[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            out[name] = None
    return out


def write(path: Path, record: dict[str, Any]) -> None:
    """Whole or not at all: a killed run must not leave half a result that the next one would take for done."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(record, indent=1, allow_nan=False) + "\n")
    os.replace(temporary, path)


def read(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
