from __future__ import annotations

import json
import os
import pickle

import pytest
import torch
from torch import nn

from vmae2_fast.config import OptimConfig
from vmae2_fast.train import checkpoint as ck
from vmae2_fast.train.optim import Optimizer


def _trained(steps: int = 2, width: int = 4) -> tuple[nn.Module, Optimizer]:
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(3, width), nn.Dropout(0.5), nn.Linear(width, 2))
    optimizer = Optimizer(model, OptimConfig(lr=0.1, lr_batch=0), global_batch=1, total_steps=100, steps_per_epoch=10)
    for step in range(steps):
        _step(model, optimizer, step)
    return model, optimizer


def _step(model: nn.Module, optimizer: Optimizer, step: int) -> None:
    optimizer.zero_grad()
    loss = model(torch.ones(4, 3)).square().mean()
    loss.backward()
    optimizer.step(step, loss)


def test_round_trip_is_bitwise_and_goes_on_bitwise(tmp_path):
    model, optimizer = _trained()
    ck.save_checkpoint(tmp_path, 2, model, optimizer, {"position": 7})
    for step in range(2, 5):
        _step(model, optimizer, step)
    other, fresh = _trained(steps=0)
    torch.manual_seed(99)
    assert ck.load_checkpoint(ck.newest_intact(tmp_path), other, fresh) == {"step": 2, "position": 7}
    for step in range(2, 5):
        _step(other, fresh, step)
    ours, theirs = ({**m.state_dict(), **o.state_tensors()} for m, o in ((model, optimizer), (other, fresh)))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[n], theirs[n]) for n in ours)


@pytest.mark.parametrize("name", [*ck.TENSOR_FILES, ck.STATE, ck.MANIFEST, ck.COMMITTED])
def test_a_flipped_byte_is_found_and_the_previous_checkpoint_taken(tmp_path, capsys, name):
    model, optimizer = _trained()
    for step in (2, 4):
        ck.save_checkpoint(tmp_path, step, model, optimizer, {})
    victim = tmp_path / "step-00000004" / name
    content = bytearray(victim.read_bytes())
    content[len(content) // 2] ^= 0x10
    victim.write_bytes(content)
    assert ck.newest_intact(tmp_path).name == "step-00000002"
    message = capsys.readouterr().err
    assert "step-00000004" in message
    assert "Falling back" in message
    # set aside, not deleted, and not met again
    assert (tmp_path / "damaged-step-00000004").is_dir()
    assert ck.newest_intact(tmp_path).name == "step-00000002"
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("harm", ["truncate", "delete", "extra"])
def test_missing_truncated_or_foreign_files_are_found(tmp_path, harm):
    model, optimizer = _trained()
    directory = ck.save_checkpoint(tmp_path, 2, model, optimizer, {})
    victim = directory / "model.safetensors"
    if harm == "truncate":
        victim.write_bytes(victim.read_bytes()[:-5])
    elif harm == "delete":
        victim.unlink()
    else:
        manifest = json.loads((directory / ck.MANIFEST).read_text())
        (directory / "model.pt").write_bytes(pickle.dumps({"weights": 1}))
        manifest["model.pt"] = manifest.pop("model.safetensors")
        (directory / ck.MANIFEST).write_text(json.dumps(manifest))
        (directory / ck.COMMITTED).write_text(ck.sha256(directory / ck.MANIFEST))
    with pytest.raises(ck.CheckpointError, match=r"start over with --restart \(resume=False in a script\)"):
        ck.newest_intact(tmp_path)


def test_a_directory_without_the_marker_is_set_aside_and_never_taken(tmp_path, capsys):
    model, optimizer = _trained()
    directory = ck.save_checkpoint(tmp_path, 2, model, optimizer, {})
    half = tmp_path / "step-00000009"
    half.mkdir()
    (half / "model.safetensors").write_bytes(b"half")
    (tmp_path / ".tmp-abc").mkdir()
    ck.clean(tmp_path)
    assert ck.committed(tmp_path) == [directory]
    assert ck.newest_intact(tmp_path) == directory
    assert sorted(os.listdir(tmp_path)) == ["damaged-step-00000009", "step-00000002"]
    assert "step-00000009: damaged or incomplete" in capsys.readouterr().err
    (directory / ck.COMMITTED).unlink()
    with pytest.raises(ck.CheckpointError, match="no intact checkpoint is left"):  # and no silent start from nothing
        ck.newest_intact(tmp_path)


@pytest.mark.parametrize("name", [ck.MANIFEST, ck.COMMITTED, ck.STATE])
def test_any_flipped_bit_of_the_small_files_is_found(tmp_path, name):
    model, optimizer = _trained()
    directory = ck.save_checkpoint(tmp_path, 2, model, optimizer, {})
    good = (directory / name).read_bytes()
    for bit in range(8 * min(len(good), 40)):
        flipped = bytearray(good)
        flipped[bit // 8] ^= 1 << bit % 8
        (directory / name).write_bytes(flipped)
        with pytest.raises(ck.CheckpointError):
            ck.verify(directory)
    (directory / name).write_bytes(good)
    ck.verify(directory)


def test_keeps_the_newest(tmp_path):
    model, optimizer = _trained()
    for step in range(1, 6):
        ck.save_checkpoint(tmp_path, step, model, optimizer, {}, keep=2)
    assert sorted(os.listdir(tmp_path)) == ["step-00000004", "step-00000005"]


def test_a_directory_without_the_marker_does_not_count_among_the_kept(tmp_path):
    model, optimizer = _trained()
    (tmp_path / "step-00000009").mkdir()
    for step in range(1, 4):
        ck.save_checkpoint(tmp_path, step, model, optimizer, {}, keep=2)
    assert [p.name for p in ck.committed(tmp_path)] == ["step-00000002", "step-00000003"]


def test_every_file_is_on_disk_before_the_rename_commits_it(tmp_path, monkeypatch):
    model, optimizer = _trained()
    fsync, replace, events = os.fsync, os.replace, []

    def syncing(descriptor):
        events.append(os.fstat(descriptor).st_ino)
        fsync(descriptor)

    def replacing(source, target):
        events.append("renamed")
        replace(source, target)

    monkeypatch.setattr(os, "fsync", syncing)
    monkeypatch.setattr(os, "replace", replacing)
    directory = ck.save_checkpoint(tmp_path, 2, model, optimizer, {})
    committed = events.index("renamed")
    before, after = events[:committed], events[committed:]
    inodes = {path.name: path.stat().st_ino for path in directory.iterdir()}
    assert sorted(inodes) == sorted([*ck.TENSOR_FILES, ck.STATE, ck.MANIFEST, ck.COMMITTED])
    assert {name for name, inode in inodes.items() if inode not in before} == set()
    assert directory.stat().st_ino in before
    # the marker vouches for the others: it must not reach the disk ahead of them
    assert max(before.index(inode) for inode in inodes.values()) == before.index(inodes[ck.COMMITTED])
    assert tmp_path.stat().st_ino in after


def test_another_architecture_is_one_clear_error_and_changes_nothing(tmp_path):
    model, optimizer = _trained()
    directory = ck.save_checkpoint(tmp_path, 2, model, optimizer, {})
    other, fresh = _trained(steps=0, width=6)
    before = {n: t.clone() for n, t in other.state_dict().items()}
    with pytest.raises(
        ck.CheckpointError, match=r"another architecture: 0\.bias is \(4,\) in the checkpoint, \(6,\) in the model"
    ):
        ck.load_checkpoint(directory, other, fresh)
    assert all(torch.equal(before[n], t) for n, t in other.state_dict().items())


def test_a_pickle_is_never_opened(tmp_path):
    class Bomb:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "exploded"),))

    path = tmp_path / "checkpoint.pt"
    path.write_bytes(pickle.dumps(Bomb()))
    model, optimizer = _trained(steps=0)
    with pytest.raises(ck.CheckpointError, match="pickles are never opened"):
        ck.load_checkpoint(path, model, optimizer)
    assert not (tmp_path / "exploded").exists()


def test_a_full_disk_leaves_the_last_commit_intact(tmp_path, monkeypatch):
    model, optimizer = _trained()
    directory = ck.save_checkpoint(tmp_path, 2, model, optimizer, {})

    def full(tensors, path):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(ck, "save_file", full)
    with pytest.raises(ck.CheckpointError, match="No space left on device"):
        ck.save_checkpoint(tmp_path, 4, model, optimizer, {})
    assert os.listdir(tmp_path) == ["step-00000002"]
    ck.verify(directory)
