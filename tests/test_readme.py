"""What the README shows runs, and names only what exists."""

from __future__ import annotations

import re
from pathlib import Path

import torch

from vmae2_fast import cli
from vmae2_fast.cli.data import COMMANDS as DATA_COMMANDS
from vmae2_fast.recipes_index import all_recipes

README = (Path(__file__).parents[1] / "README.md").read_text()


def test_the_python_example_runs() -> None:
    (code,) = re.findall(r"```python\n(.*?)```", README, flags=re.S)
    names: dict[str, object] = {}
    exec(code, names)
    assert torch.isfinite(names["loss"])
    assert all(p.grad is not None for p in names["model"].parameters())


def test_commands_and_recipes_exist() -> None:
    recipes = all_recipes()
    for command, rest in re.findall(r"vmae2 (\w+)([^`\n]*)", README):
        words = {"data": {"check": None, **DATA_COMMANDS}, **cli.GROUPS}
        if command in words and command not in cli.COMMANDS:
            assert rest.split()[0] in words[command], f"{command}{rest}"
            continue
        assert command in ("launch", *cli.COMMANDS), command
        for recipe in re.findall(r" (\w+:\w+)", rest):
            assert recipe in recipes


def test_linked_files_exist() -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert (Path(__file__).parents[1] / target).exists(), target


def test_nothing_is_left_to_fill_in() -> None:
    assert not re.findall(r"\b[A-Z]+_TABLE\b|\bTBD\b", README)
