"""Clips and masks for the two training loops beside this file."""

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

FRAMES, SIZE, PATCH, TUBELET = 16, 112, 16, 2
GRID = (FRAMES // TUBELET, SIZE // PATCH, SIZE // PATCH)


def tube_mask(batch: int, ratio: float = 0.9) -> tuple[Tensor, Tensor]:
    """Token ids [B, V] that the encoder sees and [B, L] that it does not: the same places in all frames."""
    t, sites = GRID[0], GRID[1] * GRID[2]
    order = torch.rand(batch, sites).argsort(1)
    first = torch.arange(t)[:, None] * sites
    visible, hidden = order.split([sites - int(ratio * sites), int(ratio * sites)], dim=1)
    return (first + visible[:, None]).flatten(1).sort(1).values, (first + hidden[:, None]).flatten(1).sort(1).values


def moving_textures(batch: int) -> Tensor:
    """Smooth random pictures that drift: uint8 [B, T, H, W, 3]."""
    picture = F.interpolate(torch.rand(batch, 3, 8, 8), (SIZE, SIZE), mode="bicubic").clamp(0, 1)
    speed = torch.randint(-3, 4, (batch, 2)).tolist()
    frames = [[p.roll((v * i, u * i), (1, 2)) for i in range(FRAMES)] for p, (u, v) in zip(picture, speed)]
    return (torch.stack([torch.stack(f) for f in frames]) * 255).byte().permute(0, 1, 3, 4, 2).contiguous()


def from_videos(folder: str, batch: int) -> Tensor:
    """The first frames of random files of a folder, centre square: uint8 [B, T, H, W, 3]. Unreadable files are left out."""
    import av

    files = sorted(p for p in Path(folder).rglob("*") if p.suffix.lower() in (".mp4", ".mkv", ".webm", ".avi", ".mov"))
    clips: list[Tensor] = []
    for number in torch.randint(max(len(files), 1), (8 * batch,)).tolist() if files else []:
        try:
            with av.open(str(files[number])) as video:
                frames = [torch.from_numpy(f.to_ndarray(format="rgb24")) for f, _ in zip(video.decode(video=0), range(FRAMES))]
        except (av.error.FFmpegError, IndexError):
            continue
        if frames:
            clips.append(square(torch.stack([frames[min(i, len(frames) - 1)] for i in range(FRAMES)])))
        if len(clips) == batch:
            return torch.stack(clips)
    raise SystemExit(f"{folder}: not enough readable videos in its {len(files)} video files")


def square(frames: Tensor) -> Tensor:
    """Centre square of uint8 [T, H, W, 3], brought to the clip's size."""
    side = min(frames.shape[1:3])
    top, left = (frames.shape[1] - side) // 2, (frames.shape[2] - side) // 2
    centre = frames[:, top : top + side, left : left + side].permute(0, 3, 1, 2)
    return F.interpolate(centre, (SIZE, SIZE), mode="bilinear", antialias=True).permute(0, 2, 3, 1).contiguous()
