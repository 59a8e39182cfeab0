"""`vmae2 tad ...` and `vmae2 score tad`: from untrimmed videos to detections, their score and their picture."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import tyro

from ..config import require
from .classify import parse_shard


def _device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def _target(out: str, *endings: str) -> Path:
    target = Path(out)
    require(target.parent.is_dir(), f"{target.parent}: no such folder; make it or choose another --out")
    require(target.suffix.lower() in endings, f"--out {out}: must end in {' or '.join(endings)}")
    return target


def features(
    videos: tyro.conf.Positional[tuple[str, ...]],
    *,
    weights: str,
    out: str,
    model: str | None = None,
    step: int = 4,
    normalize: Literal["none", "imagenet"] = "none",
    batch: int = 16,
    precision: Literal["float32", "bfloat16", "float16"] = "float32",
    shard: str | None = None,
) -> dict[str, Any]:
    """Take features of untrimmed videos as the released ones were taken; those that are there already are left alone.

    This is `vmae2 extract` with windows of consecutive frames, whole frames squashed to a square, and a file a video by its
    name alone, as annotations call it.

    Example: vmae2 tad features thumos14/videos --weights vit_g_k710.pth --model vit_giant_patch14_224 --out th14_features

    Example: vmae2 tad features fineaction/videos --weights runs/finetune --step 16 --out features --shard 1/8

    Args:
        videos: video files, and folders of them.
        weights: run directory or weights file of a classification model.
        out: folder of the features, one VIDEO.npy each.
        model: official name, where the weights file does not hold it.
        step: frames between two windows: 4 for THUMOS14, 16 for FineAction.
        normalize: what the model is shown: pixels in [0, 1] as for the released features, or as it was trained.
        batch: windows of a forward.
        precision: bfloat16 is faster on a GPU.
        shard: I/N, the I-th (from 1) of N shares of the videos.
    """
    from ..config import ExtractConfig
    from ..inference import load_model
    from ..tasks.features import extract_features, find_videos

    require(bool(videos), "tad features needs at least one video or folder of videos")
    share, found = parse_shard(shard), find_videos(videos, by_stem=True)
    config = ExtractConfig(step=step, resize="squash", normalize=normalize, batch=batch, precision=precision)
    trunk = load_model(weights, model, kind="classify", head_needed=False).model.to(_device())
    result = extract_features(
        trunk, found, out, config, weights_file=weights, shard=(share.rank, share.world) if share else (0, 1)
    )
    print(
        f"{out}: {result['written']} videos with {result['windows']} windows written, {result['skipped']} were there, "
        f"{len(result['failed'])} could not be decoded; {result['frames']} frames decoded, window by window it had been "
        f"{result['frames_by_window']}"
    )
    for path, reason in result["failed"].items():
        print(f"warning: {path}: {reason}", file=sys.stderr)
    return {"out": out, **result}


def scores(
    videos: tyro.conf.Positional[tuple[str, ...]],
    *,
    weights: str,
    out: str = "video_scores.json",
    model: str | None = None,
    segments: int = 5,
    crops: int = 3,
    stride: int = 4,
) -> dict[str, Any]:
    """Score the classes of whole videos with a fine-tuned classifier, for class-agnostic detections to be fused with.

    Example: vmae2 tad scores fineaction/videos --weights runs/fineaction_classifier --out video_scores.json

    Args:
        videos: video files, and folders of them.
        weights: run directory or weights file of a classification model that names its classes.
        out: a .json file.
        model: official name, where the weights file does not hold it.
        segments: clips in time.
        crops: views in space.
        stride: frames between two sampled frames.
    """
    from ..inference import load_model
    from ..tasks.features import find_videos
    from ..temporal_detection import score_videos
    from ..whole import write_json

    require(bool(videos), "tad scores needs at least one video or folder of videos")
    require(min(segments, crops, stride) >= 1, "tad scores: segments, crops and stride must be at least 1")
    target, found = _target(out, ".json"), find_videos(videos, by_stem=True)
    loaded = load_model(weights, model, kind="classify")
    loaded.model.to(_device())
    content, failed = score_videos(loaded, found, segments=segments, crops=crops, stride=stride)
    require(bool(content["results"]), f"no video could be decoded; first: {next(iter(failed.items()), None)}")
    write_json(target, content)
    print(f"wrote {target}: {len(content['results'])} videos, {len(content['class'])} classes, {len(failed)} not decoded")
    for path, reason in failed.items():
        print(f"warning: {path}: {reason}", file=sys.stderr)
    return {"out": out, "videos": len(content["results"]), "classes": len(content["class"]), "failed": failed}


def detect(
    run: tyro.conf.Positional[str],
    *,
    out: str = "detections.json",
    features: str | None = None,
    videos: tuple[str, ...] = (),
    weights: str | None = None,
    video_scores: str | None = None,
) -> dict[str, Any]:
    """Write the detections of a trained temporal detector.

    Example: vmae2 tad detect runs/thumos14_vit_giant --out detections.json

    Example: vmae2 tad detect runs/thumos14_vit_giant --features my_features --videos match_3

    Args:
        run: run directory of a temporal detection recipe.
        out: a .json file.
        features: folder that `vmae2 tad features` wrote; default the run's validation videos.
        videos: of that folder; default all.
        weights: default those of the best validation, else the last ones.
        video_scores: class scores of the videos, instead of the run's own file.
    """
    import dataclasses

    from ..data.tad import write_detections
    from ..temporal_detection import detect_videos, load_detector

    target = _target(out, ".json")
    detector = load_detector(run, weights, _device())
    if video_scores is not None:
        detector = detector._replace(config=dataclasses.replace(detector.config, video_scores=video_scores))
    found = detect_videos(detector, features, names=videos, device=_device())
    count = write_detections(target, found, {"run": detector.config.name, "model": detector.config.model.name})
    print(f"wrote {target}: {count} detections in {len(found)} videos")
    return {"out": out, "videos": len(found), "detections": count}


def draw(
    detections: tyro.conf.Positional[str],
    *,
    out: str = "timeline.png",
    annotations: str | None = None,
    videos: tuple[str, ...] = (),
    most: int = 6,
    threshold: float = 0.1,
) -> dict[str, Any]:
    """Draw detections along time, below what was annotated.

    Example: vmae2 tad draw detections.json --annotations thumos14.json --videos video_test_0000004 --out timeline.png

    Args:
        detections: a detection file.
        out: a .png, .svg or .pdf file.
        annotations: ground truth of the videos, ActivityNet style.
        videos: which; default the first ones of the file.
        most: videos drawn by default.
        threshold: least score that is shown.
    """
    from ..data.tad import TadError, read_annotations, read_detections
    from ..timeline import draw_timelines

    require(most >= 1, f"--most {most}: must be at least 1")
    require(math.isfinite(threshold), f"--threshold {threshold}: must be a number")
    target, found = _target(out, ".png", ".svg", ".pdf"), read_detections(detections)
    for name in videos:
        if name not in found:
            raise TadError(f"{detections}: no detections of {name}; there are those of {', '.join(sorted(found)[:5])}")
    chosen = list(videos) or list(found)[:most]
    require(bool(chosen), f"{detections}: holds no video")
    truth = read_annotations(annotations).videos if annotations is not None else {}
    if annotations is not None and not set(chosen) & truth.keys():
        raise TadError(f"{annotations}: none of {', '.join(chosen[:5])} is annotated there")
    result = draw_timelines(
        {name: found[name] for name in chosen},
        {name: (truth[name].segments, truth[name].labels) for name in chosen if name in truth},
        target,
        threshold=threshold,
        durations={name: truth[name].duration for name in chosen if name in truth},
    )
    hidden = f", {result['hidden']} weaker ones hidden behind them" if result["hidden"] else ""
    print(f"wrote {out}: {result['detections']} detections from {threshold:g} on in {result['videos']} videos{hidden}")
    return result


def score(
    annotations: tyro.conf.Positional[str],
    detections: tyro.conf.Positional[str],
    *,
    subset: str = "test",
    benchmark: Literal["thumos14", "fineaction"] = "thumos14",
    duplicates: Literal["drop", "keep"] = "drop",
    block_list: tuple[str, ...] = (),
) -> dict[str, Any]:
    """Mean average precision of temporal detections, from files alone.

    Example: vmae2 score tad thumos14.json detections.json --subset test

    Args:
        annotations: ground truth, ActivityNet style.
        detections: a detection file.
        subset: that is scored; case does not matter.
        benchmark: tIoU .3 to .7, or .5 to .95.
        duplicates: repeated annotations: drop (ActionFormer, OpenTAD) or keep (ActivityNet).
        block_list: videos left out, as 0000270 and 0001292 of THUMOS14 in OpenTAD.
    """
    from ..temporal_detection import score_files

    found = score_files(
        annotations, detections, subset=subset, benchmark=benchmark, deduplicate=duplicates == "drop", block_list=block_list
    )
    for name, value in found["per_class"].items():
        print(f"  {name:<32} {100 * value:6.2f}")
    for tiou, value in found["map"].items():
        print(f"mAP at tIoU {tiou} {100 * value:6.2f}   recall 1x {100 * found['recall_1x'][tiou]:6.2f}, "
              f"5x {100 * found['recall_5x'][tiou]:6.2f}")  # fmt: skip
    print(f"average mAP {100 * found['average_map']:.2f} over {len(found['per_class'])} classes, {found['events']} events")
    for what, count in found["not_counted"].items():
        print(f"warning: {count} {what}", file=sys.stderr)
    return found


COMMANDS: dict[str, dict[str, Callable[..., Any]]] = {
    "tad": {"features": features, "scores": scores, "detect": detect, "draw": draw},
    "score": {"tad": score},
}
