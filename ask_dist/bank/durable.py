"""A bank that survives its process: a folder of snapshots, and a journal of what was written since.

    snapshot-000000012.json, .safetensors   the bank as it was when journal 12 began, see `store`
    journal-000000012.bin                   the writes after it, see `journal`
    journal-000000013.bin                   the writes after those, up to now

A bank is its newest whole snapshot and then the journals from that number on, as long as no number is missing. A
number is left out on purpose where what follows is no continuation: after a write that no journal has, and where the
bank was replaced by another.
"""

from __future__ import annotations

import logging
import re
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

import numpy as np
from safetensors import SafetensorError

from ask_dist.bank import snapshot, store
from ask_dist.bank.journal import Journal, TornJournal, Upsert, read
from ask_dist.bank.memory import KnowledgeBank
from ask_dist.bank.messages import Commit, CommitResult, State
from ask_dist.bank.snapshot import DamagedSnapshot
from ask_dist.errors import InputError

SYNC_SECONDS = 0.1
RETRY_SECONDS = 60.0
# A snapshot is due when the journal is as large as the last one, and at least this: replaying never takes much longer
# than reading, and no more than twice as much is written as without snapshots.
LEAST_JOURNAL_BYTES = 64 * 2**20
NAME = re.compile(r"journal-(\d{9})\.bin")

log = logging.getLogger(__name__)

Bank = TypeVar("Bank", bound=KnowledgeBank)
Make = Callable[[State], Bank]


@dataclass(frozen=True)
class Recovered(Generic[Bank]):
    """What a folder held.

    Attributes:
        bank: as the snapshot and the journals have it.
        following: number of the journal that goes on from there, None where none can: a snapshot is needed first.
        newest: the highest number in the folder, -1 where it is empty.
        journal_bytes: of what was replayed.
    """

    bank: Bank
    following: int | None
    newest: int
    journal_bytes: int


class DurableBank(Generic[Bank]):
    """Writes to a `KnowledgeBank` that are kept: what `upsert` and `commit` have returned from outlives the process.

    The disk is told to take the journal ten times a second, so a machine that loses power loses the last tenth and the
    time that the disk takes. A disk that refuses (full, broken) costs durability, not the bank: the bank goes on in
    memory, one warning says so, and a snapshot is tried once a minute until one is whole again.

    Args:
        folder: of this bank alone; made if missing. What it holds is taken up.
        make: makes a bank of a state; of an empty one, the bank that begins.
        least_journal_bytes: a smaller journal calls for no snapshot.

    Raises:
        InputError: as `recover`; the folder is then as it was.
    """

    def __init__(self, folder: Path, make: Make[Bank], least_journal_bytes: int = LEAST_JOURNAL_BYTES) -> None:
        self._folder, self._make, self._least = folder, make, least_journal_bytes
        self._writing = threading.RLock()  # a write and its record are one; taken after the other
        self._snapshotting = threading.RLock()
        self._journal: Journal | None = None
        self._whole = False  # whether the folder has all that was written
        self._told: bool | None = None  # whether it was whole when a warning said what is wrong; None: nothing is
        self._not_before, self._snapshot_bytes = 0.0, 0
        found = recover(folder, make)
        self.bank, self._number, self._bytes = found.bank, found.newest, found.journal_bytes
        if found.following is not None:
            self._continue(found.following)
        if not self._whole:
            self.snapshot()
        self._closed = threading.Event()
        threading.Thread(target=self._keep, name="keep", daemon=True).start()

    def upsert(
        self, ids: np.ndarray, audio: np.ndarray, text: np.ndarray, reliability: np.ndarray | None, step: int
    ) -> int:
        """`KnowledgeBank.upsert`, kept."""
        with self._writing:
            written = self.bank.upsert(ids, audio, text, reliability, step)
            self._record(Upsert(ids, audio, text, reliability, step))
        return written

    def commit(self, commit: Commit) -> CommitResult:
        """`KnowledgeBank.commit`, kept."""
        with self._writing:
            result = self.bank.commit(commit)
            if self.bank.takes(commit):  # the journal says nothing of lives
                self._record(commit)
        return result

    def snapshot(self) -> bool:
        """Write the bank as the folder's newest snapshot, while writes and searches go on.

        Returns:
            Whether that succeeded; otherwise the older snapshots and their journals stay.
        """
        with self._snapshotting:
            try:
                with self._writing:
                    number, begun = self._rotate()
                    state = self.bank.state()
                self._take(store.save(self._folder, state, number=number), begun)
                return True
            except (OSError, SafetensorError) as error:
                self._no_snapshot(error)
                return False

    def save(self, folder: Path) -> Path:
        """Write the bank as the one snapshot of another folder, and share it with this one where the disk allows that.

        Returns:
            The manifest's path.

        Raises:
            OSError, SafetensorError: that folder can't be written.
        """
        with self._snapshotting:
            begins = None
            with self._writing:
                try:
                    begins = self._rotate()
                except OSError as error:
                    self._no_snapshot(error)
                state = self.bank.state()
            path = store.save(folder, state, keep=1)
            if begins is not None:
                self._share(path, *begins)
            return path

    def load(self, read: Callable[[], State], path: Path | None = None, meanwhile: Bank | None = None) -> None:
        """Replace the bank by one of another state, of an empty one by the bank that begins.

        Args:
            read: gives a state of `KnowledgeBank.state()`.
            path: of the manifest of a snapshot with that state, to be shared where the disk allows that.
            meanwhile: takes the bank's place while the state is read, so that two need not be in memory at once. A
                process that dies then comes back with the old one, which the folder has until the new one is there.

        Raises:
            InputError: of `read`, or the state does not fit; the bank is then as before, or `meanwhile`.
        """
        with self._snapshotting:
            if meanwhile is not None:
                with self._writing:
                    self.bank, self._whole = meanwhile, False
            self._replace(read(), path)

    def metrics(self) -> dict[str, float]:
        """`bank/durable`: 1 while the folder has all that was written; `bank/journal_bytes` since the last snapshot."""
        return {"bank/durable": float(self._whole), "bank/journal_bytes": float(self._bytes)}

    def close(self) -> None:
        """Flush the journal and end; nothing is to be written after it."""
        self._closed.set()
        with self._snapshotting, self._writing:
            if self._journal is not None:
                self._journal.sync()
                self._journal.close()

    def _replace(self, state: State, path: Path | None) -> None:
        with self._writing:
            self.bank = self._make(state)
            self._whole = False
            try:
                number, begun = self._rotate()
                if path is None or not self._share(path, number, begun):
                    self._take(store.save(self._folder, state or self.bank.state(), number=number), begun)
            except (OSError, SafetensorError) as error:
                self._no_snapshot(error)

    def _record(self, write: Upsert | Commit) -> None:
        if self._journal is None:
            self._whole = False
            return
        try:
            self._bytes += self._journal.append(write)
        except OSError as error:
            self._lose(self._journal, error)

    def _continue(self, number: int) -> None:
        """A journal that goes on from what the folder has."""
        try:
            self._journal, self._number, self._whole = Journal(_journal(self._folder, number)), number, True
            self._snapshot_bytes = _data_bytes(store.snapshots(self._folder)[0])
        except OSError as error:
            self._complain("no journal of the bank can be begun", error)

    def _rotate(self) -> tuple[int, int]:
        """Begin a new journal; the caller holds the lock of writes until it has the bank as it is now.

        Returns:
            The journal's number, and the bytes of those before it that a snapshot makes needless.
        """
        self._folder.mkdir(parents=True, exist_ok=True)
        number = self._number + (1 if self._whole else 2)
        journal, before = Journal(_journal(self._folder, number)), self._journal
        self._journal, self._number = journal, number
        if before is not None:
            try:
                before.sync()
            except OSError as error:
                self._lose(before, error)
            before.close()
        return number, self._bytes

    def _share(self, path: Path, number: int, begun: int) -> bool:
        """Make a snapshot of another folder the newest here too; False on another disk, or without hard links."""
        try:
            store.link(path, self._folder, number)
        except OSError as error:
            log.info("%s is not shared with %s: %s", path, self._folder, error)
            return False
        self._take(path, begun)
        return True

    def _take(self, path: Path, begun: int) -> None:
        """After a snapshot: forget what is not needed any more."""
        with self._writing:
            self._bytes -= begun
            self._whole = self._journal is not None
        self._snapshot_bytes = _data_bytes(path)
        if self._told is not None and self._whole:
            log.warning("%s has the whole bank again", self._folder)
            self._told = None
        oldest = store.number_of(store.snapshots(self._folder)[-1])
        for number in journals(self._folder):
            if number < oldest:
                _journal(self._folder, number).unlink()

    def _lose(self, journal: Journal, error: OSError) -> None:
        """A journal that could not be written is no continuation any more."""
        with self._writing:
            self._whole = False
            if self._journal is journal:
                self._journal = None
        journal.close()
        self._complain("the bank's journal can't be written", error)

    def _no_snapshot(self, error: Exception) -> None:
        self._not_before = time.monotonic() + RETRY_SECONDS
        self._complain("no snapshot of the bank can be written", error)

    def _complain(self, what: str, error: Exception) -> None:
        if self._told is None or (self._told and not self._whole):  # once, and again when it gets worse
            self._told = self._whole
            kept = "its journal goes on" if self._whole else "what is written from now on is in memory alone"
            log.warning("%s in %s (%s); %s, and it is tried again", what, self._folder, error, kept)

    def _keep(self) -> None:
        while not self._closed.wait(SYNC_SECONDS):
            journal = self._journal
            if journal is not None:
                try:
                    journal.sync()
                except OSError as error:
                    self._lose(journal, error)
            if self._due() and self._snapshotting.acquire(blocking=False):
                self._snapshotting.release()
                threading.Thread(target=self.snapshot, name="snapshot", daemon=True).start()

    def _due(self) -> bool:
        large = self._bytes > max(self._least, self._snapshot_bytes)
        return (large or not self._whole) and time.monotonic() >= self._not_before


def recover(folder: Path, make: Make[Bank]) -> Recovered[Bank]:
    """What a folder holds, as far as it is whole; the first damage is named in one warning, and nothing after it taken.

    Half a record at the very end is no damage. No journal goes on from it, so where one follows, the file was cut.

    Args:
        folder: of a `DurableBank`, or one that is missing.
        make: as for `DurableBank`.

    Raises:
        InputError: the newest whole snapshot does not fit into the memory, or `make` takes no such bank.
    """
    found = journals(folder)
    newest = max([*found, *map(store.number_of, store.snapshots(folder))], default=-1)
    if not store.snapshots(folder):
        return Recovered(make({}), None, newest, 0)
    try:
        path, state = store.newest(folder, snapshot.read)
    except DamagedSnapshot as error:  # one that is whole and can't be read now is no reason to begin anew
        log.warning("%s; the bank begins anew", error)
        return Recovered(make({}), None, newest, 0)
    bank, number, replayed = make(state), store.number_of(path), 0
    while number in found:
        place = _journal(folder, number)
        try:
            for write in read(place, state["audio"].shape[1]):
                _apply(bank, write)
        except (InputError, OSError) as error:
            if not isinstance(error, TornJournal) or number < newest:  # the last one ends where its writer was killed
                log.warning("%s; the bank is as it was before that (%s)", error, place)
            return Recovered(bank, None, newest, replayed)
        replayed += place.stat().st_size
        number += 1
    if newest > number:
        log.warning("%s is missing; the bank is as it was before that", _journal(folder, number))
        return Recovered(bank, None, newest, replayed)
    return Recovered(bank, number, newest, replayed)


def journals(folder: Path) -> list[int]:
    """The numbers of the journals in a folder."""
    found = (NAME.fullmatch(path.name) for path in folder.glob("journal-*.bin"))
    return [int(name[1]) for name in found if name]


def _apply(bank: KnowledgeBank, write: Upsert | Commit) -> None:
    if isinstance(write, Commit):
        bank.commit(write)
    else:
        bank.upsert(write.ids, write.audio, write.text, write.reliability, write.step)


def _journal(folder: Path, number: int) -> Path:
    return folder / f"journal-{number:09d}.bin"


def _data_bytes(path: Path) -> int:
    return path.with_suffix(".safetensors").stat().st_size
