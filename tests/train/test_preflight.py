"""`vmae2 ledger RECIPE` against what is allocated and published, `vmae2 launch RECIPE --check` on real clips."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from tests import tiny_runs as tiny
from vmae2_fast import cli
from vmae2_fast.recipes_index import find
from vmae2_fast.tasks import create_task
from vmae2_fast.tasks.pretrain import PretrainTask
from vmae2_fast.train import train
from vmae2_fast.train.budget import CARDS, BudgetOptions, budget, rank_bytes
from vmae2_fast.train.ledger import knobs, ledger
from vmae2_fast.train.optim import Optimizer
from vmae2_fast.train.preflight import preflight


@pytest.fixture(scope="module")
def clips(tmp_path_factory) -> Path:
    return tiny.write_clips(tmp_path_factory.mktemp("clips"), per_class=2)


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("ema", [None, 0.99])
def test_states_are_counted_to_the_byte(clips, tmp_path, frozen, ema):
    config = tiny.classify_config(clips, tmp_path)
    model = dataclasses.replace(config.model, drop_path=0.0)
    optim = dataclasses.replace(config.optim, layer_decay=1.0, ema_decay=ema)
    config = dataclasses.replace(config, model=model, optim=optim, frozen=frozen)
    task = create_task(config)
    optimizer = Optimizer(task.model, config.optim, global_batch=4, total_steps=2, steps_per_epoch=1)
    for p in task.model.parameters():
        p.grad = torch.ones_like(p) if p.requires_grad else None
    optimizer.step(0, torch.tensor(1.0))
    mine = rank_bytes(config, 1)
    parameters = list(task.model.parameters())
    assert mine["parameters"] == sum(p.nbytes for p in parameters)
    assert mine["gradients"] == sum(p.grad.nbytes for p in parameters if p.grad is not None)
    states = {name: value for name, value in optimizer.state_tensors().items() if not name.endswith(".step")}
    assert mine["optimizer"] == sum(value.nbytes for value in states.values())
    assert (mine["activations"] == 0) is frozen
    assert mine["total"] == sum(value for name, value in mine.items() if name != "total")


def test_sharding_splits_states_and_activations_follow_the_micro_batch(clips, tmp_path):
    whole = tiny.with_train(tiny.pretrain_config(clips, tmp_path), global_batch=8, micro_batch=1)
    split = tiny.with_train(whole, parallel="fsdp", micro_batch=2)
    one, four = rank_bytes(whole, 4), rank_bytes(split, 4)
    for name in ("parameters", "gradients", "optimizer"):
        assert four[name] == -(-one[name] // 4)
    assert four["activations"] == 2 * one["activations"]


def test_hybrid_sharding_splits_states_over_a_machine(clips, tmp_path):
    whole = tiny.with_train(tiny.pretrain_config(clips, tmp_path), global_batch=8)
    hybrid = tiny.with_train(whole, parallel="hsdp")
    assert rank_bytes(hybrid, 8, 4)["optimizer"] == -(-rank_bytes(whole, 8)["optimizer"] // 4)
    two = tiny.with_train(hybrid, shard_within=2)
    assert rank_bytes(two, 8, 4)["optimizer"] == -(-rank_bytes(whole, 8)["optimizer"] // 2)
    with pytest.raises(ValueError, match=r"3 ranks a copy do not divide 8 ranks; set train.shard_within"):
        rank_bytes(tiny.with_train(hybrid, shard_within=3), 8)


def test_the_published_run_as_a_budget(capsys):
    command = ["ledger", "pretrain:vit_giant_hybrid", "--card", "a100-80", "--nodes", "8", "--mfu", "0.5", "--json"]
    cli.main([*command, "--train.micro-batch", "32"])
    (giant,) = json.loads(capsys.readouterr().out.splitlines()[-1])["stages"]
    assert giant["macs_clip_published"] == pytest.approx(241.61e9, rel=3e-3)  # paper, dual masking table
    assert giant["gpus"] == 64
    assert giant["micro_batch"] * giant["micro_batches"] * 64 == 8192
    assert giant["steps"] == 300 * 1_348_253 // 2048  # views are not decoded again
    assert giant["step_seconds"] == pytest.approx(giant["flops_step"] / (64 * CARDS["a100-80"].bfloat16 * 1e12 * 0.5))
    assert giant["days"] == pytest.approx(giant["steps"] * giant["step_seconds"] / 86400)
    assert giant["decoded_clips_per_s_and_node"] == pytest.approx(256 / giant["step_seconds"])
    parameters = giant["bytes_per_gpu"]["parameters"]
    assert giant["network_bytes_per_s_and_node"] == pytest.approx(2 * 7 / 8 * parameters / giant["step_seconds"])


def test_a_float32_decoder_takes_the_time_of_float32():
    """ViT-g on 64 A100: its decoder's 22.4 of 238 GMAC at 19.5 TFLOP/s instead of 312."""
    options = BudgetOptions(card="a100-80", gpus=8, nodes=8, mfu=0.5)
    recipe = find("pretrain:vit_giant_hybrid")()
    exact = dataclasses.replace(recipe, model=dataclasses.replace(recipe.model, decoder_fp32=True))
    mixed, slow = budget(recipe, options), budget(exact, options)
    assert slow["flops_step"] == mixed["flops_step"]
    macs = ledger(recipe.model)["macs"]["executed"]
    share = sum(macs[p] for p in ("encoder_to_decoder", "decoder_linear", "decoder_attention", "head")) / 1e9
    assert share == pytest.approx(22.4, abs=0.2)
    more = 6 * share * 1e9 * (1 / 19.5e12 - 1 / 312e12) * 8192 / (64 * 0.5)
    assert slow["step_seconds"] - mixed["step_seconds"] == pytest.approx(more)
    whole = dataclasses.replace(recipe, train=dataclasses.replace(recipe.train, precision="float32"))
    assert slow["step_seconds"] < budget(whole, options)["step_seconds"]


def test_what_does_not_fit_names_the_knobs(capsys):
    cli.main(["ledger", "progressive:vit_giant", "--card", "rtx4090", "--gpus", "8"])
    out = capsys.readouterr().out
    assert out.count("DOES NOT FIT: --model.residual-dtype bfloat16, --train.parallel fsdp") == 2  # not pre-training
    stage = find("pretrain:vit_giant_hybrid")()
    small = dataclasses.replace(
        stage,
        model=dataclasses.replace(stage.model, residual_dtype="bfloat16", activation_checkpoint="block"),
        train=dataclasses.replace(stage.train, micro_batch=4, parallel="fsdp"),
    )
    assert knobs(small) == "a smaller model or clip"
    assert budget(small, BudgetOptions(card="rtx4090"))["fits"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["pretrain:vit_giant_hybrid", "--card", "h1000"], "unknown card 'h1000'; did you mean h100"),
        (["pretrain:vit_giant_hybrid", "--mfu", "2"], "--mfu 2.0: must lie above 0"),
        (["pretrain:vit_giant_hybrid", "--gpus", "3"], "take 2 or 4 ranks (--gpus, --nodes)"),
        (["pretrain:vit_gigant_hybrid"], "did you mean pretrain:vit_giant_hybrid"),
    ],
)
def test_bad_machines_are_one_line(arguments, message, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["ledger", *arguments])
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def test_preflight_runs_steps_and_leaves_nothing(clips, tmp_path):
    (clips / "left" / "broken.mp4").write_bytes(b"garbage")
    result = preflight(tiny.pretrain_config(clips, tmp_path / "out"), device="cpu")
    (clips / "left" / "broken.mp4").unlink()
    assert (result["steps"], result["clips"], result["peak_bytes"]) == (3, 5, None)
    assert list(result["replaced"]) == [str(clips / "left" / "broken.mp4")]
    assert result["checkpoint_bytes"] > rank_bytes(tiny.pretrain_config(clips, tmp_path), 1)["optimizer"]
    assert not list((tmp_path / "out").iterdir())


def test_check_finds_missing_data_before_anything_is_left(clips, tmp_path, capsys):
    small = ["--model.width", "32", "--model.depth", "1", "--model.heads", "2", "--train.micro-batch", "4"]
    arguments = ["launch", "pretrain:vit_base_k400", "--check", "--out", str(tmp_path / "out"), *small]
    (tmp_path / "videos").mkdir()
    (tmp_path / "datasets.toml").write_text('[k400]\nroot = "videos"\ntrain = "train.csv"\n')
    with pytest.raises(SystemExit) as stop:
        cli.main([*arguments, "--data.datasets", str(tmp_path / "datasets.toml")])
    assert stop.value.code == 2
    assert "train.csv: cannot read the list" in capsys.readouterr().err
    assert not list((tmp_path / "out").iterdir())


def test_out_of_memory_names_the_knobs(clips, tmp_path, monkeypatch, capsys):
    def full(self, batch):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(PretrainTask, "loss", full)
    with pytest.raises(ValueError, match=r"2 clips a forward .* try a lower --train.micro-batch .*, --train.precision"):
        train(tiny.with_train(tiny.pretrain_config(clips, tmp_path), micro_batch=2), device="cpu")
