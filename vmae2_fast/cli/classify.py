"""Commands around a classification model: test it, score predictions, name videos, take features, export.

Functions of `vmae2_fast.cli`; their signatures become flags.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import tyro

from ..config import ClassifyConfig, DataConfig, DistillConfig, ExtractConfig, SourceConfig, Stage, ViewsConfig

_EXTRACT = ExtractConfig()


def eval(
    weights: tyro.conf.Positional[str],
    *,
    model: str | None = None,
    set: str | None = None,
    datasets: str | None = None,
    data: str | None = None,
    list: str | None = None,
    template: str | None = None,
    split: str | None = None,
    segments: int | None = None,
    crops: int | None = None,
    stride: int | None = None,
    sampling: Literal["dense", "segment"] | None = None,
    label_map: str | None = None,
    frames: int | None = None,
    size: int | None = None,
    batch: int = 16,
    workers: int = 2,
    precision: Literal["float32", "bfloat16"] = "float32",
    out: str | None = None,
    shard: str | None = None,
    restart: bool = False,
) -> dict[str, Any]:
    """Test a classifier on many views of every video of a labelled set; goes on where it was stopped.

    Without --set or --data, a run directory is tested on its own validation data. Under torchrun the processes share the
    videos; --shard I/N takes one share of a job array, to be merged by `vmae2 score`.

    Example: vmae2 eval runs/finetune_vit_base_k400 --set k400 --out runs/k400_test
    Example: vmae2 eval vit_g_k710.pth --model vit_giant_patch14_224 --set k400 --label-map k400
    Example: torchrun --nproc-per-node 8 -m vmae2_fast eval weights.safetensors --data DIR --segments 5 --crops 3

    Args:
        weights: run directory or weights file of a classification model.
        model: official name, where the weights file does not hold it.
        set: one of k400 k600 k700 k710 ssv1 ssv2 ucf101 hmdb51; sampling and views follow from it.
        datasets: datasets.toml that says where the set lies; default VMAE2_DATASETS, then ./datasets.toml.
        data: a folder of labelled videos instead (sub-folder = label), or with --list the root of its paths.
        list: a list file of lines `path label` or `path total label`.
        template: names of raw frames, as img_{:05}.jpg.
        split: train, val or test; default val, of a folder without splits all.
        segments: clips in time; default the set's or the run's, else 5.
        crops: views in space; default the set's or the run's, else 3.
        stride: frames between two sampled frames; default the set's or the run's, else 4.
        sampling: dense clips or interleaved segments; default the set's or the run's, else dense.
        label_map: k400, k600, k700 (of a K710 model) or a JSON list: for each class of the data its output.
        frames: frames of a clip, where it differs from what the weights say.
        size: height and width of a clip, where it differs from what the weights say.
        batch: clips of one forward.
        workers: decoder processes.
        precision: bfloat16 runs the model under autocast.
        out: folder for predictions, metrics.json and confusion.png; default eval beside the weights' run, or ./eval.
        shard: I/N, the I-th (from 1) of N shares.
        restart: delete the predictions of an earlier test in --out first.
    """
    from ..evaluation import evaluate
    from ..inference import load_model
    from ..models.kinetics import read_label_map

    changes: dict[str, Any] = {key: value for key, value in (("frames", frames), ("size", size)) if value is not None}
    share = parse_shard(shard)
    loaded = load_model(weights, model, kind="classify", **changes)
    source = _evaluation_data(loaded.run, set, datasets, data, list, template, split)
    views = _views(loaded.run, set)
    wanted: dict[str, Any] = {"stride": stride, "sampling": sampling, "workers": workers}
    source = dataclasses.replace(source, **{key: value for key, value in wanted.items() if value is not None})
    if stride is not None:
        source = dataclasses.replace(source, sources=tuple(dataclasses.replace(s, stride=stride) for s in source.sources))
    elif set is None and data is not None:
        source = dataclasses.replace(source, stride=loaded.stride, sampling=sampling or loaded.sampling)
    views = ViewsConfig(
        segments=views.segments if segments is None else segments, crops=views.crops if crops is None else crops, batch=batch
    )
    rows = None if label_map is None else read_label_map(label_map, loaded.model.config.num_classes)
    out = out or (str(Path(weights) / "eval") if Path(weights).is_dir() else "eval")
    metrics = evaluate(
        loaded, source, out, views=views, label_map=rows, precision=precision, share=share, restart=restart,
        about={"weights": weights},
    )  # fmt: skip
    if metrics:
        print_metrics(metrics, out)
    return {"out": out, **metrics}


def score(
    predictions: tyro.conf.Positional[tuple[str, ...]],
    *,
    label_map: str | None = None,
    labels: str | None = None,
    scores: Literal["softmax", "logits"] = "softmax",
    official: str | None = None,
    out: str | None = None,
) -> dict[str, Any]:
    """Compute metrics again from saved predictions: a folder of `vmae2 eval`, or text files in the official format.

    Example: vmae2 score runs/k400_test
    Example: vmae2 score 0.txt 1.txt --scores logits

    Args:
        predictions: one folder, or the official rank files (lines `id [logits] label chunk split`).
        label_map: k400, k600, k700 (of K710 predictions) or a JSON list: for each class of the labels its column.
        labels: file of class names, one a line.
        scores: what is averaged over the views of a video.
        official: also write the predictions as one text file in the official format.
        out: folder for metrics.json and confusion.png; default the predictions' folder, none for text files.
    """
    from ..data.labels import read_labels
    from ..evaluation import score as run
    from ..models.kinetics import read_label_map
    from ..tasks.predictions import PredictionStore, read_official, write_official

    if not predictions:
        raise ValueError("score needs a folder of `vmae2 eval`, or text files of predictions")
    folder = len(predictions) == 1 and not Path(predictions[0]).is_file()
    source: Any = PredictionStore(predictions[0]) if folder else read_official(predictions)
    saved = source.read() if folder else source
    if official is not None:
        write_official(saved, official)
    rows = None if label_map is None else read_label_map(label_map, saved.predictions.logits.shape[1])
    names = None if labels is None else read_labels(labels)
    if out is not None:
        Path(out).mkdir(parents=True, exist_ok=True)
    metrics = run(source, label_map=rows, names=names, scores=scores, out=out)
    print_metrics(metrics, out or (predictions[0] if folder else None))
    return metrics


def classify(
    videos: tyro.conf.Positional[list[str]],
    *,
    weights: str = "runs/demo/finetune",
    model: str | None = None,
    labels: str | None = None,
    label_map: str | None = None,
    segments: int = 5,
    crops: int = 3,
    stride: int | None = None,
    topk: int = 5,
) -> list[dict[str, Any]]:
    """Name what happens in videos, with a fine-tuned or distilled model.

    Example: vmae2 classify clip.mp4 --weights runs/demo/finetune
    Example: vmae2 classify *.mp4 --weights vit_b_k710_dl_from_giant.pth --model vit_base_patch16_224 --label-map k400

    Args:
        videos: video files.
        weights: run directory or weights file of a classification model.
        model: official name, where the weights file does not hold it.
        labels: file of class names, one a line; default those stored with the weights, else those of Kinetics.
        label_map: k400, k600 or k700: the part of a K710 model's classes to choose from; or a JSON list of outputs.
        segments: clips in time.
        crops: views in space.
        stride: frames between two sampled frames; default the run's, else 4.
        topk: classes shown.
    """
    import torch
    from tqdm import tqdm

    from ..data.labels import read_labels
    from ..inference import classify as run
    from ..inference import load_model
    from ..models.kinetics import read_label_map

    if not videos or min(segments, crops, topk, 1 if stride is None else stride) < 1:
        raise ValueError("classify needs at least one video, and segments, crops, topk and stride of at least 1")
    loaded = load_model(weights, model, kind="classify")
    loaded.model.to("cuda" if torch.cuda.is_available() else "cpu")
    rows = None if label_map is None else read_label_map(label_map, loaded.model.config.num_classes)
    names = None if labels is None else read_labels(labels)
    results = []
    for video in tqdm(videos, desc="classifying", unit="video", disable=None):
        predictions = run(loaded, video, segments=segments, crops=crops, stride=stride, topk=topk, label_map=rows, names=names)
        tqdm.write(f"{video}: " + ", ".join(f"{p.label} {100 * p.probability:.1f} %" for p in predictions))
        results.append({"video": video, "predictions": [p._asdict() for p in predictions]})
    return results


def extract(
    videos: tyro.conf.Positional[tuple[str, ...]],
    *,
    weights: str,
    out: str,
    model: str | None = None,
    features: tyro.conf.OmitArgPrefixes[ExtractConfig] = _EXTRACT,
    frames: int | None = None,
    shard: str | None = None,
) -> dict[str, Any]:
    """Write features of videos, one file each; those that are there already are left alone.

    Example: vmae2 extract videos/ --weights runs/finetune --out features --step 8
    Example: vmae2 extract thumos/ --weights vit_g_k710.pth --model vit_giant_patch14_224 --step 4 --resize squash
    --normalize none --out th14 --shard 1/8

    Args:
        videos: video files and folders of them.
        weights: run directory or weights file; with --model also pre-training weights, whose encoder is taken.
        out: folder of the features, mirroring the folders of the videos.
        model: official name, where the weights file does not hold it.
        frames: frames of a window, where it differs from what the weights say.
        shard: I/N, the I-th (from 1) of N shares of the videos.
    """
    import torch

    from ..inference import load_model
    from ..tasks.features import extract_features, find_videos

    if not videos:
        raise ValueError("extract needs at least one video or folder of videos")
    share = parse_shard(shard)
    found = find_videos(videos)
    changes: dict[str, Any] = {} if frames is None else {"frames": frames}
    loaded = load_model(weights, model, kind="classify", head_needed=False, **changes)
    loaded.model.to("cuda" if torch.cuda.is_available() else "cpu")
    where = (share.rank, share.world) if share else (0, 1)
    result = extract_features(loaded.model, found, out, features, weights_file=weights, shard=where)
    print(
        f"{out}: {result['written']} files written with {result['rows']} rows of {result['width']}, "
        f"{result['skipped']} were there, {len(result['failed'])} videos could not be decoded"
    )
    for path, reason in result["failed"].items():
        print(f"  {path}: {reason}")
    return {"out": out, **result}


def export(
    weights: tyro.conf.Positional[str],
    target: tyro.conf.Positional[str],
    *,
    model: str | None = None,
    portable: bool = False,
) -> dict[str, Any]:
    """Write a classifier as a torch.export program (.pt2) or ONNX (.onnx), checked against the model itself.

    Example: vmae2 export runs/demo/distill student.onnx
    Example: vmae2 export vit_b_k710.pth student.pt2 --model vit_base_patch16_224 --portable

    Args:
        weights: run directory or weights file of a classification model, with a head or without.
        target: the file to write.
        model: official name, where the weights file does not hold it.
        portable: a .pt2 without our ops, which runs where vmae2_fast is not installed.
    """
    from ..export import export_model
    from ..inference import load_model

    loaded = load_model(weights, model, kind="classify", head_needed=False)
    written = export_model(loaded.model, target, portable=portable, classes=loaded.classes)
    told = "not run: onnxruntime is missing" if written["max_difference"] is None else f"{written['max_difference']:.1e}"
    print(f"wrote {target}: {written['bytes'] / 2**20:.1f} MiB, largest relative difference from the model {told}")
    return written


def study(
    name: tyro.conf.Positional[Literal["progressive", "masking", "scaling"]],
    *,
    out: str = "runs/studies",
    runs: str | None = None,
    seeds: tuple[int, ...] = (0, 1, 2),
    length: float = 1.0,
    short: bool = False,
) -> dict[str, Any]:
    """Show a claim of the paper at toy size: several seeds, means and spread as a table and a picture.

    A study that was stopped goes on where it was; studies with the same --runs train what they share once.

    Example: vmae2 study progressive
    Example: vmae2 study scaling --out docs/studies --runs runs/studies
    Example: vmae2 study masking --length 3 --runs runs/long

    Args:
        name: progressive training, decoder masks, or width against pre-training set.
        out: folder of NAME.json, NAME.md and NAME.png.
        runs: folder of scenes and training runs; default the one of --out.
        seeds: of data and models.
        length: factor on the epochs of every stage; runs of another length need another --runs.
        short: seconds instead of minutes, to see it run; the figures then mean nothing.
    """
    from ..studies import markdown
    from ..studies import study as run

    table = run(name, out, runs=runs, seeds=seeds, length=length, short=short)
    print(markdown(table))
    return table


def parse_shard(shard: str | None) -> Any:
    """`I/N`, counted from 1, as a share without a barrier; None as None. Raises ValueError for anything else."""
    from ..evaluation import Ranks

    if shard is None:
        return None
    number, _, count = shard.partition("/")
    if not (number.isdigit() and count.isdigit() and 1 <= int(number) <= int(count)):
        raise ValueError(f"--shard {shard}: give I/N, as in 1/4 .. 4/4")
    return Ranks(int(number) - 1, int(count))


def print_metrics(metrics: dict[str, Any], out: str | None) -> None:
    """The lines people read."""
    left = f", {metrics['left_out']} left out" if metrics["left_out"] else ""
    print(
        f"top-1 {100 * metrics['top1']:.2f} %, top-5 {100 * metrics['top5']:.2f} %, mean over classes "
        f"{100 * metrics['mean_class_top1']:.2f} %; {metrics['videos']} videos x {metrics['views_per_video']:g} views{left}"
    )
    for pair in metrics["most_confused"][:3]:
        print(f"  {pair['videos']} videos of {pair['class']} taken for {pair['predicted']}")
    if out is not None:
        print(f"wrote {Path(out) / 'metrics.json'}")


def _evaluation_data(
    run: Stage | None, name: str | None, datasets: str | None, folder: str | None, listed: str | None, template: str | None,
    split: str | None,
) -> DataConfig:  # fmt: skip
    from ..data.labelled_sets import labelled_set

    if name is not None and (folder or listed):
        raise ValueError("give either --set or --data and --list, not both")
    if name is not None:
        return dataclasses.replace(labelled_set(name).testing(split or "val"), datasets=datasets)
    if folder is not None or listed is not None:
        source = SourceConfig(
            name=Path(folder or str(listed)).name, split=split or "val", root=folder, list=listed, template=template
        )
        return DataConfig(sources=(source,), crop="center")
    if run is None or run.validation is None:
        raise ValueError("nothing to test on: give --set NAME, or --data FOLDER (and --list FILE)")
    data = run.validation if datasets is None else dataclasses.replace(run.validation, datasets=datasets)
    if split is not None:
        data = dataclasses.replace(data, sources=tuple(dataclasses.replace(s, split=split) for s in data.sources))
    return data


def _views(run: Stage | None, name: str | None) -> ViewsConfig:
    from ..data.labelled_sets import labelled_set

    if name is not None:
        found = labelled_set(name)
        return ViewsConfig(segments=found.segments, crops=found.crops)
    return run.views if isinstance(run, ClassifyConfig | DistillConfig) else ViewsConfig()


COMMANDS: Sequence[Any] = (eval, score, classify, extract, export, study)
