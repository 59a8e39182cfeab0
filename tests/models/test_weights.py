"""Checkpoints in and out: what fits, what is reported, what raises, and that nothing changes when it does."""

from __future__ import annotations

import json
import sys
import types

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from tests.models.tiny import DECODER, SHAPE, classify, clips, equal, official, pretrain, state_of
from vmae2_fast.models import build_model, convert_weights, create_model, load_weights, save_weights
from vmae2_fast.models.kinetics import label_map


@pytest.mark.parametrize("make", [pretrain, classify])
def test_our_own_file_comes_back_bit_for_bit(make, tmp_path):
    saved, path = make(), tmp_path / "weights.safetensors"
    save_weights(saved, path, {"step": 7})
    with safe_open(path, framework="pt") as file:
        header = file.metadata()
    assert json.loads(header["meta"]) == {"step": 7}
    assert json.loads(header["config"])["width"] == 16
    other = make()
    assert not equal(state_of(saved), state_of(other))
    report = load_weights(other, path)
    assert equal(state_of(saved), state_of(other))
    assert (report.dropped, report.initialised, report.notes) == ((), (), ())
    assert str(report) == f"{path}: {len(state_of(saved))} tensors loaded"


def test_the_same_weights_are_the_same_file(tmp_path):
    model = classify()
    for i in range(6):  # safetensors shuffles what stands beside the tensors anew each time
        save_weights(model, tmp_path / f"{i}.safetensors", {"run": "tiny", "classes": ["saut \u00e0 ski", "\u6ed1\u96ea"]})
    assert len({(tmp_path / f"{i}.safetensors").read_bytes() for i in range(6)}) == 1


def test_official_file_with_its_command_line(tmp_path):
    saved, other = pretrain(), pretrain()
    official(saved, tmp_path / "checkpoint.pth")
    load_weights(other, tmp_path / "checkpoint.pth")
    assert equal(state_of(saved), state_of(other))


def test_file_in_the_format_of_old_torch(tmp_path):
    saved, other = pretrain(), pretrain()
    torch.save({"module": saved.state_dict()}, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    load_weights(other, tmp_path / "old.pth")
    assert equal(state_of(saved), state_of(other))


def test_half_precision_weights_are_widened(tmp_path):
    saved, other = pretrain(), pretrain()
    save_file({key: value.half() for key, value in saved.state_dict().items()}, tmp_path / "half.safetensors")
    load_weights(other, tmp_path / "half.safetensors")
    assert equal({key: value.half().float() for key, value in state_of(saved).items()}, state_of(other))


def test_create_model_builds_only_what_the_file_does_not_have(tmp_path, capsys):
    save_weights(pretrain(), tmp_path / "weights.safetensors")
    model = create_model("vit_base_patch16_224", weights=str(tmp_path), **SHAPE, num_classes=5)
    assert "initialised (fc_norm.weight, fc_norm.bias, head.weight and 1 more)" in capsys.readouterr().err
    assert not any(p.is_meta for p in model.parameters())
    assert (model.fc_norm.weight == 1).all()
    assert model.head.weight.std() < 1e-4
    assert torch.isfinite(model(clips())).all()


@pytest.mark.parametrize("pooling", ["mean", "first"])
def test_pretraining_file_in_a_classifier(pooling, tmp_path):
    saved, model = pretrain(), classify(pooling=pooling)
    save_weights(saved, tmp_path / "weights.safetensors")
    report = load_weights(model, tmp_path / "weights.safetensors")
    assert torch.equal(model.blocks[1].mlp.fc2.weight, saved.encoder.blocks[1].mlp.fc2.weight)
    assert ("encoder.norm.weight" in report.dropped) == (pooling == "mean")
    assert report.loaded.get("norm.weight") == (None if pooling == "mean" else "encoder.norm.weight")
    assert {"mask_token", "encoder_to_decoder.weight", "decoder.head.bias"} <= set(report.dropped)


@pytest.mark.parametrize("classes", [400, 600, 700])
def test_kinetics_heads(classes, tmp_path):
    saved, model = classify(num_classes=710), classify(num_classes=classes)
    torch.nn.init.normal_(saved.head.bias)
    save_weights(saved, tmp_path / "k710.safetensors")
    report = load_weights(model, tmp_path / "k710.safetensors")
    rows = label_map(classes)
    assert len(set(rows)) == classes
    for row in range(classes):
        assert torch.equal(model.head.weight[row], saved.head.weight[rows[row]])
        assert model.head.bias[row] == saved.head.bias[rows[row]]
    assert report.notes == (f"head: 710 classes converted to {classes}",)


def test_head_by_rows_and_its_errors(tmp_path):
    saved, model = classify(num_classes=9), classify(num_classes=2)
    save_weights(saved, tmp_path / "nine.safetensors")
    load_weights(model, tmp_path / "nine.safetensors", head=[7, 0])
    assert torch.equal(model.head.weight, saved.head.weight[[7, 0]])
    for rows in ([7], [7, 9], [-1, 0]):
        with pytest.raises(ValueError, match="head: needs 2 row numbers below 9"):
            load_weights(model, tmp_path / "nine.safetensors", head=rows)
    with pytest.raises(ValueError, match="K710 maps for 400, 600, 700"):
        label_map(9)


@pytest.mark.parametrize(("classes", "head"), [(4, "auto"), (9, "drop"), (0, "auto")])
def test_other_heads_are_dropped_and_reported(classes, head, tmp_path):
    save_weights(classify(num_classes=9), tmp_path / "nine.safetensors")
    model = classify(num_classes=classes)
    before = state_of(model)
    report = load_weights(model, tmp_path / "nine.safetensors", head=head)
    assert set(report.dropped) == {"head.weight", "head.bias"}
    assert report.notes == ("head: 9 classes dropped",)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items() if key.startswith("head."))


@pytest.mark.parametrize(
    ("old", "new", "grid"),
    [
        ({"size": 32}, {"size": 48}, None),
        ({"frames": 8}, {"frames": 16}, None),
        ({"frames": 4, "size": 32}, {"frames": 16, "size": 64}, (2, 4, 4)),
    ],
)
def test_trained_positions_are_resized_with_the_grid(old, new, grid, tmp_path):
    saved, model = classify(learnable_positions=True, **old), classify(learnable_positions=True, **new)
    if grid is None:  # our own files know their grid
        save_weights(saved, tmp_path / "w.safetensors")
    else:
        save_file(saved.state_dict(), tmp_path / "w.safetensors")
    report = load_weights(model, tmp_path / "w.safetensors", checkpoint_grid=grid)
    small, large = saved.pos_embed.reshape(*saved.grid, 16), model.pos_embed.reshape(*model.grid, 16)
    # Resizing keeps the mean over the table up to the repeated edges, and a constant exactly.
    assert (small.mean() - large.mean()).abs() < 0.01
    assert report.notes[0].startswith(f"pos_embed: resized from {'x'.join(map(str, saved.grid))} to")
    with torch.no_grad():
        saved.pos_embed.fill_(0.7)
    save_file(saved.state_dict(), tmp_path / "constant.safetensors")
    load_weights(model, tmp_path / "constant.safetensors", checkpoint_grid=saved.grid)
    torch.testing.assert_close(model.pos_embed, torch.full_like(model.pos_embed, 0.7))


SURPRISES = {
    "missing": (lambda s: s.pop("blocks.1.attn.q_bias"), r"missing: blocks\.1\.attn\.q_bias"),
    "unexpected": (lambda s: s.update({"blocks.2.norm1.weight": torch.ones(16)}), r"unexpected: blocks\.2\.norm1\.weight"),
    "shape": (
        lambda s: s.update({"blocks.0.mlp.fc1.bias": torch.ones(3)}),
        r"other shape: blocks\.0\.mlp\.fc1\.bias \[3\] .*\[64\]",
    ),
    "positions": (lambda s: s.update({"pos_embed": torch.ones(1, 64, 16)}), "unexpected: pos_embed.*learnable_positions=True"),
    "pooling": (
        lambda s: s.update({"norm.weight": s.pop("fc_norm.weight"), "norm.bias": s.pop("fc_norm.bias")}),
        'pooling="mean"',
    ),
}


@pytest.mark.parametrize("kind", SURPRISES)
def test_surprises_raise_once_and_change_nothing(kind, tmp_path):
    change, message = SURPRISES[kind]
    state = state_of(classify())
    change(state)
    path = tmp_path / "odd.safetensors"
    save_file(state, path)
    model = classify()
    before = state_of(model)
    with pytest.raises(ValueError, match=message) as caught:
        load_weights(model, path)
    assert str(path) in str(caught.value)
    assert equal(before, state_of(model))


@pytest.mark.parametrize(
    ("saved", "model", "message"),
    [
        (lambda: pretrain(), lambda: pretrain(depth=3), r"missing: encoder\.blocks\.2"),
        (lambda: pretrain(), lambda: pretrain(width=32), "other shape"),
        (lambda: pretrain(), lambda: pretrain(heads=4), r"other number of heads: heads 2 \(the model has 4\)"),
        (lambda: classify(), lambda: pretrain(), "no decoder"),
        (lambda: classify(cosine_attention=True), lambda: classify(), r"unexpected: blocks\.0\.attn\.scale"),
    ],
)
def test_another_architecture(saved, model, message, tmp_path):
    save_weights(saved(), tmp_path / "w.safetensors")
    with pytest.raises(ValueError, match=message):
        load_weights(model(), tmp_path / "w.safetensors")


def test_saving_is_all_or_nothing(tmp_path, monkeypatch):
    path = tmp_path / "weights.safetensors"
    first = pretrain()
    save_weights(first, path)

    def half(tensors, name, header):
        name.write_bytes(b"half")
        raise OSError("no space left on device")

    monkeypatch.setattr("vmae2_fast.models.weights.save_file", half)
    with pytest.raises(OSError, match="no space left"):
        save_weights(pretrain(), path)
    assert [p.name for p in tmp_path.iterdir()] == ["weights.safetensors"]
    assert equal(load_file(path), state_of(first))


def test_saving_into_a_missing_folder_names_the_path(tmp_path):
    with pytest.raises(OSError, match=r"absent.*weights\.safetensors"):
        save_weights(pretrain(), tmp_path / "absent" / "weights.safetensors")


def test_official_to_ours_and_back_is_bit_exact(tmp_path):
    saved = pretrain().half()
    official(saved, tmp_path / "a.pth")
    done = convert_weights(tmp_path / "a.pth", tmp_path / "b.safetensors")
    parameters = sum(p.numel() for p in saved.parameters())
    assert (done["tensors"], done["parameters"], done["dtypes"]) == (len(saved.state_dict()), parameters, ["float16"])
    convert_weights(tmp_path / "b.safetensors", tmp_path / "c.pth")
    back = torch.load(tmp_path / "c.pth", weights_only=True)
    assert list(back) == ["model"]
    assert equal(back["model"], saved.state_dict())
    assert all(a.dtype == b.dtype for a, b in zip(back["model"].values(), saved.state_dict().values()))


def test_conversion_keeps_our_header_and_shared_tensors(tmp_path):
    save_weights(pretrain(), tmp_path / "a.safetensors", {"step": 7})
    convert_weights(tmp_path / "a.safetensors", tmp_path / "b.safetensors")
    with safe_open(tmp_path / "b.safetensors", framework="pt") as file:
        assert json.loads(file.metadata()["meta"]) == {"step": 7}
    whole = torch.arange(6.0)
    torch.save({"first": whole[:3], "second": whole[3:], "again": whole}, tmp_path / "views.pth")
    convert_weights(tmp_path / "views.pth", tmp_path / "views.safetensors")
    assert equal(load_file(tmp_path / "views.safetensors"), {"first": whole[:3], "second": whole[3:], "again": whole})


def test_conversion_to_an_unknown_ending(tmp_path):
    with pytest.raises(ValueError, match=r"must end in \.safetensors, \.pth or \.pt"):
        convert_weights(tmp_path / "a.pth", tmp_path / "b.onnx")


@pytest.mark.parametrize("name", ["b.safetensors", "b.pth"])
def test_conversion_into_a_missing_folder_names_it(name, tmp_path):
    official(pretrain(), tmp_path / "a.pth")
    with pytest.raises(ValueError, match=rf"absent/{name}: the folder .*absent does not exist") as caught:
        convert_weights(tmp_path / "a.pth", tmp_path / "absent" / name)
    assert f".{name}" not in str(caught.value)
    assert not (tmp_path / "absent").exists()


def hugging_face_folder(path, model, config: dict, **names) -> None:
    """The inverse of the loader's renaming, written by hand for two layers."""
    state = {}
    for key, value in model.state_dict().items():
        if key.endswith("attn.qkv.weight"):
            for part, rows in zip(("query", "key", "value"), value.chunk(3)):
                state[key.replace("attn.qkv.weight", f"attention.attention.{part}.weight")] = rows.contiguous()
        else:
            for old, new in (
                ("attn.proj", "attention.output.dense"),
                ("attn.q_bias", "attention.attention.q_bias"),
                ("attn.v_bias", "attention.attention.v_bias"),
                ("mlp.fc1", "intermediate.dense"),
                ("mlp.fc2", "output.dense"),
                ("norm1", "layernorm_before"),
                ("norm2", "layernorm_after"),
            ):
                key = key.replace(old, new)
            state[key] = value
    rename = (
        ("encoder.patch_embed.proj", "videomae.embeddings.patch_embeddings.projection"),
        ("encoder.norm", "videomae.layernorm"),
        ("encoder.blocks", "videomae.encoder.layer"),
        ("decoder.blocks", "decoder.decoder_layers"),
    )
    out = {}
    for key, value in state.items():
        for old, new in rename:
            key = key.replace(old, new) if key.startswith(old) else key
        out[key] = value
    path.mkdir(exist_ok=True)
    save_file(out, path / "model.safetensors")
    (path / "config.json").write_text(json.dumps(config))


HF_CONFIG = {"image_size": 32, "patch_size": 8, "num_frames": 8, "num_attention_heads": 2, "decoder_num_attention_heads": 2}


def test_hugging_face_folder_sets_the_epsilons_and_they_survive_our_file(tmp_path):
    saved, model = pretrain(), pretrain()
    hugging_face_folder(tmp_path / "hf", saved, HF_CONFIG | {"layer_norm_eps": 1e-12})
    report = load_weights(model, tmp_path / "hf")
    assert equal(state_of(saved), state_of(model))
    assert report.notes == ("norm_eps 1e-06 -> 1e-12, 1e-05 before the head",)
    assert (model.encoder.blocks[0].norm1.eps, model.encoder.norm.eps, model.decoder.norm.eps) == (1e-12, 1e-12, 1e-5)
    save_weights(model, tmp_path / "ours.safetensors")
    again = pretrain()
    load_weights(again, tmp_path / "ours.safetensors")
    assert (again.config.norm_eps, again.decoder.norm.eps) == (1e-12, 1e-5)
    assert build_model(model.config).decoder.norm.eps == 1e-5


def test_hugging_face_pretraining_without_the_final_norm(tmp_path):
    hugging_face_folder(tmp_path, pretrain(), HF_CONFIG)
    state = load_file(tmp_path / "model.safetensors")
    save_file({k: v for k, v in state.items() if not k.startswith("videomae.layernorm")}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"missing: encoder\.norm\.weight.*use_mean_pooling=False"):
        load_weights(pretrain(), tmp_path)
    load_weights(classify(), tmp_path)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"num_attention_heads": 4}, r"heads 4 \(the model has 2\)"),
        ({"hidden_act": "relu"}, "hidden_act='relu'"),
    ],
)
def test_hugging_face_architecture_told_by_its_configuration(config, message, tmp_path):
    hugging_face_folder(tmp_path, pretrain(), HF_CONFIG | config)
    with pytest.raises(ValueError, match=message):
        load_weights(pretrain(), tmp_path)


def test_hub_is_asked_once_then_the_cache_and_the_revision_is_printed(tmp_path, monkeypatch, capsys):
    snapshot = tmp_path / "snapshots" / "0123abc"
    snapshot.mkdir(parents=True)
    save_weights(pretrain(), snapshot / "model.safetensors")
    calls = []

    def snapshot_download(repository, *, revision, allow_patterns, local_files_only=False):
        calls.append((repository, revision, local_files_only))
        if not local_files_only:
            raise ConnectionError("no network")
        return str(snapshot)

    monkeypatch.setitem(sys.modules, "huggingface_hub", types.SimpleNamespace(snapshot_download=snapshot_download))
    load_weights(pretrain(), "hf:owner/name@v2")
    assert calls == [("owner/name", "v2", False), ("owner/name", "v2", True)]
    assert capsys.readouterr().err == "hf:owner/name: revision 0123abc\n"


def test_hub_without_the_package_or_the_repository(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ValueError, match=r"pip install vmae2_fast\[hub\]"):
        load_weights(pretrain(), "hf:owner/name")

    def snapshot_download(repository, **_):
        raise ConnectionError("no network")

    monkeypatch.setitem(sys.modules, "huggingface_hub", types.SimpleNamespace(snapshot_download=snapshot_download))
    with pytest.raises(ValueError, match="cannot be downloaded and is not in the local cache: no network"):
        load_weights(pretrain(), "hf:owner/name")


def test_sharded_safetensors(tmp_path):
    saved, model = pretrain(), pretrain()
    state = saved.state_dict()
    keys = list(state)
    shards = {"model-1.safetensors": keys[::2], "model-2.safetensors": keys[1::2]}
    for name, part in shards.items():
        save_file({key: state[key] for key in part}, tmp_path / name)
    (tmp_path / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {k: n for n, p in shards.items() for k in p}})
    )
    load_weights(model, tmp_path)
    assert equal(state, state_of(model))


def test_meta_model_takes_all_from_the_file(tmp_path):
    saved = pretrain()
    save_weights(saved, tmp_path / "w.safetensors")
    model = create_model("pretrain_videomae_base_patch16_224", weights=str(tmp_path / "w.safetensors"), **SHAPE, **DECODER)
    assert equal(state_of(saved), state_of(model))
    assert not model.encoder.positions.table.is_meta
