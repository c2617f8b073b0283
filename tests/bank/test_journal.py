"""The journal: what was appended comes back in order, and anything else stops the reader."""

from __future__ import annotations

import os
import resource
import zlib
from itertools import accumulate
from pathlib import Path

import numpy as np
import pytest

from ask_dist.bank import journal
from ask_dist.bank.journal import DamagedJournal, Journal, TornJournal, Upsert, read
from ask_dist.bank.messages import Commit

DIM = 4


@pytest.fixture
def writes(rng) -> list[Upsert | Commit]:
    def rows(count: int, kind: type) -> np.ndarray:
        return rng.normal(size=(count, DIM)).astype(kind)

    ids, half = np.array([2**63 - 1, -5, 0]), np.float16
    told = np.array([0.25, -1, 1], np.float32)
    levels = [(rows(2, np.float16), rows(2, np.float16)), (rows(1, np.float32), rows(1, np.float32))]
    return [
        Upsert(ids, rows(3, half), rows(3, half), None, 7),
        Upsert(ids, rows(3, np.float32), rows(3, np.float64), told, 2**40),
        Commit(ids[:2], rows(2, np.float32), rows(2, np.float32), np.array([1, 2]), 8),
        Commit(ids[:0], rows(0, half), rows(0, half), ids[:0], 9, levels),
        Commit(ids[:0], rows(0, half), rows(0, half), ids[:0], 9, []),
        Upsert(ids[:0], rows(0, half), rows(0, half), None, 9),
    ]


def written(path: Path, writes: list[Upsert | Commit]) -> list[int]:
    """The journal's length before the first and after each record."""
    kept = Journal(path)
    ends = list(accumulate(map(kept.append, writes), initial=path.stat().st_size))
    kept.close()
    return ends


def assert_equal(found: Upsert | Commit, wanted: Upsert | Commit) -> None:
    assert type(found) is type(wanted)
    for name, value in vars(wanted).items():
        got = getattr(found, name)
        if name == "prototypes" and value is not None:
            assert len(got) == len(value)
            for (audio, text), (wanted_audio, wanted_text) in zip(got, value, strict=True):
                np.testing.assert_array_equal(audio, wanted_audio, strict=True)
                np.testing.assert_array_equal(text, wanted_text, strict=True)
        elif isinstance(value, np.ndarray):
            np.testing.assert_array_equal(got, value, strict=True)
        else:
            assert got == value


def test_what_was_appended_comes_back_in_order(tmp_path, writes):
    written(tmp_path / "journal", writes)
    found = list(read(tmp_path / "journal", DIM))
    assert len(found) == len(writes)
    for one, other in zip(found, writes, strict=True):
        assert_equal(one, other)


def whole_records(path: Path) -> int:
    """The records before half a one that ends the journal."""
    found: list[Upsert | Commit] = []
    with pytest.raises(TornJournal):
        found.extend(read(path, DIM))
    return len(found)


def test_half_a_record_at_the_end_is_told(tmp_path, writes):
    path = tmp_path / "journal"
    ends = written(path, writes)
    content = path.read_bytes()
    assert ends[-1] == len(content)
    for length in range(len(content) + 1):
        path.write_bytes(content[:length])
        count = max(0, sum(end <= length for end in ends) - 1)
        assert (len(list(read(path, DIM))) if length in ends else whole_records(path)) == count


def test_every_flipped_byte_is_found(tmp_path, writes, rng):
    path = tmp_path / "journal"
    ends = written(path, writes)
    content = path.read_bytes()
    for position in range(len(content)):
        damaged = bytearray(content)
        damaged[position] ^= 1 << rng.integers(8)
        path.write_bytes(damaged)
        found, place = [], max((end for end in ends if end <= position), default=0)
        with pytest.raises(DamagedJournal, match=f"at byte {place}:" if place else "begins otherwise"):
            found.extend(read(path, DIM))
        assert len(found) == max(0, ends.index(place) if place else 0)
        for one, other in zip(found, writes, strict=False):
            assert_equal(one, other)


def test_a_seeded_sample_of_flipped_bits_in_a_large_one_is_found(tmp_path, rng):
    path, kept = tmp_path / "journal", Journal(tmp_path / "journal")
    rows = rng.normal(size=(1000, DIM)).astype(np.float16)
    for step in range(1000):
        kept.append(Upsert(np.arange(1000), rows, rows, None, step))
    kept.close()
    size = path.stat().st_size
    assert size > 20e6
    with open(path, "r+b", buffering=0) as file:
        for position in rng.choice(size, 40, replace=False).tolist():
            (byte,) = os.pread(file.fileno(), 1, position)
            os.pwrite(file.fileno(), bytes([byte ^ 1 << int(rng.integers(8))]), position)
            with pytest.raises(DamagedJournal):
                sum(1 for _ in read(path, DIM))
            os.pwrite(file.fileno(), bytes([byte]), position)
    assert sum(1 for _ in read(path, DIM)) == 1000


def test_another_file_is_no_journal(tmp_path):
    path = tmp_path / "journal"
    path.write_bytes(b"some text that is longer than a head")
    with pytest.raises(DamagedJournal, match="begins otherwise"):
        list(read(path, DIM))
    path.write_bytes(b"")
    assert whole_records(path) == 0


def test_a_journal_takes_no_other_file_s_place(tmp_path):
    (tmp_path / "journal").write_bytes(b"kept")
    with pytest.raises(FileExistsError):
        Journal(tmp_path / "journal")
    assert (tmp_path / "journal").read_bytes() == b"kept"


def test_a_full_disk_is_told_and_leaves_half_a_record(small_disk, rng):
    path = small_disk / "journal"
    kept, rows = Journal(path), rng.normal(size=(1000, DIM)).astype(np.float16)
    sizes = []

    def append_for_ever() -> None:
        while True:
            sizes.append(kept.append(Upsert(np.arange(1000), rows, rows, None, 1)))

    with pytest.raises(OSError, match="No space left"):
        append_for_ever()
    kept.close()
    assert whole_records(path) == len(sizes) > 20
    assert path.stat().st_size > 8 + sum(sizes)
    with pytest.raises(OSError, match="No space left"):
        Journal(small_disk / "another")
    assert not (small_disk / "another").exists()


def record(body: bytes) -> bytes:
    head = journal.HEAD.pack(len(body), zlib.crc32(body))
    return journal.MAGIC + head + journal.CHECKSUM.pack(zlib.crc32(head)) + body


def body(kind: int, arrays: list[tuple[int, int, int]], values: int, count: int | None = None) -> bytes:
    """A body that tells of arrays (dtype, rows, columns) and has that many bytes of values."""
    told = journal.BODY.pack(kind, (len(arrays) if count is None else count).to_bytes(7, "little"), 1)
    return told + b"".join(journal.ARRAY.pack(*array) for array in arrays) + bytes(values)


IDS, ROWS, TOLD = (0, 2, -1), (1, 2, DIM), (2, 2, -1)
IDS_BYTES, ROWS_BYTES, TOLD_BYTES = 16, 2 * DIM * 2, 8
UPSERT = ([IDS, ROWS, ROWS], IDS_BYTES + 2 * ROWS_BYTES)


def test_a_record_made_by_hand_is_taken(tmp_path):
    (tmp_path / "journal").write_bytes(record(body(1, *UPSERT)))
    (write,) = read(tmp_path / "journal", DIM)
    assert write.audio.shape == (2, DIM)


@pytest.mark.parametrize(
    "crafted",
    [
        b"",
        b"short",
        body(0, *UPSERT),
        body(9, *UPSERT),
        body(1, [], 0),
        body(1, [IDS], IDS_BYTES),
        body(1, UPSERT[0], UPSERT[1] + 1),  # more than the arrays say
        body(1, UPSERT[0], UPSERT[1] - 1),
        body(1, UPSERT[0], UPSERT[1], count=2**56 - 1),
        body(1, [(0, 2**62, -1), ROWS, ROWS], UPSERT[1]),
        body(1, [IDS, (1, 2**62, 2**62), ROWS], UPSERT[1]),
        body(1, [IDS, (1, 2**40, 0), ROWS], UPSERT[1]),
        body(1, [IDS, (1, 0, 2**62), ROWS, ROWS], UPSERT[1]),  # no values, and too wide for an array all the same
        body(1, [(0, -2, -1), ROWS, ROWS], 2 * ROWS_BYTES),
        body(1, [IDS, (1, 2, -DIM), ROWS], UPSERT[1]),
        body(1, [(7, 2, -1), ROWS, ROWS], UPSERT[1]),
        body(1, [(-1, 2, -1), ROWS, ROWS], UPSERT[1]),
        body(1, [IDS, (1, 2, DIM + 1), (1, 2, DIM - 1)], UPSERT[1]),  # another width
        body(1, [IDS, (0, 1, DIM), ROWS], UPSERT[1] + 16),  # another dtype, fewer rows
        body(1, [TOLD, ROWS, ROWS], TOLD_BYTES + 2 * ROWS_BYTES),
        body(1, [IDS, ROWS, ROWS, IDS], UPSERT[1] + IDS_BYTES),
        body(2, *UPSERT),
        body(2, [IDS, TOLD, ROWS, ROWS], UPSERT[1] + TOLD_BYTES),
        body(2, [IDS, IDS, ROWS, ROWS, ROWS, ROWS], UPSERT[1] + IDS_BYTES + 2 * ROWS_BYTES),
        body(3, [IDS, IDS, ROWS, ROWS, ROWS], UPSERT[1] + IDS_BYTES + ROWS_BYTES),
        body(3, [IDS, IDS, ROWS, ROWS, ROWS, (1, 2, DIM + 1)], UPSERT[1] + IDS_BYTES + 2 * ROWS_BYTES + 4),
        body(3, [IDS, IDS, ROWS, ROWS, ROWS, ROWS], UPSERT[1] + IDS_BYTES + ROWS_BYTES) + b"\xff" * ROWS_BYTES,  # NaN
    ],
)
def test_a_crafted_record_is_refused(tmp_path, crafted):
    (tmp_path / "journal").write_bytes(record(crafted))
    with pytest.raises(DamagedJournal, match="at byte 8 that is no write to a bank of width 4"):
        list(read(tmp_path / "journal", DIM))


def test_a_huge_length_takes_no_memory(tmp_path):
    head = journal.HEAD.pack(2**63, 0)
    (tmp_path / "journal").write_bytes(journal.MAGIC + head + journal.CHECKSUM.pack(zlib.crc32(head)) + bytes(100))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert whole_records(tmp_path / "journal") == 0
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000
