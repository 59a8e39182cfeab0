"""AdamW with the official parameter groups, layer-wise decay, schedules, clipping, and steps that skip what is not finite.

Nothing here reads a device value on the host: norm, clipping and the decision to skip stay on the device.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ..config import OptimConfig
from ..models.vit import autocast_weights
from ..sharded import is_sharded
from .adamw import MAP, SCALE, make_adamw, values
from .parallel import World, copies, join_like, local, norm, regather, slice_like
from .schedule import cosine_schedule, warmup_length

NO_DECAY = ("pos_embed", "cls_token", "mask_token")
_COMPILED = "_orig_mod."


def _clean(name: str) -> str:
    return name.replace(_COMPILED, "")


def layer_id(name: str, depth: int) -> int:
    """Layer of a parameter for layer-wise decay: 0 patch embedding and tables, i+1 block i, depth+1 the rest."""
    if name in NO_DECAY or name.startswith("patch_embed"):
        return 0
    if name.startswith("blocks."):
        return int(name.split(".")[1]) + 1
    return depth + 1


def parameter_groups(
    model: nn.Module, weight_decay: float, layer_decay: float = 1.0, skip: Iterable[str] = NO_DECAY
) -> list[dict[str, Any]]:
    """AdamW groups as the official code builds them: {"params", "names", "lr_scale", "weight_decay", "decays"}.

    No decay for one-dimensional parameters, `*.bias`, `*.scale` and the names in `skip`. With `layer_decay` < 1 there
    are two groups a layer, lr_scale = layer_decay ** (depth + 1 - layer_id). Groups stand in the order of the first
    parameter they hold. A torch.compile wrapper's name prefix is ignored; under torch 2 the official script does not
    ignore it and therefore decays `mask_token` (`skip=()` gives that variant).
    Raises ValueError for layer-wise decay on a model without `blocks`.
    """
    skip = set(skip)
    names = [(_clean(n), p) for n, p in model.named_parameters() if p.requires_grad]
    depth = len({n.split(".")[1] for n, _ in names if n.startswith("blocks.")})
    if layer_decay < 1.0 and not depth:
        raise ValueError("layer-wise decay needs a classification model (parameters blocks.N.*); set optim.layer_decay=1")
    groups: dict[tuple[int, bool], dict[str, Any]] = {}
    for name, p in names:
        decays = not (p.ndim <= 1 or name.endswith((".bias", ".scale")) or name in skip)
        layer = layer_id(name, depth) if layer_decay < 1.0 else -1
        if (layer, decays) not in groups:
            groups[layer, decays] = {
                "params": [],
                "names": [],
                "lr_scale": layer_decay ** (depth + 1 - layer) if layer_decay < 1.0 else 1.0,
                "weight_decay": weight_decay if decays else 0.0,
                "decays": decays,
            }
        groups[layer, decays]["params"].append(p)
        groups[layer, decays]["names"].append(name)
    return list(groups.values())


def scaled_lr(lr: float, global_batch: int, lr_batch: int) -> float:
    """Linear scaling rule lr * global_batch / lr_batch; `lr_batch` 0 leaves lr alone.

    `global_batch` counts the views of repeated sampling, as the paper's table does (8192 with views: 1.5e-4 -> 4.8e-3).
    The official script leaves them out (2048 clips: 6e-4 -> the same 4.8e-3): divide its lr by the number of views.
    """
    return lr * global_batch / lr_batch if lr_batch else lr


class LossScale:
    """The factor a float16 loss is multiplied by, so that small gradients stay above float16's smallest numbers.

    Halved after a step that was not finite (not below 1), doubled after `GROWTH_STEPS` finite ones in a row: the defaults of
    `torch.amp.GradScaler` and of the official code. Both numbers stay on the device.
    """

    GROWTH_STEPS = 2000

    def __init__(self, device: torch.device | str = "cpu", initial: float = 2.0**16) -> None:
        self.value = torch.full((), initial, device=device)
        self.finite_steps = torch.zeros((), dtype=torch.int32, device=device)

    def update(self, skipped: Tensor) -> None:
        """Take note of whether the step was skipped (0 or 1)."""
        torch._amp_update_scale_(self.value, self.finite_steps, skipped, 2.0, 0.5, self.GROWTH_STEPS)
        self.value.clamp_(min=1.0)


class Optimizer:
    """AdamW over `model` with the schedules of `config` for a run of `total_steps`.

    `global_batch` sets the learning rate (see `scaled_lr`), `steps_per_epoch` turns warm-up epochs into steps. A sharded
    model (`parallel.distribute`) is updated slice by slice, each rank its own. `loss_scale`: what the loss was multiplied by
    before its backward. `shadows`: keep a bfloat16 copy of `models.vit.autocast_weights`, written in the pass that updates
    them, for products under bfloat16 autocast to take; only where our own kernel runs and nothing is sharded. They are not
    part of the state.
    """

    def __init__(
        self,
        model: nn.Module,
        config: OptimConfig,
        *,
        global_batch: int,
        total_steps: int,
        steps_per_epoch: float,
        world: World = World(),  # noqa: B008 (frozen)
        loss_scale: LossScale | None = None,
        shadows: bool = False,
    ) -> None:
        self.model, self.config, self.world, self.loss_scale = model, config, world, loss_scale
        self.total_steps = total_steps
        self.warmup = warmup_length(config.warmup_epochs, steps_per_epoch)
        self.lr = scaled_lr(config.lr, global_batch, config.lr_batch)
        self.min_lr = scaled_lr(config.min_lr, global_batch, config.lr_batch)
        groups = parameter_groups(model, config.weight_decay, config.layer_decay)
        self.params: dict[str, nn.Parameter] = {n: p for g in groups for n, p in zip(g["names"], g["params"])}
        # AdamW works on the slices themselves: its fused kernel takes no mixture of sharded and plain tensors.
        self.slices = {n: nn.Parameter(local(p.detach())) if is_sharded(p) else p for n, p in self.params.items()}
        for group in groups:
            group["params"] = [self.slices[n] for n in group["names"]]
        self.copies = max((copies(p) for p in self.params.values()), default=0)
        cast = [p for p in autocast_weights(model) if p.requires_grad] if shadows and not self.copies else []
        self.adamw = make_adamw(groups, config, self.lr, cast)
        # A state of its own in AdamW's: it is saved, restored and sharded with the moments.
        self._started: dict[nn.Parameter, Tensor] = {}
        if config.ema_decay is not None:
            self._started = {p: p.detach().clone() for p in self.slices.values()}

    def lr_at(self, step: int) -> float:
        """Scheduled learning rate of a step, before the groups' lr_scale."""
        return cosine_schedule(step, base=self.lr, final=self.min_lr, total=self.total_steps, warmup=self.warmup)

    def weight_decay_at(self, step: int) -> float:
        """Scheduled weight decay of a step (constant unless `weight_decay_end` is given)."""
        base, end = self.config.weight_decay, self.config.weight_decay_end
        return base if end is None else cosine_schedule(step, base=base, final=end, total=self.total_steps)

    def zero_grad(self) -> None:
        for p in (*self.params.values(), *self.slices.values()):
            p.grad = None

    def step(self, step: int, loss: Tensor) -> tuple[Tensor, Tensor]:
        """Update the parameters from their gradients; returns (gradient norm before clipping, skipped 0/1), fp32 scalars.

        Where the norm or `loss` (unscaled) is not finite, parameters, moments and AdamW's own step count stay as they were,
        and the loss scale is halved.
        """
        lr, weight_decay = self.lr_at(step), self.weight_decay_at(step)
        for group in self.adamw.param_groups:
            self.adamw.set_lr(group, lr * group["lr_scale"])
            if group["decays"]:
                group["weight_decay"] = weight_decay
        for name, p in self.params.items():
            if self.copies and p.grad is not None:
                self.slices[name].grad = local(p.grad)
        size = norm([p.grad for p in self.slices.values() if p.grad is not None], self.copies, self.world)
        factor = None if self.loss_scale is None else self.loss_scale.value.clone()
        if factor is not None:
            size = size / factor
        skipped = torch.logical_not(torch.isfinite(size) & torch.isfinite(loss.detach())).to(torch.float32)
        clip = self.config.clip_grad
        scale = None if clip is None else ((size + 1e-6) / clip).clamp(min=1.0).float()
        if factor is not None:
            scale = factor if scale is None else scale * factor
        self.adamw.update(scale, skipped)
        if self.loss_scale is not None:
            self.loss_scale.update(skipped)
        if self.config.ema_decay is not None:
            self._average(self.config.ema_decay)
        return size, skipped

    @torch.no_grad()
    def _average(self, decay: float) -> None:
        state = self.adamw.state
        for p in [p for p in self._started if p in state]:
            state[p]["ema"] = self._started.pop(p)
        params: list[Tensor] = [p for p in self.slices.values() if "ema" in state.get(p, {})]
        torch._foreach_lerp_([state[p]["ema"] for p in params], params, 1 - decay)

    @contextlib.contextmanager
    @torch.no_grad()
    def averaged(self) -> Iterator[None]:
        """While it is open, the parameters hold their moving averages (`ema_decay`); without one, or before the first
        step, they are left alone."""
        pairs = [(p, self.adamw.state[p]["ema"]) for p in self.slices.values() if "ema" in self.adamw.state.get(p, {})]
        kept = [p.detach().clone() for p, _ in pairs]
        for p, average in pairs:
            p.copy_(average)
        regather(self.model)
        try:
            yield
        finally:
            for (p, _), value in zip(pairs, kept):
                p.copy_(value)
            regather(self.model)

    def state_tensors(self) -> dict[str, Tensor]:
        """Moments and step counts as `<parameter>.<exp_avg | exp_avg_sq | step>`, moments sharded as their parameter, and the
        state of the loss scale. Moments of 8 bits as they are (see `adamw.py`), of a sharded model as float32."""
        state: dict[str, Tensor] = {}
        for n, p in self.params.items():
            kept = self.adamw.saved(self.slices[n])
            if is_sharded(p):  # the blocks of a slice are not those of the whole
                kept = values(kept)
            state |= {f"{n}.{key}": value if key == "step" else join_like(value, p) for key, value in kept.items()}
        return {**state, **self._scale_state()}

    def _scale_state(self) -> dict[str, Tensor]:
        scale = self.loss_scale
        return {} if scale is None else {"loss_scale.value": scale.value, "loss_scale.finite_steps": scale.finite_steps}

    def load_state_tensors(self, tensors: dict[str, Tensor]) -> None:
        """The inverse of `state_tensors`, from whole tensors. Raises ValueError naming one that belongs to no parameter, or
        is missing."""
        found: dict[str, dict[str, Tensor]] = {}
        scale = self._scale_state()
        if missing := scale.keys() - tensors.keys():
            raise ValueError(f"optimizer state holds no {sorted(missing)[0]}: it was not written by a float16 run")
        for whole, value in tensors.items():
            if whole in scale:
                continue
            name, _, key = whole.rpartition(".")
            p = self.params.get(name)
            if p is None or (value.shape != p.shape and key != "step" and not key.endswith((SCALE, MAP))):
                raise ValueError(f"optimizer state {whole} of shape {tuple(value.shape)} fits no parameter of this model")
            found.setdefault(name, {})[key] = value
        state: dict[nn.Parameter, dict[str, Tensor]] = {}
        for name, kept in found.items():
            p = self.params[name]
            if self.config.implementation != "torchao8bit" or is_sharded(p):
                kept = values(kept)
            plain = ("step", *(key for key in kept if key.endswith((SCALE, MAP))))
            mine = {key: value if key in plain else slice_like(value, p) for key, value in kept.items()}
            state[self.slices[name]] = {key: value.to(p.device) for key, value in mine.items()}
        for name, target in scale.items():
            target.copy_(tensors[name])
        self._started = {p: value for p, value in self._started.items() if "ema" not in state.get(p, {})}
        self.adamw.restore(state)
