"""Hybrid lists from the lists of their parts: nothing twice, nothing of validation in training, labels of K710."""

from __future__ import annotations

import json

import numpy as np
import pytest

from vmae2_fast import cli
from vmae2_fast.config import DataConfig, SourceConfig
from vmae2_fast.data import ManifestError, open_sources
from vmae2_fast.data.build import build_labelled, build_unlabelled, label_map, label_numbers, merged_names, video_id


def _open(toml, name, split="train"):
    data = DataConfig(sources=(SourceConfig(name=name, split=split),), datasets=str(toml))
    source = open_sources(data)[0]
    return source, [source.manifest[i] for i in range(len(source.manifest))]


def _map(classes):
    names = merged_names()
    return [names[number] for number in label_map(classes)]


@pytest.fixture
def kinetics(tmp_path):
    """K400 and K700 as lists of paths and labels, K600 as raw annotations; some videos in several lists."""
    (tmp_path / "k" / "400").mkdir(parents=True)
    (tmp_path / "k" / "600").mkdir()
    (tmp_path / "k" / "700").mkdir()
    (tmp_path / "k" / "400" / "train.csv").write_text("a/vid_A.mp4 3\nb/vid_B_000010_000020.mp4 399\nc/leak.mp4 5\n")
    (tmp_path / "k" / "400" / "val.csv").write_text("v/val_V.mp4 0\nv/only.mp4 9\n")
    head = "label,youtube_id,time_start,time_end,split\n"
    names = _map(600)
    (tmp_path / "k" / "600" / "train.csv").write_text(
        f'{head}"{names[7]}",vid_B,10,20,train\n"{names[8]}",-x_Y,3,13,train\ntying tie,new,0,10,train\n')
    (tmp_path / "k" / "600" / "val.csv").write_text(f"{head}{names[9]},leak,1,11,val\n")
    (tmp_path / "k" / "700" / "train.csv").write_text("-x_Y_000003_000013.mp4 12\nval_V.mp4 2\n")
    (tmp_path / "k" / "700" / "val.csv").write_text("val_V.mp4 1\n")
    toml = tmp_path / "datasets.toml"
    toml.write_text("".join(
        f'[k{n}]\nroot = "k/{n}"\ntrain = "train.csv"\nval = "val.csv"\nclasses = {n}\n' for n in (400, 600, 700)))
    return toml


def test_video_ids():
    assert video_id("x/jf7RDuUTrsQ.mp4") == video_id("jf7RDuUTrsQ_000010_000020.mkv") == "jf7RDuUTrsQ"
    assert video_id("a_000010.mp4") == "a_000010"


def test_labelled(kinetics, tmp_path):
    result = build_labelled([str(kinetics)], str(tmp_path / "out"))
    source, train = _open(result["datasets"], "k710")
    _, val = _open(result["datasets"], "k710", "val")
    names = merged_names()
    assert source.label_names == names
    assert source.root == str(tmp_path / "k")
    assert [(r.path, names[r.label]) for r in train] == [
        ("400/a/vid_A.mp4", _map(400)[3]), ("400/b/vid_B_000010_000020.mp4", _map(400)[399]),
        ("600/-x_Y_000003_000013.mp4", _map(600)[8]), ("600/new_000000_000010.mp4", "tying necktie"),
    ]  # fmt: skip
    assert [(r.path, names[r.label]) for r in val] == [
        ("400/v/val_V.mp4", _map(400)[0]), ("400/v/only.mp4", _map(400)[9]), ("600/leak_000001_000011.mp4", _map(600)[9]),
    ]  # fmt: skip
    assert result["train"]["also_in_val"] == 2
    assert result["train"]["repeated"] == 2
    assert result["missing"] == []
    kept = build_labelled([str(kinetics)], str(tmp_path / "other"), keep="train")
    assert (kept["train"]["clips"], kept["val"]["clips"], kept["val"]["also_in_train"]) == (6, 1, 2)
    with pytest.raises(FileExistsError, match="holds something already"):
        build_labelled([str(kinetics)], str(tmp_path / "out"))


def test_labels_by_name(tmp_path):
    (tmp_path / "train.csv").write_text("a.mp4 1\nb.mp4 0\n")
    (tmp_path / "val.csv").write_text("c.mp4 1\n")
    (tmp_path / "names.txt").write_text("sniffing\nabseiling\n")
    toml = tmp_path / "datasets.toml"
    toml.write_text('[k400]\ntrain = "train.csv"\nval = "val.csv"\nlabels = "names.txt"\n')
    result = build_labelled([str(toml)], str(tmp_path / "out"))
    assert [merged_names()[r.label] for r in _open(result["datasets"], "k710")[1]] == ["abseiling", "smelling feet"]
    assert result["missing"] == ["k600", "k700"]
    (tmp_path / "names.txt").write_text("sniffing\nabsailing\n")
    with pytest.raises(ManifestError, match=r"K400: unknown class 'absailing'; did you mean abseiling"):
        build_labelled([str(toml)], str(tmp_path / "new"))
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("classes", [400, 600, 700])
def test_every_class_of_every_part_is_found_by_name(classes):
    names = _map(classes)
    numbers = label_numbers(classes, names, "x")
    assert len(set(numbers.values())) == classes
    assert [merged_names()[numbers[name]] for name in names] == names


def _unlabelled(tmp_path, without=()):
    tables = {
        "k710": ('format = "video"\nclasses = 710\n', "a 1.mp4 3\nb.mp4 709\n"),
        "ssv2": ('kind = "frames"\nclasses = 174\ntemplate = "img_{:05}.jpg"\n', "74225 62 140\n9 30 0\n"),
        "ava": ('format = "pretrain"\ntemplate = "image_{:06}.jpg"\n', "film 1 700\nshort 0 40\nother 5 650\n"),
        "webvid": ('format = "paths"\n', "".join(f"{i}.mp4\n" for i in range(30))),
    }
    text = ""
    for name, (keys, lines) in tables.items():
        if name not in without:
            (tmp_path / f"{name}.csv").write_text(lines)
            text += f'[{name}]\ntrain = "{name}.csv"\n{keys}'
    toml = tmp_path / "datasets.toml"
    toml.write_text(text)
    return toml


def test_unlabelled(tmp_path, monkeypatch):
    from vmae2_fast.data import build

    monkeypatch.setitem(build.UNLABELLED, "webvid", build.Part(title="WebVid2M", clips=10, subset=10))
    toml = _unlabelled(tmp_path)
    result = build_unlabelled([str(toml)], str(tmp_path / "out"), seed=3)
    made = result["datasets"]
    assert [r[:3] for r in _open(made, "k710")[1]] == [("a 1.mp4", 0, -1), ("b.mp4", 0, -1)]
    source, records = _open(made, "ssv2")
    assert (source.stride, source.template) == (2, "img_{:05}.jpg")
    assert [r[:3] for r in records] == [("74225", 1, 62), ("9", 1, 30)]
    assert [r[:3] for r in _open(made, "ava")[1]] == [
        ("film", 1, 300), ("film", 301, 300), ("film", 601, 100), ("short", 0, 40), ("other", 5, 300), ("other", 305, 300),
    ]  # fmt: skip
    web = [r.path for r in _open(made, "webvid")[1]]
    assert len(set(web)) == 10
    assert web == sorted(web, key=lambda path: int(path[:-4]))
    again = build_unlabelled([str(toml)], str(tmp_path / "again"), seed=3)
    assert [r.path for r in _open(again["datasets"], "webvid")[1]] == web
    assert result["clips"] == 20
    assert result["sources"]["ssv2"] == {
        "clips": 2, "share": 0.1, "published": 168_913, "published_share": pytest.approx(168_913 / 1_098_263, abs=1e-4),
    }  # fmt: skip
    assert list(result["missing"]) == ["own_web"]
    assert "never released" in result["missing"]["own_web"]


def test_the_command_names_what_is_missing(tmp_path, capsys):
    toml = _unlabelled(tmp_path, without=("webvid",))
    cli.main(["data", "build", "unlabelled", "--datasets", str(toml), "--out", str(tmp_path / "out"), "--json"])
    *lines, last = capsys.readouterr().out.splitlines()
    assert json.loads(last)["clips"] == 10
    assert any(line.startswith("not there: own_web, own web videos") for line in lines)
    assert any(line.startswith("not there: webvid, WebVid2M") for line in lines)
    (tmp_path / "k710.csv").write_text("film.mp4 0 -1\n")
    toml.write_text('[ava]\ntrain = "k710.csv"\nformat = "pretrain"\n')
    with pytest.raises(SystemExit):
        cli.main(["data", "build", "unlabelled", "--datasets", str(toml), "--out", str(tmp_path / "new")])
    assert "films are cut by frame numbers" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


def test_lists_of_published_size(tmp_path):
    """Synthetic K400, K600 and K700 that overlap as much as leaves 658,340 and 66,803 videos, and the mixture of all."""
    rng = np.random.RandomState(0)
    train, val = [f"t{i:010}" for i in range(658_340)], [f"v{i:010}" for i in range(66_803)]
    bounds = {400: (0, 240_436), 600: (100_000, 466_006), 700: (125_000, 658_340)}
    text = ""
    for classes, (first, last) in bounds.items():
        labels = rng.randint(classes, size=last - first + 66_803)
        lines = [f"{name}.mp4 {label}" for name, label in zip(train[first:last], labels)]
        lines += [f"{name}_000001_000011.mp4 {labels[i]}" for i, name in enumerate(val[:500])]  # leaks
        (tmp_path / f"k{classes}_train.csv").write_text("\n".join(lines))
        own = val[{400: 0, 600: 15_000, 700: 33_000}[classes]:{400: 19_796, 600: 42_935, 700: 66_803}[classes]]
        (tmp_path / f"k{classes}_val.csv").write_text("".join(f"{name}.mp4 {labels[-1 - i]}\n" for i, name in enumerate(own)))
        text += f'[k{classes}]\ntrain = "k{classes}_train.csv"\nval = "k{classes}_val.csv"\nclasses = {classes}\n'
    (tmp_path / "kinetics.toml").write_text(text)
    result = build_labelled([str(tmp_path / "kinetics.toml")], str(tmp_path / "k710"))
    assert result["train"]["clips"] == result["train"]["published"] == 658_340
    assert result["val"]["clips"] == result["val"]["published"] == 66_803
    assert result["train"]["also_in_val"] == 500
    (tmp_path / "ssv2.csv").write_text("".join(f"{i} 40 0\n" for i in range(168_913)))
    (tmp_path / "ava.csv").write_text("".join(f"film{i} 1 27000\n" for i in range(235)))
    (tmp_path / "webvid.csv").write_text("".join(f"{i}.mp4\n" for i in range(400_000)))
    (tmp_path / "own.toml").write_text(
        '[ssv2]\ntrain = "ssv2.csv"\nclasses = 174\nkind = "frames"\ntemplate = "img_{:05}.jpg"\n'
        '[ava]\ntrain = "ava.csv"\nformat = "pretrain"\ntemplate = "image_{:06}.jpg"\n'
        '[webvid]\ntrain = "webvid.csv"\nformat = "paths"\n')
    mixture = build_unlabelled([str(tmp_path / "own.toml"), result["datasets"]], str(tmp_path / "hybrid"))
    clips = {name: source["clips"] for name, source in mixture["sources"].items()}
    assert clips == {"k710": 658_340, "ssv2": 168_913, "ava": 21_150, "webvid": 250_000}
    assert mixture["clips"] == sum(clips.values())
