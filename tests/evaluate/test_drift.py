import numpy as np
import pytest
import torch
from scipy.stats import ortho_group

from ask_dist.evaluate.drift import auroc, mean_drift, neighbour_overlap, out_of_span_share


def rows(n: int, d: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(n, d)).astype(np.float32)


def slow_overlap(stored: np.ndarray, fresh: np.ndarray, k: int) -> float:
    def nearest(all_rows: np.ndarray, i: int) -> set[int]:
        unit = all_rows / np.linalg.norm(all_rows, axis=1, keepdims=True)
        others = [j for j in range(len(unit)) if j != i]
        return set(sorted(others, key=lambda j: -float(unit[i] @ unit[j]))[:k])

    shares = [len(nearest(stored, i) & nearest(fresh, i)) / k for i in range(len(stored))]
    return float(np.mean(shares))


def test_mean_drift_of_known_angles():
    stored = np.array([[1.0, 0.0], [1.0, 0.0], [0.0, 2.0], [3.0, 0.0]])
    fresh = np.array([[5.0, 0.0], [0.0, 1.0], [0.0, -1.0], [1.0, 1.0]])
    assert mean_drift(stored, fresh) == pytest.approx((0 + 1 + 2 + 1 - np.sqrt(0.5)) / 4, abs=1e-6)


def test_mean_drift_of_float16_rows_is_that_of_their_float32_values():
    stored, fresh = rows(50, 8, 0).astype(np.float16), rows(50, 8, 1).astype(np.float16)
    assert mean_drift(stored, fresh) == pytest.approx(mean_drift(stored.astype(np.float32), fresh.astype(np.float32)))


@pytest.mark.parametrize("chunk", [1, 7, 1000])
def test_neighbour_overlap_equals_the_slow_one_for_every_chunk(chunk):
    stored = rows(60, 6, 2)
    fresh = stored + 0.5 * rows(60, 6, 3)
    assert neighbour_overlap(stored, fresh, k=5, chunk=chunk) == pytest.approx(slow_overlap(stored, fresh, 5))


def test_a_common_rotation_drifts_but_keeps_every_neighbour():
    stored = rows(100, 16, 4)
    fresh = stored @ ortho_group.rvs(16, random_state=5).astype(np.float32)
    assert mean_drift(stored, fresh) > 0.5
    assert neighbour_overlap(stored, fresh) == 1.0


def test_overlap_of_unrelated_rows_is_chance():
    assert neighbour_overlap(rows(400, 32, 6), rows(400, 32, 7)) == pytest.approx(10 / 399, abs=0.01)


def test_overlap_takes_every_other_row_where_there_are_fewer_than_k():
    assert neighbour_overlap(rows(4, 3, 8), rows(4, 3, 9), k=10) == 1.0


def test_drift_names_what_is_wrong():
    with pytest.raises(ValueError, match=r"stored \(3, 2\) and fresh \(4, 2\)"):
        mean_drift(rows(3, 2, 0), rows(4, 2, 0))
    with pytest.raises(ValueError, match="0 rows are too few"):
        mean_drift(rows(0, 2, 0), rows(0, 2, 0))
    with pytest.raises(ValueError, match="1 rows are too few: at least 2"):
        neighbour_overlap(rows(1, 2, 0), rows(1, 2, 0))


def test_out_of_span_share_of_known_vectors():
    features = torch.eye(4)[:2]
    assert out_of_span_share(torch.tensor([[3.0, 1.0, 0.0, 0.0]]), features) == pytest.approx(0.0, abs=1e-12)
    assert out_of_span_share(torch.tensor([[0.0, 0.0, 2.0, 1.0]]), features) == pytest.approx(1.0)
    assert out_of_span_share(torch.tensor([[3.0, 0.0, 4.0, 0.0]]), features) == pytest.approx(16 / 25)
    assert out_of_span_share(torch.zeros(2, 4), features) == 0.0


def test_out_of_span_share_ignores_repeated_features():
    features = torch.randn(3, 16, generator=torch.Generator().manual_seed(0))
    gradient = torch.randn(5, 16, generator=torch.Generator().manual_seed(1))
    repeated = torch.cat([features, features, features[:1] + features[1:2]])
    assert out_of_span_share(gradient, repeated) == pytest.approx(out_of_span_share(gradient, features), abs=1e-9)


def test_an_in_batch_loss_teaches_nothing_outside_the_batch_and_outside_rows_do():
    generator = torch.Generator().manual_seed(2)
    raw = torch.randn(16, 64, generator=generator, requires_grad=True)
    bank = torch.nn.functional.normalize(torch.randn(32, 64, generator=generator), dim=1)
    shares = []
    for outside in (bank[:0], bank):
        unit = torch.nn.functional.normalize(raw, dim=1)
        audio, text = unit[:8], unit[8:]
        loss = torch.nn.functional.cross_entropy(10 * audio @ torch.cat([text, outside]).T, torch.arange(8))
        (gradient,) = torch.autograd.grad(loss, raw)
        shares.append(out_of_span_share(gradient, unit))
    assert shares[0] == pytest.approx(0.0, abs=1e-8)
    assert shares[1] > 0.01


def test_out_of_span_share_names_what_is_wrong():
    with pytest.raises(ValueError, match="4 wide but features 3"):
        out_of_span_share(torch.ones(1, 4), torch.ones(2, 3))
    with pytest.raises(ValueError, match="not finite"):
        out_of_span_share(torch.full((1, 3), torch.nan), torch.ones(2, 3))


def test_auroc_equals_counting_every_pair_with_ties_as_half():
    generator = np.random.default_rng(10)
    scores, labels = generator.integers(0, 6, size=80), generator.random(80) < 0.3
    pairs = [(p > n) + 0.5 * (p == n) for p in scores[labels] for n in scores[~labels]]
    assert auroc(scores, labels) == pytest.approx(np.mean(pairs))


def test_auroc_of_known_orders():
    labels = np.array([True, True, False, False])
    assert auroc(np.array([4, 3, 2, 1]), labels) == 1.0
    assert auroc(np.array([1, 2, 3, 4]), labels) == 0.0
    assert auroc(np.zeros(4), labels) == 0.5
    with pytest.raises(ValueError, match="4 positives and 0 negatives"):
        auroc(np.zeros(4), np.ones(4, dtype=bool))
