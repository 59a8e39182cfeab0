"""Reading files: what is damaged, hostile or no checkpoint at all is refused in one line that names it."""

from __future__ import annotations

import json
import os
import pickle
import tarfile
import traceback
import warnings

import pytest
import torch
from safetensors.torch import save_file

from tests.models.tiny import classify, official, pretrain, state_of
from vmae2_fast.config import to_dict
from vmae2_fast.models import load_weights, save_weights


class Unknown:
    pass


class Hostile:
    def __reduce__(self):
        return os.mkdir, ("pwned",)


@pytest.mark.parametrize(
    ("write", "asked"),
    [
        (lambda path: torch.save({"model": {"a": torch.ones(1)}, "args": Hostile()}, path), f"{os.name}.mkdir"),
        (lambda path: torch.save({"args": Unknown()}, path), f"{__name__}.Unknown"),
        (lambda path: path.write_bytes(pickle.dumps(Hostile(), protocol=2)), f"{os.name}.mkdir"),
        (lambda path: path.write_bytes(pickle.dumps(Hostile(), protocol=4)), None),
        (lambda path: torch.save({"model": Hostile()}, path, _use_new_zipfile_serialization=False), f"{os.name}.mkdir"),
    ],
    ids=["zip", "unknown class", "bare pickle", "bare pickle of a protocol torch does not read", "old format"],
)
def test_hostile_pickle_is_refused(write, asked, tmp_path, monkeypatch):
    """In our own words: torch's advise to load the file with the safety off, and doubt the pickle protocol."""
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "evil.pth")
    model = classify()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(ValueError, match=r"evil\.pth: refused") as caught:
            load_weights(model, tmp_path / "evil.pth")
    named = f" (it asks for {asked})" if asked else ""
    assert str(caught.value).endswith(f"loading it could run code{named}; ask for a safetensors file")
    assert "weights_only" not in "".join(traceback.format_exception(caught.value))
    assert not (tmp_path / "pwned").exists()


def test_a_tar_file_of_old_torch_is_refused_without_torchs_advice(tmp_path):
    (tmp_path / "part").write_bytes(b"")
    with tarfile.open(tmp_path / "old.pth", "w") as tar:
        for name in ("storages", "tensors", "pickle"):
            tar.add(tmp_path / "part", name)
    with pytest.raises(ValueError, match=r"old\.pth: refused") as caught:
        load_weights(classify(), tmp_path / "old.pth")
    assert "weights_only" not in str(caught.value)


NO_INDEX = (b"{}", b"", b"\xff\xfe", b"[]", b'{"weight_map": []}', b'{"weight_map": {"a": 3}}', b'{"weight_map": {"a": []}}')


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("w.pth", b"", "not a readable|refused"),
        ("w.pth", b"PK\x03\x04garbage", "not a readable|refused"),
        ("w.safetensors", b"\x08\x00\x00\x00\x00\x00\x00\x00garbage!", "not a readable safetensors file"),
        ("w.safetensors", b"", "not a readable safetensors file"),
        *(("model.safetensors.index.json", content, "not an index of safetensors files") for content in NO_INDEX),
    ],
)
def test_damaged_files_are_named(name, content, message, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message) as caught:
        load_weights(classify(), tmp_path / name)
    assert name in str(caught.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [({"name": 3}, "must be a string, got 3"), ({"width": "x"}, "must be a whole number, got 'x'"), ([], "must be an object")],
)
def test_a_header_with_values_of_a_wrong_type_names_the_file(change, message, tmp_path):
    model = pretrain()
    config = {**to_dict(model.config), **change} if isinstance(change, dict) else change
    save_file(state_of(model), tmp_path / "w.safetensors", {"config": json.dumps(config)})
    with pytest.raises(ValueError, match=rf"w\.safetensors: its model configuration cannot be read: .*{message}"):
        load_weights(model, tmp_path / "w.safetensors")


def test_truncated_files_are_named(tmp_path):
    official(pretrain(), tmp_path / "a.pth")
    save_weights(pretrain(), tmp_path / "b.safetensors")
    for name in ("a.pth", "b.safetensors"):
        whole = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(whole[: len(whole) // 2])
        with pytest.raises(ValueError, match=name):
            load_weights(pretrain(), tmp_path / name)


def test_no_tensors_no_file_no_choice(tmp_path):
    torch.save({"epoch": 3}, tmp_path / "empty.pth")
    with pytest.raises(ValueError, match="holds no tensors"):
        load_weights(classify(), tmp_path / "empty.pth")
    with pytest.raises(ValueError, match="no such checkpoint"):
        load_weights(classify(), tmp_path / "absent.pth")
    torch.save({}, tmp_path / "second.pth")
    with pytest.raises(ValueError, match=r"exactly one checkpoint file.*found empty\.pth, second\.pth"):
        load_weights(classify(), tmp_path)
