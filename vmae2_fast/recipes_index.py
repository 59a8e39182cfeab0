"""Finding recipes: public functions of `vmae2_fast.recipes.*` (or of a file of yours) that return a run configuration."""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import inspect
import pkgutil
import sys
import typing
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import tyro

from .config import KINDS, Progression, Stage, unknown

Recipe = Callable[..., Any]
Options = typing.TypeVar("Options")


def _in_module(module: ModuleType) -> dict[str, Recipe]:
    found = {}
    for name, function in vars(module).items():
        own = inspect.isfunction(function) and function.__module__ == module.__name__ and not name.startswith("_")
        if own and typing.get_type_hints(function).get("return") in KINDS.values():
            found[name] = function
    return found


def all_recipes() -> dict[str, Recipe]:
    """`module:function` -> function, for every installed recipe."""
    from . import recipes

    out = {}
    for info in sorted(pkgutil.iter_modules(recipes.__path__), key=lambda i: i.name):
        if info.name.startswith("_"):
            continue
        module = importlib.import_module(f"{recipes.__name__}.{info.name}")
        out.update({f"{info.name}:{name}": function for name, function in _in_module(module).items()})
    return out


def find(name: str) -> Recipe:
    """A recipe by `module:function`, by `function` where only one has that name, or by `path/to/file.py:function`.

    Raises ValueError with close matches.
    """
    path, colon, function = name.rpartition(":")
    if colon and path.endswith(".py"):
        return _from_file(Path(path), function)
    known = all_recipes()
    if name in known:
        return known[name]
    short = [full for full in known if full.partition(":")[2] == name]
    if len(short) == 1:
        return known[short[0]]
    raise ValueError(unknown("recipe", name, list(known)) + "; `vmae2 recipes` lists them")


def _from_file(path: Path, function: str) -> Recipe:
    if not path.is_file():
        raise ValueError(f"{path}: no such recipe file")
    spec = importlib.util.spec_from_file_location(f"vmae2_recipe_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[module.__name__] = module  # dataclasses of the file look their annotations up there
    spec.loader.exec_module(module)
    found = _in_module(module)
    if not found:
        raise ValueError(f"{path}: no function says by its return annotation that it returns one of {', '.join(KINDS)}")
    if function not in found:
        raise ValueError(f"{path}: {unknown('recipe', function, list(found))}")
    return found[function]


def table() -> list[dict[str, str]]:
    return [
        {"name": name, "about": (function.__doc__ or "").strip().splitlines()[0]} for name, function in all_recipes().items()
    ]


def listing() -> str:
    rows = table()
    width = max(len(row["name"]) for row in rows)
    return "\n".join(f"  {row['name']:<{width}}  {row['about']}" for row in rows)


def with_options(
    arguments: list[str], options: type[Options], prog: str, parse: Callable[..., Any]
) -> tuple[Stage | Progression, Options]:
    """`RECIPE [flags]`: the recipe's run with flags applied, and the command's own `options` among the flags."""
    name, *rest = arguments
    recipe = find(name)
    prog = f"{prog} {name}"
    helped = any(a in ("-h", "--help") for a in rest)
    rest = [a for a in rest if a not in ("-h", "--help")]
    chosen, rest = parse(options, rest, prog, return_unknown_args=True)
    made, rest = parse(recipe, rest, prog, return_unknown_args=True)
    return override(made, [*rest, "--help"] if helped else rest, prog, parse), chosen


def override(run: Stage | Progression, arguments: list[str], prog: str, parse: Callable[..., Any]) -> Any:
    """`run` with flags applied: `--optim.lr 3e-4`, for a stage of a progression `--STAGE.optim.lr 3e-4`."""
    if not isinstance(run, Progression):
        return parse(tyro.conf.AvoidSubcommands[type(run)], arguments, prog, default=run)  # type: ignore[misc]
    fields: list[Any] = [(stage.name, type(stage), dataclasses.field(default=stage)) for stage in run.stages]
    stages = dataclasses.make_dataclass("Stages", fields, frozen=True, kw_only=True)
    changed = parse(tyro.conf.AvoidSubcommands[stages], arguments, prog)  # type: ignore[misc, valid-type]
    return dataclasses.replace(run, stages=tuple(getattr(changed, stage.name) for stage in run.stages))
