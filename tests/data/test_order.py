from __future__ import annotations

import dataclasses
import math
from collections import defaultdict

import numpy as np
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


@st.composite
def weighted(draw: st.DrawFn) -> Order:
    order = draw(orders)
    weights = draw(st.lists(st.sampled_from([0.3, 0.5, 1.0, 1.75, 2.0, 3.5]), min_size=9, max_size=9))
    return dataclasses.replace(order, weights=tuple(weights[: len(order.counts)]))


@given(order=weighted(), epoch=st.integers(0, 3))
def test_weights_say_how_often_an_epoch_meets_each_clip(order: Order, epoch: int) -> None:
    met: dict[tuple[int, int], list[int]] = defaultdict(list)
    for lane in range(order.lanes):
        for piece in order.pieces(epoch, *order.lane_bounds(lane)):
            assert 0 <= piece.first < piece.first + piece.clips <= order.counts[piece.shard]
            for clip in range(piece.first, piece.first + piece.clips):
                met[piece.shard, clip].append(piece.turn)
    assert sum(map(len, met.values())) == order.clips
    for shard, (count, weight) in enumerate(zip(order.counts, order.weights, strict=True)):
        for clip in range(count):
            turns = sorted(met[shard, clip])
            assert turns == list(range(len(turns)))  # each turn once
            assert math.floor(weight) <= len(turns) <= math.ceil(weight)
    asked = sum(count * weight for count, weight in zip(order.counts, order.weights, strict=True))
    assert abs(order.clips - asked) <= 1


def test_a_fraction_is_drawn_anew_each_epoch_and_reaches_all() -> None:
    order = Order((40, 20), seed=1, lanes=2, per_lane=1, window=8, weights=(0.25, 1.0))
    drawn = []
    for epoch in range(40):
        pieces = [piece for piece in order.pieces(epoch, 0, order.clips) if piece.shard == 0]
        drawn.append([clip for piece in pieces for clip in range(piece.first, piece.first + piece.clips)])
        assert len(drawn[-1]) == 10
    counts = np.bincount(np.concatenate(drawn), minlength=40)
    assert counts.min() > 0
    assert counts.max() < 30
    assert order.steps_per_epoch == 15


def test_weights_of_one_change_nothing_and_another_turn_draws_anew() -> None:
    plain = Order((7, 3, 9), seed=5, lanes=2, per_lane=1, window=4)
    ones = dataclasses.replace(plain, weights=(1.0, 1.0, 1.0))
    assert list(plain.pieces(2, 0, 19)) == list(ones.pieces(2, 0, 19))
    draws = {int(plain.clip_rng(0, 7, turn).integers(2**60)) for turn in range(3)}
    assert len(draws) == 3


@given(order=weighted(), epoch=st.integers(0, 2), data=st.data())
def test_any_stretch_of_an_epoch_is_the_same_stretch_of_the_whole(
    order: Order, epoch: int, data: st.DataObject
) -> None:
    def clips(first: int, last: int) -> list[tuple[int, int, int]]:
        pieces = order.pieces(epoch, first, last)
        return [(p.shard, clip, p.turn) for p in pieces for clip in range(p.first, p.first + p.clips)]

    first = data.draw(st.integers(0, order.clips))
    last = data.draw(st.integers(first, order.clips))
    assert clips(first, last) == clips(0, order.clips)[first:last]
