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
    assert len(RegionOrder.build(24, n).steps) == calls


@pytest.mark.parametrize("grid, n", CUTS)
def test_schedule_covers_every_slot_once_and_follows_the_steps(grid, n):
    order = RegionOrder.build(grid, n)
    slots = [list(range(start, stop)) for start, stop, _, _ in order.steps]
    assert sum(slots, []) == list(range(order.num_tokens))
    for step, group in enumerate(slots):
        assert set(order.step_of_slot[group].tolist()) == {step}


@pytest.mark.parametrize("grid, n", CUTS)
def test_decoding_needs_no_mask(grid, n):
    """What a slot may see is what is cached when its step runs: earlier steps and its own."""
    order = RegionOrder.build(grid, n)
    for start, stop, _, _ in order.steps:
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
    assert order.step_of_slot.tolist() == [0, 1, 2, 3, 4, 4, 4, 4, 5, 5, 5, 5, 6, 6, 6, 6]
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


def test_special_tokens_are_one_fewer():
    assert resolve_parallelism(16, 15) == resolve_parallelism(16, None) == 16
    with pytest.raises(ValueError, match="--spe-token-num 3 contradicts --ar-token-num 16"):
        resolve_parallelism(16, 3)


SCHEDULES = [
    (8, 1, "region"), (8, 4, "region"), (24, 16, "region"), (24, 16, "nested"), (24, 64, "nested"),
    (8, 8, "nested"), (8, 4, "nested"), (8, 16, "1x4,4x3,8x2,4x4,1x16"), (8, 4, "4x16"),
    (8, 16, "2x8,16x3"), ((4, 6), 6, "3x2,2x3,6x2"),
]  # fmt: skip


@pytest.mark.parametrize("grid, n, schedule", SCHEDULES)
def test_a_step_holds_the_tokens_of_the_step_before_and_special_ones(grid, n, schedule):
    """Against a slow version, slot by slot; every token is predicted once, by the step that may."""
    order = RegionOrder.build(grid, n, schedule)
    slots, predicting, special, before = [], [], 0, [("class", 0)]
    for step, (start, stop, first, end) in enumerate(order.steps):
        assert start == len(slots)
        held = list(before)
        while len(held) < end - first:
            held.append(("special", special))
            special += 1
        predicting += [start + i for i in range(end - first)]
        slots += held
        assert stop == len(slots) and set(order.seen[start:stop]) == {stop}
        assert set(order.step_of_slot[start:stop].tolist()) == {step}
        assert order.held(start, stop) == merged(held)
        before = [("token", token) for token in range(first, end)]
    assert order.held(0, len(slots)) == merged(slots)
    assert order.num_slots == len(slots) and order.num_special == special
    assert order.predicting.tolist() == predicting and len(predicting) == order.num_tokens
    assert sorted(order.permutation.tolist()) == list(range(order.num_tokens))
    for place, (kind, which) in zip(order.slot_positions.tolist(), slots, strict=True):
        raster = order.permutation[which].item() if kind == "token" else None
        assert place == ([-1, -1] if raster is None else list(divmod(raster, order.grid[1])))


def merged(held):
    """Neighbours of one kind as one slice."""
    runs = []
    for kind, which in held:
        if runs and runs[-1][0] == kind and runs[-1][1].stop == which:
            runs[-1] = (kind, slice(runs[-1][1].start, which + 1))
        else:
            runs.append((kind, slice(which, which + 1)))
    return runs


@pytest.mark.parametrize("n, steps", [(4, 147), (16, 42), (64, 18)])
def test_nested_start_takes_fewer_steps_and_as_many_special_tokens(n, steps):
    order = RegionOrder.build(24, n, "nested")
    assert len(order.steps) == steps and order.num_special == n - 1
    assert order.num_slots == order.num_tokens


@pytest.mark.parametrize("grid, n, schedule", SCHEDULES)
def test_tokens_of_a_step_are_in_different_regions(grid, n, schedule):
    order = RegionOrder.build(grid, n, schedule)
    (h, w), (rh, rw) = order.grid, order.regions
    raster = order.permutation
    region = raster // w // (h // rh) * rw + raster % w // (w // rw)  # (T,)
    for step in order.steps:
        assert len(set(region[step.first : step.end].tolist())) == step.end - step.first


def test_nested_groups_are_spread_over_the_grid():
    """Any quarter of a group of 16 has one region in each quadrant, as the first four do."""
    order = RegionOrder.build(24, 16, "nested")
    quadrant = order.permutation // 24 // 12 * 2 + order.permutation % 24 // 12  # (T,)
    assert (quadrant.view(-1, 4).sort(1).values == torch.arange(4)).all()


@pytest.mark.parametrize(
    "schedule, message",
    [
        ("1x3,4x15", "63 tokens, but there are 64"),
        ("1x4,8x1,4x13", "a step goes beyond token 8"),
        ("nest", "expected region, nested, or sizes such as 1x4,4x35, not 'nest'"),
        ("1x4,-4x15", "not '-4x15'"),
        ("1x999999", "more than 64 tokens"),
    ],
)
def test_schedules_that_do_not_fit_say_why(schedule, message):
    with pytest.raises(ValueError, match=f"--schedule {schedule}: .*{message}"):
        RegionOrder.build(8, 4, schedule)
    with pytest.raises(ValueError, match="--schedule nested: n = 6 cannot be divided by 4 until"):
        RegionOrder.build((4, 6), 6, "nested")


@pytest.mark.parametrize("schedule", ["region", "4x9", "1x36"])
def test_raster_order_and_written_regions(schedule):
    order = RegionOrder.build(6, 4, schedule, "raster")
    assert order.permutation.tolist() == list(range(36))
    assert order.steps == RegionOrder.build(6, 4, schedule).steps
    if schedule == "4x9":  # neighbours together
        assert order.slot_positions[8:12].tolist() == [[0, 4], [0, 5], [1, 0], [1, 1]]
    for layout, regions in {"1x2": (1, 2), "2x1": (2, 1)}.items():
        order = RegionOrder.build(6, 2, layout=layout)
        assert order.permutation.tolist() == slow_region_order((6, 6), regions)


@pytest.mark.parametrize("schedule", ["region", "4x16", "1x64", "1x4,4x3,2x8,4x8"])
def test_causal_groups_see_what_comes_before_them(schedule):
    full = RegionOrder.build(8, 4 if schedule != "1x4,4x3,2x8,4x8" else 16, schedule)
    order = RegionOrder(full.grid, full.regions, schedule, causal=True)
    slots = order.num_slots
    assert torch.equal(order.mask(), torch.ones(slots, slots, dtype=torch.bool).tril())
    assert order.seen == tuple(range(1, slots + 1))
    assert torch.equal(order.step_of_slot, full.step_of_slot)
    assert full.seen == tuple(full.mask().sum(-1).tolist())


@pytest.mark.parametrize("schedule", ["region", "4x16"])
def test_special_tokens_may_have_the_positions_of_what_they_predict(schedule):
    order = RegionOrder.build(8, 4, schedule)
    positions, plain = order.positions_with_special.tolist(), order.slot_positions.tolist()
    special = range(5, 8) if schedule == "region" else range(1, 4)
    for slot, (with_special, without) in enumerate(zip(positions, plain, strict=True)):
        if slot in special:
            assert without == [-1, -1]
            assert with_special == list(divmod(order.permutation[slot].item(), 8))
        else:
            assert with_special == without
