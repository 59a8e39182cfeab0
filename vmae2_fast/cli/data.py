"""`vmae2 data COMMAND`: lists made, and looked after, before anything is trained on them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from ..config import DistillConfig, Progression, Stage, unknown
from . import files as file_commands
from .parsing import FaultsFoundError, call, parse, usage


def build(
    what: tyro.conf.Positional[Literal["labelled", "unlabelled"]],
    *,
    out: str,
    datasets: Annotated[tuple[str, ...], tyro.conf.arg(metavar="TOML...")] = ("datasets.toml",),
    seed: int = 0,
    keep: Literal["val", "train"] = "val",
    clip_path: str = "{id}_{start:06}_{end:06}.mp4",
) -> dict[str, Any]:
    """Write the lists of Kinetics-710 (labelled) or UnlabeledHybrid (unlabelled) from the lists of their parts.

    Example: vmae2 data build labelled --datasets datasets.toml --out lists/k710
    Example: vmae2 data build unlabelled --datasets datasets.toml lists/k710/datasets.toml --out lists/hybrid

    Args:
        what: labelled merges the tables k400, k600 and k700; unlabelled mixes k710, ssv2, ava, webvid and own_web.
        out: a new folder for the lists and their datasets.toml.
        datasets: the files whose tables say where the parts are.
        seed: of the random subsets (unlabelled).
        keep: the list in which a video of a training and a validation list stays (labelled).
        clip_path: file of a raw annotation, of {id}, {start}, {end}, {label} and {split} (labelled).
    """
    from ..data import build as lists

    if what == "labelled":
        result = lists.build_labelled(datasets, out, keep=keep, clip_path=clip_path)
        for split in ("train", "val"):
            counts = dict(result[split])
            clips, published = counts.pop("clips"), counts.pop("published")
            details = ", ".join(f"{key.replace('_', ' ')} {value:,}" for key, value in counts.items())
            print(f"{split}: {clips:,} clips (published: {published:,}); {details}")
        if result["missing"]:
            print(f"not there: {', '.join(result['missing'])}")
    else:
        result = lists.build_unlabelled(datasets, out, seed=seed)
        for name, source in result["sources"].items():
            told = f"{name:<8} {source['clips']:>9,} clips {100 * source['share']:5.1f} %"
            print(f"{told}   (published: {source['published']:,}, {100 * source['published_share']:.1f} %)")
        print(f"{'all':<8} {result['clips']:>9,} clips (published: {result['published']:,})")
        for name, title in result["missing"].items():
            print(f"not there: {name}, {title}; the shares above are without it")
    print(f"wrote {result['datasets']}")
    return result


@dataclasses.dataclass(frozen=True, kw_only=True)
class CheckOptions:
    """What `data check` takes beside the recipe's own arguments and values."""

    sample: int | None = None
    """Clips of each source to look for, spread evenly; None: all."""
    examples: int = 10
    """Missing files named for each source."""
    json: bool = False
    """Print the result as the last line on stdout."""


def check(arguments: list[str]) -> dict[str, Any]:
    """Look for every root, list, file and weights of a recipe, and name what is missing.

    Example: vmae2 data check pretrain:vit_base_hybrid --data.datasets lists/hybrid/datasets.toml
    Example: vmae2 data check pretrain:vit_base_hybrid --sample 1000
    """
    from .. import recipes_index

    if not arguments or arguments[0].startswith("-"):
        print(check.__doc__)
        parse(CheckOptions, ["--help"], "vmae2 data check RECIPE")
    run, options = recipes_index.with_options(arguments, CheckOptions, "vmae2 data check", parse)
    if options.sample is not None and options.sample < 1:
        raise ValueError(f"--sample {options.sample}: look at one clip at least, or leave it out for all")
    results, missing = _check(run, options)
    for row in results:
        print(f"{row['source']}: {row['looked_at']:,} of {row['clips']:,} clips looked for, {row['missing']:,} missing")
        for example in row["examples"]:
            print(f"  {example}")
    if missing:
        result = {"missing": missing, "sources": results}
        raise FaultsFoundError(f"{missing:,} missing for {arguments[0]}; they are named above", result)
    print("everything is there")
    return {"missing": 0, "sources": results}


def _check(run: Stage | Progression, options: CheckOptions) -> tuple[list[dict[str, Any]], int]:
    """One row for each thing looked for, and how much is missing."""
    from ..data.check import check_sources

    rows: list[dict[str, Any]] = []
    seen: set[Any] = set()
    made = None
    stages = run.stages if isinstance(run, Progression) else (run,)
    if isinstance(run, Progression) and run.prepare is not None:
        made = str(Path(run.out) / "data" / "datasets.toml")
        folder = run.prepare.folder
        if folder is not None:
            rows.append(_file("prepare.folder", folder, Path(folder).is_dir()))
    for stage in stages:
        rows += [_file(key, path, Path(path).exists()) for key, path in _weights(stage).items()]
        for data in filter(None, (stage.data, stage.validation)):
            if made is not None and data.datasets == made:
                continue  # written by the progression itself before its first stage
            new = tuple(source for source in data.sources if (data.datasets, source) not in seen)
            seen |= {(data.datasets, source) for source in new}
            if new or not data.sources:
                unseen = dataclasses.replace(data, sources=new)
                rows += [row._asdict() for row in check_sources(unseen, sample=options.sample, examples=options.examples)]
    return rows, sum(row["missing"] for row in rows)


def _file(key: str, path: str, there: bool) -> dict[str, Any]:
    examples = () if there else (path,)
    return {"source": key, "clips": 1, "looked_at": 1, "missing": int(not there), "examples": examples}


def _weights(stage: Stage) -> dict[str, str]:
    """Weights files a stage starts from; those of other stages and of the hub are not there yet."""
    named = {f"{stage.name}.init": stage.init}
    if isinstance(stage, DistillConfig):
        named[f"{stage.name}.teacher_weights"] = None if stage.teacher_weights == "random" else stage.teacher_weights
    return {key: path for key, path in named.items() if path and not path.startswith(("stage:", "hf:"))}


COMMANDS: dict[str, Callable[..., Any]] = {"build": build, **file_commands.COMMANDS}


def data(arguments: list[str]) -> Any:
    """Make lists of clips, look for what they name, and look at or rewrite their files, before anything is trained.

    Example: vmae2 data build labelled --out lists/k710
    Example: vmae2 data check pretrain:vit_base_hybrid
    Example: vmae2 data verify lists/k710/train.csv --root /data/k400
    """
    if arguments and arguments[0] == "check":
        return check(arguments[1:])
    arguments = [a for a in arguments if a != "--json"]
    commands = {**COMMANDS, "check": check}
    if not arguments or arguments[0] in ("-h", "--help"):
        print(usage("vmae2 data COMMAND [--help] [--json] ...", __doc__.split("\n")[0], commands))
        return {}
    if arguments[0] not in COMMANDS:
        raise ValueError(unknown("command", f"data {arguments[0]}", [f"data {name}" for name in commands]))
    return call(COMMANDS[arguments[0]], arguments[1:], f"vmae2 data {arguments[0]}")
