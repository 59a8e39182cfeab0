"""Configs as JSON and back, every wrong key or type named."""

from __future__ import annotations

import dataclasses
import json
import types
import typing
from pathlib import Path
from typing import Any, Literal, Union

from .ava import AvaConfig
from .checks import require, unknown
from .clips import ClassifyConfig, DistillConfig, PretrainConfig
from .progression import Progression
from .tad import TadConfig

KINDS: dict[str, type] = {
    c.__name__: c for c in (PretrainConfig, ClassifyConfig, DistillConfig, AvaConfig, TadConfig, Progression)
}


def to_dict(config: Any) -> dict[str, Any]:
    """A config as plain JSON values, its class under `kind`."""
    out: dict[str, Any] = {"kind": type(config).__name__} if type(config).__name__ in KINDS else {}
    for f in dataclasses.fields(config):
        value = getattr(config, f.name)
        if dataclasses.is_dataclass(value):
            value = to_dict(value)
        elif isinstance(value, tuple):
            value = [to_dict(v) if dataclasses.is_dataclass(v) else v for v in value]
        out[f.name] = value
    return out


def from_dict(data: Any, cls: type | None = None) -> Any:
    """The inverse of `to_dict`. Raises ValueError naming an unknown or missing key, or one with a value of another type."""
    where = "a configuration" if cls is None else cls.__name__
    require(isinstance(data, dict), f"{where} must be an object, got {data!r}")
    data = dict(data)
    kind = data.pop("kind", None)
    if kind is not None:
        require(isinstance(kind, str) and kind in KINDS, unknown("config kind", str(kind), list(KINDS)))
        require(cls is None or cls is KINDS[kind], f"kind: {where} was expected, got {kind!r}")
        cls = KINDS[kind]
    if cls is None:
        raise ValueError(f"missing key 'kind'; there are: {', '.join(sorted(KINDS))}")
    hints = typing.get_type_hints(cls)
    fields = {f.name: f for f in dataclasses.fields(cls)}
    for key in data:
        require(key in fields, f"{cls.__name__}: {unknown('key', str(key), list(fields))}")
    for key, f in fields.items():
        optional = f.default is not dataclasses.MISSING or f.default_factory is not dataclasses.MISSING
        require(optional or key in data, f"{cls.__name__}: missing key {key!r}")
    return cls(**{key: _decode(f"{cls.__name__}.{key}", value, hints[key]) for key, value in data.items()})


_PLAIN: dict[Any, tuple[tuple[type, ...], str]] = {
    bool: ((bool,), "true or false"),
    int: ((int,), "a whole number"),
    float: ((int, float), "a number"),
    str: ((str,), "a string"),
}


def _decode(name: str, value: Any, hint: Any) -> Any:
    """A JSON value as the type `hint` asks for: a union of dataclasses or X | None, Literal, tuple, dataclass, plain."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (Union, types.UnionType):
        options = [a for a in arguments if a is not type(None)]
        if value is None and len(options) < len(arguments):
            return None
        if len(options) == 1:
            return _decode(name, value, options[0])
        require(isinstance(value, dict), f"{name}: must be an object, got {value!r}")
        decoded = from_dict(value)
        kinds = [option.__name__ for option in options]
        require(type(decoded) in options, f"{name}: must be one of {', '.join(kinds)}, got {type(decoded).__name__}")
        return decoded
    if origin is Literal:
        require(value in arguments, f"{name}: must be one of {', '.join(map(repr, arguments))}, got {value!r}")
        return value
    if origin is tuple:
        require(isinstance(value, (list, tuple)), f"{name}: must be a list, got {value!r}")
        count = None if arguments[-1] is Ellipsis else len(arguments)
        require(count is None or len(value) == count, f"{name}: must be a list of {count}, got {value!r}")
        return tuple(_decode(name, item, arguments[0 if count is None else i]) for i, item in enumerate(value))
    if dataclasses.is_dataclass(hint):
        require(isinstance(value, dict), f"{name}: must be an object, got {value!r}")
        return from_dict(value, hint)  # type: ignore[arg-type]
    allowed, words = _PLAIN[hint]
    # by exact type: a bool is an int to Python, not to whoever writes a configuration
    require(type(value) in allowed, f"{name}: must be {words}, got {value!r}")
    return value


def save(config: Any, path: str | Path) -> None:
    Path(path).write_text(json.dumps(to_dict(config), indent=2) + "\n")


def load(path: str | Path) -> Any:
    """Read a config written by `save`. Raises ValueError naming the file."""
    try:
        return from_dict(json.loads(Path(path).read_text()))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: not a run configuration: {error}") from error
