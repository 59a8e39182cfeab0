"""dual_mask: counts, closed forms, determinism, the same bits from every implementation."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from tests.ops.numpy_masks import numpy_dual_mask, philox
from tests.support import backends, cases, compiles, opcheck
from vmae2_fast import backend
from vmae2_fast.ops.masks import (
    DECODER_KINDS,
    DualMask,
    dual_mask,
    dual_mask_from_masks,
    mask_sizes,
    masks_from_rng,
    philox_words,
)

GRIDS = [(8, 14, 14), (2, 4, 4), (5, 6, 2), (1, 2, 2), (8, 16, 16)]


def positions(batch: int, start: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.arange(start, start + batch), torch.arange(batch) % 3


def sets(lists: torch.Tensor) -> list[set[int]]:
    return [{i for i in row if i >= 0} for row in lists.tolist()]


def assert_equal(a: DualMask, b: DualMask) -> None:
    for name, x, y in zip(DualMask._fields, a, b, strict=True):
        assert torch.equal(x, y), name


def test_philox_known_answers() -> None:
    """The published test vectors of Philox 4x32-10 (Random123's kat_vectors) that this counter layout can express."""
    words = philox_words(torch.tensor([0]), torch.tensor([0]), seed=0, purpose=0, count=4)
    assert [f"{w:08x}" for w in words[0].tolist()] == ["6627e8d5", "e169c58d", "bc57ac4c", "9b00dbd8"]
    # The vector of counter 243f6a88 85a308d3 13198a2e 03707344 lies in lane 0x03707344, which no small count reaches: it
    # proves the numpy version, and that proves the first lanes of the same stream.
    position, view, seed = 0x85A308D3_243F6A88 - (1 << 64), 0x13198A2E, 0x299F31D0_A4093822
    key = 0xA4093822, 0x299F31D0
    got = philox_words(torch.tensor([position]), torch.tensor([view]), seed=seed, purpose=0, count=8)[0].tolist()
    assert got == philox((0x243F6A88, 0x85A308D3, 0x13198A2E, np.arange(2)), key).ravel().tolist()
    assert philox((0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344), key).tolist() == [
        0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1,
    ]  # fmt: skip


@pytest.mark.parametrize("decoder", DECODER_KINDS)
@pytest.mark.parametrize(("name", "grid"), cases("dual_mask", GRIDS, [(2, 4, 4), (1, 2, 2)]), ids=str)
def test_lists_are_consistent(name: str, grid: tuple[int, int, int], decoder: str) -> None:
    position, view = positions(5)
    arguments = {"grid": grid, "encoder_ratio": 0.7, "decoder": decoder, "decoder_ratio": 0.25}
    with backend.use_backend(name):
        mask = dual_mask(position, view, seed=11, **arguments)
    sizes = mask_sizes(**arguments)
    assert [m.shape for m in mask] == [(5, n) for n in (*sizes, sizes[2])]
    assert all(m.dtype == torch.int32 and m.is_contiguous() for m in mask)
    tokens, sites = grid[0] * grid[1] * grid[2], grid[1] * grid[2]
    rows = zip(
        mask.visible_index.tolist(), mask.decode_index.tolist(), mask.loss_index.tolist(), mask.loss_slot.tolist(), strict=True
    )
    for visible, decoded, loss, slot in rows:
        assert visible == sorted(set(visible))
        assert decoded == sorted(set(decoded))
        assert set(visible) | set(decoded) <= set(range(tokens))
        assert visible == [t * sites + s for t in range(grid[0]) for s in visible[: len(visible) // grid[0]]]  # a tube
        expected = [i for i in decoded if i not in set(visible)]
        assert loss == expected + [-1] * (sizes[2] - len(expected))
        assert slot == [decoded.index(i) for i in expected] + [0] * (sizes[2] - len(expected))
        if decoder == "none":
            assert set(decoded) == set(range(tokens)) - set(visible)
        if decoder == "frame":
            assert set(decoded) == {t * sites + s for t in {i // sites for i in decoded} for s in range(sites)}
        if decoder == "tube":
            assert set(decoded) == {t * sites + s for t in range(grid[0]) for s in {i % sites for i in decoded}}
    if decoder in ("none", "frame") or (decoder == "running_cell" and grid[0] % 4 == 0):
        assert int(mask.loss_index.min()) >= 0, "these counts are constant: no padding"


@pytest.mark.parametrize("decoder", DECODER_KINDS)
@pytest.mark.parametrize(("name", "grid"), cases("dual_mask", GRIDS, [(5, 6, 2)]), ids=str)
def test_every_backend_has_the_reference_bits(name: str, grid: tuple[int, int, int], decoder: str) -> None:
    position = torch.tensor([0, 1, 2**31, 2**32 + 5, 2**62 + 3, 12345678901])
    view = torch.tensor([0, 1, 2, 3, 2**31, 7])
    for seed in (2**63 - 1,) if name == "triton" else (0, 1, 2**32 - 1, 2**63 - 1):
        results = []
        for which in ("reference", name):
            with backend.use_backend(which):
                results.append(dual_mask(position, view, grid=grid, seed=seed, decoder=decoder, encoder_ratio=0.75))
        assert_equal(*results)


@pytest.mark.parametrize(
    ("decoder", "ratio"),
    [("running_cell", 0.25), ("running_cell", 0.5), ("running_cell", 0.75), ("none", 0.5), ("frame", 0.5), ("random", 0.6),
     ("tube", 0.3)],
)  # fmt: skip
@pytest.mark.parametrize(("name", "grid"), cases("dual_mask", GRIDS, [(5, 6, 2), (8, 14, 14), (8, 16, 16)]), ids=str)
def test_every_backend_has_the_bits_of_numpy(name: str, grid: tuple[int, int, int], decoder: str, ratio: float) -> None:
    """Against an implementation that shares no line with the package."""
    position, view, seed = torch.tensor([2**62 + 2**32 + 3, 5]), torch.tensor([2**31, 1]), 2**63 - 2**33 - 7
    with backend.use_backend(name):
        got = dual_mask(position, view, grid=grid, seed=seed, encoder_ratio=0.9, decoder=decoder, decoder_ratio=ratio)
    for row in range(2):
        expected = numpy_dual_mask(int(position[row]), int(view[row]), grid, seed, 0.9, decoder, ratio)
        for field, lists, values in zip(DualMask._fields, got, expected, strict=True):
            assert lists[row].tolist() == values.tolist(), field


@pytest.mark.skipif("triton" not in backends("dual_mask"), reason="no Triton")
def test_triton_draws_more_words_than_fit_in_registers(monkeypatch: pytest.MonkeyPatch) -> None:
    from vmae2_fast.ops import _masks_triton

    monkeypatch.setattr(_masks_triton, "MOST_WORDS", 8)
    results = []
    for name in ("reference", "triton"):
        with backend.use_backend(name):
            results.append(dual_mask(*positions(2), grid=(1, 4, 3), seed=4, encoder_ratio=0.5, decoder="random"))
    assert_equal(*results)


@pytest.mark.skipif("triton" not in backends("dual_mask"), reason="no Triton")
def test_triton_keeps_the_first_of_equal_words() -> None:
    """Equal words hardly ever come: the selection itself, on words that are given."""
    from tests.ops.select_words import select

    for words in ([5, 3, 5, 5, 1, 5, 2**32 - 1, 0], [7] * 8, [2**31, 2**31 - 1, 2**32 - 1, 2**31] * 2):
        for items in (3, 8):
            for count in range(1, items + 1):
                smallest = sorted(range(items), key=lambda i: (words[i], i))[:count]
                assert select(words, items, count) == sorted(smallest)


@pytest.mark.parametrize(
    ("grid", "ratio", "sizes"),
    [
        ((8, 14, 14), 0.5, (160, 784, 704)),
        ((8, 16, 16), 0.5, (208, 1024, 920)),
        ((8, 16, 16), 0.25, (208, 1536, 1380)),
        ((8, 16, 16), 0.75, (208, 512, 460)),
        ((8, 14, 14), 0.25, (160, 1176, 1056)),
        ((8, 14, 14), 0.75, (160, 392, 352)),
    ],
)
def test_published_counts(grid: tuple[int, int, int], ratio: float, sizes: tuple[int, int, int]) -> None:
    assert mask_sizes(grid, decoder_ratio=ratio) == sizes
    assert bool((dual_mask(*positions(200), grid=grid, seed=5, decoder_ratio=ratio).loss_index >= 0).all())


@pytest.mark.parametrize("name", backends("dual_mask"))
def test_a_row_depends_on_position_view_and_seed_only(name: str) -> None:
    with backend.use_backend(name):
        whole = dual_mask(*positions(12), grid=(2, 4, 4), seed=9)
        position, view = positions(12)
        parts = [dual_mask(position[s], view[s], grid=(2, 4, 4), seed=9) for s in (slice(0, 5), slice(5, 12))]
        assert_equal(whole, DualMask(*(torch.cat(pair) for pair in zip(*parts, strict=True))))
        big = {"grid": (8, 14, 14)}
        base = dual_mask(*positions(1), seed=9, **big).visible_index
        assert not torch.equal(base, dual_mask(*positions(1), seed=10, **big).visible_index)
        assert not torch.equal(base, dual_mask(*positions(1), seed=9 + 2**32, **big).visible_index)
        assert not torch.equal(base, dual_mask(*positions(1, 1), seed=9, **big).visible_index)
        assert not torch.equal(base, dual_mask(torch.tensor([0]), torch.tensor([1]), seed=9, **big).visible_index)


def test_encoder_and_decoder_draw_independently() -> None:
    mask = dual_mask(*positions(1), grid=(4, 14, 14), seed=2, encoder_ratio=0.5, decoder="tube", decoder_ratio=0.5)
    overlap = len(sets(mask.visible_index)[0] & sets(mask.decode_index)[0]) / mask.visible_index.shape[1]
    assert 0.2 < overlap < 0.8


def test_draws_are_uniform() -> None:
    """Visits of each site, and the four phases, within five standard deviations of a fair draw."""
    batch, sites, kept = 4000, 16, 4
    mask = dual_mask(torch.arange(batch), torch.zeros(batch, dtype=torch.long), grid=(4, 4, 4), seed=1, encoder_ratio=0.75)
    visits = torch.bincount(mask.visible_index[:, :kept].flatten().long(), minlength=sites).double()
    deviation = (batch * kept / sites * (1 - kept / sites)) ** 0.5
    assert float((visits - batch * kept / sites).abs().max()) < 5 * deviation
    phases = torch.unique(mask.decode_index, dim=0, return_counts=True)[1].double()
    assert len(phases) == 4
    assert float((phases - batch / 4).abs().max()) < 5 * (batch * 3 / 16) ** 0.5


def test_running_cell_closed_form() -> None:
    queue = [1, 1, 0, 0]
    grid = [(t, y, x) for t in range(5) for y in range(4) for x in range(6)]

    def decoded_at(phase: int) -> set[int]:
        return {i for i, (t, y, x) in enumerate(grid) if not queue[(2 * (y % 2) + (x % 2) + phase + 1 + t) % 4]}

    mask = dual_mask(*positions(64), grid=(5, 4, 6), seed=3)
    maps = set()
    for row in sets(mask.decode_index):
        phases = [phase for phase in range(4) if row == decoded_at(phase)]
        assert len(phases) == 1
        maps.add(phases[0])
    assert maps == {0, 1, 2, 3}


@pytest.mark.parametrize("decoder", DECODER_KINDS)
def test_lists_of_masks_match_masks(decoder: str) -> None:
    encoder_mask, decoder_mask = masks_from_rng(
        np.random.RandomState(0), 3, grid=(3, 4, 4), encoder_ratio=0.5, decoder=decoder
    )
    mask = dual_mask_from_masks(encoder_mask, torch.from_numpy(decoder_mask))
    assert sets(mask.visible_index) == [set(np.flatnonzero(~row)) for row in encoder_mask]
    assert sets(mask.decode_index) == [set(np.flatnonzero(~row)) for row in decoder_mask]
    assert sets(mask.loss_index) == [set(np.flatnonzero(e & ~d)) for e, d in zip(encoder_mask, decoder_mask, strict=True)]
    sizes = mask_sizes((3, 4, 4), encoder_ratio=0.5, decoder=decoder)
    assert (mask.visible_index.shape[1], mask.decode_index.shape[1]) == sizes[:2]
    assert mask.loss_index.shape[1] <= sizes[2]


@pytest.mark.parametrize("name", backends("dual_mask"))
def test_opcheck(name: str) -> None:
    with backend.use_backend(name):
        opcheck(torch.ops.vmae2.dual_mask.default, (*positions(3), [2, 4, 4], 7, 0.75, "running_cell", 0.5))


def test_traces_without_reading_data() -> None:
    def draw(position: torch.Tensor, view: torch.Tensor) -> DualMask:
        return dual_mask(position, view, grid=(2, 4, 4), seed=7)

    assert_equal(compiles(draw, *positions(3)), draw(*positions(3)))
    with FakeTensorMode() as mode:
        fake = draw(*(mode.from_tensor(t) for t in positions(3)))
    assert [f.shape for f in fake] == [r.shape for r in draw(*positions(3))]


def test_reference_never_asks_for_a_value() -> None:
    """The reference itself runs under FakeTensorMode, where nonzero, boolean indexing and .item() raise."""
    from vmae2_fast.ops.masks import dual_mask_reference

    with FakeTensorMode() as mode:
        for decoder in DECODER_KINDS:
            dual_mask_reference(*(mode.from_tensor(t) for t in positions(3)), (2, 4, 4), 7, 0.75, decoder, 0.5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"grid": (8, 15, 15)}, "even grid.*15x15"),
        ({"decoder_ratio": 0.6}, "multiple of 1/4, got 0.6; nearest valid: 0.5 or 0.75"),
        ({"decoder_ratio": 1.0}, r"\[0, 1\)"),
        ({"encoder_ratio": 1.0}, r"encoder_ratio must be in \[0, 1\)"),
        ({"encoder_ratio": -0.1}, r"encoder_ratio must be in \[0, 1\)"),
        ({"encoder_ratio": float("nan")}, r"encoder_ratio must be in \[0, 1\)"),
        ({"decoder": "cell"}, "one of running_cell, none, frame, random, tube"),
        ({"grid": (8, 0, 14)}, "positive"),
        ({"seed": -1}, "seed"),
        ({"view": torch.zeros(2, dtype=torch.long)}, "differ"),
        ({"position": torch.zeros(3)}, "position must be int64"),
    ],
)
def test_rejects(arguments: dict, message: str) -> None:
    position, view = positions(3)
    with pytest.raises(ValueError, match=message):
        dual_mask(**{"position": position, "view": view, "grid": (8, 14, 14), "seed": 0, **arguments})


def test_masks_with_unequal_rows_are_refused() -> None:
    encoder = np.array([[1, 0, 0, 0], [1, 1, 0, 0]], bool)
    with pytest.raises(ValueError, match="rows of encoder_mask keep"):
        dual_mask_from_masks(encoder, np.zeros((2, 4), bool))


def test_ragged_loss_tokens_are_padded() -> None:
    encoder = np.array([[1, 1, 0, 0], [1, 1, 0, 0]], bool)
    decoder = np.array([[1, 1, 0, 0], [0, 0, 1, 1]], bool)
    mask = dual_mask_from_masks(encoder, decoder)
    assert mask.loss_index.tolist() == [[-1, -1], [0, 1]]
    assert mask.loss_slot.tolist() == [[0, 0], [0, 1]]


@pytest.mark.cuda
@pytest.mark.parametrize("decoder", DECODER_KINDS)
@pytest.mark.parametrize("grid", [*GRIDS, (8, 24, 24), (16, 32, 32)], ids=str)
@pytest.mark.parametrize("name", backends("dual_mask", "cuda"))
def test_cuda_has_the_cpu_bits(name: str, grid: tuple[int, int, int], decoder: str) -> None:
    position, view = positions(6, 2**33 - 3)
    arguments = {"grid": grid, "seed": 2**63 - 1, "decoder": decoder, "encoder_ratio": 0.75}
    with backend.use_backend(name):
        drawn = dual_mask(position.cuda(), view.cuda(), **arguments)
    assert_equal(DualMask(*(m.cpu() for m in drawn)), dual_mask(position, view, **arguments))


@pytest.mark.cuda
@pytest.mark.parametrize("name", backends("dual_mask", "cuda"))
def test_a_captured_graph_draws_anew(name: str) -> None:
    position, view = (t.cuda() for t in positions(4))
    with backend.use_backend(name):
        dual_mask(position, view, grid=(8, 14, 14), seed=5)  # compiles
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            drawn = dual_mask(position, view, grid=(8, 14, 14), seed=5)
    position += 1000
    graph.replay()
    expected = dual_mask(position.cpu(), view.cpu(), grid=(8, 14, 14), seed=5)
    assert_equal(DualMask(*(m.cpu() for m in drawn)), expected)
