"""`vmae2 detect|score|draw ava`: commands about actions of people given by boxes."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import tyro

from ..config import load, require


def detect_ava(
    run: tyro.conf.Positional[str],
    *,
    out: str = "detections.csv",
    weights: str | None = None,
    videos: str | None = None,
    boxes: str | None = None,
    box_images: str | None = None,
    start_second: float = 0.0,
) -> dict[str, Any]:
    """Write the detections of a trained action detector on its validation set, or on videos and people of your own.

    Example: vmae2 detect ava runs/ava_vit_base --out detections.csv

    Example: vmae2 detect ava runs/ava_vit_base --videos clip.mp4 --boxes people.csv

    Args:
        run: run directory of an AVA recipe.
        out: result file, rows video,second,x1,y1,x2,y2,action,score.
        weights: default those of the best validation, else the last ones.
        videos: a video file or a folder of them, instead of the validation set.
        boxes: people of those videos and the key frames to look at, rows video,second,x1,y1,x2,y2,score, or .json, .pkl.
        box_images: JSON of the images that the boxes of a .json belong to.
        start_second: second of the first frame of those videos.
    """
    import dataclasses

    from ..config import AvaConfig
    from ..data.ava import write_results
    from ..models import load_weights
    from ..tasks import AvaTask

    folder, target = Path(run), Path(out)
    config = load(folder / "config.json")
    if not isinstance(config, AvaConfig):
        raise ValueError(f"{folder} holds no action detector but a {type(config).__name__}")
    if not target.parent.is_dir():
        raise ValueError(f"{target.parent}: no such folder; make it or choose another --out")
    require((videos is None) == (boxes is None), "detect ava: --videos and --boxes go together")
    if videos is not None:
        place = Path(videos)
        require(place.exists(), f"{videos}: no such video or folder")
        own = dataclasses.replace(
            config.validation or config.data, videos=str(place if place.is_dir() else place.parent), annotations="",
            exclusions=None, boxes=boxes, box_images=box_images, start_second=start_second,
        )  # fmt: skip
        config = dataclasses.replace(config, validation=own)
    best = folder / "best.safetensors"
    source = weights or str(best if best.exists() else folder / "weights.safetensors")
    task = AvaTask(config)
    load_weights(task.model, source)
    with task.validation_views() as views:
        count = write_results(target, task.detections(views))
        bad = views.stats["bad"]
    for path, times in bad.items():
        print(f"warning: {path}: {times} key frames could not be decoded", file=sys.stderr)
    print(f"wrote {target}: {count} rows, weights {source}")
    return {"out": str(target), "rows": count, "weights": source, "left_out": bad}


def score_ava(
    annotations: tyro.conf.Positional[str],
    results: tyro.conf.Positional[str],
    *,
    labels: str | None = None,
    exclusions: str | None = None,
    style: Literal["videomae", "activitynet", "mmaction2"] = "videomae",
) -> dict[str, Any]:
    """Frame-mAP of action detections, from files alone.

    Example: vmae2 score ava ava_val_v2.2.csv detections.csv --labels ava_action_list_v2.2_for_activitynet_2019.pbtxt

    Args:
        annotations: ground truth, rows video,second,x1,y1,x2,y2,action,person.
        results: detections, rows video,second,x1,y1,x2,y2,action,score.
        labels: label map of the actions that count; without one all that are annotated.
        exclusions: key frames that count for nothing, rows video,second.
        style: the public evaluator to compute it as.
    """
    from ..tasks.metrics.ava import score_files

    found = score_files(annotations, results, labels=labels, exclusions=exclusions, style=style)
    for name, value in found["per_class"].items():
        print(f"  {name:<48} {100 * value:6.2f}")
    print(f"frame-mAP ({style}) {100 * found['frame_map']:.2f} over {found['classes']} classes")
    for what, count in found["left_out"].items():
        print(f"warning: {count} {what}", file=sys.stderr)
    return found


def draw_ava(
    video: tyro.conf.Positional[str],
    results: tyro.conf.Positional[str],
    *,
    out: str = "actions.mp4",
    labels: str | None = None,
    name: str | None = None,
    threshold: float = 0.3,
    most: int = 3,
    start_second: float = 0.0,
    begin: float | None = None,
    end: float | None = None,
) -> dict[str, Any]:
    """Draw action detections on their video.

    Example: vmae2 draw ava clip.mp4 detections.csv --labels labels.pbtxt --begin 3 --end 9 --out clip.gif

    Args:
        video: the video file.
        results: detections, rows video,second,x1,y1,x2,y2,action,score.
        out: an .mp4 or .gif file.
        labels: label map with the names of the actions.
        name: of the video in the results; default the file's name without ending.
        threshold: least score that is shown.
        most: actions shown a box.
        start_second: second of the first frame.
        begin: second from which on is drawn, default the first.
        end: second up to which is drawn, default the last.
    """
    from ..data.ava import read_label_map, read_results
    from ..draw_actions import draw_actions

    names = read_label_map(labels) if labels is not None else {}
    options: dict[str, Any] = {"name": name, "threshold": threshold, "most": most, "start_second": start_second,
                               "begin": begin, "end": end}  # fmt: skip
    written = draw_actions(video, read_results(results), out, names=names, **options)
    if written["flat"]:
        print(f"warning: {written['flat']} detections without area", file=sys.stderr)
    print(f"wrote {written['out']}: {written['boxes']} boxes on {written['frames']} frames")
    return written


COMMANDS: dict[str, dict[str, Callable[..., Any]]] = {
    "detect": {"ava": detect_ava}, "score": {"ava": score_ava}, "draw": {"ava": draw_ava},
}  # fmt: skip
