"""A durable bank: whatever kills its process, what it acknowledged comes back."""

from __future__ import annotations

import logging
import multiprocessing
import os
import shutil
import signal
import threading
import time
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
import pytest

from ask_dist.bank import durable, snapshot, store
from ask_dist.bank.durable import DurableBank, journals, recover
from ask_dist.bank.memory import KnowledgeBank
from ask_dist.bank.messages import Commit, State
from ask_dist.errors import InputError
from tests.mounts import fill, mounted

DIM, IDS, KILLS = 8, 40, 200


def make(state: State) -> KnowledgeBank:
    settings = {"dim": DIM, "capacity": 2000}
    return KnowledgeBank.from_state(state, **settings) if state else KnowledgeBank(**settings)


def write(bank: KnowledgeBank | DurableBank, number: int) -> None:
    """The write of that number to a bank that has had all before it: an upsert, or now and then a commit."""
    rng = np.random.default_rng(number)
    count = int(rng.integers(1, 6))
    audio, text = rng.normal(size=(2, count, DIM)).astype(rng.choice([np.float16, np.float32]))
    if number % 7 == 6:
        seen = (bank.bank if isinstance(bank, DurableBank) else bank).snapshot()
        levels = [(audio, text)] if number % 2 else None
        stale = seen.version[:count] - rng.integers(0, 2, count)[: len(seen.ids)]
        rows = len(stale)
        bank.commit(Commit(seen.ids[:rows], audio[:rows], text[:rows], stale, number, levels))
    else:
        told = rng.uniform(-1, 1, count).astype(np.float32) if number % 2 else None
        bank.upsert(rng.integers(0, IDS, count), audio, text, told, number)


def same(one: KnowledgeBank, other: KnowledgeBank) -> bool:
    here, there = one.state(), other.state()
    return here.keys() == there.keys() and all(np.array_equal(here[name], there[name]) for name in here)


def replay(writes: int) -> KnowledgeBank:
    bank = make({})
    for number in range(writes):
        write(bank, number)
    return bank


@pytest.fixture
def start(tmp_path):
    started = []

    def start(folder: Path = tmp_path / "bank", **settings) -> DurableBank:
        started.append(DurableBank(folder, make, **settings))
        return started[-1]

    yield start
    for bank in started:
        bank.close()


def recovered(folder: Path) -> KnowledgeBank:
    return recover(folder, make).bank


def write_until_killed(folder: Path, first: int, acknowledge: Connection) -> None:
    """Writes from a number on, each acknowledged by its number; snapshots come every few milliseconds."""
    durable.SYNC_SECONDS = 0.003
    bank = DurableBank(folder, make, least_journal_bytes=4000)
    while True:
        write(bank, first)
        acknowledge.send_bytes(first.to_bytes(8, "little"))
        first += 1


@pytest.mark.multiprocess
def test_a_bank_that_is_killed_at_200_points_loses_nothing_that_it_acknowledged(tmp_path, rng):
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["ask_dist.bank.durable", "tests.bank.test_durable"])
    bank, count, snapshots = make({}), 0, set()
    for _ in range(KILLS):
        heard, told = context.Pipe(duplex=False)
        process = context.Process(target=write_until_killed, args=(tmp_path, count, told))
        process.start()
        told.close()
        acknowledged = count
        for _ in range(rng.integers(0, 12)):
            acknowledged = int.from_bytes(heard.recv_bytes(), "little") + 1
        time.sleep(rng.uniform(0, 0.005))
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        while heard.poll():
            try:
                acknowledged = int.from_bytes(heard.recv_bytes(), "little") + 1
            except EOFError:
                break
        for number in range(count, acknowledged):
            write(bank, number)
        count, found = acknowledged, recovered(tmp_path)
        if not same(found, bank):  # the write in progress may be in the journal too
            write(bank, count)
            count += 1
        assert same(found, bank)
        snapshots |= {path.name for path in store.snapshots(tmp_path)}
    assert count > KILLS
    assert len(snapshots) > 10


def test_a_commit_that_is_refused_is_not_replayed(start, tmp_path):
    bank = start()
    for number in range(6):
        write(bank, number)
    seen = bank.bank.snapshot()
    bank.commit(Commit(seen.ids, -seen.audio, -seen.text, seen.version, 9, life="another"))
    assert same(recovered(tmp_path / "bank"), replay(6))


def test_what_was_written_comes_back(start, tmp_path):
    bank = start()
    for number in range(50):
        write(bank, number)
    assert same(recovered(tmp_path / "bank"), replay(50))
    again = start()
    assert same(again.bank, replay(50))
    assert again.metrics()["bank/durable"] == 1
    assert again.metrics()["bank/journal_bytes"] >= bank.metrics()["bank/journal_bytes"] > 0


def test_a_refused_write_is_not_kept(start, tmp_path):
    bank, rows = start(), np.ones((2001, DIM))
    with pytest.raises(InputError, match="capacity"):
        bank.upsert(np.arange(2001), rows, rows, None, 1)
    write(bank, 0)
    assert same(recovered(tmp_path / "bank"), replay(1))


def test_snapshots_come_by_themselves_and_old_journals_go(start, tmp_path, monkeypatch):
    monkeypatch.setattr(durable, "SYNC_SECONDS", 0.01)
    bank, number, deadline = start(least_journal_bytes=3000), 0, time.monotonic() + 60
    while bank._number < 4:
        assert time.monotonic() < deadline
        write(bank, number)
        number += 1
        time.sleep(0.001)
    bank.close()
    numbers = [store.number_of(path) for path in store.snapshots(tmp_path / "bank")]
    assert len(numbers) == 2
    assert min(journals(tmp_path / "bank")) == min(numbers) > 0
    assert same(recovered(tmp_path / "bank"), replay(number))


def test_writes_go_on_while_snapshots_are_written(start, tmp_path, rng):
    bank, done = start(), threading.Event()

    def upserts(first: int) -> None:
        step = 0
        while not done.is_set():
            rows = rng.normal(size=(5, DIM)) * first
            bank.upsert(np.arange(first, first + 5), rows, rows, None, step)
            step += 1

    threads = [threading.Thread(target=upserts, args=(first,)) for first in (1, 3, 100)]  # the first two overlap
    for thread in threads:
        thread.start()
    try:
        for _ in range(10):
            assert bank.snapshot()
    finally:
        done.set()
        for thread in threads:
            thread.join()
    assert same(recovered(tmp_path / "bank"), bank.bank)


def test_a_damaged_newest_snapshot_costs_nothing(start, tmp_path, caplog):
    bank = start()
    for number in range(30):
        write(bank, number)
        if number in (10, 20):
            assert bank.snapshot()
    newest = store.snapshots(tmp_path / "bank")[0]
    newest.with_suffix(".safetensors").write_bytes(b"cut")
    with caplog.at_level(logging.WARNING):
        assert same(recovered(tmp_path / "bank"), replay(30))
    assert len(caplog.messages) == 1
    again = start()
    write(again, 30)
    assert same(recovered(tmp_path / "bank"), replay(31))


def test_no_whole_snapshot_begins_anew_and_says_so(start, tmp_path, caplog):
    write(start(), 0)
    store.snapshots(tmp_path / "bank")[0].write_text("{}")
    with caplog.at_level(logging.WARNING):
        again = start()
    (said,) = caplog.messages
    assert "snapshot-000000001.json is no manifest" in said
    assert len(again.bank) == 0
    write(again, 0)
    assert same(recovered(tmp_path / "bank"), replay(1))


def test_a_start_without_the_memory_for_the_bank_fails_and_leaves_the_folder_as_it_was(start, tmp_path, monkeypatch):
    bank, folder = start(), tmp_path / "bank"
    for number in range(20):
        write(bank, number)
        if number == 10:
            assert bank.snapshot()
    bank.close()
    content = {path.name: path.read_bytes() for path in folder.iterdir()}
    for name, told in {"max": "1000", "current": "900", "stat": "inactive_file 50\n"}.items():
        (tmp_path / f"memory.{name}").write_text(told)
    monkeypatch.setattr(snapshot, "CGROUP", tmp_path)
    with pytest.raises(InputError, match="use a larger machine"):
        start()
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == content
    (tmp_path / "memory.max").write_text("max")
    assert same(start().bank, replay(20))


def test_a_damaged_record_ends_the_replay_and_is_named(start, tmp_path, caplog):
    bank, ends = start(), []
    (path,) = (tmp_path / "bank").glob("journal-*.bin")
    for number in range(10):
        ends.append(path.stat().st_size)
        write(bank, number)
    content = bytearray(path.read_bytes())
    content[ends[6] + 40] ^= 1
    path.write_bytes(content)
    with caplog.at_level(logging.WARNING):
        again = start()
    (said,) = caplog.messages
    assert f"{path} is damaged at byte {ends[6]}: the record does not match its checksum" in said
    assert same(again.bank, replay(6))
    assert path.exists()  # until two snapshots are newer
    for number in range(6, 9):
        write(again, number)
    assert same(recovered(tmp_path / "bank"), replay(9))


def test_a_journal_that_was_cut_ends_the_replay_and_is_named(start, tmp_path, caplog):
    ends = []
    for first in (0, 5, 10):  # three starts, each with a journal of its own
        bank = start()
        journal = max((tmp_path / "bank").glob("journal-*.bin"))
        for number in range(first, first + 5):
            ends.append((journal, journal.stat().st_size))
            write(bank, number)
    cut, end = ends[8]
    os.truncate(cut, end + 30)
    with caplog.at_level(logging.WARNING):
        again = start()
    (said,) = caplog.messages
    assert f"{cut} is damaged at byte {end}: the record there has no end" in said
    assert same(again.bank, replay(8))
    write(again, 8)
    assert same(recovered(tmp_path / "bank"), replay(9))


@pytest.mark.parametrize("left", [0, 5, 12, 30])
def test_half_a_record_at_the_very_end_is_nothing_to_tell_of(start, tmp_path, caplog, left):
    bank, ends = start(), []
    (path,) = (tmp_path / "bank").glob("journal-*.bin")
    for number in range(10):
        ends.append(path.stat().st_size)
        write(bank, number)
    kept = 0 if left < 8 else 6
    os.truncate(path, left if left < 8 else ends[6] + left)
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            bank = start()
            assert same(bank.bank, replay(kept))
            assert bank.metrics()["bank/durable"] == 1
            write(bank, kept)
            kept += 1
        assert same(recovered(tmp_path / "bank"), replay(kept))
    assert caplog.messages == []


@pytest.mark.timeout(60)
def test_a_pipe_in_a_journal_s_place_ends_the_replay_and_is_named(start, tmp_path, caplog):
    for first in (0, 5):
        bank = start()
        for number in range(first, first + 5):
            write(bank, number)
    pipe = max((tmp_path / "bank").glob("journal-*.bin"))
    pipe.unlink()
    os.mkfifo(pipe)  # nobody writes to it: who opens it waits
    with caplog.at_level(logging.WARNING):
        assert same(start().bank, replay(5))
    (said,) = caplog.messages
    assert f"it is no regular file; the bank is as it was before that ({pipe})" in said


def test_a_missing_journal_ends_the_replay_and_is_named(start, tmp_path, caplog):
    for first in (0, 5, 10):  # three starts, each with a journal of its own
        bank = start()
        for number in range(first, first + 5):
            write(bank, number)
    removed = sorted((tmp_path / "bank").glob("journal-*.bin"))[1]
    removed.unlink()
    with caplog.at_level(logging.WARNING):
        assert same(start().bank, replay(5))
    (said,) = caplog.messages
    assert f"{removed} is missing" in said


def test_a_checkpoint_shares_the_snapshot_and_outlives_it(start, tmp_path):
    bank, checkpoint = start(), tmp_path / "checkpoint"
    for number in range(20):
        write(bank, number)
    path = bank.save(checkpoint)
    shared = store.snapshots(tmp_path / "bank")[0]
    assert snapshot.read_manifest(shared).digest == snapshot.read_manifest(path).digest
    assert os.path.samefile(shared.with_suffix(".safetensors"), path.with_suffix(".safetensors"))
    for number in range(20, 30):
        write(bank, number)
        bank.snapshot()
    assert not shared.exists()
    assert same(make(store.load(checkpoint)), replay(20))
    assert same(recovered(tmp_path / "bank"), replay(30))


@pytest.mark.parametrize("elsewhere", [False, True])
def test_a_bank_that_is_replaced_comes_back_as_the_new_one(start, tmp_path, elsewhere):
    bank = start()
    for number in range(20):
        write(bank, number)
    checkpoint = tmp_path / "checkpoint"
    with mounted(tmp_path / "disk", "size=1m") as disk:
        place = disk / "checkpoint" if elsewhere else checkpoint
        bank.save(place)
        for number in range(20, 30):
            write(bank, number)
        path, state = store.newest(place, snapshot.read)
        bank.load(lambda: state, path)
        assert same(recovered(tmp_path / "bank"), replay(20))
        write(bank, 20)
        assert same(recovered(tmp_path / "bank"), replay(21))
        store.snapshots(tmp_path / "bank")[0].unlink()  # the one before is another bank's: no journal goes on from it
        assert same(recovered(tmp_path / "bank"), replay(30))
        bank.load(dict)
        assert len(recovered(tmp_path / "bank")) == 0


def test_a_state_that_does_not_fit_replaces_nothing(start, tmp_path):
    bank = start()
    write(bank, 0)
    with pytest.raises(InputError, match="rows of shape"):
        bank.load(KnowledgeBank(DIM + 1, 10).state)
    write(bank, 1)
    assert same(recovered(tmp_path / "bank"), replay(2))


def test_a_disk_too_full_for_a_snapshot_leaves_the_one_before_and_the_journal(start, small_disk, rng, caplog):
    bank, folder = start(small_disk / "bank"), small_disk / "bank"
    first = store.snapshots(folder)
    rows = rng.normal(size=(1500, DIM)).astype(np.float16)
    bank.upsert(np.arange(1500), rows, rows, None, 1)  # a snapshot of 100 kB
    (small_disk / "ballast").write_bytes(bytes(shutil.disk_usage(small_disk).free - 50_000))
    with caplog.at_level(logging.WARNING):
        assert [bank.snapshot(), bank.snapshot()] == [False, False]
        bank.upsert(np.arange(5), -rows[:5], rows[:5], None, 9)
    (said,) = caplog.messages
    assert "no snapshot of the bank can be written" in said
    assert "No space left on device" in said
    assert "its journal goes on" in said
    assert store.snapshots(folder) == first
    assert bank.metrics()["bank/durable"] == 1
    assert same(recovered(folder), bank.bank)
    (small_disk / "ballast").unlink()
    assert bank.snapshot()
    assert same(recovered(folder), bank.bank)


def test_a_journal_that_fails_after_a_snapshot_is_told_of_too(start, small_disk, rng, caplog):
    bank, folder = start(small_disk / "bank"), small_disk / "bank"
    rows = rng.normal(size=(1500, DIM)).astype(np.float16)
    bank.upsert(np.arange(1500), rows, rows, None, 1)  # a snapshot of 100 kB
    (small_disk / "ballast").write_bytes(bytes(shutil.disk_usage(small_disk).free - 50_000))
    with caplog.at_level(logging.WARNING):
        assert not bank.snapshot()
        (said,) = caplog.messages
        assert "its journal goes on" in said
        step = 2
        while bank.metrics()["bank/durable"]:
            bank.upsert(np.arange(50), rows[:50], rows[:50], None, step)
            step += 1
        assert not bank.snapshot()
        _, said = caplog.messages
        assert "the bank's journal can't be written" in said
        assert "what is written from now on is in memory alone" in said
        (small_disk / "ballast").unlink()
        assert bank.snapshot()
    assert caplog.messages[2:] == [f"{folder} has the whole bank again"]
    assert same(recovered(folder), bank.bank)


def test_a_full_disk_costs_durability_until_there_is_room_again(start, small_disk, caplog, monkeypatch):
    monkeypatch.setattr(durable, "RETRY_SECONDS", 0.05)
    monkeypatch.setattr(durable, "SYNC_SECONDS", 0.01)
    bank, folder = start(small_disk / "bank"), small_disk / "bank"
    ballast, number = fill(small_disk), 0
    with caplog.at_level(logging.WARNING):
        while bank.metrics()["bank/durable"]:
            write(bank, number)
            number += 1
        for _ in range(3):
            assert not bank.snapshot()
        write(bank, number)
    (said,) = caplog.messages
    assert "what is written from now on is in memory alone" in said
    assert same(bank.bank, replay(number + 1))
    with caplog.at_level(logging.ERROR):
        assert same(recovered(folder), replay(number - 1))
    ballast.unlink()
    deadline = time.monotonic() + 30
    while not bank.metrics()["bank/durable"]:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    write(bank, number + 1)
    assert same(recovered(folder), replay(number + 2))


def test_a_folder_that_can_t_be_made_leaves_a_bank_in_memory(start, tmp_path, caplog):
    with mounted(tmp_path / "disk", "ro") as disk, caplog.at_level(logging.WARNING):
        bank = start(disk / "bank")
        write(bank, 0)
        assert bank.metrics()["bank/durable"] == 0
        assert same(bank.bank, replay(1))
        bank.save(tmp_path / "checkpoint")
    assert same(make(store.load(tmp_path / "checkpoint")), replay(1))
    assert len(caplog.messages) == 1
