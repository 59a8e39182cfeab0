"""Compiled and graphed steps: the same numbers, and clear refusals. Capture itself needs a GPU (`pytest -m cuda`)."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from torch import nn

from tests import tiny_runs as tiny
from vmae2_fast.data.loader import Batch
from vmae2_fast.models import Block
from vmae2_fast.tasks import create_task
from vmae2_fast.train import execution, train
from vmae2_fast.train.execution import Eager, Graphed, compile_model
from vmae2_fast.train.log import read_metrics


def batch(number: int, clips: int = 2) -> Batch:
    generator = torch.Generator().manual_seed(number)
    shape = (clips, tiny.FRAMES, tiny.SIZE, tiny.SIZE, 3)
    clip = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
    position = torch.arange(clips) + clips * number
    return Batch(clip, torch.zeros(clips, dtype=torch.int64), position, torch.zeros_like(position), ("",) * clips, [])


@pytest.fixture
def compiled(monkeypatch) -> list[nn.Module]:
    """torch.compile without a code generator; the modules that were handed to it."""
    modules: list[nn.Module] = []
    original = nn.Module.compile

    def trace(self, **options):
        modules.append(self)
        original(self, backend="aot_eager", **options)

    torch._dynamo.reset()
    monkeypatch.setattr(nn.Module, "compile", trace)
    return modules


@pytest.mark.parametrize("what", ["none", "blocks", "model"])
def test_a_compiled_step_is_the_eager_one(what, compiled, tmp_path: Path) -> None:
    config = tiny.pretrain_config(tmp_path, tmp_path)
    results = []
    for chosen in ("none", what):
        torch.manual_seed(0)
        task = create_task(config, torch.device("cpu"))
        compile_model(task.model, chosen)
        out = Eager(task)(batch(0), 4.0)
        results.append([out["loss"], *(p.grad for p in task.model.parameters())])
        assert not any("_orig_mod" in name for name in task.model.state_dict())
    for ours, expected in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(ours, expected)
    assert all(isinstance(m, Block) for m in compiled) == (what != "model")
    assert len(compiled) == {"none": 0, "blocks": 2, "model": 1}[what]


def test_a_run_compiles_what_its_config_says(compiled, tmp_path: Path) -> None:
    clips = tiny.write_clips(tmp_path / "clips", per_class=2)
    losses = []
    for what in ("none", "blocks"):
        config = tiny.with_train(tiny.pretrain_config(clips, tmp_path / what), compile=what, epochs=2)
        summary = train(config, device="cpu")
        losses.append([line["loss"] for line in read_metrics(Path(summary["directory"]) / "metrics.jsonl")])
    assert len(compiled) == 2
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)


def test_a_graph_needs_a_gpu(tmp_path: Path) -> None:
    clips = tiny.write_clips(tmp_path / "clips", per_class=2)
    config = tiny.with_train(tiny.pretrain_config(clips, tmp_path / "out"), cuda_graph=True)
    with pytest.raises(ValueError, match=r"train\.cuda_graph needs a GPU, and this run is on cpu"):
        train(config, device="cpu")


def test_a_graph_and_skipped_samples_exclude_each_other(tmp_path: Path) -> None:
    config = tiny.classify_config(tmp_path, tmp_path)
    skipping = dataclasses.replace(config, model=dataclasses.replace(config.model, drop_path_skip=True))
    with pytest.raises(ValueError, match=r"train\.cuda_graph and model\.drop_path_skip exclude each other"):
        tiny.with_train(skipping, cuda_graph=True)


class Rehearsal(Graphed):
    """A graph whose replay runs the step again into the captured tensors: what surrounds a capture, without a GPU."""

    def __init__(self, task) -> None:
        Eager.__init__(self, task)
        self.alone, self.seen, self.graph = task.config.train.micro_batch is None, execution.WARM_UP, None

    def _capture(self, given: Batch, total: float) -> None:
        self.static = given._replace(clip=given.clip.clone(), position=given.position.clone())
        self.parameters = list(self.task.model.parameters())
        self.gradients = [torch.full_like(p, float("nan")) for p in self.parameters]
        self.out = {"loss": torch.zeros(())}
        self.total, self.graph = total, self

    def replay(self) -> None:
        before = [p.grad for p in self.parameters]
        for parameter in self.parameters:
            parameter.grad = None
        self.out["loss"].copy_(Eager.__call__(self, self.static, self.total)["loss"])
        for parameter, gradient, old in zip(self.parameters, self.gradients, before, strict=True):
            gradient.copy_(parameter.grad)
            parameter.grad = old


@pytest.mark.parametrize("micro_batch", [None, 2])
def test_replays_fill_the_input_and_add_up_gradients(micro_batch, tmp_path: Path) -> None:
    config = tiny.with_train(tiny.pretrain_config(tmp_path, tmp_path), micro_batch=micro_batch)
    results = []
    for kind in (Eager, Rehearsal):
        torch.manual_seed(0)
        task = create_task(config, torch.device("cpu"))
        run, losses = kind(task), []
        for step in range(2):
            task.model.zero_grad(set_to_none=True)
            losses += [run(batch(step * 2 + micro), 4.0)["loss"] for micro in range(1 if micro_batch is None else 2)]
        results.append([*losses, *(p.grad for p in task.model.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    with pytest.raises(ValueError, match=r"train\.cuda_graph holds clip \[2, .*this batch has \[3, "):
        run(batch(0, clips=3), 4.0)
    with pytest.raises(ValueError, match="needs a constant number of loss tokens"):
        run(batch(0), torch.tensor(4.0))


@pytest.mark.cuda
@pytest.mark.parametrize("micro_batch", [None, 2])
def test_a_captured_step_is_the_eager_one(micro_batch, tmp_path: Path) -> None:
    config = tiny.with_train(tiny.pretrain_config(tmp_path, tmp_path), micro_batch=micro_batch)
    results = []
    for kind in (Eager, Graphed):
        torch.manual_seed(0)
        task = create_task(config, torch.device("cuda"))
        run, losses = kind(task), []
        for step in range(execution.WARM_UP + 3):
            task.model.zero_grad(set_to_none=True)
            losses += [run(batch(step * 2 + micro), 4.0)["loss"] for micro in range(1 if micro_batch is None else 2)]
        results.append([*losses, *(p.grad for p in task.model.parameters())])
    for ours, expected in zip(*reversed(results), strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-3, atol=1e-5)
