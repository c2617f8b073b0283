"""InfoNCE, masks and the weighted mean, against hand-made numbers and slow loops."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from ask_dist.losses.contrastive import contrast_masks, info_nce, weighted_mean
from ask_dist.losses.gather import GlobalBatch


def batch_of(ids: list[int], valid: list[bool] | None = None, offset: int = 0, world_size: int = 1) -> GlobalBatch:
    rows = torch.zeros(len(ids), 1)
    flags = torch.tensor(valid if valid is not None else [True] * len(ids))
    return GlobalBatch(rows, rows, torch.tensor(ids), flags, offset, world_size)


def slow_info_nce(logits: Tensor, allowed: Tensor, target: Tensor) -> list[float]:
    losses = []
    for row in range(len(logits)):
        denominator = sum(math.exp(logits[row, c]) for c in range(logits.shape[1]) if allowed[row, c])
        losses.append(-math.log(math.exp(logits[row, target[row]]) / denominator))
    return losses


def test_two_equal_logits_cost_ln_2():
    allowed, target = contrast_masks(batch_of([1, 2]), 2)
    torch.testing.assert_close(info_nce(torch.zeros(2, 2), allowed, target), torch.full((2,), math.log(2.0)))


def test_a_logit_of_ln_3_against_one_of_0_costs_ln_4_thirds():
    logits = torch.tensor([[math.log(3.0), 0.0], [0.0, math.log(3.0)]])
    allowed, target = contrast_masks(batch_of([1, 2]), 2)
    torch.testing.assert_close(info_nce(logits, allowed, target), torch.full((2,), math.log(4 / 3)))


def test_a_row_alone_costs_nothing():
    allowed, target = contrast_masks(batch_of([1]), 1)
    assert info_nce(torch.tensor([[7.0]]), allowed, target).item() == 0.0


def test_equal_ids_are_no_negatives():
    allowed, _ = contrast_masks(batch_of([5, 6, 5]), 3)
    assert allowed.tolist() == [[True, True, False], [True, True, True], [False, True, True]]


def test_empty_slots_are_no_negatives_and_keep_their_own_column():
    allowed, _ = contrast_masks(batch_of([5, 6, 7], valid=[True, False, True]), 3)
    assert allowed.tolist() == [[True, False, True], [True, True, True], [True, False, True]]


def test_the_second_rank_owns_the_later_columns():
    allowed, target = contrast_masks(batch_of([1, 2, 3, 1], offset=2, world_size=2), 2)
    assert target.tolist() == [2, 3]
    assert allowed.tolist() == [[True, True, True, True], [False, True, True, True]]


def test_agrees_with_a_loop():
    logits = 5 * torch.randn(6, 6, generator=torch.Generator().manual_seed(0))
    batch = batch_of([1, 2, 3, 2, 1, 6], valid=[True, True, False, True, True, True])
    allowed, target = contrast_masks(batch, 6)
    torch.testing.assert_close(info_nce(logits, allowed, target), torch.tensor(slow_info_nce(logits, allowed, target)))


def test_weighted_mean_counts_valid_rows_of_all_ranks():
    values, weights = torch.tensor([1.0, 10.0]), torch.tensor([1.0, 0.5])
    first = batch_of([1, 2, 3, 4], valid=[True, True, True, False], offset=0, world_size=2)
    second = batch_of([1, 2, 3, 4], valid=[True, True, True, False], offset=2, world_size=2)
    assert weighted_mean(values, weights, first).item() == pytest.approx(2 * 6.0 / 3)
    assert weighted_mean(values, weights, second).item() == pytest.approx(2 * 1.0 / 3)


def test_a_batch_without_a_valid_row_costs_nothing():
    batch = batch_of([1, 2], valid=[False, False])
    assert weighted_mean(torch.tensor([3.0, 4.0]), torch.ones(2), batch).item() == 0.0
