from __future__ import annotations

import os

import numpy as np

from ask_dist.bench.process import alone, peak_bytes
from ask_dist.bench.rows import CHUNK, bytes_a_row, clustered


def test_rows_lie_around_centres_and_their_halves_agree() -> None:
    ids, audio, text = (np.concatenate(part) for part in zip(*clustered(CHUNK + 100, 64, centres=8), strict=True))
    assert ids.tolist() == list(range(CHUNK + 100))
    rows, partners = audio.astype(np.float32), text.astype(np.float32)
    np.testing.assert_allclose(np.linalg.norm(rows, axis=1), 1.0, atol=2e-3)
    alike = rows[:200] @ rows.T
    assert np.sort(alike, axis=1)[:, -16:].mean() > 0.8  # neighbours are near,
    assert alike.mean() < 0.3  # and others are not
    own = (rows * partners).sum(axis=1)
    assert own.mean() > 0.85
    assert own.mean() > (rows * np.roll(partners, 1, axis=0)).sum(axis=1).mean() + 0.4


def test_later_rows_have_the_same_centres() -> None:
    first, later = (next(clustered(500, 64, centres=4, first=start))[1].astype(np.float32) for start in (0, 500))
    assert np.sort(later @ first.T, axis=1)[:, -16:].mean() > 0.8
    assert not np.array_equal(first, later)


def test_a_process_of_its_own_says_what_its_memory_was() -> None:
    assert alone(os.getpid) != os.getpid()
    assert peak_bytes() > 10 * 2**20
    assert 4000 * 2 * 2 * 64 / 4000 < alone(bytes_a_row, index="flat", precision="float16", rows=4000, dim=64) < 50_000
