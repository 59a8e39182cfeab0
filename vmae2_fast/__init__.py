"""vmae2_fast: dual-masked video autoencoding with custom kernels.

    import vmae2_fast as vf
    model = vf.create_model("vit_base_patch16_224", weights="weights.safetensors")

Names are loaded at first use, so that importing the package stays light and needs no optional dependency.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# Where each public name lives; None: the name is a module of its own.
_LAZY = {
    "config": None,
    "ops": None,
    "environment": "backend",
    "use_backend": "backend",
    "create_model": "models",
    "build_model": "models",
    "load_weights": "models",
    "save_weights": "models",
    "export_model": "export",
    "VideoLoader": "data",
    "EvaluationLoader": "data",
}

__all__ = ["__version__", *_LAZY]

if TYPE_CHECKING:
    from . import config as config
    from . import ops as ops
    from .backend import environment as environment
    from .backend import use_backend as use_backend
    from .data import EvaluationLoader as EvaluationLoader
    from .data import VideoLoader as VideoLoader
    from .export import export_model as export_model
    from .models import build_model as build_model
    from .models import create_model as create_model
    from .models import load_weights as load_weights
    from .models import save_weights as save_weights

# In a source checkout recipes/ and benchmarks/ lie beside the package; installed, they lie inside it.
_beside = Path(__file__).resolve().parent.parent
if not Path(__file__).with_name("recipes").exists() and (_beside / "recipes" / "__init__.py").is_file():
    __path__.append(str(_beside))


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = _LAZY[name]
    value = importlib.import_module(f"{__name__}.{module or name}")
    if module is not None:
        value = getattr(value, name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY})
