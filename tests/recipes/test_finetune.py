"""The recipes of labelled sets: they build, agree with the published tables, and read the sets' lists as they are."""

from __future__ import annotations

import dataclasses
import inspect
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.tiny_runs import write_clips
from vmae2_fast import cli
from vmae2_fast.config import ClassifyConfig, DistillConfig
from vmae2_fast.data import ManifestError, open_sources
from vmae2_fast.data.labelled_sets import LABELLED_SETS, labelled_set
from vmae2_fast.data.randaugment import parse_policy
from vmae2_fast.models import build_model, resolve
from vmae2_fast.models.positions import position_table, sincos_table
from vmae2_fast.recipes_index import all_recipes, find

RECIPES = {name: recipe for name, recipe in all_recipes().items() if name.startswith(("finetune:", "distill:"))}


@pytest.mark.parametrize("name", RECIPES)
def test_every_variant_resolves_and_builds(name):
    variants = [{}]
    if "variant" in inspect.signature(RECIPES[name]).parameters:
        variants = [{"variant": "official"}, {"variant": "paper"}]
    names = set()
    for arguments in variants:
        run = RECIPES[name](**arguments)
        assert isinstance(run, ClassifyConfig | DistillConfig)
        names.add(run.cites)
        with torch.device("meta"):
            assert sum(p.numel() for p in build_model(run.model).parameters()) > 2e7
    assert all(names)
    assert len(names) == len(variants)


@pytest.mark.parametrize(
    ("name", "tokens", "views", "lr"),
    [
        # real learning rate = base * clips / 256, the views not counted
        ("finetune:vit_giant_k400", 2048, 15, 1e-5 * 96 / 256),
        ("vit_giant_k400_64x266", 11552, 6, 1e-4 * 32 / 256),
        ("vit_giant_k600_64x266", 11552, 6, 1e-4 * 32 / 256),
        ("vit_huge_k400_64x288", 32 * 18 * 18, 12, 1e-4 * 32 / 256),
        ("vit_huge_k600_32x384", 16 * 24 * 24, 12, 1e-4 * 32 / 256),
        ("finetune:vit_giant_ssv2", 2048, 6, 3e-4 * 96 / 256),
        ("vit_giant_hmdb51", 2048, 15, 5e-4 * 24 / 256),
        ("distill:vit_base_k710", 1568, 15, 1e-3 * 1024 / 256),
    ],
)
def test_published_tokens_views_and_learning_rates(name, tokens, views, lr):
    run = find(name)()
    assert resolve(run.model).tokens == tokens
    assert run.views.segments * run.views.crops == views
    assert run.optim.lr * run.train.global_batch / run.optim.lr_batch == pytest.approx(lr)


@pytest.mark.parametrize("name", ["vit_giant_k400_64x266", "vit_huge_k600_32x384"])
def test_large_clips_keep_the_positions_of_pre_training(name):
    """A token of 64x266 gets what the 16x224 table has at its place in time, height and width."""
    spec = resolve(find(name)().model)
    table = position_table(spec, 16, "interpolate").reshape(*spec.grid, 16)
    native = (8, 224 // spec.patch, 224 // spec.patch)
    before = sincos_table(int(np.prod(native)), 16).reshape(*native, 16)
    place = [(np.arange(new) + 0.5) * old / new - 0.5 for new, old in zip(spec.grid, native)]

    def at(values, axis, x):  # linear between pixel centres, edges repeated
        low = np.clip(np.floor(x), 0, values.shape[axis] - 1).astype(int)
        high = np.clip(np.floor(x) + 1, 0, values.shape[axis] - 1).astype(int)
        return values.take(low, axis) * (1 - (x - np.floor(x))) + values.take(high, axis) * (x - np.floor(x))

    for t, y, x in ((0, 0, 0), (5, 3, 11), (spec.grid[0] - 1, spec.grid[1] - 1, 2)):
        value = at(at(at(before, 0, place[0][t]), 0, place[1][y]), 0, place[2][x])
        np.testing.assert_allclose(table[t, y, x], value, atol=1e-5)
    assert not np.allclose(table.reshape(-1, 16), sincos_table(spec.tokens, 16), atol=0.1)


@pytest.mark.parametrize("name", LABELLED_SETS)
def test_lists_of_every_set_are_read(name, tmp_path):
    """Two clips of the highest class, as the official lists write them, through the table the set proposes."""
    s = labelled_set(name)
    root = tmp_path / "videos"
    root.mkdir()
    last = s.classes - 1
    lines = ["a b/v1.mp4 {}", "v2.mp4 {}"] if s.template is None else ["a b/1 30 {}", "2 20 {}"]
    for split in ("train", "val"):
        (root / f"{split}.csv").write_text("\n".join(line.format(last) for line in lines) + "\n")
    (tmp_path / "datasets.toml").write_text(s.toml_table().replace("/path/to/videos", "videos"))
    for data in (s.training(), s.testing()):
        (source,) = open_sources(_at(data, tmp_path))
        assert (source.classes, source.stride, source.template) == (s.classes, s.stride, s.template)
        records = [source.manifest[i] for i in range(2)]
        assert [r.label for r in records] == [last, last]
        assert records[0].path.startswith("a b/")
        assert [r.total for r in records] == ([-1, -1] if s.template is None else [30, 20])
    if s.template is not None:
        assert source.frame_files(records[1])[0] == str(root / "2" / s.template.format(1))  # numbered from 1
    (root / "train.csv").write_text(lines[0].format(s.classes))
    with pytest.raises(ManifestError, match=rf"train.csv:1: label {s.classes} is out of range"):
        open_sources(_at(s.training(), tmp_path))
    (root / "train.csv").unlink()
    with pytest.raises(ManifestError, match=r"train\.csv: cannot read the list"):
        open_sources(_at(s.training(), tmp_path))


def _at(data, folder: Path):
    return dataclasses.replace(data, datasets=str(folder / "datasets.toml"))


def test_something_something_is_never_flipped_and_sampled_by_segments():
    assert {n for n, s in LABELLED_SETS.items() if not s.flip} == {"ssv1", "ssv2"}
    assert {n for n, s in LABELLED_SETS.items() if s.sampling == "segment"} == {"ssv1", "ssv2"}


@pytest.mark.parametrize("probe", ["none", "linear", "attentive"])
def test_a_folder_of_ones_own_is_fine_tuned(probe, tmp_path, capsys):
    clips = write_clips(tmp_path / "clips", per_class=2)
    small = [
        "--model.frames", "8", "--model.size", "32", "--model.patch", "8", "--model.width", "16", "--model.depth", "1",
        "--model.heads", "2", "--train.epochs", "2", "--train.global-batch", "2", "--train.micro-batch", "2",
        "--train.precision", "float32", "--optim.warmup-epochs", "0", "--views.segments", "1",
    ]  # fmt: skip
    arguments = ["launch", "finetune:folder", "--data", str(clips), "--probe", probe, "--out", str(tmp_path / "runs")]
    cli.main([*arguments, *small, "--json"])
    summary = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert summary["classes"] == ["left", "right"]
    assert summary["validation"]["videos"] == 4
    assert summary["steps"] == 4


def test_a_missing_folder_is_named(capsys):
    with pytest.raises(SystemExit):
        cli.main(["launch", "finetune:folder", "--data", "nowhere"])
    assert "nowhere: no such folder of videos" in capsys.readouterr().err


@pytest.mark.parametrize("name", [n for n, r in RECIPES.items() if "variant" in inspect.signature(r).parameters])
def test_the_paper_augments_as_its_table_prints(name):
    """RandAug (0, 0.5) and MultiScaleCrop; number of operations, erasing, flips and mixing are the scripts'."""
    official, paper = (RECIPES[name](variant=variant) for variant in ("official", "paper"))
    policy = parse_policy(paper.data.augment.randaugment)
    assert (policy.magnitude, policy.deviation, policy.layers) == (0, 0.5, 4)
    assert (official.data.crop, paper.data.crop) == ("random_resized", "multi_scale")
    changed = dataclasses.replace(official.data, augment=paper.data.augment, crop="multi_scale")
    assert paper.data == changed
    assert paper.data.augment.erase == official.data.augment.erase


def test_official_augmentation_is_in_every_fine_tuning_recipe():
    for name, recipe in RECIPES.items():
        run = recipe()
        if getattr(run, "objective", "kl") == "features":
            continue
        printed = name.startswith("distill:") or run.name.endswith(("x266", "x288", "x384"))  # in the paper alone
        assert run.data.augment.randaugment == f"rand-m{0 if printed else 7}-n4-mstd0.5-inc1", name
        assert run.data.crop == ("multi_scale" if printed else "random_resized"), name
        assert (run.mix.mixup, run.mix.cutmix) == (0.8, 1.0), name
        assert run.data.augment.erase == (0.25 if name.startswith("finetune:") else 0.0), name
