"""Stages in order: what the first starts from, what is handed on, and what is refused before anything runs."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests import tiny_runs as tiny
from vmae2_fast.config import Progression
from vmae2_fast.models import build_model
from vmae2_fast.models.weights import save_weights
from vmae2_fast.train.progression import run_progression, weights_of


def still(config: Any, **changes: Any) -> Any:
    """One epoch that moves no weight: a stage ends with what it started from."""
    config = tiny.with_train(config, epochs=1)
    return dataclasses.replace(config, optim=dataclasses.replace(config.optim, lr=0.0, min_lr=0.0), **changes)


def two_stages(clips: Path, out: Path) -> Progression:
    model = dataclasses.replace(tiny.CLASSIFY_MODEL, depth=1)
    second = still(tiny.classify_config(clips, out), model=model, validation=None, init="stage:tiny_pretrain")
    return Progression(name="two", stages=(still(tiny.pretrain_config(clips, out)), second), out=str(out))


def starting_weights(path: Path) -> Path:
    torch.manual_seed(5)
    save_weights(build_model(tiny.PRETRAIN_MODEL), path)
    return path


def test_given_weights_start_the_first_stage_and_it_hands_on_its_own(clips, tmp_path):
    out, given = tmp_path / "out", starting_weights(tmp_path / "given.safetensors")
    results = run_progression(two_stages(clips, out), init=str(given))
    assert list(results) == ["data", "tiny_pretrain", "tiny_classify"]
    start, first, second = (load_file(p) for p in (given, *(weights_of(out, n) for n in list(results)[1:])))
    assert start.keys() == first.keys()
    assert all(torch.equal(start[name], first[name]) for name in start)
    assert torch.equal(second["blocks.0.attn.qkv.weight"], first["encoder.blocks.0.attn.qkv.weight"])
    inits = [json.loads((out / name / "config.json").read_text())["init"] for name in list(results)[1:]]
    assert inits == [str(given), str(weights_of(out, "tiny_pretrain"))]


def test_given_weights_stand_in_for_those_of_the_stage_before(clips, tmp_path):
    out, given = tmp_path / "out", starting_weights(tmp_path / "given.safetensors")
    run = two_stages(clips, out)
    with pytest.raises(ValueError, match=r"tiny_pretrain/weights\.safetensors, which does not exist"):
        run_progression(run, start="tiny_classify")
    assert list(run_progression(run, start="tiny_classify", init=str(given))) == ["data", "tiny_classify"]
    start, end = load_file(given), load_file(weights_of(out, "tiny_classify"))
    assert torch.equal(end["blocks.0.attn.qkv.weight"], start["encoder.blocks.0.attn.qkv.weight"])


def test_a_student_needs_the_stage_that_trains_its_teacher(clips, tmp_path):
    teacher = still(tiny.classify_config(clips, tmp_path), name="finetune", validation=None)
    student = still(tiny.distill_config(clips, tmp_path, "stage:finetune"), name="distill", validation=None)
    run = Progression(name="two", stages=(teacher, student), out=str(tmp_path / "out"))
    with pytest.raises(ValueError, match=r"stage distill starts from .*finetune/weights\.safetensors, which does not exist"):
        run_progression(run, start="distill")
    assert not (tmp_path / "out").exists()
    assert list(run_progression(run)) == ["data", "finetune", "distill"]
    assert list(run_progression(run, start="distill")) == ["data", "distill"]
