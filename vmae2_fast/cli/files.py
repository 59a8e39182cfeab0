"""`vmae2 data verify` and `vmae2 data transcode`: every file of a list looked at, or written anew."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import tyro

from ..whole import write_json
from .parsing import FaultsFoundError


def verify(
    list: tyro.conf.Positional[str],
    *,
    root: str | None = None,
    template: str | None = None,
    shard: str = "0/1",
    workers: int = 2,
    timeout_s: float = 60.0,
    report: str | None = None,
) -> dict[str, Any]:
    """Probe every file of a list or folder and decode its first, middle and last frame; exit code 2 if one is bad.

    Example: vmae2 data verify lists/train.csv --root /data/k400 --report bad.json

    Example: vmae2 data verify lists/train.csv --shard $SLURM_ARRAY_TASK_ID/16 --report bad.$SLURM_ARRAY_TASK_ID.json

    Args:
        list: a list in an official line format, or a folder of videos.
        root: what its paths are relative to; default: the list's folder.
        template: names of raw frames, as in img_{:05}.jpg, for a list of those.
        shard: I/N, every N-th file from I on, for job arrays.
        workers: processes.
        timeout_s: seconds a file may take.
        report: JSON file of the result, by reason.
    """
    from ..data import files

    _positive(workers, timeout_s)
    listed = files.open_list(list, root=root, template=template)
    result = files.verify(listed, shard=shard, workers=workers, timeout_s=timeout_s)
    return _told(result, f"{result['files']:,} files, {result['frames']:,} frames", report)


def transcode(
    list: tyro.conf.Positional[str],
    *,
    out: str,
    root: str | None = None,
    short_side: int = 256,
    gop: int = 12,
    codec: Literal["h264", "hevc", "vp9"] = "h264",
    crf: int = 20,
    shard: str = "0/1",
    workers: int = 2,
    timeout_s: float = 600.0,
    report: str | None = None,
) -> dict[str, Any]:
    """Write the videos of a list or folder anew so that they are cheap to decode, and a list of them; run again to go on.

    Example: vmae2 data transcode lists/train.csv --root /data/k400 --out /data/k400_256

    Example: vmae2 data transcode lists/train.csv --out /data/k400_256 --shard $SLURM_ARRAY_TASK_ID/64

    Args:
        list: a list in an official line format, or a folder of videos.
        out: folder of the new files, which keep their relative paths and end in .mp4.
        root: what the list's paths are relative to; default: its folder.
        short_side: pixels; smaller videos keep their size.
        gop: frames from one key frame to the next.
        codec: of the new files.
        crf: quality, lower is better and larger.
        shard: I/N, every N-th file from I on, for job arrays.
        workers: processes.
        timeout_s: seconds a file may take.
        report: JSON file of the result, by reason.
    """
    from ..data import files
    from ..data import transcode as recode

    _positive(workers, timeout_s)
    recoding = recode.Recoding(short_side=short_side, gop=gop, codec=codec, crf=crf)
    listed = files.open_list(list, root=root)
    result = recode.transcode(listed, out, recoding, shard=shard, workers=workers, timeout_s=timeout_s)
    told = f"{result['done']:,} of {result['files']:,} files written, {result['skipped']:,} were there; list: {result['list']}"
    return _told(result, told, report)


def _positive(workers: int, timeout_s: float) -> None:
    if workers < 1 or timeout_s <= 0:
        raise ValueError(f"--workers {workers}, --timeout-s {timeout_s:g}: both must be above 0")


def _told(result: dict[str, Any], summary: str, report: str | None) -> dict[str, Any]:
    """Print and write the result. Raises FaultsFoundError where files are bad: the exit code says so too."""
    print(summary)
    for reason, paths in result["reasons"].items():
        print(f"{len(paths):>7,}  {reason}, for example {paths[0]}")
    if report is not None:
        write_json(report, result, indent=2)
    if result["bad"]:
        where = f"; all are in {report}" if report is not None else "; --report FILE names all"
        raise FaultsFoundError(f"{result['bad']:,} of {result['files']:,} files are bad{where}", result)
    return result


COMMANDS: dict[str, Callable[..., Any]] = {"verify": verify, "transcode": transcode}
