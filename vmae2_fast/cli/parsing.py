"""Command lines into calls: flags from signatures and dataclasses, errors as one line, lists of commands."""

from __future__ import annotations

import contextlib
import functools
import io
import re
from collections.abc import Callable
from typing import Any

import tyro


class FaultsFoundError(ValueError):
    """What a command was to look for is there: it ends with exit code 2, and with `--json` in its result all the same."""

    def __init__(self, message: str, result: dict[str, Any]) -> None:
        super().__init__(message)
        self.result = result


def parse(target: Any, arguments: list[str], prog: str, **options: Any) -> Any:
    """tyro's parser, its help as it is, its errors as one ValueError line."""
    out = io.StringIO()
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
            return tyro.cli(target, args=arguments, prog=prog, **options)
    except SystemExit as stop:
        if not stop.code:
            print(out.getvalue())
            raise
        raise ValueError(_one_line(out.getvalue())) from None


def _one_line(box: str) -> str:
    """The message of tyro's error box: its first part, then the flags it offers instead."""
    lines = [re.sub(r"[-─]{4,}", "", line.strip("│|╭╮╰╯+ ")).strip() for line in box.splitlines()]
    text = re.split("For full helptext|Argument helptext", " ".join(line for line in lines[1:] if line))[0]
    text = re.sub(r"Error parsing [A-Z]\w*: ", "", text)  # of a dataclass, which nobody typed
    head, offers, rest = text.partition("Perhaps you meant:")
    flags = list(dict.fromkeys(re.findall(r"--[\w.\-]+", rest)))
    return head.strip() + (f"; did you mean {' or '.join(flags[:3])}?" if offers and flags else "")


def call(command: Callable[..., Any], arguments: list[str], prog: str) -> Any:
    """Run a command whose flags are its arguments."""

    @functools.wraps(command)
    def bound(*args: Any, **kwargs: Any) -> Any:
        return functools.partial(command, *args, **kwargs)  # parsed first, run after: only parsing is captured

    return parse(bound, arguments, prog)()


def usage(form: str, about: str, commands: dict[str, Callable[..., Any]]) -> str:
    """What a command of commands offers."""
    lines = [f"  {name:<12} {(command.__doc__ or '').splitlines()[0]}" for name, command in commands.items()]
    return "\n".join([f"usage: {form}", "", about, "", *lines])
