"""Published recipes resolve, build at full size without memory, and reach the published learning rates and counts."""

from __future__ import annotations

import dataclasses
import inspect
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from vmae2_fast.config import DistillConfig, Progression, TadConfig, from_dict, to_dict
from vmae2_fast.data.augment import OFFICIAL, OFFICIAL_MIX, PAPER
from vmae2_fast.data.manifest import ManifestError, open_sources
from vmae2_fast.data.schedule import Mixture
from vmae2_fast.models import build_model, resolve
from vmae2_fast.recipes import pretrain, progressive
from vmae2_fast.recipes_index import all_recipes, find
from vmae2_fast.train.batch import batch_unit, micro_batches, split_batch
from vmae2_fast.train.optim import scaled_lr
from vmae2_fast.train.progression import check_stage

PUBLISHED = [n for n in all_recipes() if n.partition(":")[0] in ("pretrain", "post_pretrain", "progressive")]
PUBLISHED.remove("pretrain:hybrid_available")


def published_runs() -> list[tuple[str, str | None]]:
    """Every recipe in every variant, those of one's own data and the demo left out."""
    found: list[tuple[str, str | None]] = []
    for name, recipe in all_recipes().items():
        if name.startswith("demo:") or name in ("pretrain:hybrid_available", "finetune:folder"):
            continue
        variants = ("official", "paper") if "variant" in inspect.signature(recipe).parameters else (None,)
        found += [(name, variant) for variant in variants]
    return found


def cited_gpus(name: str, variant: str | None) -> int:
    """The GPUs a recipe's own text names; 1 for detectors on features, else 8 where it names none."""
    found = re.search(r"(\d+) (?:GPUs|A100-80G)(?: \(paper: (\d+)\))?", inspect.getdoc(all_recipes()[name]) or "")
    if found is None:
        return 1 if name.startswith("tad:") else 8
    return int(found[2] if variant == "paper" and found[2] else found[1])


def made(name: str, variant: str | None, **arguments: str) -> Any:
    return all_recipes()[name](**({} if variant is None else {"variant": variant}), **arguments)


@pytest.mark.parametrize(("name", "variant"), published_runs())
def test_runs_on_the_gpus_it_names_and_on_fewer(name: str, variant: str | None) -> None:
    run, gpus = made(name, variant), cited_gpus(name, variant)
    stages = run.stages if isinstance(run, Progression) else (run,)
    for ranks in {gpus, *(2**k for k in range(7) if 2**k <= gpus)}:
        for stage in stages:
            micro, forwards = split_batch(stage, ranks)
            assert micro * forwards * ranks == stage.train.global_batch
            unit = batch_unit(stage)[1]
            # whatever fits: from one decode, or one group of mixed clips, to a rank's whole share
            assert unit in micro_batches(stage, ranks) or isinstance(stage, TadConfig)


@pytest.mark.parametrize("size", ["giant", "huge"])
@pytest.mark.parametrize("target", ["k400", "k600", "ssv1", "ssv2", "ucf101", "hmdb51", "ava", "ava_kinetics"])
def test_progressions_run_on_eight_gpus_from_end_to_end(size: str, target: str) -> None:
    for stage in getattr(progressive, f"vit_{size}")(target=target).stages:
        split_batch(stage, 8)


def test_pairs_of_mixed_clips_are_the_scripts() -> None:
    """All clips of a script's device, first with last: the same pairs in groups of 2, or of 3 where a device held 3."""
    devices = {"giant_k400": 3, "giant_ucf101": 3, "huge_k400": 4, "large_k400": 6, "base_k400": 16}
    names = {f"finetune:vit_{name}": clips for name, clips in devices.items()} | {"post_pretrain:vit_giant_k710": 3}
    for name, device in names.items():
        run, gpus = find(name)(), cited_gpus(name, None)
        assert run.train.global_batch == gpus * device * run.data.views
        assert run.mix.clips == (3 if device == 3 else 2)


@pytest.mark.parametrize("name", PUBLISHED)
def test_resolves_and_builds_on_meta(name: str) -> None:
    run = all_recipes()[name]()
    for stage in run.stages if isinstance(run, Progression) else (run,):
        assert from_dict(to_dict(stage)) == stage
        assert stage.cites
        check_stage(stage)
        split_batch(stage, 8)
        for model in (stage.model, *([stage.teacher] if isinstance(stage, DistillConfig) else [])):
            with torch.device("meta"):
                assert next(build_model(model).parameters()).is_meta


@pytest.mark.parametrize(
    ("name", "variant", "lr", "views"),
    [("giant", "official", 4.8e-3, 8192), ("giant", "paper", 4.8e-3, 8192), ("huge", "official", 8e-3, 8192),
     ("huge", "paper", 4.8e-3, 8192), ("base", "official", 4e-3, 4096)],
)  # fmt: skip
def test_pretraining_reaches_the_published_learning_rate(name: str, variant: str, lr: float, views: int) -> None:
    run = getattr(pretrain, f"vit_{name}_hybrid")(variant=variant)
    assert run.train.global_batch == views
    assert scaled_lr(run.optim.lr, run.train.global_batch, run.optim.lr_batch) == pytest.approx(lr)


@pytest.mark.parametrize(("size", "official", "paper"), [("giant", 2234, 2048), ("huge", 2048, 2048), ("base", 1536, 1536)])
def test_the_paper_prints_another_decoder(size: str, official: int, paper: int) -> None:
    for variant, hidden in (("official", official), ("paper", paper)):
        model = find(f"pretrain:vit_{size}_hybrid")(variant=variant).model
        decoder = resolve(model).decoder
        assert decoder is not None
        assert decoder.mlp_hidden == hidden
        assert model.decoder_fp32 is (variant == "paper")


@pytest.mark.parametrize("size", ["giant", "huge"])
@pytest.mark.parametrize("target", ["ava", "ava_kinetics", "thumos14", "fineaction"])
def test_progressions_end_at_detection(size: str, target: str) -> None:
    run = getattr(progressive, f"vit_{size}")(target=target, out="here")
    last, alone = run.stages[-1], all_recipes()[f"{'ava' if 'ava' in target else 'tad'}:{target}_vit_{size}"]()
    check_stage(last)
    assert [s.name for s in run.stages[:-1]] == ["pretrain", "post_pretrain"]
    assert last.model.name == run.stages[-2].model.name
    if "ava" in target:
        assert dataclasses.replace(last, name=alone.name, init=None) == alone
        assert last.init == "stage:post_pretrain"
        return
    assert (last.init, last.trunk_weights) == (None, "stage:post_pretrain")
    assert {last.data.features, last.validation.features} == {"here/features"}
    folder = alone.data.features
    parts = {name: dataclasses.replace(getattr(last, name), features=folder) for name in ("data", "validation")}
    assert dataclasses.replace(last, name=alone.name, trunk_weights=None, **parts) == alone


@pytest.mark.parametrize("target", ["k400", "k600", "ssv1", "ssv2", "ucf101", "hmdb51"])
def test_ssv2_skips_post_pretraining_and_never_flips(target: str) -> None:
    run = progressive.vit_giant(target=target)  # type: ignore[arg-type]
    moving = target.startswith("ssv")
    assert [s.name for s in run.stages] == ["pretrain", *([] if moving else ["post_pretrain"]), "finetune"]
    assert run.stages[-1].init == f"stage:{run.stages[-2].name}"
    assert run.stages[-1].data.flip is not moving
    tuned = find(f"finetune:vit_giant_{target}")(variant="paper")
    assert dataclasses.replace(run.stages[-1], name=tuned.name, init=None) == tuned


@pytest.mark.parametrize("name", [n for n in all_recipes() if n.startswith("post_pretrain:")])
@pytest.mark.parametrize("variant", ["official", "paper"])
def test_post_pretraining_augments_and_counts_clips(name: str, variant: str) -> None:
    run = find(name)(variant=variant)
    assert run.data.augment == (PAPER if variant == "paper" else OFFICIAL)
    assert run.data.crop == ("multi_scale" if variant == "paper" else "random_resized")
    assert dataclasses.replace(run.mix, clips=2) == OFFICIAL_MIX
    if variant == "paper":
        assert (run.train.global_batch, run.data.views) == (256, 2)
        assert scaled_lr(run.optim.lr, run.train.global_batch, run.optim.lr_batch) == pytest.approx(1e-3 * 128 / 256)


def write_lists(toml: Path, **clips: int) -> None:
    tables = []
    for name, count in clips.items():
        root = toml.parent / name
        root.mkdir(exist_ok=True)
        (root / "train.csv").write_text("".join(f"{i}.mp4 0 -1\n" for i in range(count)))
        tables.append(f'[{name}]\nroot = "{name}"\ntrain = "train.csv"\nkind = "video"\n')
    toml.write_text("".join(tables))


@pytest.mark.parametrize("lengths", [{"k710": 640, "ssv2": 48}, {"ssv2": 30, "ava": 500, "webvid": 7}])
def test_hybrid_available_draws_the_proportions_it_prints(
    lengths: dict[str, int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    toml = tmp_path / "datasets.toml"
    write_lists(toml, **lengths)
    data = pretrain.hybrid_available(datasets=str(toml)).data
    told = dict(re.findall(r"(\w+) ([\d.]+)%", capsys.readouterr().err.partition(";")[0]))
    sources = open_sources(data)
    mixture = Mixture([len(s.manifest) for s in sources], [s.weight for s in sources], seed=0)
    assert len(mixture) == sum(lengths.values())
    drawn = np.bincount(np.concatenate([mixture.order(epoch)[0] for epoch in range(4)])) / (4 * len(mixture))
    for source, share in zip(sources, drawn, strict=True):
        assert share == pytest.approx(float(told[source.name]) / 100, abs=1e-3)
        assert share == pytest.approx(pretrain.HYBRID[source.name] / sum(pretrain.HYBRID[s.name] for s in sources), abs=1e-3)


def test_hybrid_available_with_the_published_lists_weighs_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pretrain, "HYBRID", {"k710": 658, "ssv2": 169, "ava": 21})
    write_lists(tmp_path / "datasets.toml", **pretrain.HYBRID)
    run = pretrain.hybrid_available(datasets=str(tmp_path / "datasets.toml"))
    assert [s.weight for s in run.data.sources] == [1.0, 1.0, 1.0]


def test_hybrid_available_names_what_is_missing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    toml = tmp_path / "datasets.toml"
    write_lists(toml, k710=640, ssv2=48)
    run = pretrain.hybrid_available(size="giant", datasets=str(toml))
    full = pretrain.vit_giant_hybrid()
    assert [(s.name, s.stride) for s in run.data.sources] == [("k710", 4), ("ssv2", 2)]
    assert dataclasses.replace(run, name=full.name, data=full.data) == full
    told = capsys.readouterr().err
    assert "k710 79.6% (640 clips, weight 0.8555), ssv2 20.4% (48 clips, weight 2.927); missing ava, webvid, own_web" in told
    assert "(38.6% of the published clips)" in told
    assert "not a reproduction" in told
    toml.write_text('[ssv2]\nroot = "nowhere"\ntrain = "train.csv"\n')
    with pytest.raises(ManifestError, match="source ssv2: the root folder"):
        pretrain.hybrid_available(datasets=str(toml))
    toml.write_text("")
    with pytest.raises(ValueError, match="none of the sources of UnlabeledHybrid"):
        pretrain.hybrid_available(datasets=str(toml))
