"""The one training loop: any task, any stage, resumable at every optimiser step.

Nothing between clip and loss reads a device value on the host; losses and norms are read once per `log_every` steps.
Everything random is a function of (seed, position) or comes from torch's generators, whose states are in the
checkpoint: a run killed at any moment and started again ends with the same bits.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from ..config import RunConfig
from ..data.loader import Batch
from ..models.weights import save_weights
from ..tasks import Task, create_task
from .batch import split_batch
from .checkpoint import START_OVER, load_checkpoint, newest_intact, remove_after
from .clock import ForwardClock, compared
from .execution import Eager, Graphed, accumulate, compile_model
from .float8 import check_float8, use_float8
from .interrupt import Interrupt
from .log import ROLLED_BACK, Board, MetricsLog, progress
from .memory import naming_knobs, with_micro_batch
from .optim import LossScale, Optimizer
from .parallel import World, distribute, join
from .pictures import RunPictures
from .profile import StepProfile
from .progress import Progress
from .run_directory import RunDirectory
from .saver import Saver
from .spikes import WINDOW, SpikeLog
from .watchdog import Watchdog

_SAVE_FAILED = 1 << 16  # beside the numbers of signals
_DETOURS = ("fallback", "rgb")
"""A loader's counts, by reason, of clips that cost more than they should: see `Reader.stats`."""

NOT_FINITE = 3
"""Exit code of a run that was ended by `train.max_skipped` steps in a row without a finite loss and gradient."""


class _NotFinite(Exception):
    """`train.max_skipped` steps in a row were skipped; raised on all ranks, which see the same losses and norms."""


def train(
    config: RunConfig, *, init: str | None = None, resume: bool = True, device: torch.device | str | None = None,
    profile: bool = False,
) -> dict[str, Any]:  # fmt: skip
    """Run one stage to its end in `config.out`/`config.name` and return its summary.

    init: weights to start from, overrides `config.init`: a file, a finished run directory, or `hf:OWNER/NAME[@REV]`.
    resume: take up the newest intact checkpoint, or return at once if the run is finished; False starts over.
    device: default the first GPU, else the CPU. Under torchrun or srun all ranks call this together, each on its own GPU.
    profile: write a trace of a few of its steps, see `train.profile`.

    Summary: name, kind, device, precision, steps, epochs, clips, seconds (of training, over all sittings), clips_per_s,
    first_loss, last_loss (mean over the last `log_every` steps), skipped_steps, rollbacks, replaced
    ({path: times} of clips that could not be decoded), validation (metrics, or None), classes (names, or None), weights,
    directory.
    Raises ValueError for bad input, SystemExit 128 + number after SIGTERM, SIGUSR1, SIGUSR2 or SIGINT on any rank with a
    checkpoint saved, SystemExit 3 when no step is finite any more.
    """
    if init is not None:
        config = dataclasses.replace(config, init=init)
    world, device = join(device)
    run = world.on_first(lambda: RunDirectory.open(config, resume=resume))
    if (summary := world.on_first(run.summary)) is not None:
        if world.first:
            print(f"{config.name}: finished earlier, see {run.done}", file=sys.stderr)
        return summary
    with Interrupt() as interrupt, _threads(config.train.threads):
        try:
            trainer = Trainer(config, run, device, world)
        except BaseException:
            if world.first:
                run.abandon()
            raise
        trainer.fit(interrupt, profile=profile)
        return trainer.finish()


class Trainer:
    """Everything one run needs while it runs, on one rank."""

    def __init__(self, config: RunConfig, run: RunDirectory, device: torch.device, world: World) -> None:
        config = with_micro_batch(config, run.plan, device, world)
        self.config, self.run, self.world = config, run, world
        train = config.train
        if train.tensorboard:
            Board.check()
        if train.float8:
            check_float8(device)
        torch.manual_seed(config.seed)
        split = world.size > 1 and train.parallel != "ddp"
        self.task: Task[Any] = create_task(config, device, on_meta=split)  # type: ignore[arg-type]
        if train.float8:
            use_float8(self.task.model)
        checkpoint = world.on_first(lambda: newest_intact(run.checkpoints))
        init = config.init if checkpoint is None else None
        if not self.task.on_meta:
            self._load_init(init)
        compile_model(self.task.model, train.compile)  # before it is split over ranks
        loss = distribute(self.task, world)
        if self.task.on_meta:
            self._load_init(init)
        if world.rank:
            torch.manual_seed(config.seed + world.rank * 2**32)  # the model is the same on all ranks, drop path is not
        if train.parallel == "ddp":  # a sharded model's forwards need all ranks each time
            self.task.rank, self.task.world, self.task.gather = world.rank, world.size, world.gather
        self.clock = ForwardClock(device)
        loss = self.clock.timed(loss) if world.size > 1 and not train.cuda_graph else loss  # a graph has no clocks in it
        scale = LossScale(device) if self.task.dtype == torch.float16 else None
        run_batch = Graphed if train.cuda_graph else Eager
        self.forward_backward = run_batch(self.task, loss, world, None if scale is None else scale.value)
        self.micro_batch, self.micro_batches = split_batch(config, world.size)
        self.decodes = train.global_batch // config.data.views
        self.loader = self.task.training_loader(
            self.micro_batch // config.data.views, run.quarantine, rank=world.rank, world=world.size
        )
        self.task.check_labels(self.loader.sources)
        self.task.check_validation()
        clips = self.loader.num_clips
        self.steps_per_epoch = clips / self.decodes
        self.total_steps = train.epochs * clips // self.decodes
        if self.total_steps < 1:
            raise ValueError(
                f"{config.name}: {train.epochs} epochs of {clips} clips are less than one step of {self.decodes} decodes "
                f"(train.global_batch={train.global_batch}, data.views={config.data.views}); lower train.global_batch"
            )
        self.optimizer = Optimizer(
            self.task.model, config.optim, global_batch=train.global_batch, total_steps=self.total_steps,
            steps_per_epoch=self.steps_per_epoch, world=world, loss_scale=scale,
            shadows=device.type == "cpu" and self.task.dtype == torch.bfloat16,
        )  # fmt: skip
        self.progress = Progress(epoch_clips=clips)
        if checkpoint is not None:
            self.progress = Progress(**load_checkpoint(checkpoint, self.task.model, self.optimizer, world=world))
            if self.progress.epoch_clips != clips:
                raise ValueError(
                    f"{run.path}: an epoch had {self.progress.epoch_clips} clips when this run began and has {clips} now; "
                    f"restore the lists, or {START_OVER}"
                )
        self.saved_step = self.progress.step if checkpoint is not None else -1
        self.saver = Saver(
            run.checkpoints, world, keep=train.keep_checkpoints, keep_every=train.keep_every, background=train.async_checkpoint
        )
        board = Board(run.tensorboard, self.progress.step) if train.tensorboard and world.first else None
        self.log = MetricsLog(run.metrics, enabled=world.first, board=board)
        self.spikes = SpikeLog(
            run, train.spike_factor, clips=self.micro_batch // config.data.views, micro_batches=self.micro_batches,
            rank=world.rank, ranks=world.size,
        )  # fmt: skip
        for log in (self.log, self.spikes.log):
            log.cut(self.progress.step, *ROLLED_BACK)
        self.pictures = RunPictures(self.task, run, world)
        self.pending: list[dict[str, Tensor]] = []
        self.replaced: list[str] = []
        self.stop = 0
        if world.first:
            run.write_environment()

    def _load_init(self, source: str | None) -> None:
        if source:
            report = self.task.load_init(source)
            if self.world.first:
                print(report, file=sys.stderr)

    def fit(self, interrupt: Interrupt, profile: bool = False) -> None:
        """Train up to the last step. Raises SystemExit after saving if a signal arrived."""
        train, state = self.config.train, self.progress
        validate_every = round(train.validate_every * self.steps_per_epoch) if self.config.validation else 0
        if state.step and self.world.first:
            at = f"step {state.step} of {self.total_steps}"
            print(f"{self.config.name}: goes on from {at}, saved in {self.run.checkpoints}", file=sys.stderr)
        self.task.model.train()
        self.mark, self.data_mark = time.perf_counter(), (0.0, 0.0)
        self.detours_mark: dict[str, Counter[str]] = {}
        self.loader.position = state.position
        self.loader.steps = (self.total_steps - state.step) * self.micro_batches
        batches = self.spikes.watch(iter(self.loader))
        bar = progress(self.config.name, self.total_steps, state.step, shown=self.world.first)
        watch = Watchdog(train.stuck_after, self.run.path / f"stuck-rank{self.world.rank}.txt")
        out_of_memory = naming_knobs(self.config, self.task.device, self.micro_batch)
        folder, left = self.run.profile if profile else None, self.total_steps - state.step
        profiler = StepProfile(folder, self.world, self.task.device, first=state.step, left=left)
        with self.loader, bar, watch, self.saver, profiler, out_of_memory:
            while state.step < self.total_steps:
                try:
                    self._step(batches)
                    watch.beat(state.step)
                    profiler.step()
                    # All ranks must leave after the same step, whichever of them was told to.
                    self.stop = self.world.highest(_SAVE_FAILED if self.saver.failed else interrupt.signal)
                    self._after_step(bar, validate_every)
                except _NotFinite:
                    self._roll_back()
                bar.update(state.step - bar.n)
        interrupt.deferred = False  # from here on all is saved: a signal may end the process at once

    def _after_step(self, bar: tqdm[Any], validate_every: int) -> None:
        """Log, validate, save, draw and stop, where it is time for it."""
        train, state = self.config.train, self.progress
        if self.stop == _SAVE_FAILED:
            self.saver.wait()
        last = state.step == self.total_steps
        if state.step % train.log_every == 0 or last:
            entry = self._flush()
            shown = {k: entry[k] for k in ("loss", "lr", "clips_per_s", "wait_s", "replaced")}
            detours = {k: sum(entry[k].values()) for k in _DETOURS}
            bar.set_postfix(shown | {k: n for k, n in detours.items() if n})
        if validate_every and state.step % validate_every == 0 and not last:
            self._validate()
        save = state.step % train.checkpoint_every == 0 or last
        if save or self.stop:
            self._save()
        if last or self.stop:
            self.saver.wait()
        if not self.stop and self.pictures.due(state.step, save):
            self._draw()
        if self.stop:
            if self.world.first:
                again = "run the same command again to go on"
                print(f"{self.config.name}: saved step {state.step}; {again}", file=sys.stderr)
            raise SystemExit(128 + self.stop)

    def _roll_back(self) -> None:
        """Go back to the newest checkpoint from before the steps that were skipped, and on with the clips behind them.

        Raises SystemExit 3 where there is none, or it was done `train.max_rollbacks` times already. Until the next checkpoint
        nothing on disk depends on it: a run that is killed before comes to the same steps and goes back again.
        """
        state, train = self.progress, self.config.train
        self.saver.wait()
        wanted = None if state.rollbacks >= train.max_rollbacks else state.sound
        target = None if wanted is None else self.world.on_first(lambda: newest_intact(self.run.checkpoints, wanted))
        why = (
            f"{self.config.name}: loss or gradient was not finite for {state.skipped_in_a_row} steps in a row, last at step "
            f"{state.step}"
        )
        if target is None:
            if self.world.first:
                tried = f" (gone back {state.rollbacks} times)" if state.rollbacks else ""
                print(
                    f"{why}{tried}. Run again with --optim.clip-grad, a lower --optim.lr or a longer warm-up; what the newest "
                    "checkpoint holds is from before",
                    file=sys.stderr,
                )
            raise SystemExit(NOT_FINITE)
        reached = state.step
        state.go_back(Progress(**load_checkpoint(target, self.task.model, self.optimizer, world=self.world)))
        self.world.on_first(lambda: remove_after(self.run.checkpoints, state.step))
        self.saved_step = state.step
        self.loader.steps = (self.loader.steps or 0) + (reached - state.step) * self.micro_batches
        for log in (self.log, self.spikes.log):
            log.set_aside(state.step)
        self.log.write(
            kind="rollback", step=state.step, lost_step=reached, position=state.position, rollbacks=state.rollbacks
        )
        if self.world.first:
            print(
                f"WARNING: {why}. Gone back to {target} ({state.rollbacks} of at most {train.max_rollbacks} times), and on "
                f"with the clips behind these; {self.run.spikes} names what was in them",
                file=sys.stderr,
            )
        self.mark = time.perf_counter()

    def _step(self, batches: Iterator[Batch]) -> None:
        state, clips = self.progress, self.config.train.global_batch
        self.optimizer.zero_grad()
        sums, replaced = accumulate(self.task, batches, self.micro_batches, clips, self.forward_backward)
        sums["grad_norm"], sums["skipped"] = self.optimizer.step(state.step, sums["loss"])
        self.pending.append(sums)
        self.replaced += replaced
        state.step += 1
        state.position += self.decodes

    def _flush(self) -> dict[str, Any]:
        """Read the pending device values in one transfer, update the counters, and write and return the log's line."""
        state, train = self.progress, self.config.train
        now = time.perf_counter()
        seconds, self.mark = now - self.mark, now
        state.seconds += seconds
        steps = len(self.pending)
        names = list(self.pending[0]) if steps else []
        rows = torch.stack([torch.stack([s[n].float() for n in names]) for s in self.pending]).tolist() if steps else []
        self.pending.clear()
        table = [dict(zip(names, row)) for row in rows]
        unusual = self.spikes.judge([row["loss"] for row in table], state.recent)
        times = self._data_times()
        seen = self.spikes.batches(unusual, state.position - steps * self.decodes)
        mine = self.replaced, seen, self.clock.take(times["wait_s"]), self._detours()
        replaced, batches, own, detours = zip(*self.world.gather(mine))
        for paths in replaced:
            state.replaced = dict(Counter(state.replaced) + Counter(paths))
        self.replaced = []
        self.spikes.write(unusual, state.step - steps, table, batches)
        state.count(table, max(train.log_every, WINDOW))
        if state.skipped_in_a_row >= train.max_skipped:
            raise _NotFinite
        extras = [n for n in names if n not in ("loss", "grad_norm", "skipped")]
        norm = table[-1]["grad_norm"] if table else None
        entry = {
            "kind": "train",
            "step": state.step,
            "epoch": round(state.step / self.steps_per_epoch, 4),
            "loss": _mean(state.recent[-train.log_every :]),
            "lr": self.optimizer.lr_at(state.step - 1) if state.step else 0.0,
            "grad_norm": norm if norm is not None and math.isfinite(norm) else None,
            **{n: _mean([row[n] / train.global_batch for row in table]) for n in extras},
            "clips_per_s": round(steps * train.global_batch / seconds, 3),
            "seconds": round(state.seconds, 3),
            "skipped": state.skipped,
            "rollbacks": state.rollbacks,
            **({} if (scale := self.optimizer.loss_scale) is None else {"loss_scale": scale.value.item()}),
            "replaced": sum(state.replaced.values()),
            **{name: dict(sum((rank[name] for rank in detours), Counter())) for name in _DETOURS},
            **times,
            **({"ranks": self.world.size, "rank_s": compared(own, max(steps, 1))} if self.world.size > 1 else {}),
        }
        self.log.write(**entry)
        return entry

    def _data_times(self) -> dict[str, float]:
        """Since the last line: seconds this process waited for clips, and seconds decoding took in all of its workers."""
        now = self.loader.wait_s, self.loader.decode_s
        waited, decoded = (b - a for a, b in zip(self.data_mark, now))
        self.data_mark = now
        return {"wait_s": round(waited, 3), "decode_s": round(decoded, 3)}

    def _detours(self) -> dict[str, Counter[str]]:
        """Since the last line: clips of this rank that did not take the cheap way, by reason."""
        now = {name: Counter(getattr(self.loader, name)) for name in _DETOURS}
        new = {name: counts - self.detours_mark.get(name, Counter()) for name, counts in now.items()}
        self.detours_mark = now
        return new

    def _save(self) -> None:
        if self.progress.step == self.saved_step:
            return
        if self.pending:
            self._flush()
        if not self.progress.skipped_in_a_row:
            self.progress.sound = self.progress.step
        state = dataclasses.asdict(self.progress)
        self.saver.save(state.pop("step"), self.task.model, self.optimizer, state)
        self.saved_step = self.progress.step

    def _draw(self) -> None:
        if self.pending:
            self._flush()
        self.pictures.draw(self.progress.step)
        self.mark = time.perf_counter()  # nor are pictures training time

    def _validate(self) -> dict[str, Any]:
        if self.pending:
            self._flush()
        with self.optimizer.averaged(), self.task.validation_views(self.run.quarantine) as views:
            metrics = self.task.evaluate(views)
            metrics["left_out"] = dict(sum(map(Counter, self.task.gather(views.stats["bad"])), Counter()))
            self._keep_best(metrics)
        self.task.model.train()
        numbers = {k: v for k, v in metrics.items() if not isinstance(v, (list, dict))}
        self.log.write(kind="validation", step=self.progress.step, **numbers)
        self.mark = time.perf_counter()  # validation is not training time
        return metrics

    def _keep_best(self, metrics: dict[str, Any]) -> None:
        name, state = self.task.best_by, self.progress
        value = None if name is None else metrics.get(name)
        if name is None or value is None or not math.isfinite(value) or (state.best is not None and value <= state.best):
            return
        state.best = value
        self._save_weights(self.run.best, {"run": self.config.name, "step": state.step, name: value})

    def _save_weights(self, path: Path, meta: dict[str, Any]) -> None:
        whole = self.world.whole(self.task.model.state_dict())
        self.world.on_first(lambda: save_weights(self.task.model, path, meta, whole))

    def finish(self) -> dict[str, Any]:
        """Write the final weights, validate, and close the run with `done.json`."""
        config, state = self.config, self.progress
        classes = self.task.class_names()
        meta = {"run": config.name, "step": state.step} | ({"classes": list(classes)} if classes else {})
        with self.optimizer.averaged():
            self._save_weights(self.run.weights, meta)
        self.log.cut(state.step, "validation")
        validation = self._validate() if config.validation is not None else None
        clips = state.step * config.train.global_batch
        summary = {
            "name": config.name,
            "kind": type(config).__name__,
            "device": str(self.task.device),
            "precision": "float32" if self.task.dtype is None else str(self.task.dtype).removeprefix("torch."),
            "steps": state.step,
            "epochs": config.train.epochs,
            "clips": clips,
            "seconds": round(state.seconds, 3),
            "clips_per_s": round(clips / state.seconds, 3),
            "first_loss": state.first_loss,
            "last_loss": _mean(state.recent[-config.train.log_every :]),
            "skipped_steps": state.skipped,
            "rollbacks": state.rollbacks,
            "replaced": state.replaced,
            "validation": validation,
            "classes": list(classes) if classes else None,
            "weights": str(self.run.weights),
            "directory": str(self.run.path),
        }
        self.world.on_first(lambda: self.run.finish(summary))
        return summary


def _mean(values: list[float]) -> float | None:
    finite = [v for v in values if math.isfinite(v)]
    return sum(finite) / len(finite) if finite else None


@contextlib.contextmanager
def _threads(count: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)
