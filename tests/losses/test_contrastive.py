"""InfoNCE and the sigmoid loss by blocks of columns, masks and the weighted mean: hand-made numbers, whole matrices."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import logsigmoid, normalize

from ask_dist.losses.contrastive import column_blocks, contrast_masks, info_nce, weighted_mean
from ask_dist.losses.gather import GlobalBatch
from ask_dist.losses.siglip import siglip
from tests.allocations import Allocations

DIM = 5
ONE = torch.tensor(1.0)


def batch_of(ids: list[int], valid: list[bool] | None = None, offset: int = 0, world_size: int = 1) -> GlobalBatch:
    rows = torch.zeros(len(ids), 1)
    flags = torch.tensor(valid if valid is not None else [True] * len(ids))
    return GlobalBatch(rows, rows, torch.tensor(ids), flags, offset, world_size)


def info_nce_of(logits: Tensor, batch: GlobalBatch) -> Tensor:
    """InfoNCE of rows whose products with the keys are these logits."""
    return info_nce(logits, torch.eye(logits.shape[1], dtype=logits.dtype), ONE, batch)


def columns_of(batch: GlobalBatch, row: int) -> list[int]:
    """The columns that a row is compared with, its own first."""
    others = [j for j, valid in enumerate(batch.valid) if valid and batch.ids[j] != batch.ids[row]]
    return [row, *others]


def whole_info_nce(queries: Tensor, keys: Tensor, scale: Tensor, bias: Tensor, batch: GlobalBatch) -> Tensor:
    """Row by row out of the whole matrix."""
    logits = scale * queries @ keys.T
    rows = [logits[i, columns_of(batch, batch.offset + i)] for i in range(len(queries))]
    return torch.stack([row.logsumexp(0) - row[0] for row in rows])


def whole_siglip(queries: Tensor, keys: Tensor, scale: Tensor, bias: Tensor, batch: GlobalBatch) -> Tensor:
    logits = scale * queries @ keys.T + bias
    rows = [logits[i, columns_of(batch, batch.offset + i)] for i in range(len(queries))]
    return torch.stack([-logsigmoid(row[0]) - logsigmoid(-row[1:]).sum() for row in rows])


def blockwise_info_nce(queries: Tensor, keys: Tensor, scale: Tensor, bias: Tensor, batch: GlobalBatch) -> Tensor:
    return info_nce(queries, keys, scale, batch)


Loss = Callable[[Tensor, Tensor, Tensor, Tensor, GlobalBatch], Tensor]
LOSSES: dict[str, tuple[Loss, Loss]] = {
    "info_nce": (blockwise_info_nce, whole_info_nce),
    "siglip": (siglip, whole_siglip),
}


def value_and_gradients(loss: Loss, batch: GlobalBatch, local: int, scale: float) -> list[Tensor]:
    """Of one rank: the loss of each row, and the gradients of its weighted sum."""
    generator = torch.Generator().manual_seed(len(batch.ids))
    keys = normalize(torch.randn(len(batch.ids), DIM, generator=generator, dtype=torch.float64), dim=1)
    queries = normalize(torch.randn(local, DIM, generator=generator, dtype=torch.float64), dim=1)
    inputs = [queries, keys, torch.tensor(scale, dtype=torch.float64), torch.tensor(-0.1 * scale, dtype=torch.float64)]
    for tensor in inputs:
        tensor.requires_grad_()
    rows = loss(*inputs, batch)
    gradients = torch.autograd.grad((rows * torch.arange(1, local + 1)).sum(), inputs, materialize_grads=True)
    return [rows.detach(), *gradients]


@st.composite
def batches(draw: st.DrawFn) -> tuple[GlobalBatch, int]:
    """The global batch of 1 to 4 ranks as one of them has it: few ids, so that they repeat, and slots not valid."""
    local, world_size = draw(st.integers(1, 5)), draw(st.integers(1, 4))
    size, rank = local * world_size, draw(st.integers(0, world_size - 1))
    ids = draw(st.lists(st.sampled_from([-(2**63), 0, 1, 2, 3, 2**63 - 1]), min_size=size, max_size=size))
    valid = draw(st.lists(st.booleans(), min_size=size, max_size=size))
    return batch_of(ids, valid, offset=rank * local, world_size=world_size), local


@pytest.mark.parametrize("name", LOSSES)
@given(case=batches(), scale=st.sampled_from([1.0, 10.0, 100.0]))
def test_blocks_have_the_values_and_gradients_of_the_whole_matrix(name, case, scale):
    batch, local = case
    found, wanted = (value_and_gradients(loss, batch, local, scale) for loss in LOSSES[name])
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("name", LOSSES)
def test_a_block_without_a_negative_breaks_no_gradient(name):
    """The other rank's slots are all empty, or all of the rows' own pair."""
    for batch in (batch_of([1, 2, 3, 4], [True, True, False, False], world_size=2), batch_of([7] * 4, world_size=2)):
        with torch.autograd.set_detect_anomaly(True):  # nor one on the way, which a mask would hide
            results = value_and_gradients(LOSSES[name][0], batch, 2, 100.0)
        assert all(torch.isfinite(value).all() for value in results)


def peak(loss: Loss, local: int, world_size: int) -> Allocations:
    """Forward and backward on one rank; a row has 4 elements, so that next to logits it counts for little."""
    size = local * world_size
    batch = batch_of(list(range(size)), world_size=world_size)
    inputs = [torch.randn(rows, 4, requires_grad=True) for rows in (local, size)]
    with Allocations() as allocations:
        loss(*inputs, ONE, -ONE, batch).sum().backward()
    return allocations


@pytest.mark.parametrize("name", LOSSES)
def test_memory_is_that_of_one_block_whatever_the_number_of_ranks(name):
    blockwise, whole = LOSSES[name]
    few, many = peak(blockwise, 64, 2), peak(blockwise, 64, 16)
    assert few.largest == many.largest == 64 * 64
    of_rows = 4 * 64 * (16 - 2)  # bytes for each float32 that a row of the further ranks has
    assert many.peak - few.peak < of_rows * 16  # each matrix of the further columns would be 64
    assert few.peak < 1.25 * peak(blockwise, 64, 1).peak
    assert peak(blockwise, 128, 2).peak > 3 * few.peak  # it is the local batch that it goes by
    # The same measure sees a whole matrix.
    assert peak(whole, 16, 4).largest == 16 * 16 * 4


def test_two_equal_logits_cost_ln_2():
    torch.testing.assert_close(info_nce_of(torch.zeros(2, 2), batch_of([1, 2])), torch.full((2,), math.log(2.0)))


def test_a_logit_of_ln_3_against_one_of_0_costs_ln_4_thirds():
    logits = torch.tensor([[math.log(3.0), 0.0], [0.0, math.log(3.0)]])
    torch.testing.assert_close(info_nce_of(logits, batch_of([1, 2])), torch.full((2,), math.log(4 / 3)))


def test_a_row_alone_costs_nothing():
    assert info_nce_of(torch.tensor([[7.0]]), batch_of([1])).item() == 0.0


def test_the_sigmoid_loss_by_hand():
    """Products of 1 with the own column and 0 else, scale ln 3, bias -ln 3: one question of 1/2, two of 1/4 for yes."""
    scale = torch.tensor(math.log(3.0))
    found = siglip(torch.eye(3), torch.eye(3), scale, -scale, batch_of([1, 2, 3]))
    torch.testing.assert_close(found, torch.full((3,), math.log(2.0) + 2 * math.log(4 / 3)))


def test_a_ranks_own_columns_come_first_and_every_block_once():
    batch = batch_of([0] * 6, offset=2, world_size=3)
    assert column_blocks(batch, 2) == [slice(2, 4), slice(4, 6), slice(0, 2)]
    assert column_blocks(batch_of([0] * 3), 3) == [slice(0, 3)]


def test_equal_ids_are_no_negatives():
    allowed, own = contrast_masks(batch_of([5, 6, 5]), 3, slice(0, 3))
    assert allowed.tolist() == [[True, True, False], [True, True, True], [False, True, True]]
    assert own.equal(torch.eye(3, dtype=torch.bool))


def test_empty_slots_are_no_negatives_and_keep_their_own_column():
    allowed, _ = contrast_masks(batch_of([5, 6, 7], valid=[True, False, True]), 3, slice(0, 3))
    assert allowed.tolist() == [[True, False, True], [True, True, True], [True, False, True]]


def test_the_second_rank_owns_the_later_columns():
    batch = batch_of([1, 2, 3, 1], offset=2, world_size=2)
    allowed, own = contrast_masks(batch, 2, slice(2, 4))
    assert allowed.tolist() == [[True, True], [True, True]]
    assert own.tolist() == [[True, False], [False, True]]
    allowed, own = contrast_masks(batch, 2, slice(0, 2))
    assert allowed.tolist() == [[True, True], [False, True]]
    assert not own.any()


def test_weighted_mean_counts_valid_rows_of_all_ranks():
    values, weights = torch.tensor([1.0, 10.0]), torch.tensor([1.0, 0.5])
    first = batch_of([1, 2, 3, 4], valid=[True, True, True, False], offset=0, world_size=2)
    second = batch_of([1, 2, 3, 4], valid=[True, True, True, False], offset=2, world_size=2)
    assert weighted_mean(values, weights, first).item() == pytest.approx(2 * 6.0 / 3)
    assert weighted_mean(values, weights, second).item() == pytest.approx(2 * 1.0 / 3)


def test_a_batch_without_a_valid_row_costs_nothing():
    batch = batch_of([1, 2], valid=[False, False])
    assert weighted_mean(torch.tensor([3.0, 4.0]), torch.ones(2), batch).item() == 0.0
