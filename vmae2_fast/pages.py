"""Reports as single HTML files: Jinja2 templates beside this file, pictures inside the page."""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

from .train.pictures import missing
from .whole import write_whole

__all__ = ["embedded", "missing", "write_page"]

_KINDS = {".png": "image/png", ".gif": "image/gif"}


def embedded(picture: Path) -> str:
    """A PNG or GIF as the address of an image."""
    return f"data:{_KINDS[picture.suffix]};base64,{base64.b64encode(picture.read_bytes()).decode()}"


def write_page(path: Path, template: str, **values: Any) -> Path:
    """Fill a template and write the page, which takes the place of an earlier one at once."""
    from jinja2 import Environment, FileSystemLoader

    pages = Environment(autoescape=True, loader=FileSystemLoader(Path(__file__).parent), trim_blocks=True)
    text = pages.get_template(template).render(**values)
    write_whole(path, lambda temporary: temporary.write_text(text))
    return path
