"""RandAugment: every operation has Pillow's pixels, policies are read and drawn as their strings say."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch

from vmae2_fast.data.randaugment import OPERATIONS, Operation, Policy, draw_operations, parse_policy, randaugment

OFFICIAL = "rand-m7-n4-mstd0.5-inc1"


def _video(height, width, frames=3, seed=0):
    """Noise over a ramp, so that flat and busy parts both occur; frame 1 is one colour."""
    rng = np.random.RandomState(seed)
    ramp = np.linspace(30, 200, width)[None, None, :, None] + np.array([0, 20, -25])
    video = (ramp + rng.normal(0, 20, (frames, height, width, 3))).clip(0, 255).astype(np.uint8)
    video[1] = (90, 17, 203)
    return torch.from_numpy(video)


def _pillow(image, name, value):
    """One operation by Pillow, written after its public interface."""
    from PIL import Image, ImageEnhance, ImageOps

    def transform(*matrix):
        return image.transform(image.size, Image.Transform.AFFINE, matrix, resample=Image.Resampling.BICUBIC,
                               fillcolor=(128, 128, 128))  # fmt: skip

    width, height = image.size
    return {
        "AutoContrast": lambda: ImageOps.autocontrast(image),
        "Equalize": lambda: ImageOps.equalize(image),
        "Invert": lambda: ImageOps.invert(image),
        "Rotate": lambda: image.rotate(value, resample=Image.Resampling.BICUBIC, fillcolor=(128, 128, 128)),
        "Posterize": lambda: ImageOps.posterize(image, int(value)) if value else Image.new("RGB", image.size),
        "Solarize": lambda: ImageOps.solarize(image, int(value)),
        "SolarizeAdd": lambda: image.point([min(255, i + int(value)) if i < 128 else i for i in range(256)] * 3),
        "Color": lambda: ImageEnhance.Color(image).enhance(value),
        "Contrast": lambda: ImageEnhance.Contrast(image).enhance(value),
        "Brightness": lambda: ImageEnhance.Brightness(image).enhance(value),
        "Sharpness": lambda: ImageEnhance.Sharpness(image).enhance(value),
        "ShearX": lambda: transform(1, value, 0, 0, 1, 0),
        "ShearY": lambda: transform(1, 0, 0, value, 1, 0),
        "TranslateXRel": lambda: transform(1, 0, value * width, 0, 1, 0),
        "TranslateYRel": lambda: transform(1, 0, 0, 0, 1, value * height),
    }[name]()


ARGUMENTS = {
    "AutoContrast": (0.0,), "Equalize": (0.0,), "Invert": (0.0,), "Rotate": (-30.0, 0.0, 12.7), "Posterize": (0, 1, 4),
    "Solarize": (0, 77, 256), "SolarizeAdd": (0, 110), "Color": (0.1, 1.0, 1.9), "Contrast": (0.1, 1.63),
    "Brightness": (0.1, 0.43, 1.9), "Sharpness": (0.1, 1.77), "ShearX": (-0.3, 0.21), "ShearY": (-0.17, 0.3),
    "TranslateXRel": (-0.45, 0.313), "TranslateYRel": (-0.2, 0.45),
}  # fmt: skip


GEOMETRIC = ("Rotate", "ShearX", "ShearY", "TranslateXRel", "TranslateYRel")


@pytest.mark.parametrize("name", OPERATIONS)
@pytest.mark.parametrize("shape", [(37, 61), (64, 48), (2, 2), (1, 5)])
def test_every_operation_has_pillows_pixels(name, shape):
    image = pytest.importorskip("PIL.Image")
    clips = torch.stack([_video(*shape, seed=i) for i in range(len(ARGUMENTS[name]))])
    before = clips.clone()
    found = randaugment(clips, [[Operation(name, float(value))] for value in ARGUMENTS[name]])
    for clip, result, value in zip(clips, found, ARGUMENTS[name], strict=True):
        for frame, ours in zip(clip.numpy(), result.numpy(), strict=True):
            theirs = np.asarray(_pillow(image.fromarray(frame), name, value))
            if name in GEOMETRIC:  # truncation of sums that are whole but for the order of their terms
                difference = np.abs(ours.astype(int) - theirs)
                assert difference.max() <= 1
                assert (difference > 0).mean() <= 0.005 + 3 / difference.size
            else:
                np.testing.assert_array_equal(ours, theirs)
    assert torch.equal(clips, before)


def test_clips_of_a_batch_take_their_own_operations():
    clips = torch.stack([_video(20, 30, seed=i) for i in range(4)])
    plans = [
        [Operation("Rotate", 11.0), Operation("Invert")], [], [Operation("Invert"), Operation("Rotate", -4.0)],
        [Operation("Invert"), Operation("Color", 0.3), Operation("Equalize")],
    ]  # fmt: skip
    together = randaugment(clips, plans)
    for clip, plan, result in zip(clips, plans, together, strict=True):
        for operation in plan:
            clip = randaugment(clip[None], [[operation]])[0]
        assert torch.equal(clip, result)
    for wrong in (clips.float(), clips[0], clips[..., :2]):
        with pytest.raises(ValueError, match=r"need uint8 \[B, T, H, W, 3\]"):
            randaugment(wrong, plans)


def test_policies():
    assert parse_policy(OFFICIAL) == Policy(magnitude=7, layers=4, deviation=0.5, increasing=True)
    assert parse_policy("rand") == Policy(magnitude=10, layers=2)
    assert parse_policy("rand-n3-m9-inc0-p0.3") == Policy(magnitude=9, layers=3, probability=0.3)
    assert parse_policy("rand-w0").weights is not None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("auto-m7", "must begin with rand"), ("rand-m7-x3", "'x3' is unknown"), ("rand-m7-m8", "'m8' is there twice"),
        ("rand-n0", "at least 1"), ("rand-n1.5", "whole number"), ("rand-inc2", "0 or 1"), ("rand-w1", "one set of weights"),
        ("rand-m11", r"0\.\.10"), ("rand-p2", r"0\.\.1"), ("rand-n14-w0", "13 operations"), ("rand-m", "'m' is unknown"),
    ],
)  # fmt: skip
def test_policies_that_cannot_be_meant(text, message):
    with pytest.raises(ValueError, match=message):
        parse_policy(text)


def _drawn(text, count=4000):
    rng = np.random.RandomState(3)
    return [draw_operations(parse_policy(text), rng) for _ in range(count)]


def test_draws_follow_the_policy():
    drawn = _drawn(OFFICIAL)
    applied = [operation for plan in drawn for operation in plan]
    assert abs(len(applied) / (4 * len(drawn)) - 0.5) < 0.02
    names = Counter(operation.name for operation in applied)
    assert set(names) == set(OPERATIONS)
    expected = len(applied) / len(OPERATIONS)
    assert sum((n - expected) ** 2 / expected for n in names.values()) < 36.1  # chi-square, 14 degrees, p = 0.001
    angles = np.array([operation.argument for operation in applied if operation.name == "Rotate"])
    assert abs(np.abs(angles).mean() - 21.0) < 0.3  # magnitude 7 of 10, of 30 degrees
    assert abs(np.abs(angles).std() - 1.5) < 0.2  # deviation 0.5 of 10
    assert 0.4 < (angles > 0).mean() < 0.6
    for name, low, high in (
        ("Posterize", 1, 2), ("Solarize", 26, 128), ("SolarizeAdd", 55, 110), ("ShearX", -0.3, 0.3), ("Color", 0.1, 1.9),
        ("TranslateYRel", -0.45, 0.45), ("Invert", 0, 0),
    ):  # fmt: skip
        values = [operation.argument for operation in applied if operation.name == name]
        assert low <= min(values)
        assert max(values) <= high


def test_the_other_forms_of_a_policy():
    plain = [operation for plan in _drawn("rand-m5-n2-p1") for operation in plan]
    assert len(plain) == 8000
    arguments = {operation.name: operation.argument for operation in plain}
    assert arguments["Color"] == 1.0
    assert (arguments["Posterize"], arguments["Solarize"]) == (2, 128)
    weighted = _drawn("rand-m5-n4-p1-w0", 500)
    names = Counter(operation.name for plan in weighted for operation in plan)
    assert not {"Posterize", "Invert"} & set(names)
    assert names.most_common(1)[0][0] == "Rotate"
    assert all(len({operation.name for operation in plan}) == 4 for plan in weighted)
