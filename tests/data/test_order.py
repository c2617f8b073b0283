from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ask_dist.data.order import Order, lanes_of
from ask_dist.errors import InputError

orders = st.builds(
    Order,
    counts=st.lists(st.integers(0, 12), min_size=1, max_size=9).filter(sum).map(tuple),
    seed=st.integers(0, 2**40),
    lanes=st.sampled_from([1, 2, 4, 8]),
    per_lane=st.integers(1, 5),
    window=st.integers(1, 9),
)


@given(order=orders, epoch=st.integers(0, 3))
def test_lanes_cover_every_clip_once(order: Order, epoch: int) -> None:
    met = []
    for lane in range(order.lanes):
        for shard, first, count, _ in order.pieces(epoch, *order.lane_bounds(lane)):
            met += [(shard, first + offset) for offset in range(count)]
    assert sorted(met) == [(shard, place) for shard, count in enumerate(order.counts) for place in range(count)]


@given(order=orders)
def test_lanes_differ_by_one_clip_at_most_and_fit_the_steps(order: Order) -> None:
    lengths = [order.lane_length(lane) for lane in range(order.lanes)]
    assert sum(lengths) == sum(order.counts)
    assert max(lengths) - min(lengths) <= 1
    assert (order.steps_per_epoch - 1) * order.per_lane < max(lengths) <= order.steps_per_epoch * order.per_lane


@given(order=orders)
def test_blocks_tile_a_lane(order: Order) -> None:
    for lane in range(order.lanes):
        places = [place for start, stop in order.blocks(lane) for place in range(start, stop)]
        assert places == list(range(order.lane_length(lane)))
        assert all(stop - start <= order.window for start, stop in order.blocks(lane))


def test_epochs_seeds_lanes_and_blocks_draw_different_orders() -> None:
    order = Order((5,) * 20, seed=1, lanes=2, per_lane=1, window=50)
    other = Order((5,) * 20, seed=2, lanes=2, per_lane=1, window=50)
    shard_orders = {tuple(piece.shard for piece in o.pieces(epoch, 0, 100)) for o in (order, other) for epoch in (0, 1)}
    assert len(shard_orders) == 4
    permutations = {
        tuple(o.block_order(epoch, lane, block, 50))
        for o in (order, other)
        for epoch in (0, 1)
        for lane in (0, 1)
        for block in (0, 1)
    }
    assert len(permutations) == 16
    draws = {int(o.clip_rng(epoch, i).integers(2**60)) for o in (order, other) for epoch in (0, 1) for i in (-7, 0, 7)}
    assert len(draws) == 12


def test_lanes_are_shared_out_in_contiguous_groups() -> None:
    assert [list(lanes_of(rank, 4, 8)) for rank in range(4)] == [[0, 1], [2, 3], [4, 5], [6, 7]]
    with pytest.raises(InputError, match="8 lanes for 3 ranks: set lanes to a multiple of 3"):
        lanes_of(0, 3, 8)
    with pytest.raises(InputError, match="rank 2 of 2"):
        lanes_of(2, 2, 8)
