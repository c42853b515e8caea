"""The order that the page draws is RegionOrder's."""

import pytest

from autoregressive.models.region_order import RegionOrder
from autoregressive.sample.page.orders import describe_order


@pytest.mark.parametrize("n, schedule", [("4", "region"), ("16", "nested"), ("1", "region")])
def test_the_page_draws_the_order_itself(n, schedule):
    order = RegionOrder.build(8, int(n), schedule)
    told = describe_order({"grid": "8", "n": n, "schedule": schedule})
    assert told["cells"] == order.permutation.tolist()
    assert [s["tokens"] for s in told["steps"]] == [[s.first, s.end] for s in order.steps]
    inputs = [piece for s in told["steps"] for piece in s["inputs"]]
    assert sum(b - a for _, a, b in inputs) == order.num_slots
    assert told["fitting"] == [1, 2, 4, 8, 16, 32]


@pytest.mark.parametrize(
    "query, message",
    [
        ({"grid": "x"}, "expected whole numbers"),
        ({"grid": "1000000"}, "grid: expected 2 to 32"),
        ({"grid": "8", "n": "3"}, "n = 3 does not cut a 8x8 grid"),
        ({"grid": "8", "schedule": "1x9999999"}, "--schedule 1x9999999: expected"),
    ],
)
def test_what_does_not_fit_is_said(query, message):
    with pytest.raises(ValueError, match=message):
        describe_order(query)
