"""resize_crop: whole numbers, so backends agree bit for bit, and the truth is torch's float64 filter rounded."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F

from tests.support import awkward, backends, compiles, expanded, opcheck
from vmae2_fast import backend
from vmae2_fast.ops import Window, Yuv420, resize_crop, resize_crop_packed
from vmae2_fast.ops._resize_table import MAX_SIDE
from vmae2_fast.ops.yuv import NOT_YUV, coefficients, frame_bytes

BACKENDS = backends("resize_crop")
FAST = [name for name in BACKENDS if name != "triton" or torch.cuda.is_available()]  # not Triton's interpreter
# frame height and width, window, height and width of the result
CASES = {
    "down": (9, 13, Window(1, 2, 7, 10), (5, 6)),
    "up": (9, 13, Window(1, 2, 5, 3), (7, 8)),
    "flipped": (9, 13, Window(0, 3, 9, 10, True), (6, 7)),
    "copy": (9, 13, Window(2, 4, 6, 9), (6, 9)),
    "mirror": (9, 13, Window(2, 4, 6, 9, True), (6, 9)),
    "width only": (9, 13, Window(0, 0, 6, 13), (6, 5)),
    "height only": (9, 13, Window(0, 4, 9, 8), (4, 8)),
    "one pixel": (9, 13, Window(8, 12, 1, 1), (3, 2)),
    "one-pixel frame": (1, 1, Window(0, 0, 1, 1), (1, 1)),
    "to one pixel": (5, 4, Window(0, 0, 5, 4), (1, 1)),
    "one line": (1, 13, Window(0, 0, 1, 13, True), (2, 6)),
    "scaled": (9, 13, Window(1, 2, 4, 4, False, (5, 8)), (4, 4)),
    "scaled, flipped": (9, 13, Window(3, 5, 6, 6, True, (12, 18)), (6, 6)),
    "far": (23, 2, Window(0, 0, 23, 2), (1, 3)),
}


def video(height: int, width: int, channels: int = 3, frames: int = 2) -> Tensor:
    return torch.randint(0, 256, (frames, height, width, channels), dtype=torch.uint8)


def exact(frames: Tensor, window: Window, size: tuple[int, int]) -> Tensor:
    """torch's filter in float64: of the window, or of whole frames the window is then cut from."""
    pixels = frames.permute(0, 3, 1, 2).double()
    top, left, height, width, flip, scaled = window
    if scaled is None:
        pixels = pixels[:, :, top : top + height, left : left + width]
    pixels = F.interpolate(pixels, size=scaled or size, mode="bilinear", antialias=True)
    if scaled is not None:
        pixels = pixels[:, :, top : top + height, left : left + width]
    return (pixels.flip(3) if flip else pixels).permute(0, 2, 3, 1)


def assert_rounded(clip: Tensor, truth: Tensor) -> None:
    """Nearest integers everywhere: a tie, which float64 does not tell from what lies beside it, may go either way."""
    assert clip.dtype == torch.uint8
    assert clip.shape == truth.shape
    assert float((clip - truth).abs().max()) <= 0.5 + 1e-9


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", BACKENDS)
def test_every_pixel_is_the_rounded_filter(name: str, case: str) -> None:
    height, width, window, size = CASES[case]
    for channels in (1, 2, 3, 4) if name in FAST or case == "scaled, flipped" else (3,):
        frames = video(height, width, channels)
        with backend.use_backend(name):
            clip = resize_crop(frames, [window], size)
        assert clip.shape == (1, 2, *size, channels)
        assert_rounded(clip[0], exact(frames, window, size))
        with backend.use_backend("reference"):
            assert torch.equal(clip, resize_crop(frames, [window], size))


@pytest.mark.parametrize("side", [1, 2, 3, 31, 55, 56, 64, 65, 84, 97, 112, 113, 128, 200])
@pytest.mark.parametrize("name", [n for n in FAST if n != "reference"])
def test_ratios_agree_with_the_reference(name: str, side: int) -> None:
    """Small and large denominators, with and without a vector path, on noise and on ramps, whose sums lie near ties."""
    ramp = (torch.arange(side)[:, None, None] + 2 * torch.arange(side + 7)[:, None]).expand(-1, -1, 3) % 256
    frames = torch.stack([video(side, side + 7, frames=1)[0], ramp.to(torch.uint8)])
    windows = [Window(0, 0, side, side), Window(0, 7, side, side, True), Window(0, 0, side, side + 7)]
    with backend.use_backend(name):
        clips = resize_crop(frames, windows, 56)
    with backend.use_backend("reference"):
        assert torch.equal(clips, resize_crop(frames, windows, 56))
    for clip, window in zip(clips, windows, strict=True):
        assert_rounded(clip, exact(frames, window, (56, 56)))


@pytest.mark.parametrize("name", FAST)
def test_two_thousand_pixels_to_three(name: str) -> None:
    frames = video(2000, 40, frames=1)
    window = Window(0, 0, 2000, 40)
    with backend.use_backend(name):
        assert_rounded(resize_crop(frames, [window], 3)[0], exact(frames, window, (3, 3)))
        tall = torch.full((1, MAX_SIDE, 1, 1), 255, dtype=torch.uint8)  # the largest sums there are
        assert resize_crop(tall, [Window(0, 0, MAX_SIDE, 1)], 1).item() == 255
        wide = tall.transpose(1, 2)
        wide[..., ::2, :] = 254
        assert resize_crop(wide, [Window(0, 0, 1, MAX_SIDE)], 1).item() == 255


@pytest.mark.parametrize("name", BACKENDS)
def test_halves_are_rounded_up(name: str) -> None:
    pairs = torch.arange(255, dtype=torch.uint8)
    frames = torch.stack([pairs, pairs + 1], dim=1).view(255, 1, 2, 1)[:: 1 if name in FAST else 32]
    with backend.use_backend(name):
        clip = resize_crop(frames, [Window(0, 0, 1, 2)], 1)
    assert torch.equal(clip.flatten(), frames[:, 0, 1, 0])  # k + 1/2 becomes k + 1 for even and odd k


@pytest.mark.parametrize("name", FAST)
def test_halves_with_a_large_denominator_are_rounded_up(name: str) -> None:
    """From 97 pixels to 112 weights are odd and add up to 224: between columns of 143 and 255 every pixel is a half."""
    columns = (torch.arange(97, dtype=torch.uint8) % 2 * 112 + 143)[:, None].expand(1, 97, 97, 3)
    frames = torch.cat([columns.transpose(1, 2), columns])
    window = Window(0, 0, 97, 97)
    truth = exact(frames, window, (112, 112))
    halves = (truth - truth.floor() - 0.5).abs() < 1e-9
    assert halves.double().mean() > 0.9
    with backend.use_backend(name):
        clip = resize_crop(frames, [window], 112)[0]
    assert torch.equal(clip[halves].double(), (truth[halves] + 0.25).round())


@pytest.mark.parametrize("name", BACKENDS)
def test_a_call_serves_clips_of_many_sizes(name: str) -> None:
    """Views are clip-major, each as if it were alone, whatever else is in the call."""
    clips = [video(9, 13), video(4, 4), video(7, 8)]
    windows = [[Window(0, 0, 6, 9), Window(2, 3, 7, 5, True)], [], [Window(1, 1, 6, 6), Window(0, 0, 7, 8)]]
    with backend.use_backend(name):
        together = resize_crop(clips, windows, 5)
        alone = [resize_crop(clip, [w], 5) for clip, views in zip(clips, windows, strict=True) for w in views]
        assert torch.equal(together, torch.cat(alone))
        stacked = torch.stack([clips[0], clips[0] // 2])
        assert torch.equal(resize_crop(stacked, windows[:2], 5), together[:2])
        assert resize_crop(clips, [[], [], []], 5).shape == (0, 2, 5, 5, 3)
        assert resize_crop(stacked[:0], [], 5).shape == (0, 2, 5, 5, 3)


@pytest.mark.parametrize("name", FAST)
def test_threads_change_nothing(name: str) -> None:
    frames = video(90, 120, frames=8)
    windows = [Window(0, 0, 90, 90), Window(5, 9, 77, 61, True), Window(0, 3, 64, 64, False, (64, 85))]
    with backend.use_backend(name):
        one = resize_crop(frames, windows, 64, threads=1)
        assert all(torch.equal(one, resize_crop(frames, windows, 64, threads=n)) for n in (2, 3, 16, None))


@pytest.mark.parametrize("name", BACKENDS)
def test_memory_layouts(name: str) -> None:
    window, base = Window(1, 2, 6, 8), video(9, 13)
    with backend.use_backend(name):
        expected = resize_crop(base, [window], 5)
        for layout, frames in awkward(base):
            assert torch.equal(resize_crop(frames, [window], 5), expected), layout
        assert torch.equal(resize_crop(expanded(base), [window], 5), expected[:, :1].expand(-1, 2, -1, -1, -1))
        # rows of a batch: what lies before and behind stays
        batch = torch.full((4, 2, 5, 5, 3), 7, dtype=torch.uint8)
        out = batch[1:3]
        assert resize_crop(base, [window, window], 5, out=out) is out
        assert torch.equal(out, expected.expand(2, -1, -1, -1, -1))
        assert (batch[::3] == 7).all()


@pytest.mark.parametrize("name", BACKENDS)
def test_packed_frames_with_strides(name: str) -> None:
    """Lines and frames with gaps, in any order and overlapping; nothing outside the window is read."""
    padded = video(9, 16, frames=3)
    whole = [Window(0, 0, 9, 13), Window(0, 3, 9, 13)]
    buffer = padded.reshape(-1)
    frame, line = 9 * 16 * 3, 16 * 3
    clips = torch.tensor(
        [
            [frame, 2, 9, 13, frame, line, *NOT_YUV],
            [frame + 3 * 3, 2, 9, 13, frame, line, *NOT_YUV],
            [0, 2, 9, 16, 2 * frame, line, *NOT_YUV],
        ]
    )
    windows = torch.tensor(
        [[1, 0, 0, 9, 13, 5, 6, 0, 0, 0], [0, 0, 0, 9, 13, 5, 6, 0, 0, 0], [2, 0, 0, 9, 16, 8, 9, 1, 2, 1]]
    )
    with backend.use_backend(name):
        out = resize_crop_packed(buffer, clips, windows, buffer.new_empty(3, 2, 5, 6, 3))
        expected = resize_crop(padded[1:], whole, (5, 6))
        assert torch.equal(out[:2], expected.flip(0))
        grid = resize_crop(padded[::2], [Window(0, 0, 9, 16)], (8, 9))
        assert torch.equal(out[2], grid[0, :, 1:6, 2:8].flip(2))


@pytest.mark.parametrize("name", BACKENDS)
def test_buffers_beyond_two_gigabytes(name: str) -> None:
    buffer = torch.from_numpy(np.zeros(2**31 + 4096, dtype=np.uint8))  # pages that nobody touches take no memory
    frames = video(9, 13, frames=2)
    far = 2**31 + 64
    buffer[:351], buffer[far : far + 351] = frames[0].flatten(), frames[1].flatten()
    clips = torch.tensor([[0, 2, 9, 13, far, 39, *NOT_YUV], [far, 2, 9, 13, 0, 39, *NOT_YUV]])
    windows = torch.tensor([[0, 0, 0, 9, 13, 4, 4, 0, 0, 0], [1, 0, 0, 9, 13, 4, 4, 0, 0, 0]])
    with backend.use_backend(name):
        out = resize_crop_packed(buffer, clips, windows, buffer.new_empty(2, 2, 4, 4, 3))
        expected = resize_crop(frames, [Window(0, 0, 9, 13)], 4)[0]
    assert torch.equal(out[0], expected)
    assert torch.equal(out[1], expected[1:].expand(2, -1, -1, -1))


FORMATS = [(matrix, value_range) for matrix in ("bt601", "bt709") for value_range in ("limited", "full")]


def planar(height: int, width: int, frames: int = 2, matrix: str = "bt601", value_range: str = "limited") -> Yuv420:
    planes = torch.randint(0, 256, (frames, frame_bytes(height, width)), dtype=torch.uint8)
    return Yuv420(planes, height, width, matrix, value_range)


def exact_rgb(video: Yuv420) -> Tensor:
    """Float64 [T, H, W, 3] after the formulas of BT.601 and BT.709, not rounded; chroma repeated for the pixels it covers."""
    h, w = video.height, video.width
    y, chroma = video.planes[:, : h * w].view(-1, h, w), video.planes[:, h * w :].view(-1, 2, (h + 1) // 2, (w + 1) // 2)
    chroma = chroma.repeat_interleave(2, 2).repeat_interleave(2, 3)[..., :h, :w]
    if video.value_range == "limited":
        luma, (cb, cr) = (y.double() - 16) / 219, ((chroma.double() - 128) / 224).unbind(1)
    else:
        luma, (cb, cr) = y.double() / 255, ((chroma.double() - 128) / 255).unbind(1)
    red, blue = {"bt601": (0.299, 0.114), "bt709": (0.2126, 0.0722)}[video.matrix]
    r, b = luma + 2 * (1 - red) * cr, luma + 2 * (1 - blue) * cb
    g = (luma - red * r - blue * b) / (1 - red - blue)
    return (255 * torch.stack([r, g, b], -1)).clamp(0, 255)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", BACKENDS)
def test_yuv_is_its_rgb_resized(name: str, case: str) -> None:
    """The same bits as converting first, whatever the window's parity; and that is the exact conversion, rounded."""
    height, width, window, size = CASES[case]
    for matrix, value_range in FORMATS if name in FAST else FORMATS[1:3]:
        video = planar(height, width, matrix=matrix, value_range=value_range)
        with backend.use_backend("reference"):
            rgb = resize_crop(video, [Window(0, 0, height, width)], (height, width))[0]
            expected = resize_crop(rgb, [window], size)
        assert float((rgb - exact_rgb(video)).abs().max()) <= 0.53
        with backend.use_backend(name):
            clip = resize_crop(video, [window], size)
        assert torch.equal(clip, expected)
        assert float((clip[0] - exact(exact_rgb(video), window, size)).abs().max()) <= 1.03  # two roundings


@pytest.mark.parametrize("name", [n for n in FAST if n != "reference"])
def test_yuv_of_every_level_and_width(name: str) -> None:
    """All pairs of luma and one chroma, the other random, and every remainder of a vector's width at either parity."""
    levels = torch.arange(256, dtype=torch.uint8)
    for matrix, value_range in FORMATS:
        y, chroma = levels.repeat_interleave(2).expand(512, 512), levels[:, None].expand(256, 256)
        noise = torch.randint(0, 256, (256, 256), dtype=torch.uint8)
        planes = torch.stack([torch.cat([p.flatten() for p in (y, *c)]) for c in ((chroma, noise), (noise, chroma))])
        video = Yuv420(planes, 512, 512, matrix, value_range)
        whole = [Window(0, 0, 512, 512)]
        with backend.use_backend(name):
            found = resize_crop(video, whole, 512)
        assert float((found[0] - exact_rgb(video)).abs().max()) <= 0.53
        with backend.use_backend("reference"):
            assert torch.equal(found, resize_crop(video, whole, 512))
    video = planar(5, 61, frames=1)
    for left in (0, 1):
        for width in range(1, 61):
            windows = [Window(left, left, 4, width, bool(width % 2))]
            results = []
            for backend_name in (name, "reference"):
                with backend.use_backend(backend_name):
                    results += [resize_crop(video, windows, (4, width)), resize_crop(video, windows, (3, width + 1))]
            assert torch.equal(results[0], results[2])
            assert torch.equal(results[1], results[3])


@pytest.mark.parametrize("name", BACKENDS)
def test_yuv_beside_rgb_and_several_clips(name: str) -> None:
    """Formats mix in one call; clips of one tensor need no copy and are those of a sequence."""
    window, other = Window(1, 1, 7, 9), Window(2, 3, 6, 5, True)
    planes = planar(9, 13, frames=4).planes.unflatten(0, (2, 2))
    two = [Yuv420(p, 9, 13) for p in planes]
    rgb, third = video(9, 13), planar(7, 8, matrix="bt709", value_range="full")
    with backend.use_backend(name):
        views = [[window, other], [window], [other], [Window(0, 0, 7, 8)]]
        clips = [two[0], rgb, two[1], third]
        together = resize_crop(clips, views, 5)
        alone = [resize_crop(clip, own, 5) for clip, own in zip(clips, views, strict=True)]
        assert torch.equal(together, torch.cat(alone))
        assert torch.equal(resize_crop(Yuv420(planes, 9, 13), [views[0], views[2]], 5), together[[0, 1, 3]])
        gap = torch.zeros(2, 2, 2 * frame_bytes(9, 13), dtype=torch.uint8)[..., ::2].copy_(planes)
        assert torch.equal(resize_crop(Yuv420(gap, 9, 13), [views[0], views[2]], 5), together[[0, 1, 3]])


@pytest.mark.parametrize("name", BACKENDS)
def test_yuv_lines_with_gaps(name: str) -> None:
    """Planes whose lines are longer than the frame is wide (odd and even), in a buffer without a byte to spare."""
    for line in (15, 16):
        whole = planar(9, line, frames=2)
        size, chroma_line = frame_bytes(9, line), (line + 1) // 2
        # of the last V line only the seven samples of thirteen pixels are there
        buffer = whole.planes.flatten()[: 2 * size - (chroma_line - 7)].clone()
        clips = torch.tensor([[0, 2, 9, 13, size, line, *coefficients("bt601", "limited")]])
        windows = torch.tensor([[0, 1, 3, 8, 10, 5, 6, 0, 0, 1], [0, 0, 0, 9, 13, 9, 13, 4, 0, 0]])
        with backend.use_backend(name):
            out = resize_crop_packed(buffer, clips, windows, buffer.new_empty(2, 2, 5, 6, 3))
            assert torch.equal(out[:1], resize_crop(whole, [Window(1, 3, 8, 10, True)], (5, 6)))
            rgb = resize_crop(whole, [Window(0, 0, 9, line)], (9, line))[0]
            assert torch.equal(out[1], rgb[:, 4:9, :6])
            with pytest.raises(ValueError, match=f"clip 0 ends at byte {buffer.numel()} of a buffer of {buffer.numel() - 1}"):
                resize_crop_packed(buffer[:-1], clips, windows, out)


@pytest.mark.parametrize("name", FAST)
def test_yuv_threads_change_nothing(name: str) -> None:
    frames = planar(91, 121, frames=4)
    windows = [Window(0, 0, 91, 91), Window(5, 9, 77, 61, True), Window(0, 3, 64, 64, False, (64, 85))]
    with backend.use_backend(name):
        one = resize_crop(frames, windows, 64, threads=1)
        assert all(torch.equal(one, resize_crop(frames, windows, 64, threads=n)) for n in (2, 3, 16, None))


def test_rejected_yuv() -> None:
    good = planar(9, 13)
    for values, message in (
        ({"matrix": "bt2020"}, "matrix must be one of bt601, bt709, got 'bt2020'"),
        ({"value_range": "tv"}, "value_range must be one of limited, full, got 'tv'"),
        ({"height": 10}, r"must be uint8 \[T, 200\] or \[N, T, 200\], got torch.uint8 \(2, 187\)"),
        ({"height": 0}, "must have a pixel, got 0 x 13"),
        ({"planes": good.planes.int()}, "must be uint8"),
        ({"planes": good.planes[0]}, "must be uint8"),
    ):
        with pytest.raises(ValueError, match=f"resize_crop: .*{message}"):
            Yuv420(**{"planes": good.planes, "height": 9, "width": 13, **values})
    for frames, windows, message in (
        (good, [Window(0, 0, 10, 4)], "inside its frames of 9 x 13"),
        ([good, planar(9, 13, frames=3)], [[Window(0, 0, 4, 4)]] * 2, "one T, C and device"),
        ([good, video(9, 13, channels=1)], [[Window(0, 0, 4, 4)]] * 2, "one T, C and device"),
        ([Yuv420(good.planes[None], 9, 13)], [[Window(0, 0, 4, 4)]], "several clips in one"),
    ):
        with pytest.raises(ValueError, match=f"resize_crop: .*{message}"):
            resize_crop(frames, windows, 5)
    buffer, color = good.planes.flatten(), coefficients("bt709", "full")
    windows, out = torch.tensor([[0, 0, 0, 9, 13, 4, 4, 0, 0, 0]]), buffer.new_empty(1, 2, 4, 4, 3)
    for line, own, target, message in (
        (12, color, out, "a line at least its width"),
        (13, color, out[..., :1].contiguous(), "out must have 3 channels"),
        (13, color._replace(y=-1), out, "coefficients"),
        (13, color._replace(black=256), out, "coefficients"),
        (13, color._replace(bu=1 << 15), out, "coefficients"),
    ):
        with pytest.raises(ValueError, match=f"resize_crop: clip 0 .*{message}"):
            resize_crop_packed(buffer, torch.tensor([[0, 2, 9, 13, 187, line, *own]]), windows, target)


def test_opcheck_fake_and_compile() -> None:
    buffer, out = video(9, 13).reshape(-1), torch.zeros(2, 2, 4, 4, 3, dtype=torch.uint8)
    clips = torch.tensor([[0, 2, 9, 13, 351, 39, *NOT_YUV]])
    windows = torch.tensor([[0, 0, 0, 9, 13, 4, 4, 0, 0, 0], [0, 1, 2, 6, 6, 4, 4, 0, 0, 1]])
    opcheck(torch.ops.vmae2.resize_crop.default, (buffer, clips, windows, out, 0))
    frames, views = video(9, 13), [Window(0, 0, 9, 13), Window(1, 2, 6, 6, True)]

    def clip(frames: Tensor, views: Sequence[Window]) -> Tensor:
        return resize_crop(frames, views, 4).float() / 255

    compiled = compiles(clip, frames, views)
    assert torch.equal(compiled, clip(frames, views))
    again = torch.compile(clip, fullgraph=True, backend="aot_eager")
    for views in ([Window(0, 0, 8, 8), Window(0, 1, 7, 9)], [Window(1, 1, 5, 5), Window(2, 2, 4, 4)], [Window(0, 0, 4, 4)]):
        assert torch.equal(again(frames, views), clip(frames, views))
    with FakeTensorMode() as mode:
        fake = resize_crop(mode.from_tensor(frames), views, 4)
        assert fake.shape == (len(views), 2, 4, 4, 3)


BAD_WINDOWS = {
    "lie inside its frames of 9 x 13": [
        Window(-1, 0, 4, 4), Window(0, -1, 4, 4), Window(6, 0, 4, 4), Window(0, 10, 4, 4), Window(0, 0, 0, 4),
        Window(0, 0, 4, 0),
    ],
    "they must lie inside": [Window(top, left, 5, 5, False, (6, 9)) for top, left in ((2, 0), (0, 5), (-1, 0), (0, -1))],
    "must be as large as the clip, 5 x 5": [Window(0, 0, 4, 4, False, (6, 9))],
    "no side may exceed 8192": [Window(0, 0, 5, 5, False, (8193, 9))],
    "whole numbers of pixels": [
        Window(0.5, 0, 4, 4), Window(0, 0, 4, 4.0), Window(0, 0, 5, 5, False, (6.5, 9)), Window(0, 0, 4, 4, 0.5),
    ],
    "must be a sequence of Window": [[Window(0, 0, 4, 4)], (0, 0, 4, 4)],
}  # fmt: skip


@pytest.mark.parametrize("message", BAD_WINDOWS)
def test_rejected_windows(message: str) -> None:
    for window in BAD_WINDOWS[message]:
        with pytest.raises(ValueError, match=f"resize_crop: .*{message}"):
            resize_crop(video(9, 13), [window], 5)


def test_rejected_arguments() -> None:
    frames, window = video(9, 13), Window(0, 0, 4, 4)
    for bad, windows, message in (
        (frames.float(), [window], "must be uint8"),
        (frames[0], [window], "must be uint8"),
        (frames[None], [window], "must be a sequence of Window"),
        (frames[None], [[window]] * 2, "1 clips, but windows for 2"),
        ([], [], "the sequence of clips is empty"),
        ([frames, frames[:1]], [[window]] * 2, "one T, C and device"),
        ([frames, frames[..., :1]], [[window]] * 2, "one T, C and device"),
        (frames.repeat(1, 1, 1, 2), [window], "1 to 4 channels, got 6"),
    ):
        with pytest.raises(ValueError, match=f"resize_crop: .*{message}"):
            resize_crop(bad, windows, 5)
    for values, message in (
        ({"size": 0}, "at least one pixel"),
        ({"size": 5.0}, "size must be a whole number of pixels.*got 5.0"),
        ({"size": (5, 5.5)}, "size must be a whole number of pixels"),
        ({"size": (5, 5, 5)}, "two for height and width"),
        ({"size": 5, "threads": 0}, "threads must be positive"),
        ({"size": 5, "threads": 2**31}, "threads must be positive and below"),
        ({"size": 5, "out": frames.new_empty(1, 2, 5, 4, 3)}, r"out must be \(1, 2, 5, 5, 3\)"),
        ({"size": 5, "out": torch.empty(1, 2, 5, 5, 3)}, "out must be contiguous uint8"),
        ({"size": 5, "out": frames.new_empty(1, 2, 5, 5, 6)[..., ::2]}, "out must be contiguous uint8"),
    ):
        with pytest.raises(ValueError, match=f"resize_crop: .*{message}"):
            resize_crop(frames, [window], **values)


@pytest.mark.parametrize("name", BACKENDS)
def test_out_must_not_overlap_the_frames(name: str) -> None:
    size = 2 * 9 * 13 * 3
    arena = torch.zeros(2 * size, dtype=torch.uint8)
    frames, window = arena[:size].view(2, 9, 13, 3).copy_(video(9, 13)), Window(0, 0, 9, 13)
    with backend.use_backend(name):
        for start in (0, 1, size - 1):
            with pytest.raises(ValueError, match="resize_crop: out shares memory with the frames"):
                resize_crop(frames, [window], (9, 13), out=arena[start : start + size].view(1, 2, 9, 13, 3))
        beside = resize_crop(frames, [window], (9, 13), out=arena[size:].view(1, 2, 9, 13, 3))
        assert torch.equal(beside[0], frames)


def test_rejected_tables() -> None:
    """Numbers that would lead a kernel out of the buffer never reach it."""
    buffer = video(9, 13).reshape(-1)
    clip, window = [0, 2, 9, 13, 351, 39, *NOT_YUV], [0, 0, 0, 9, 13, 4, 4, 0, 0, 0]
    good = torch.tensor([clip]), torch.tensor([window]), buffer.new_empty(1, 2, 4, 4, 3)

    def changed(row: list[int], column: int, value: int) -> Tensor:
        return torch.tensor([[value if i == column else v for i, v in enumerate(row)]])

    for column, value in ((0, 1), (0, -1), (1, 3), (2, 10), (3, 0), (3, 14), (4, 352), (4, -1), (5, -39), (5, 40)):
        with pytest.raises(ValueError, match="resize_crop: clip 0 "):
            resize_crop_packed(buffer, changed(clip, column, value), *good[1:])
    for column, value in ((0, 1), (0, -1), (1, 1), (2, -1), (5, 3), (6, 8193), (7, 1), (8, -1), (9, 2)):
        with pytest.raises(ValueError, match="resize_crop: window 0"):
            resize_crop_packed(buffer, good[0], changed(window, column, value), good[2])
    for bad in (good[0].int(), good[0][0], good[0][:, :6]):
        with pytest.raises(ValueError, match="resize_crop: clips must be int64"):
            resize_crop_packed(buffer, bad, *good[1:])
    with pytest.raises(ValueError, match="resize_crop: windows must be int64"):
        resize_crop_packed(buffer, good[0], good[1][:, :9], good[2])
    for bad in (buffer.view(2, -1), buffer[::2], buffer.int()):
        with pytest.raises(ValueError, match="resize_crop: buffer must be contiguous uint8"):
            resize_crop_packed(bad, *good)
    with pytest.raises(ValueError, match="resize_crop: out must be contiguous uint8"):
        resize_crop_packed(buffer, *good[:2], buffer.new_empty(2, 2, 4, 4, 3))
