"""Region order: permutation, steps, attention rule and schedule against the paper's figures and
a slow version.
"""

import pytest
import torch

from autoregressive.models.load import resolve_parallelism
from autoregressive.models.region_order import RegionOrder

CUTS = [(8, 1), (8, 4), (12, 9), (8, 16), (24, 4), (24, 16), ((4, 6), 2), ((4, 6), 6), ((6, 4), 2)]


def slow_region_order(grid, regions):
    """Raster indices by the paper's words: for each place in a region, for each region."""
    (h, w), (rh, rw) = grid, regions
    place_h, place_w = h // rh, w // rw
    return [
        (i * place_h + y) * w + j * place_w + x
        for y in range(place_h)
        for x in range(place_w)
        for i in range(rh)
        for j in range(rw)
    ]


@pytest.mark.parametrize("n", [1, 4, 9, 16])
def test_permutation_is_golden(golden, n):
    file = golden(f"gpt_tiny_n{n}.npz")
    assert (
        RegionOrder.build(int(file["grid"]), n).permutation.tolist()
        == file["region_order"].tolist()
    )


@pytest.mark.parametrize("grid, n", CUTS)
def test_permutation_matches_slow_version_and_inverts(grid, n):
    order = RegionOrder.build(grid, n)
    assert order.permutation.tolist() == slow_region_order(order.grid, order.regions)
    raster = torch.randperm(order.num_tokens)
    assert torch.equal(raster[order.permutation][order.inverse], raster)


@pytest.mark.parametrize("n, calls", [(1, 576), (4, 147), (16, 51)])
def test_forward_calls_of_the_paper(n, calls):
    assert len(RegionOrder.build(24, n).schedule) == calls


@pytest.mark.parametrize("grid, n", CUTS)
def test_schedule_covers_every_slot_once_and_follows_the_steps(grid, n):
    order = RegionOrder.build(grid, n)
    slots = [list(range(start, stop)) for start, stop in order.schedule]
    assert sum(slots, []) == list(range(order.num_tokens))
    for step, group in enumerate(slots):
        assert set(order.steps[group].tolist()) == {step}


@pytest.mark.parametrize("grid, n", CUTS)
def test_decoding_needs_no_mask(grid, n):
    """What a slot may see is what is cached when its step runs: earlier steps and its own."""
    order = RegionOrder.build(grid, n)
    for start, stop in order.schedule:
        expected = torch.zeros(stop - start, order.num_tokens, dtype=torch.bool)
        expected[:, :stop] = True
        assert torch.equal(order.mask()[start:stop], expected)


def test_raster_order_is_causal():
    order = RegionOrder.build(6, 1)
    assert torch.equal(order.mask(), torch.ones(36, 36, dtype=torch.bool).tril())
    assert order.permutation.tolist() == list(range(36))


def test_attention_truth_table_n4_on_4x4():
    """Slots: class, t1..t4, 3 special, one group of 4 (the last of 16 tokens is no input)."""
    order = RegionOrder.build(4, 4)
    assert order.steps.tolist() == [0, 1, 2, 3, 4, 4, 4, 4, 5, 5, 5, 5, 6, 6, 6, 6]
    sees = ["".join("x" if v else "." for v in row) for row in order.mask().tolist()]
    assert sees[0] == "x" + "." * 15
    assert sees[3] == "xxxx" + "." * 12
    assert sees[4] == sees[7] == "xxxxxxxx" + "." * 8  # t4 and the special tokens are one step
    assert sees[8] == sees[11] == "xxxxxxxxxxxx" + "." * 4


def test_slot_positions_follow_the_tokens_they_hold():
    order = RegionOrder.build(4, 4)
    positions = order.slot_positions.tolist()
    assert positions[0] == positions[5] == positions[6] == positions[7] == [-1, -1]
    assert positions[1:5] == [[0, 0], [0, 2], [2, 0], [2, 2]]
    assert positions[8:12] == [[0, 1], [0, 3], [2, 1], [2, 3]]


def test_two_regions_are_as_square_as_possible():
    assert RegionOrder.build((4, 6), 2).regions == (1, 2)
    assert RegionOrder.build((6, 4), 2).regions == (2, 1)


@pytest.mark.parametrize("n", [0, 5, 7, 64])
def test_n_that_does_not_fit_names_what_does(n):
    with pytest.raises(ValueError, match=f"n = {n} does not cut a 8x8 .*: 1, 2, 4, 8, 16, 32"):
        RegionOrder.build(8, n)
    with pytest.raises(
        ValueError, match=f"--ar-token-num {n}: n = {n} does not cut a 8x8 .*: 1, 2, 4, 8, 16, 32"
    ):
        resolve_parallelism(n, None, (8, 8))
