"""Made-up rows whose neighbours mean something, and banks of them."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from ask_dist.bank.memory import KnowledgeBank
from ask_dist.bank.prototypes import unit_rows
from ask_dist.bench.process import peak_bytes

CHUNK = 2_000
CENTRES_APART = 500  # rows a centre
DIRECTIONS = 32  # that rows of a centre differ in, as embeddings do: in all of them, every row would be equally far
SPREAD = 0.5  # length of a row's offset from its centre, which has length 1
DISAGREEMENT = 0.5  # of text with audio, by the length of their offsets


def clustered(
    rows: int, dim: int, *, seed: int = 0, first: int = 0, centres: int | None = None
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Rows around random centres, in chunks: ids int64 [n], audio and text float16 [n, dim], unit length.

    A row is its centre and a random offset within a few directions that all share; audio and text have the centre and
    most of the offset in common.

    Args:
        rows, dim: how many, and how wide.
        seed: of centres and rows: chunks are the same however many follow.
        first: id of the first row.
        centres: how many; by default one for every 500 rows. Queries for a bank take its number.
    """
    about = np.random.default_rng(seed)
    middles = unit_rows(about.standard_normal((centres or -(-rows // CENTRES_APART), dim), np.float32))
    directions = unit_rows(about.standard_normal((DIRECTIONS, dim), np.float32))
    for start in range(first, first + rows, CHUNK):
        rng = np.random.default_rng([seed, start])
        count = min(CHUNK, first + rows - start)
        middle = middles[rng.integers(len(middles), size=count)]
        common, apart = (unit_rows(rng.standard_normal((count, DIRECTIONS), np.float32)) for _ in range(2))
        audio = middle + SPREAD * common @ directions
        text = middle + SPREAD * (common + DISAGREEMENT * apart) @ directions
        yield np.arange(start, start + count), *(unit_rows(half).astype(np.float16) for half in (audio, text))


def filled_bank(index: str, precision: str, rows: int, dim: int, gpu: bool = False) -> KnowledgeBank:
    """A bank of clustered rows, ids from 0 on, with its index trained if it has one to train."""
    bank = KnowledgeBank(dim, rows, precision, index=index, inverted_from=1, gpu=gpu)  # type: ignore[arg-type]
    for chunk in clustered(rows, dim):
        bank.upsert(*chunk, None, 0)
    bank.maintain()
    return bank


def bytes_a_row(index: str, precision: str, rows: int, dim: int) -> float:
    """What such a bank adds to the peak of this process, by its rows."""
    before = peak_bytes()
    bank = filled_bank(index, precision, rows, dim)
    return max(1.0, peak_bytes() - before) / len(bank)
