"""One snapshot on disk: what was written is read, and anything else is refused."""

from __future__ import annotations

import hashlib
import json
import os
import tracemalloc
from pathlib import Path

import numpy as np
import psutil
import pytest
import safetensors.numpy

from ask_dist.bank import external, rows, snapshot, store
from ask_dist.bank.memory import KnowledgeBank
from ask_dist.bank.messages import State
from ask_dist.bank.shard import shard_of, shard_state
from ask_dist.errors import InputError
from tests.snapshots import crafted


def test_a_manifest_says_what_the_snapshot_is(tmp_path, state):
    first, second = store.save(tmp_path, state, source="a corpus"), store.save(tmp_path, state, source="a corpus")
    manifest = snapshot.read_manifest(first)
    assert (manifest.rows, manifest.dim, manifest.dtype, manifest.source) == (40, 8, "float16", "a corpus")
    assert manifest.digest == snapshot.read_manifest(second).digest
    state["audio"] = -state["audio"]
    assert snapshot.read_manifest(store.save(tmp_path, state, source="a corpus")).digest != manifest.digest


def test_every_flipped_byte_is_found(tmp_path, rng):
    bank = KnowledgeBank(dim=2, capacity=10)
    bank.upsert(np.arange(3), rng.normal(size=(3, 2)), rng.normal(size=(3, 2)), None, step=3)
    path = store.save(tmp_path, bank.state())
    for file in (path, path.with_suffix(".safetensors")):
        content = file.read_bytes()
        for position in range(len(content)):
            damaged = bytearray(content)
            damaged[position] ^= 1 << rng.integers(8)
            file.write_bytes(damaged)
            with pytest.raises(snapshot.DamagedSnapshot):
                snapshot.read(path)
        file.write_bytes(content)
    snapshot.read(path)


@pytest.fixture
def large(tmp_path, rng, monkeypatch) -> Path:
    """The manifest of a snapshot of 20 MB."""
    monkeypatch.setattr(snapshot, "BLOCK_BYTES", 2**20)
    bank, rows = KnowledgeBank(dim=500, capacity=10_000), rng.normal(size=(10_000, 500)).astype(np.float16)
    bank.upsert(np.arange(10_000), rows, rows, None, step=3)
    return store.save(tmp_path / "large", bank.state())


def test_a_seeded_sample_of_flipped_bits_in_a_large_one_is_found(large, rng):
    data = large.with_suffix(".safetensors")
    size = data.stat().st_size
    assert size > 20e6
    with open(data, "r+b", buffering=0) as file:
        for position in rng.choice(size, 30, replace=False).tolist():
            (byte,) = os.pread(file.fileno(), 1, position)
            os.pwrite(file.fileno(), bytes([byte ^ 1 << int(rng.integers(8))]), position)
            with pytest.raises(snapshot.DamagedSnapshot, match=f"in block {position // 2**20}:"):
                snapshot.read(large)
            os.pwrite(file.fileno(), bytes([byte]), position)
    snapshot.read(large)


def test_embeddings_are_in_memory_once(large, tmp_path, monkeypatch):
    monkeypatch.setattr(snapshot, "MANIFEST_BYTES", 2**16)  # a buffer of that size is made at once
    monkeypatch.setattr(snapshot, "PART_BYTES", 2**16)
    monkeypatch.setattr(rows, "CHUNK_ROWS", 1000)
    size = large.with_suffix(".safetensors").stat().st_size
    tracemalloc.start()
    try:
        snapshot.verify(large)
        assert tracemalloc.get_traced_memory()[1] < size / 4  # the parts at hand, and the rows' ids and steps
        state = snapshot.read(large)
        bank = KnowledgeBank.from_state(state, dim=500, capacity=10_000)
        assert tracemalloc.get_traced_memory()[1] < 1.4 * size
        before, _ = tracemalloc.get_traced_memory()
        tracemalloc.reset_peak()
        copy = store.save(tmp_path / "copy", state)
        assert tracemalloc.get_traced_memory()[1] < before + size / 4
    finally:
        tracemalloc.stop()
    assert snapshot.verify(copy).digest == snapshot.read_manifest(large).digest
    np.testing.assert_array_equal(bank.snapshot().audio, snapshot.read(copy)["audio"])


@pytest.mark.parametrize("look", [snapshot.read, snapshot.view, snapshot.verify])
def test_a_snapshot_that_outgrows_the_memory_is_refused_before_any_of_it_is_read(tmp_path, state, look):
    path, rows = store.save(tmp_path, state), psutil.virtual_memory().total // 36 * 2
    crafted(path, rows)
    told = rf"{rows} rows and takes .* GiB, this machine has .* GiB free: use a larger machine"
    with pytest.raises(InputError, match=told) as caught:
        look(path)
    assert not isinstance(caught.value, snapshot.DamagedSnapshot)  # it is no reason to take another one


@pytest.mark.parametrize("look", [snapshot.read, snapshot.view, snapshot.verify])
@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"extra": ("I32", [2**24])}, "extra is not known"),
        ({"counts": ("I64", [2**23])}, r"counts is int64 \[8388608\]"),
        ({"prototypes.generation": ("I64", [2**23])}, "prototypes.generation is no whole number"),
    ],
)
def test_arrays_of_no_bank_are_refused_before_any_of_them_is_read(tmp_path, state, look, more, message):
    path = store.save(tmp_path, state)
    crafted(path, 40, **more)
    tracemalloc.start()
    try:
        with pytest.raises(snapshot.DamagedSnapshot, match=message):
            look(path)
        assert tracemalloc.get_traced_memory()[1] < snapshot.MANIFEST_BYTES + 2**20
    finally:
        tracemalloc.stop()


def test_a_header_that_outgrows_a_bank_s_is_refused_before_it_is_read(tmp_path, state):
    path = store.save(tmp_path, state)
    crafted(path, 40, **{f"{number:08d}" * 30: ("I64", []) for number in range(4000)})
    with pytest.raises(snapshot.DamagedSnapshot, match=r"its header has 1\d{6} bytes, that of a bank at most"):
        snapshot.verify(path)


def test_a_container_has_no_more_memory_than_its_limit(tmp_path, state, monkeypatch):
    """The files in which Linux says so, as those of a container that holds 900 bytes of its 1,000, 50 of them cache."""
    path = store.save(tmp_path / "bank", state)
    for name, content in {"max": "1000", "current": "900", "stat": "anon 850\ninactive_file 50\n"}.items():
        (tmp_path / f"memory.{name}").write_text(content)
    monkeypatch.setattr(snapshot, "CGROUP", tmp_path)
    told = snapshot.read_manifest(path)
    copied = sum(values.nbytes for name, values in state.items() if name not in ("audio", "text"))
    for look, needed in ((snapshot.view, 2 * copied), (snapshot.verify, 2 * copied), (snapshot.read, told.bytes)):
        (tmp_path / "memory.max").write_text(str(needed + 849))
        with pytest.raises(InputError, match=r"40 rows .* GiB free: use a larger machine"):
            look(path)
    for free in (told.bytes + 2 * copied + 850, "max"):
        (tmp_path / "memory.max").write_text(str(free))
        assert len(snapshot.read(path)["ids"]) == 40


def test_a_shard_never_holds_the_rows_of_the_others(large, monkeypatch):
    monkeypatch.setattr(snapshot, "MANIFEST_BYTES", 2**16)
    monkeypatch.setattr(snapshot, "PART_BYTES", 2**16)
    size = large.with_suffix(".safetensors").stat().st_size
    tracemalloc.start()
    try:
        part = shard_state([external.load(large.parent, "", 500)], 1, 4)
        assert tracemalloc.get_traced_memory()[1] < 0.6 * size  # a quarter, twice while it is put together
    finally:
        tracemalloc.stop()
    whole = snapshot.read(large)
    mine = shard_of(whole["ids"], 4) == 1
    np.testing.assert_array_equal(part["ids"], whole["ids"][mine])
    np.testing.assert_array_equal(part["audio"], whole["audio"][mine])


@pytest.mark.parametrize("block_bytes", [8, 104, 1 << 20])
def test_the_damaged_block_is_named(tmp_path, state, monkeypatch, block_bytes):
    monkeypatch.setattr(snapshot, "BLOCK_BYTES", block_bytes)
    path = store.save(tmp_path, state)
    data = path.with_suffix(".safetensors")
    content = bytearray(data.read_bytes())
    content[2000] ^= 1
    data.write_bytes(content)
    with pytest.raises(snapshot.DamagedSnapshot, match=f"in block {2000 // block_bytes}:"):
        snapshot.read(path)


def rewritten(path: Path, state: State, **changes: object) -> None:
    """A snapshot with checksums that fit, made by someone else's program."""
    data = path.with_suffix(".safetensors")
    safetensors.numpy.save_file({name: np.asarray(value, order="C") for name, value in state.items()}, data)
    tree = snapshot.read_manifest(path).model_dump() | {
        "bytes": data.stat().st_size,
        "blocks": snapshot.looked_through(data, snapshot.BLOCK_BYTES)[0],
    }
    manifest = snapshot.Manifest.model_construct(**(tree | changes))
    path.write_text(f"{manifest.model_dump_json()}\n{manifest.digest}\n")


@pytest.mark.parametrize(
    ("name", "make", "message"),
    [
        ("audio", lambda rows: rows[:, :4], r"audio is float16 \[40, 4\], not float16 \[40, 8\]"),
        ("text", lambda rows: rows[:5], r"text is float16 \[5, 8\]"),
        ("text", lambda rows: rows * np.float16(np.inf), "a value is not finite"),
        ("step", lambda rows: rows.astype(np.int32), "step is int32"),
        ("ids", lambda rows: rows * 0, "an id occurs twice"),
        ("counts", lambda rows: rows[:1], "counts is int64"),
        ("prototypes.0.audio", lambda rows: rows[:, :3], r"prototypes.0 has shapes \[4, 3\] and \[4, 8\]"),
        ("prototypes.0.audio", lambda rows: rows[0, 0], r"prototypes.0 has shapes \[\]"),
        ("prototypes.0.text", lambda rows: rows[:2], r"prototypes.0 has shapes \[4, 8\] and \[2, 8\]"),
        ("prototypes.0.text", lambda rows: rows.astype(int), "prototypes.0 is float16 and int64, not of floats"),
        ("prototypes.0.text", lambda rows: rows * np.float16(np.nan), "prototypes.0 holds a value that is not finite"),
        ("prototypes.generation", lambda value: np.full(3, value), "prototypes.generation is no whole number"),
    ],
)
def test_arrays_that_are_no_bank_are_refused(tmp_path, state, name, make, message):
    path = store.save(tmp_path, state)
    rewritten(path, state | {name: make(state[name])})
    with pytest.raises(snapshot.DamagedSnapshot, match=message):
        snapshot.read(path)


def test_missing_and_unknown_arrays_are_refused(tmp_path, state):
    path = store.save(tmp_path, state)
    rewritten(path, state | {"weights": np.zeros(3)})
    with pytest.raises(snapshot.DamagedSnapshot, match="weights is not known"):
        snapshot.read(path)
    rewritten(path, {name: value for name, value in state.items() if name != "prototypes.0.text"})
    with pytest.raises(snapshot.DamagedSnapshot, match=r"prototypes\.0\.text is not known, or is missing"):
        snapshot.read(path)
    del state["reliability"]
    rewritten(path, state)
    with pytest.raises(snapshot.DamagedSnapshot, match="reliability is missing"):
        snapshot.read(path)


@pytest.mark.parametrize(
    "changes",
    [
        {"rows": 10**15},
        {"dim": 9},
        {"dim": 0},
        {"rows": -1},
        {"bytes": 10**15},
        {"block_bytes": 2**40},
        {"blocks": ()},
        {"format": 1},
        {"dtype": "object"},
        {"source": 3},
        {"file": "../elsewhere.safetensors"},
    ],
)
def test_a_crafted_manifest_is_refused(tmp_path, state, changes):
    path = store.save(tmp_path, state)
    tree = json.loads(path.read_text().partition("\n")[0]) | changes
    line = json.dumps(tree, separators=(",", ":"))
    path.write_text(f"{line}\n{hashlib.sha256(line.encode()).hexdigest()}\n")
    with pytest.raises(snapshot.DamagedSnapshot):
        snapshot.read(path)


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
@pytest.mark.parametrize("odd", [np.nan, np.inf, -np.inf])
def test_one_value_that_is_not_finite_makes_rows_no_bank(tmp_path, dtype, odd):
    bank = KnowledgeBank(dim=8, capacity=2000, dtype=np.dtype(dtype).name)
    extreme = np.resize([np.finfo(dtype).max, np.finfo(dtype).min, np.finfo(dtype).smallest_subnormal, -0.0], (1500, 8))
    bank.upsert(np.arange(1500), extreme, extreme, None, step=0)
    state = bank.state()
    assert snapshot.read(store.save(tmp_path / "good", state))["audio"].dtype == dtype
    state["text"][1499, 7] = odd
    path = store.save(tmp_path / "bad", state)
    with pytest.raises(snapshot.DamagedSnapshot, match="a value is not finite"):
        snapshot.read(path)
