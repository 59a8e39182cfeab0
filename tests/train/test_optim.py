from __future__ import annotations

import math
import sys
import types

import pytest
import torch
from torch import nn

from tests.models.tiny import clips, mask, pretrain
from vmae2_fast import backend
from vmae2_fast.config import OptimConfig
from vmae2_fast.models import PretrainViT
from vmae2_fast.models.vit import autocast_weights
from vmae2_fast.ops import _shadow
from vmae2_fast.train import adamw
from vmae2_fast.train.optim import LossScale, Optimizer, parameter_groups, scaled_lr


def _optimizer(model: nn.Module, **config) -> Optimizer:
    return Optimizer(
        model, OptimConfig(**{"lr": 0.1, "lr_batch": 0, **config}), global_batch=1, total_steps=10, steps_per_epoch=10
    )


def _model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 4), nn.LayerNorm(4), nn.Linear(4, 3))


def _backward(model: nn.Module, scale: float = 1.0) -> torch.Tensor:
    loss = scale * model(torch.linspace(-1, 1, 15).view(3, 5)).square().sum()
    loss.backward()
    return loss


def test_lr_scaling_counts_views_as_the_paper_does():
    assert scaled_lr(1.5e-4, 8192, 256) == pytest.approx(4.8e-3)
    assert scaled_lr(1.5e-4, 8192, 0) == 1.5e-4


@pytest.mark.parametrize("poison", ["gradient", "loss"])
def test_non_finite_step_changes_nothing(poison):
    model = _model()
    optimizer = _optimizer(model, clip_grad=1.0)
    optimizer.step(0, _backward(model))
    before = {n: t.clone() for n, t in {**model.state_dict(), **optimizer.state_tensors()}.items()}
    optimizer.zero_grad()
    loss = _backward(model)
    if poison == "gradient":
        model[0].weight.grad[1, 2] = math.nan
    else:
        loss = loss * math.inf
    _, skipped = optimizer.step(1, loss)
    assert skipped.item() == 1
    after = {**model.state_dict(), **optimizer.state_tensors()}
    assert all(torch.equal(before[n], after[n]) for n in before)
    optimizer.zero_grad()
    _, skipped = optimizer.step(2, _backward(model))
    assert skipped.item() == 0
    assert optimizer.state_tensors()["0.weight.step"].item() == 2
    assert not torch.equal(before["0.weight"], model[0].weight)


@pytest.mark.parametrize("scale", [100.0, 1e-3], ids=["clipped", "below the limit"])
def test_steps_equal_a_separate_clip_and_torchs_unfused_adamw(scale):
    ours, theirs = _model().double(), _model().double()
    optimizer = _optimizer(ours, clip_grad=0.5, weight_decay=0.0)
    adamw = torch.optim.AdamW(theirs.parameters(), betas=(0.9, 0.95), eps=1e-8, weight_decay=0.0, foreach=False, fused=False)
    for step in range(4):
        optimizer.zero_grad()
        adamw.zero_grad()
        for model in (ours, theirs):
            loss = scale * model(torch.linspace(-1, 1, 15, dtype=torch.float64).view(3, 5)).square().sum()
            loss.backward()
        adamw.param_groups[0]["lr"] = optimizer.lr_at(step)
        unclipped = torch.nn.utils.clip_grad_norm_(theirs.parameters(), 0.5)
        norm, skipped = optimizer.step(step, loss)
        adamw.step()
        assert norm.item() == pytest.approx(unclipped.item(), rel=1e-6)
        assert not skipped
    for a, b in zip(ours.parameters(), theirs.parameters()):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=0.0)


def test_weight_decay_schedule_leaves_biases_and_norms_alone():
    model = _model()
    optimizer = _optimizer(model, weight_decay=0.04, weight_decay_end=0.4)
    optimizer.step(5, _backward(model))
    seen = {n: g["weight_decay"] for g in optimizer.adamw.param_groups for n in g["names"]}
    assert seen["0.weight"] == seen["2.weight"] == pytest.approx(0.22)
    assert seen["0.bias"] == seen["1.weight"] == 0.0


def test_layer_decay_needs_blocks():
    with pytest.raises(ValueError, match="layer_decay=1"):
        parameter_groups(_model(), 0.05, layer_decay=0.9)


def test_layer_decay_shrinks_the_steps_of_early_layers():
    model = nn.Sequential()
    for name in ("patch_embed", "blocks", "head"):
        model.add_module(name, nn.Linear(4, 4) if name != "blocks" else nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)))
    optimizer = _optimizer(model, layer_decay=0.5, weight_decay=0.0)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    loss = model(torch.linspace(-1, 1, 12).view(3, 4)).square().sum()
    loss.backward()
    optimizer.step(5, loss)
    # AdamW's first step moves every weight by its learning rate, whatever the size of its gradient
    moved = {n: (p.detach() - before[n]).abs().max().item() / optimizer.lr_at(5) for n, p in model.named_parameters()}
    for name, scale in {"patch_embed": 1 / 8, "blocks.0": 1 / 4, "blocks.1": 1 / 2, "head": 1.0}.items():
        assert moved[f"{name}.weight"] == pytest.approx(scale, rel=1e-4)
        assert moved[f"{name}.bias"] == pytest.approx(scale, rel=1e-4)


def test_compile_prefix_does_not_change_the_groups():
    class Masked(nn.Module):
        def __init__(self):
            super().__init__()
            self.mask_token = nn.Parameter(torch.zeros(1, 1, 4))
            self.proj = nn.Linear(4, 4)

    model = Masked()
    plain = [(g["names"], g["weight_decay"]) for g in parameter_groups(model, 0.05)]
    wrapped = nn.Module()
    wrapped._orig_mod = model
    assert [(g["names"], g["weight_decay"]) for g in parameter_groups(wrapped, 0.05)] == plain
    assert plain[0] == (["mask_token", "proj.bias"], 0.0)


def test_foreign_optimizer_state_is_refused():
    optimizer = _optimizer(_model())
    with pytest.raises(ValueError, match=r"other\.weight\.exp_avg"):
        optimizer.load_state_tensors({"other.weight.exp_avg": torch.zeros(2)})


def test_moving_average_by_its_formula_and_through_a_checkpoint():
    torch.manual_seed(0)
    model = torch.nn.Linear(3, 2)
    config = OptimConfig(lr=0.1, lr_batch=0, ema_decay=0.9)
    arguments = {"global_batch": 1, "total_steps": 10, "steps_per_epoch": 10}

    def step(model, optimizer, number):
        optimizer.zero_grad()
        loss = model(torch.full((1, 3), 1.0 + number)).square().sum()
        loss.backward()
        optimizer.step(number, loss)

    optimizer = Optimizer(model, config, **arguments)
    expected = model.weight.detach().double().clone()
    for number in range(3):
        step(model, optimizer, number)
        expected = 0.9 * expected + 0.1 * model.weight.detach().double()
    weight = model.weight.detach().clone()
    with optimizer.averaged():
        torch.testing.assert_close(model.weight.double(), expected, rtol=1e-6, atol=1e-7)
    assert torch.equal(model.weight, weight)

    other = torch.nn.Linear(3, 2)
    other.load_state_dict(model.state_dict())
    resumed = Optimizer(other, config, **arguments)
    resumed.load_state_tensors({name: value.clone() for name, value in optimizer.state_tensors().items()})
    for which in ((model, optimizer), (other, resumed)):
        step(*which, 3)
    assert torch.equal(model.weight, other.weight)
    with optimizer.averaged(), resumed.averaged():
        assert torch.equal(model.weight, other.weight)
        assert not torch.equal(model.weight, weight)


class FusedAdam(torch.optim.Optimizer):
    """apex's FusedAdam (capturable) as its source describes it, on the device the parameters have."""

    def __init__(
        self, params, lr=1e-3, bias_correction=True, betas=(0.9, 0.999), eps=1e-8, adam_w_mode=True, weight_decay=0.0,
        amsgrad=False, set_grad_none=True, capturable=False, master_weights=False,
    ):  # fmt: skip
        assert adam_w_mode
        assert capturable
        super().__init__(params, {"lr": torch.tensor(lr), "betas": betas, "eps": eps, "weight_decay": weight_decay})
        self._dummy_overflow_buf = torch.zeros(1, dtype=torch.int32)

    @torch.no_grad()
    def step(self, closure=None, grads=None, output_params=None, scale=None, grad_norms=None, grad_scaler=None):
        for group in self.param_groups:
            group["step"] += (self._dummy_overflow_buf != 1).to(torch.int)
            self._dummy_overflow_buf.copy_(grad_scaler._check_inf_per_device(self)[group["params"][0].device])
            inverse = grad_scaler._get_scale_async().double().reciprocal().float()
            if self._dummy_overflow_buf:
                continue
            (beta1, beta2), step = group["betas"], group["step"]
            for p in group["params"]:
                state = self.state[p]
                if not state:
                    state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(p), torch.zeros_like(p)
                grad = p.grad.mul_(inverse)
                state["exp_avg"].lerp_(grad, 1 - beta1)
                state["exp_avg_sq"].lerp_(grad.square(), 1 - beta2)
                size = (state["exp_avg_sq"] / (1 - beta2**step)).sqrt() + group["eps"]
                p -= group["lr"] * (state["exp_avg"] / (1 - beta1**step) / size + group["weight_decay"] * p)


@pytest.fixture
def apex(monkeypatch):
    package, module = types.ModuleType("apex"), types.ModuleType("apex.optimizers")
    package.optimizers, module.FusedAdam = module, FusedAdam
    monkeypatch.setitem(sys.modules, "apex", package)
    monkeypatch.setitem(sys.modules, "apex.optimizers", module)
    monkeypatch.setattr(adamw, "why_not_apex", lambda device: None)


def _steps(optimizer: Optimizer, model: nn.Module, steps: range, poisoned: int | None = None) -> None:
    """On gradients of their own: those of a loss would carry one step's rounding into the next."""
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        for p in model.parameters():
            p.grad = torch.randn(p.shape, generator=generator)
        optimizer.step(step, torch.tensor(math.inf if step == poisoned else 1.0))


def _take_one_path(ours, model, torchs, other):
    """Five steps, one of them skipped, states that change hands, and three more: always the same to 1e-6."""
    for optimizer, m in ((ours, model), (torchs, other)):
        _steps(optimizer, m, range(5), poisoned=2)
    for _ in range(2):
        a, b = ours.state_tensors(), torchs.state_tensors()
        assert a.keys() == b.keys()
        pairs = [*((a[name], b[name]) for name in b), *zip(model.parameters(), other.parameters())]
        for x, y in pairs:
            assert (x - y).norm() <= 1e-6 * y.norm()
        ours.load_state_tensors({n: t.clone() for n, t in b.items()})
        torchs.load_state_tensors({n: t.clone() for n, t in a.items()})
        for optimizer, m in ((ours, model), (torchs, other)):
            _steps(optimizer, m, range(5, 8))


def test_apex_equals_torch_and_goes_on_where_torch_stopped(apex):
    """Decay, clipping, a skipped step, and a checkpoint that passes from one to the other and back."""
    config = {"weight_decay": 0.1, "clip_grad": 0.5, "ema_decay": 0.9, "layer_decay": 1.0}
    model, other = _model(), _model()
    ours, torchs = _optimizer(model, implementation="apex", **config), _optimizer(other, implementation="torch", **config)
    _take_one_path(ours, model, torchs, other)


@pytest.mark.parametrize(
    ("implementation", "module", "message"),
    [
        ("apex", "apex.optimizers", r"optim.implementation=apex: apex.optimizers cannot be imported .*vmae2 env"),
        ("torchao8bit", "torchao.optim", r"optim.implementation=torchao8bit: torchao.optim .*vmae2_fast\[adam8bit\]"),
    ],
)
def test_absent_implementations_name_the_way_out(monkeypatch, implementation, module, message):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ValueError, match=message):
        _optimizer(_model(), implementation=implementation)


def test_apex_needs_a_gpu(monkeypatch):
    monkeypatch.setitem(sys.modules, "apex.optimizers", types.SimpleNamespace(FusedAdam=FusedAdam))
    with pytest.raises(ValueError, match=r"optim.implementation=apex runs on cuda only, not on cpu"):
        _optimizer(_model(), implementation="apex")


def _quantised_model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 64), nn.LayerNorm(64))  # 4096 weights: torchao keeps smaller ones in float32


def _quantised_steps(optimizer: Optimizer, model: nn.Module, numbers: range) -> None:
    for step in numbers:
        optimizer.zero_grad()
        loss = model(torch.linspace(-1, 1, 128).view(2, 64).sin()).square().mean() + model[0].weight.square().mean()
        loss.backward()
        optimizer.step(step, loss * math.nan if step == 1 else loss)


QUANTISED = {"lr": 1e-3, "clip_grad": 0.5, "weight_decay": 0.1}


def test_eight_bits_follow_torch_and_resume_to_the_bit():
    """Moments of 8 bits: near torch's weights, no step where it is skipped, and their codes go through a checkpoint."""
    pytest.importorskip("torchao.optim")
    ours, again, theirs = (_quantised_model() for _ in range(3))
    first = _optimizer(ours, **QUANTISED, implementation="torchao8bit")
    torchs = _optimizer(theirs, **QUANTISED, implementation="torch")
    for optimizer, m in ((first, ours), (torchs, theirs)):
        _quantised_steps(optimizer, m, range(4))
    saved = {n: t.clone() for n, t in first.state_tensors().items()}
    assert all(type(t) is torch.Tensor for t in saved.values())
    assert saved["0.weight.step"].item() == 3
    assert saved["0.weight.exp_avg"].dtype == torch.uint8
    start, moved = _quantised_model()[0].weight, theirs[0].weight.detach()
    assert (ours[0].weight - moved).norm() < 0.1 * (moved - start).norm()
    again.load_state_dict(ours.state_dict())
    second = _optimizer(again, **QUANTISED, implementation="torchao8bit")
    second.load_state_tensors(saved)
    assert all(torch.equal(value, saved[name]) for name, value in second.state_tensors().items())
    for optimizer, m in ((first, ours), (second, again)):
        _quantised_steps(optimizer, m, range(4, 6))
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), again.parameters()))
    for other in ("torch", "vmae2"):  # goes on with what the codes stand for, and back
        third = _optimizer(again, **QUANTISED, implementation=other)
        third.load_state_tensors({n: t.clone() for n, t in second.state_tensors().items()})
        mine = third.state_tensors()
        assert torch.equal(mine["0.weight.exp_avg"], second.adamw.state[again[0].weight]["exp_avg"].dequantize())
        _quantised_steps(third, again, range(6, 7))
        second.load_state_tensors(third.state_tensors())


def test_codes_stand_for_the_values_of_their_table():
    """Without torchao: two blocks of 256 codes, each with its factor."""
    model, table = _quantised_model(), torch.linspace(-1, 1, 256)
    codes = torch.randint(0, 256, (64, 64), dtype=torch.uint8)
    factors = torch.rand(16)
    weight = {"exp_avg": codes, "exp_avg_scale": factors, "exp_avg_map": table, "exp_avg_sq": torch.ones(64, 64)}
    state = {f"0.weight.{key}": value for key, value in {**weight, "step": torch.tensor(3.0)}.items()}
    optimizer = _optimizer(model)
    optimizer.load_state_tensors(state)
    expected = torch.tensor([[table[c] * f for c in row] for row, f in zip(codes.view(16, 256).tolist(), factors)])
    assert torch.equal(optimizer.state_tensors()["0.weight.exp_avg"], expected.view(64, 64))
    for damage in ({"exp_avg_scale": None}, {"exp_avg_map": table[:9]}, {"exp_avg_scale": factors[:15]}):
        broken = {n: t for n, t in {**weight, **damage}.items() if t is not None}
        with pytest.raises(ValueError, match="exp_avg is of 8 bits, but exp_avg_scale or exp_avg_map is missing or does not"):
            optimizer.load_state_tensors({f"0.weight.{key}": value for key, value in broken.items()})


native = pytest.mark.skipif(backend.native() is None, reason="no native extension")


@native
def test_ours_runs_on_a_cpu_where_its_kernel_is_there_and_takes_float32(monkeypatch):
    assert isinstance(_optimizer(_model()).adamw, adamw._Ours)
    assert isinstance(_optimizer(_model().double()).adamw, torch.optim.AdamW)
    with backend.use_backend("reference"):
        assert isinstance(_optimizer(_model()).adamw, torch.optim.AdamW)
    with pytest.raises(ValueError, match=r"optim\.implementation=vmae2 runs on the cpu only, not on meta"):
        _optimizer(_model().to("meta"), implementation="vmae2")


@native
@pytest.mark.parametrize("clip", [None, 0.5])
def test_ours_equals_torch_and_goes_on_where_torch_stopped(clip):
    """Decay, layer by layer too, clipping, a skipped step, and a checkpoint that passes from one to the other and back."""
    config = {"weight_decay": 0.1, "clip_grad": clip, "ema_decay": 0.9}
    model, other = _model(), _model()
    ours, torchs = _optimizer(model, implementation="vmae2", **config), _optimizer(other, implementation="torch", **config)
    _take_one_path(ours, model, torchs, other)


@native
def test_a_run_with_shadows_has_the_bits_of_one_without_and_saves_none():
    def run(shadows: bool, resumed: bool) -> tuple[PretrainViT, Optimizer]:
        torch.manual_seed(0)
        model, settings = pretrain(depth=2), {"global_batch": 1, "total_steps": 9, "steps_per_epoch": 9}
        lists, video = mask(model, 2), clips(2)
        made = Optimizer(model, OptimConfig(lr=0.01, lr_batch=0, ema_decay=0.5), **settings, shadows=shadows)
        for step in range(4):
            if step == 2:
                with made.averaged(), torch.autocast("cpu", torch.bfloat16):
                    averages.append(model(video, lists).detach())
            if resumed and step == 3:
                state = {n: t.clone() for n, t in made.state_tensors().items()}
                weights = {n: t.clone() for n, t in model.state_dict().items()}
                model = pretrain(depth=2)
                model.load_state_dict(weights)
                made = Optimizer(model, OptimConfig(lr=0.01, lr_batch=0, ema_decay=0.5), **settings, shadows=shadows)
                made.load_state_tensors(state)
            made.zero_grad()
            with torch.autocast("cpu", torch.bfloat16):
                loss = model(video, lists).float().square().mean()
            loss.backward()
            made.step(step, loss)
        return model, made

    averages: list[torch.Tensor] = []
    (plain, without), *others = run(False, False), run(True, False), run(True, True)
    for model, optimizer in others:
        assert all(torch.equal(a, b) for a, b in zip(plain.state_dict().values(), model.state_dict().values()))
        state, expected = optimizer.state_tensors(), without.state_tensors()
        assert state.keys() == expected.keys()
        assert all(torch.equal(state[name], expected[name]) for name in expected)
        cast = autocast_weights(model)
        assert len(cast) == 4 * 4 + 2  # qkv, proj, fc1, fc2 of four blocks, encoder_to_decoder, head
        assert all(_shadow.cast(w, torch.bfloat16) is _shadow.cast(w, torch.bfloat16) for w in cast)
        assert _shadow.cast(model.mask_token, torch.bfloat16) is not _shadow.cast(model.mask_token, torch.bfloat16)
    assert all(torch.equal(averages[0], a) for a in averages[1:])


def _scaled(scale: LossScale, **config) -> tuple[nn.Module, Optimizer]:
    model = _model()
    config = OptimConfig(**{"lr": 0.1, "lr_batch": 0, **config})
    return model, Optimizer(model, config, global_batch=1, total_steps=10, steps_per_epoch=10, loss_scale=scale)


def test_a_scaled_loss_gives_the_same_steps_and_norms():
    plain, scale = _model(), LossScale()
    scaled, theirs = _scaled(scale, clip_grad=0.5)
    ours = _optimizer(plain, clip_grad=0.5)
    for step in range(3):
        ours.zero_grad()
        theirs.zero_grad()
        loss = _backward(plain)
        _backward(scaled, scale.value.item())
        # a power of two: not one bit is lost
        assert torch.equal(torch.stack(ours.step(step, loss)), torch.stack(theirs.step(step, loss)))
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), scaled.parameters()))


def test_the_loss_scale_shrinks_after_an_overflow_grows_after_peace_and_is_remembered():
    scale = LossScale(initial=4.0)
    model, optimizer = _scaled(scale)
    before = {n: t.clone() for n, t in model.state_dict().items()}

    def step(number: int, factor: float = 1.0) -> float:
        optimizer.zero_grad()
        loss = _backward(model)
        model[0].weight.grad.mul_(factor)
        return optimizer.step(number, loss)[1].item()

    assert step(0, math.inf) == 1
    assert scale.value.item() == 2.0
    assert all(torch.equal(before[n], t) for n, t in model.state_dict().items())
    assert step(1) == 0
    scale.finite_steps.fill_(LossScale.GROWTH_STEPS - 1)
    assert step(2) == 0
    assert (scale.value.item(), scale.finite_steps.item()) == (4.0, 0)
    step(3)
    _, resumed = _scaled(LossScale())
    resumed.load_state_tensors({n: t.clone() for n, t in optimizer.state_tensors().items()})
    assert (resumed.loss_scale.value.item(), resumed.loss_scale.finite_steps.item()) == (4.0, 1)
    for number in range(5):
        assert step(number, math.nan) == 1
    assert scale.value.item() == 1.0  # not below


def test_states_of_another_precision_are_refused():
    _, optimizer = _scaled(LossScale())
    with pytest.raises(ValueError, match="fits no parameter"):
        _optimizer(_model()).load_state_tensors(optimizer.state_tensors())
    with pytest.raises(ValueError, match="not written by a float16 run"):
        optimizer.load_state_tensors({})
