"""The loop end to end on tiny encoded clips: learning, accumulation, resuming, bad input."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
from pathlib import Path

import av
import pytest
import torch
from safetensors.torch import load_file

from tests import tiny_runs as tiny
from tests.drills.judge import same_bits
from vmae2_fast.config import MaskConfig
from vmae2_fast.data.augment import OFFICIAL, OFFICIAL_MIX
from vmae2_fast.data.loader import VideoLoader
from vmae2_fast.tasks import create_task
from vmae2_fast.train import loop, train
from vmae2_fast.train.log import read_metrics
from vmae2_fast.train.optim import LossScale, Optimizer

pytestmark = pytest.mark.usefixtures("one_thread")


def _stop_after(monkeypatch, step: int, error: BaseException) -> None:
    original = Optimizer.step

    def stepping(self, number, loss):
        if number == step:
            raise error
        return original(self, number, loss)

    monkeypatch.setattr(Optimizer, "step", stepping)


class Stopped(Exception):
    pass


def _train_until(monkeypatch, step: int, config) -> None:
    """A sitting that breaks off inside step number `step`."""
    with monkeypatch.context() as patch:
        _stop_after(patch, step, Stopped())
        with pytest.raises(Stopped):
            train(config)


def test_pretrain_run_leaves_what_it_promises(clips, tmp_path):
    config = dataclasses.replace(
        tiny.with_train(tiny.pretrain_config(clips, tmp_path), epochs=20), validation=tiny.data(clips)
    )
    summary = train(config)
    assert summary["steps"] == 40
    assert summary["clips"] == 160
    assert summary["last_loss"] < 0.97 * summary["first_loss"]
    run = Path(summary["directory"])
    assert sorted(os.listdir(run)) == [
        "checkpoints", "config.json", "done.json", "environment.json", "inputs.json", "metrics.jsonl", "weights.safetensors"
    ]  # fmt: skip
    assert json.loads((run / "done.json").read_text()) == summary
    assert sorted(os.listdir(run / "checkpoints")) == ["step-00000036", "step-00000040"]
    lines = read_metrics(run / "metrics.jsonl")
    assert [e["step"] for e in lines] == list(range(2, 41, 2))
    assert lines[-1]["epoch"] == 20
    assert all(e["grad_norm"] > 0 for e in lines)
    validation = read_metrics(run / "metrics.jsonl", "validation")
    assert [e["step"] for e in validation] == [40]
    assert validation[0]["ratio_to_zero_predictor"] == summary["validation"]["ratio_to_zero_predictor"]


def test_training_goes_on_in_training_mode_after_a_validation(clips, tmp_path, monkeypatch):
    config = tiny.with_train(tiny.classify_config(clips, tmp_path), epochs=3, validate_every=1)
    original, modes = loop.accumulate, []

    def accumulating(task, *args, **keywords):
        modes.append({m.training for m in task.model.modules()})
        return original(task, *args, **keywords)

    monkeypatch.setattr(loop, "accumulate", accumulating)
    summary = train(config)
    assert [e["step"] for e in read_metrics(Path(summary["directory"]) / "metrics.jsonl", "validation")] == [2, 4, 6]
    assert modes == [{True}] * 6


def test_every_step_is_in_one_line_of_the_log(clips, tmp_path, monkeypatch):
    """Lines at the steps that are logged (5, 10), saved (3, 6, 9), validated (4, 8) and at the last (12), each once."""
    config = dataclasses.replace(tiny.pretrain_config(clips, tmp_path), validation=tiny.data(clips))
    config = tiny.with_train(config, log_every=5, checkpoint_every=3, validate_every=2)
    original, norms = Optimizer.step, {}

    def stepping(self, number, loss):
        norm, skipped = original(self, number, loss)
        norms[number + 1] = norm.item()
        return norm, skipped

    monkeypatch.setattr(Optimizer, "step", stepping)
    lines = read_metrics(Path(train(config)["directory"]) / "metrics.jsonl")
    assert [e["step"] for e in lines] == [3, 4, 5, 6, 8, 9, 10, 12]
    assert [e["grad_norm"] for e in lines] == [norms[e["step"]] for e in lines]


def test_a_finished_run_is_not_run_again(clips, tmp_path, monkeypatch):
    config = tiny.pretrain_config(clips, tmp_path)
    first = train(config)
    _stop_after(monkeypatch, 0, Stopped())
    assert train(config) == first
    with pytest.raises(Stopped):
        train(config, resume=False)


@pytest.mark.parametrize("kind", ["pretrain", "classify"])
def test_resume_is_bitwise(clips, tmp_path, monkeypatch, kind):
    make = getattr(tiny, f"{kind}_config")
    whole = train(make(clips, tmp_path / "whole"))
    config = make(clips, tmp_path / "parts")
    for step in (2, 7, 10):
        _train_until(monkeypatch, step, config)
        torch.manual_seed(step)  # whatever happens in between, the generators come from the checkpoint
    parts = train(config)
    assert same_bits(whole["weights"], parts["weights"])
    assert parts["first_loss"] == whole["first_loss"]
    assert parts["last_loss"] == whole["last_loss"]
    assert parts["validation"] == whole["validation"]
    ours, theirs = (tiny.metrics_without_time(Path(s["directory"]) / "metrics.jsonl") for s in (whole, parts))
    assert ours == theirs


def test_float16_finds_its_loss_scale_and_goes_on_bitwise(clips, tmp_path, monkeypatch):
    initial = LossScale.__init__.__defaults__
    monkeypatch.setattr(LossScale.__init__, "__defaults__", ("cpu", 2.0**30))  # far beyond what float16 holds
    whole, part = (tiny.with_train(tiny.pretrain_config(clips, tmp_path / n), precision="float16") for n in "ab")
    whole = tiny.with_train(whole, epochs=20)
    part = tiny.with_train(part, epochs=20)
    summary = train(whole)
    lines = read_metrics(Path(summary["directory"]) / "metrics.jsonl")
    skipped = summary["skipped_steps"]
    assert summary["precision"] == "float16"
    assert 0 < skipped < 40
    assert lines[-1]["loss_scale"] == 2.0 ** (30 - skipped)
    assert summary["last_loss"] < 0.95 * summary["first_loss"]
    _train_until(monkeypatch, 9, part)
    monkeypatch.setattr(LossScale.__init__, "__defaults__", initial)
    again = train(part)
    assert same_bits(again["weights"], summary["weights"])
    assert again["skipped_steps"] == skipped


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT])
def test_a_signal_saves_and_exits(clips, tmp_path, monkeypatch, capsys, number):
    whole = train(tiny.pretrain_config(clips, tmp_path / "whole"))
    config = tiny.pretrain_config(clips, tmp_path / "parts")
    original = Optimizer.step

    def stepping(self, step, loss):
        if step == 6:
            os.kill(os.getpid(), number)
        return original(self, step, loss)

    before = signal.getsignal(number)
    with monkeypatch.context() as patch:
        patch.setattr(Optimizer, "step", stepping)
        with pytest.raises(SystemExit) as stop:
            train(config)
    assert stop.value.code == 128 + number
    assert "goes on from" not in capsys.readouterr().err
    assert signal.getsignal(number) is before
    assert "step-00000007" in os.listdir(tmp_path / "parts" / config.name / "checkpoints")
    logged = read_metrics(tmp_path / "parts" / config.name / "metrics.jsonl")
    assert [e["step"] for e in logged] == [2, 4, 6, 7]
    assert same_bits(whole["weights"], train(config)["weights"])
    assert "tiny_pretrain: goes on from step 7 of 12" in capsys.readouterr().err


# (T'=4: constant counts), (T'=2 and a random decoder mask: counts known only from the masks)
@pytest.mark.parametrize(("frames", "decoder"), [(8, "running_cell"), (4, "running_cell"), (8, "random")])
def test_accumulation_gives_the_gradient_of_the_big_batch(clips, tmp_path, frames, decoder):
    gradients = []
    for micro in (8, 2):
        config = tiny.with_train(tiny.pretrain_config(clips, tmp_path), global_batch=8, micro_batch=micro)
        config = dataclasses.replace(
            config,
            model=dataclasses.replace(config.model, frames=frames),
            mask=MaskConfig(encoder_ratio=0.75, decoder=decoder),
            data=tiny.data(clips, views=2),
        )
        torch.manual_seed(0)
        task = create_task(config)
        with VideoLoader(
            config.data, frames=frames, size=tiny.SIZE, clips_per_batch=micro // 2, seed=0, steps=8 // micro
        ) as loader:
            batches = list(loader)
        counts = {int((task.masks(b.position, b.view).loss_index >= 0).sum()) for b in batches}
        assert micro == 8 or decoder != "random" or len(counts) > 1, "the case needs micro-batches of unequal counts"
        sums, replaced = loop.accumulate(task, iter(batches), 8 // micro, 8)
        assert not replaced
        gradients.append({"loss": sums["loss"], **{n: p.grad for n, p in task.model.named_parameters()}})
    for name, big in gradients[0].items():
        # the same sums in another order: fp32 rounding only
        error = (gradients[1][name] - big).norm() / big.norm()
        assert error < 1e-5, f"{name}: {error}"


def test_the_log_counts_clips_that_had_to_be_converted(tmp_path):
    clips = tiny.write_clips(tmp_path / "clips")
    summary = train(tiny.pretrain_config(clips, tmp_path / "out"))
    plain = read_metrics(Path(summary["directory"]) / "metrics.jsonl")
    assert [(line["rgb"], line["fallback"]) for line in plain] == [({}, {})] * 6
    for path in clips.rglob("*.mp4"):
        _in_ten_bits(path)
    summary = train(tiny.pretrain_config(clips, tmp_path / "again"))
    lines = read_metrics(Path(summary["directory"]) / "metrics.jsonl")
    assert [line["rgb"] for line in lines] == [{"pixel format yuv420p10le": 2 * 4}] * 6  # steps of a line, clips of a step


def _in_ten_bits(path: Path) -> None:
    with av.open(str(path)) as video:
        frames = [frame.to_ndarray(format="rgb24") for frame in video.decode(video=0)]
    with av.open(str(path), "w") as out:
        stream = out.add_stream("libx264", rate=25)
        stream.height, stream.width, stream.pix_fmt = *frames[0].shape[:2], "yuv420p10le"
        for frame in frames:
            out.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        out.mux(stream.encode())


def test_a_corrupt_video_does_not_end_the_run(tmp_path):
    clips = tiny.write_clips(tmp_path / "clips")
    bad = clips / "left" / "1.mp4"
    bad.write_bytes(bad.read_bytes()[:200])
    config = dataclasses.replace(tiny.pretrain_config(clips, tmp_path / "out"), validation=tiny.data(clips))
    summary = train(config)
    assert summary["steps"] == 12
    # named with its count: once an epoch, and once more wherever it was drawn as a replacement
    assert list(summary["replaced"]) == [str(bad)]
    assert summary["replaced"][str(bad)] >= 6
    assert summary["validation"]["left_out"] == {str(bad): 1}
    assert summary["validation"]["clips"] == 7
    quarantined = [
        json.loads(line)["path"] for line in (Path(summary["directory"]) / "quarantine.jsonl").read_text().splitlines()
    ]
    assert quarantined == [str(bad)]


def test_weights_are_handed_on(clips, tmp_path):
    first = train(tiny.pretrain_config(clips, tmp_path))
    config = tiny.with_train(tiny.classify_config(clips, tmp_path), epochs=1)
    config = dataclasses.replace(
        config, optim=dataclasses.replace(config.optim, lr=0.0, min_lr=0.0), model=dataclasses.replace(config.model, depth=1)
    )
    second = train(config, init=first["directory"])
    before, after = load_file(first["weights"]), load_file(second["weights"])
    for name in ("patch_embed.proj.weight", "blocks.0.attn.qkv.weight"):
        assert torch.equal(after[name], before[f"encoder.{name}"])
    assert json.loads((Path(second["directory"]) / "config.json").read_text())["init"] == first["directory"]


def test_another_config_in_the_same_directory_names_the_key(clips, tmp_path, monkeypatch):
    config = tiny.pretrain_config(clips, tmp_path)
    _train_until(monkeypatch, 5, config)
    changed = dataclasses.replace(config, optim=dataclasses.replace(config.optim, lr=1e-4))
    with pytest.raises(ValueError, match=r"optim\.lr: 0\.003 there, 0\.0001 now.*resume=False"):
        train(changed)
    # how often it is saved is free to change; starting over is the way out
    assert train(tiny.with_train(config, checkpoint_every=3))["steps"] == 12
    assert train(changed, resume=False)["steps"] == 12


def test_a_moved_output_folder_is_the_same_run(clips, tmp_path, monkeypatch):
    first = train(tiny.pretrain_config(clips, tmp_path / "a"))
    config = tiny.classify_config(clips, tmp_path / "a", model=dataclasses.replace(tiny.CLASSIFY_MODEL, depth=1))
    done = train(config, init=first["weights"])
    (tmp_path / "a").rename(tmp_path / "b")
    monkeypatch.chdir(tmp_path)
    moved = dataclasses.replace(config, out="b")
    assert train(moved, init="b/tiny_pretrain/weights.safetensors") == done
    with pytest.raises(ValueError, match="init: "):
        train(moved, init="elsewhere/tiny_pretrain/weights.safetensors")


def test_a_run_that_failed_before_its_first_checkpoint_does_not_block_its_name(clips, tmp_path):
    config = tiny.pretrain_config(clips, tmp_path)
    with pytest.raises(ValueError, match=r"nowhere\.safetensors"):
        train(config, init=str(tmp_path / "nowhere.safetensors"))
    assert train(config)["steps"] == 12


def test_a_data_set_that_changed_under_a_run_is_an_error(tmp_path, monkeypatch):
    clips = tiny.write_clips(tmp_path / "clips")
    config = tiny.pretrain_config(clips, tmp_path / "out")
    _train_until(monkeypatch, 5, config)
    (clips / "left" / "0.mp4").unlink()
    with pytest.raises(ValueError, match="an epoch had 8 clips when this run began and has 7 now"):
        train(config)


def test_an_output_folder_that_cannot_be_written_is_an_error_before_training(clips, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="cannot write the run directory"):
        train(tiny.pretrain_config(clips, tmp_path / "file"))


def test_a_batch_larger_than_the_run_is_an_error(clips, tmp_path):
    with pytest.raises(ValueError, match=r"6 epochs of 8 clips are less than one step of 64 decodes"):
        train(tiny.with_train(tiny.pretrain_config(clips, tmp_path), global_batch=64))


def test_a_warmup_longer_than_the_run_is_an_error(clips, tmp_path):
    config = tiny.pretrain_config(clips, tmp_path)
    with pytest.raises(ValueError, match=r"warm-up of 14 steps does not fit a run of 12 steps; lower optim\.warmup_epochs"):
        train(dataclasses.replace(config, optim=dataclasses.replace(config.optim, warmup_epochs=7)))


def test_non_finite_steps_are_counted_and_many_in_a_row_end_the_run(clips, tmp_path, monkeypatch, capsys):
    config = tiny.with_train(tiny.pretrain_config(clips, tmp_path), epochs=6)
    original = Optimizer.step

    def poisoned(bad):
        def step(self, number, loss):
            if number in bad:
                next(iter(self.params.values())).grad.mul_(float("nan"))
            return original(self, number, loss)

        return step

    with monkeypatch.context() as patch:
        patch.setattr(Optimizer, "step", poisoned({3, 8}))
        summary = train(config)
    assert summary["skipped_steps"] == 2
    assert all(t.isfinite().all() for t in load_file(summary["weights"]).values())
    config = tiny.with_train(config, max_skipped=5)
    monkeypatch.setattr(Optimizer, "step", poisoned(set(range(4, 12))))
    with pytest.raises(SystemExit) as stop:
        train(config, resume=False)
    assert stop.value.code == loop.NOT_FINITE
    assert "not finite for 6 steps in a row" in capsys.readouterr().err


def test_augmented_fine_tuning_goes_on_bitwise_after_a_stop(clips, tmp_path, monkeypatch):
    """RandAugment, erasing, mixup and cutmix through the whole pipeline: they change the weights, a stop does not."""
    augmented = {"crop": "random_resized", "flip": True, "augment": OFFICIAL}
    plain = tiny.with_train(tiny.classify_config(clips, tmp_path / "plain"), epochs=3)
    config = dataclasses.replace(plain, data=dataclasses.replace(plain.data, **augmented), mix=OFFICIAL_MIX)
    whole = train(dataclasses.replace(config, out=str(tmp_path / "whole")))
    stopped = dataclasses.replace(config, out=str(tmp_path / "stopped"))
    _train_until(monkeypatch, 5, stopped)
    again = train(stopped)
    assert whole["steps"] == again["steps"] == 6
    assert same_bits(whole["weights"], again["weights"])
    assert not same_bits(whole["weights"], train(plain)["weights"])
