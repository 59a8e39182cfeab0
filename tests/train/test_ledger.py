"""The ledger against published figures, built models and torch's own FLOP counter."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from vmae2_fast.config import MaskConfig, ModelConfig, OptimConfig
from vmae2_fast.models import build_model, model_names
from vmae2_fast.ops.masks import dual_mask
from vmae2_fast.ops.reconstruction import reconstruction_loss
from vmae2_fast.train.ledger import ledger, saved_bytes, table
from vmae2_fast.train.optim import Optimizer

BASE, GIANT = "pretrain_videomae_base_patch16_224", "pretrain_videomae_giant_patch14_224"
SMALL = {"frames": 8, "size": 32, "patch": 8, "width": 24, "depth": 3, "heads": 2}
SMALL_PRETRAIN = {**SMALL, "decoder_width": 16, "decoder_depth": 2, "decoder_heads": 2}


# VideoMAE V2 paper, tables "decoder masking" and "dual masking": GMACs a clip, printed as FLOPs.
@pytest.mark.parametrize(("name", "mask", "published"), [
    (BASE, MaskConfig(decoder="none"), 35.48),
    (BASE, MaskConfig(decoder_ratio=0.25), 31.63),
    (BASE, MaskConfig(decoder_ratio=0.5), 25.87),
    (BASE, MaskConfig(decoder_ratio=0.75), 21.06),
    (BASE, MaskConfig(decoder="frame"), 25.87),
    (BASE, MaskConfig(decoder="random"), 25.87),
    (GIANT, MaskConfig(decoder="none"), 263.93),
    (GIANT, MaskConfig(), 241.61),
])
def test_pretraining_figures_of_the_paper(name: str, mask: MaskConfig, published: float) -> None:
    assert ledger(name, mask)["macs"]["published"]["total"] / 1e9 == pytest.approx(published, rel=0.003)


# Tables "Kinetics-400" and "Kinetics-600" (TMACs of all views). The two large ViT-H rows are swapped in the paper: each is
# compared with what the other one prints. Small and base: 57 G and 180 G, the figures other libraries publish.
@pytest.mark.parametrize(("name", "frames", "size", "views", "published"), [
    ("vit_small_patch16_224", 16, 224, 1, 0.057),
    ("vit_base_patch16_224", 16, 224, 1, 0.180),
    ("vit_huge_patch16_224", 16, 224, 15, 17.88),
    ("vit_giant_patch14_224", 16, 224, 15, 38.16),
    ("vit_giant_patch14_224", 64, 266, 6, 160.30),
    ("vit_huge_patch16_224", 64, 288, 12, 184.24),
    ("vit_huge_patch16_224", 32, 384, 12, 153.34),
])
def test_multi_view_figures_of_the_paper(name: str, frames: int, size: int, views: int, published: float) -> None:
    account = ledger(ModelConfig(name=name, frames=frames, size=size, num_classes=400), views=views)
    assert account["macs_views"]["published"] / 1e12 == pytest.approx(published, rel=0.003)


def test_the_decoder_mlp_of_the_published_figure_is_the_released_one() -> None:
    printed = ledger(ModelConfig(name=GIANT, decoder_mlp_ratio=4.0))  # the 2048 hidden units the paper prints
    assert printed["macs"]["published"]["total"] / 1e9 == pytest.approx(240.67, abs=0.01)


@pytest.mark.parametrize(("name", "tokens"), [
    (BASE, {"all": 1568, "visible": 160, "decoded": 784, "sequence": 944, "loss": 704}),
    (GIANT, {"all": 2048, "visible": 208, "decoded": 1024, "sequence": 1232, "loss": 920}),
])
def test_token_counts(name: str, tokens: dict[str, int]) -> None:
    assert ledger(name)["tokens"] == tokens


@pytest.mark.parametrize("overrides", [
    {}, {"layer_scale": 0.1}, {"cosine_attention": True}, {"qkv_bias": False}, {"decoder_mlp_ratio": 2.0}, {"in_chans": 1,
     "pixel_mean": (0.5,), "pixel_std": (0.5,)},
])
def test_pretraining_parameters_equal_the_built_model(overrides: dict[str, Any]) -> None:
    config = ModelConfig(name=BASE, **{**SMALL_PRETRAIN, **overrides})
    model, counted = build_model(config), ledger(config)["parameters"]
    assert counted["total"] == sum(p.numel() for p in model.parameters())
    assert counted["encoder"] == sum(p.numel() for p in model.encoder.parameters())
    assert counted["decoder"] == sum(p.numel() for p in model.decoder.parameters())


@pytest.mark.parametrize("overrides", [
    {}, {"num_classes": 7}, {"pooling": "first"}, {"learnable_positions": True}, {"pooling": "attentive", "num_classes": 7},
])
def test_classification_parameters_equal_the_built_model(overrides: dict[str, Any]) -> None:
    config = ModelConfig(name="vit_base_patch16_224", **{**SMALL, **overrides})
    assert ledger(config)["parameters"]["total"] == sum(p.numel() for p in build_model(config).parameters())


@pytest.mark.parametrize("name", model_names())
def test_parameters_of_the_official_sizes(name: str) -> None:
    config = ModelConfig(name=name, num_classes=0 if name.startswith("pretrain") else 710)
    with torch.device("meta"):
        model = build_model(config)
    assert ledger(config)["parameters"]["total"] == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("frames", [4, 8])  # 4: the loss tokens are padded
@pytest.mark.parametrize("overrides", [{}, {"layer_scale": 0.1}, {"cosine_attention": True}])
def test_executed_macs_equal_torchs_flop_counter_in_pretraining(frames: int, overrides: dict[str, Any]) -> None:
    config, mask = ModelConfig(name=BASE, **{**SMALL_PRETRAIN, "frames": frames, **overrides}), MaskConfig(encoder_ratio=0.75)
    model = build_model(config)
    clip = torch.zeros(2, frames, 32, 32, 3, dtype=torch.uint8)
    lists = dual_mask(torch.arange(2), torch.zeros(2, dtype=torch.int64), grid=model.grid, seed=0, encoder_ratio=0.75)
    with FlopCounterMode(display=False) as forward:
        pred = model(clip, lists)
    assert forward.get_total_flops() == 2 * 2 * ledger(config, mask)["macs"]["executed"]["total"]
    with FlopCounterMode(display=False) as backward:
        pred.sum().backward()
    # The backward of attention computes its scores once more; `flops_step` counts what has to be computed.
    account = ledger(config, mask)
    scores = sum(account["macs"]["executed"][part] for part in ("encoder_attention", "decoder_attention"))
    assert forward.get_total_flops() + backward.get_total_flops() == 2 * (account["flops_step"] + scores)


@pytest.mark.parametrize("pooling", ["mean", "first", "attentive"])
def test_executed_macs_equal_torchs_flop_counter_in_classification(pooling: str) -> None:
    config = ModelConfig(name="vit_base_patch16_224", **SMALL, num_classes=5, pooling=pooling)
    with FlopCounterMode(display=False) as counter:
        build_model(config)(torch.zeros(2, 3, 8, 32, 32))
    account = ledger(config)
    # the counter knows our attention, but not torch's own on a CPU, which the pool runs: scores and sums of one query
    missed = 2 * account["tokens"]["all"] * SMALL["width"] if pooling == "attentive" else 0
    assert counter.get_total_flops() == 2 * 2 * (account["macs"]["executed"]["total"] - missed)


def measured(config: ModelConfig, clips: int, *, bf16: bool = False, ratio: float = 0.9) -> int:
    """Bytes a training step keeps: to the loss in pre-training, to the scores in classification."""
    model = build_model(config).train()
    spec = model.spec
    clip = torch.zeros(clips, spec.frames, spec.size, spec.size, spec.channels, dtype=torch.uint8)

    def run() -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            if spec.decoder is None:
                return model(clip)
            position = torch.arange(clips)
            mask = dual_mask(position, torch.zeros_like(position), grid=model.grid, seed=0, encoder_ratio=ratio)
            cube = {"patch": spec.patch, "tubelet": spec.tubelet}
            return reconstruction_loss(model(clip, mask), clip, mask.loss_index, **cube, reduction="sum")[0]

    return saved_bytes(run, model)


OPTIONS: list[dict[str, Any]] = [
    {},
    {"residual_dtype": "bfloat16"},
    {"layer_scale": 0.1, "drop_path": 0.2},
    {"activation_checkpoint": "mlp"},
    {"activation_checkpoint": "mlp", "layer_scale": 0.1},
    {"activation_checkpoint": "block"},
    {"activation_checkpoint": "block", "layer_scale": 0.1, "drop_path": 0.2},
    {"decoder_fp32": True, "residual_dtype": "bfloat16"},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("name", [BASE, "vit_base_patch16_224"])
def test_activation_bytes_at_real_size(name: str, options: dict[str, Any]) -> None:
    config = ModelConfig(name=name, num_classes=0 if name == BASE else 400, **options)
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert measured(config, 2, bf16=True) == 2 * ledger(config)["activation_bytes"]["total"]


@pytest.mark.parametrize("config", [
    ModelConfig(name=GIANT),
    ModelConfig(name=GIANT, residual_dtype="bfloat16"),
    ModelConfig(name="vit_giant_patch14_224", num_classes=710, drop_path=0.25),
    ModelConfig(name="vit_giant_patch14_224", num_classes=710, drop_path=0.25, residual_dtype="bfloat16", pooling="first"),
], ids=str)  # fmt: skip
def test_activation_bytes_of_the_giant(config: ModelConfig) -> None:
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert measured(config, 1, bf16=True) == ledger(config)["activation_bytes"]["total"]


@pytest.mark.parametrize("options", OPTIONS[::2], ids=str)
@pytest.mark.parametrize("bf16", [False, True])
def test_activation_bytes_of_a_real_run(options: dict[str, Any], bf16: bool) -> None:
    """Tensors that are really there, and not the fakes' word for it."""
    config, mask = ModelConfig(name=BASE, **{**SMALL_PRETRAIN, **options}), MaskConfig(encoder_ratio=0.75)
    account = ledger(config, mask, precision="bfloat16" if bf16 else "float32")
    assert measured(config, 3, bf16=bf16, ratio=0.75) == 3 * account["activation_bytes"]["total"]
    for pooling in ("mean", "attentive"):
        classifier = ModelConfig(name="vit_base_patch16_224", **{**SMALL, **options}, num_classes=5, pooling=pooling)
        account = ledger(classifier, precision="bfloat16" if bf16 else "float32")
        assert measured(classifier, 3, bf16=bf16) == 3 * account["activation_bytes"]["total"]


def test_evaluation_keeps_nothing() -> None:
    model = build_model(ModelConfig(name="vit_base_patch16_224", **SMALL)).eval()
    with torch.no_grad():
        assert saved_bytes(lambda: model(torch.zeros(2, 3, 8, 32, 32)), model) == 0


def test_policies_and_precision_order_the_activation_bytes() -> None:
    def kept(precision: Any = "bfloat16", **overrides: Any) -> int:
        return ledger(ModelConfig(name=GIANT, **overrides), precision=precision)["activation_bytes"]["total"]

    assert kept(activation_checkpoint="block") < kept(activation_checkpoint="mlp") < kept() < kept("float32")
    assert kept(residual_dtype="bfloat16") < kept() < kept(layer_scale=0.1)


def test_step_and_optimizer_of_the_giant() -> None:
    account = ledger(GIANT)
    assert account["flops_step"] / 1e9 == pytest.approx(1425, abs=1)  # forward and backward of what is executed
    assert account["optimizer_bytes"]["total"] == 16 * 1_026_306_560


def _state_bytes(optimizer: Optimizer) -> int:
    """Of the moments in memory, whatever they are made of."""
    total = 0
    for state in optimizer.adamw.state.values():
        for key in ("exp_avg", "exp_avg_sq"):
            moment = state[key]
            parts = (moment,) if type(moment) is torch.Tensor else (moment.codes, moment.scale, moment.qmap)
            total += sum(part.untyped_storage().nbytes() for part in parts)
    return total


@pytest.mark.parametrize("implementation", ["torch", "vmae2", "torchao8bit"])
@pytest.mark.parametrize("options", [{}, {"decoder_fp32": True}, {"num_classes": 5, "pooling": "attentive"}], ids=str)
def test_optimizer_bytes_are_those_of_a_real_step(options: dict[str, Any], implementation: Any) -> None:
    if implementation == "torchao8bit":
        pytest.importorskip("torchao.optim")  # it compiles for every shape: seconds for each model
        if options:
            pytest.skip("one model is enough for what has no shadows")
    small = {**SMALL_PRETRAIN, "width": 64, "decoder_width": 32}  # wide enough for matrices of 8 bits
    config = ModelConfig(name="vit_base_patch16_224" if "num_classes" in options else BASE, **small, **options)
    model = build_model(config)
    settings: dict[str, Any] = {"global_batch": 1, "total_steps": 2, "steps_per_epoch": 2, "shadows": True}
    optimizer = Optimizer(model, OptimConfig(implementation=implementation), **settings)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step(0, torch.ones(()))
    account = ledger(config, MaskConfig(encoder_ratio=0.75), implementation=implementation)["optimizer_bytes"]
    assert account["moments"] == _state_bytes(optimizer)
    assert (account["moments"] < 8 * account["parameters"] // 4) == (implementation == "torchao8bit")
    rows = getattr(optimizer.adamw, "_rows", [])
    copies = [row.shadow for row in (row for rows in rows for row in rows) if row.shadow is not None]
    assert account["shadows"] == sum(copy.untyped_storage().nbytes() for copy in copies)
    assert bool(account["shadows"]) == (implementation == "vmae2")
    assert account["total"] == sum(value for part, value in account.items() if part != "total")
    exact = ledger(config, MaskConfig(encoder_ratio=0.75), implementation=implementation, precision="float32")
    assert exact["optimizer_bytes"]["shadows"] == 0


def test_eight_bits_of_the_giant() -> None:
    """2 bytes a parameter, 8 more for every 256, two tables a tensor, and what is small in float32."""
    plain, account = (ledger(GIANT, implementation=name)["optimizer_bytes"] for name in ("torch", "torchao8bit"))
    assert 2.03 < account["moments"] / (plain["parameters"] / 4) < 2.04


def test_table_shows_both_counts_and_the_views() -> None:
    text = table(ledger(GIANT))
    for figure in ("241.61", "237.71", "1,026.307", "loss 920"):
        assert figure in text
    assert "total of 15 views" in table(ledger("vit_base_patch16_224", views=15))


def test_bad_requests_are_named() -> None:
    with pytest.raises(ValueError, match="views must be at least 1, got 0"):
        ledger("vit_base_patch16_224", views=0)
    with pytest.raises(ValueError, match="unknown model"):
        ledger("vit_bose_patch16_224")
    with pytest.raises(ValueError, match="multiple of 1/4"):
        ledger(BASE, MaskConfig(decoder_ratio=0.6))
