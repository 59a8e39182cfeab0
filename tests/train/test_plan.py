"""Recipes sized for cards by the ledger, and the plan a launch prints before anything starts."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest

from tests.recipes.test_published import cited_gpus, made, published_runs
from vmae2_fast import cli
from vmae2_fast.recipes_index import find
from vmae2_fast.train.budget import CARDS, SHARE, card_name, card_of, rank_bytes
from vmae2_fast.train.plan import fitted

SIZED = [run for run in published_runs() if run[0].partition(":")[0] in ("pretrain", "post_pretrain", "finetune", "distill")]
CUT = {"train": {"micro_batch": 0, "parallel": "ddp"}, "model": {"activation_checkpoint": "none"}}


def machines(ranks: int) -> tuple[int, int]:
    return min(ranks, 8), max(ranks // 8, 1)


@pytest.mark.parametrize("card", ["24gb", "40gb", "80gb"])
@pytest.mark.parametrize(("name", "variant"), SIZED)
def test_every_recipe_fits_every_card(name: str, variant: str | None, card: str) -> None:
    stage = made(name, variant)
    gpus, nodes = machines(cited_gpus(name, variant))
    sized = fitted(stage, card, gpus=gpus, nodes=nodes)
    assert rank_bytes(sized, gpus * nodes, gpus)["total"] <= SHARE * int(card[:2]) * 1e9

    def uncut(run: Any) -> Any:
        return dataclasses.replace(run, **{k: dataclasses.replace(getattr(run, k), **v) for k, v in CUT.items()})

    assert uncut(sized) == uncut(stage)  # only how the work is cut up


def test_the_first_way_that_fits_is_taken() -> None:
    recipe = find("finetune:vit_giant_ssv2")()
    ways = {}
    for card in ("24gb", "40gb", "80gb"):
        sized = fitted(recipe, card, gpus=8, nodes=4)
        ways[card] = (sized.model.activation_checkpoint, sized.train.parallel, sized.train.micro_batch)
    assert ways["80gb"] == ("none", "ddp", 6)
    assert ways["24gb"] != ways["80gb"]
    own = dataclasses.replace(recipe, model=dataclasses.replace(recipe.model, activation_checkpoint="block"))
    assert fitted(own, "80gb", gpus=8, nodes=4).model.activation_checkpoint == "block"  # never less than asked for


def test_what_no_way_fits_is_told() -> None:
    with pytest.raises(ValueError, match=r"needs \d+\.\d GB on each of 1 x rtx4090, which has 22.8, .* take more GPUs"):
        fitted(find("finetune:vit_giant_k400_64x266")(), "24gb")
    with pytest.raises(ValueError, match="detection is not sized"):
        fitted(find("ava:ava_vit_base")(), "24gb")


def test_cards_by_name() -> None:
    assert [CARDS[card_name(n)].memory for n in ("24gb", "40gb", "80gb", "h200")] == [24, 40, 80, 141]
    names = {"NVIDIA H100 80GB HBM3": "h100", "NVIDIA A100-SXM4-40GB": "a100-40", "NVIDIA H200": "h200", "NVIDIA L4": None}
    assert {name: card_of(name) for name in names} == names


def test_a_launch_tells_its_plan_first(capsys: pytest.CaptureFixture[str]) -> None:
    command = ["launch", "pretrain:vit_giant_hybrid", "--dry-run", "--gpus", "8", "--nodes", "8", "--card", "80gb", "--json"]
    cli.main(command)
    said = capsys.readouterr()
    (stage,) = json.loads(said.out.splitlines()[-1])["stages"]
    assert (stage["gpus"], stage["card"], stage["fits"]) == (64, "a100-80", True)
    told = ("vit_giant pre-training script", "64 x a100-80", "GB of 80.0 by the ledger", "s a step at 40% MFU")
    for text in (*told, "300 epochs of 1,348,253 clips", "days; a node decodes"):
        assert text in said.err


def test_every_stage_is_checked_before_the_first_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    for command in (["launch", "progressive:vit_giant", "--dry-run"], ["ledger", "progressive:vit_giant"]):
        with pytest.raises(SystemExit) as stop:
            cli.main([*command, "--gpus", "8", "--nodes", "8"])
        assert stop.value.code == 2
        said = capsys.readouterr()
        assert (said.out, said.err.count("\n")) == ("", 1)
        assert "post_pretrain: train.global_batch=192 is not divisible by ranks x mix.clips x data.views=64 x 6" in said.err
