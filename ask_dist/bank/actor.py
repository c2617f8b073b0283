"""The bank as a Ray actor: a thin wrapper, quick to start because it imports no torch where there is no GPU."""

from __future__ import annotations

import logging
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import ray

from ask_dist.bank import external, snapshot, store
from ask_dist.bank.durable import DurableBank
from ask_dist.bank.messages import Commit, CommitResult, Knowledge, Modality, Snapshot, State
from ask_dist.bank.prototypes import Prototypes
from ask_dist.bank.shard import Changes, Chosen, Found, KnowledgeShard, Mark, OwnRows, shard_state
from ask_dist.errors import InputError
from ask_dist.files import writing

log = logging.getLogger(__name__)

FOLLOW_SECONDS = 0.5  # between two looks of a replica at its primary
LET_GO_SECONDS = 60.0  # that calls in progress have to end, before a loaded bank is read into the memory of the old one
LANES = 4  # calls in progress at once: the bank's lock orders them, answers are serialised outside it


class BankActor:
    """A `KnowledgeBank`, or one shard of it, and the number of neighbours it answers with.

    Args:
        neighbours: k of `search_ids`.
        durable_path: a folder of a `DurableBank`: a restarted actor, whose constructor runs again, comes back with all
            that was written.
        primary: name of the actor that this one is a read replica of: it takes no writes, asks that actor twice a
            second for what was written there, and fills itself from it whenever either of them was restarted.
        begins_with: a bank folder, the digest of the weights that encoded it, and which of how many shards this is:
            the rows that the bank holds when it is empty otherwise.
        maintenance_seconds: pause between two looks at whether inverted files are to be trained.
        settings: `KnowledgeBank`'s arguments.
    """

    def __init__(
        self,
        *,
        neighbours: int,
        durable_path: str | None = None,
        primary: str | None = None,
        begins_with: tuple[str, str, int, int] | None = None,
        maintenance_seconds: float = 30.0,
        **settings: Any,
    ) -> None:
        self._neighbours, self._settings, self._begins_with = neighbours, settings, begins_with
        self._committed = time.monotonic()
        self._replacing = threading.Lock()  # one bank is saved or loaded at a time
        self._durable = None if durable_path is None else DurableBank(Path(durable_path), self._made)
        self._bank = self._made({}) if self._durable is None else self._durable.bank
        if settings.get("index", "flat") != "flat":
            threading.Thread(target=self._maintain, args=(maintenance_seconds,), name="maintain", daemon=True).start()
        if primary is not None:
            threading.Thread(target=self._follow, args=(primary,), name="follow", daemon=True).start()

    def search_ids(self, ids: np.ndarray) -> Knowledge:
        return self._bank.search_ids(ids, self._neighbours)

    def own_rows(self, ids: np.ndarray) -> OwnRows:
        return self._bank.own_rows(ids)

    def nearest(self, ids: np.ndarray, *own: OwnRows) -> Found:
        return self._bank.nearest(ids, self._neighbours, *own)

    def chosen(self, shard: int, *found: Found) -> Chosen:
        return self._bank.chosen(shard, *found)

    def changes(self, mark: Mark) -> Changes:
        return self._bank.changes(mark)

    def search(self, queries: np.ndarray, k: int, modality: Modality) -> tuple[np.ndarray, np.ndarray]:
        return self._bank.search(queries, k, modality)

    def upsert(
        self, ids: np.ndarray, audio: np.ndarray, text: np.ndarray, reliability: np.ndarray | None, step: int
    ) -> int:
        return (self._durable or self._bank).upsert(ids, audio, text, reliability, step)

    def snapshot(self) -> Snapshot:
        return self._bank.snapshot(np.float16)  # what workers send and get; half the memory of the refiner

    def commit(self, commit: Commit) -> CommitResult:
        result = (self._durable or self._bank).commit(commit)
        self._committed = time.monotonic()
        return result

    def prototypes(self) -> Prototypes | None:
        return self._bank.prototypes

    def metrics(self) -> dict[str, float]:
        """`KnowledgeBank.metrics`, and how long ago the refiner last committed: grows while it is dead or hangs."""
        told = self._bank.metrics() | {"bank/seconds_since_commit": time.monotonic() - self._committed}
        return told | (self._durable.metrics() if self._durable else {})

    @ray.method(max_task_retries=-1)  # a checkpoint waits for a bank that is being restarted
    def save(self, folder: str) -> str:
        """Write the bank as the one snapshot of another folder.

        Returns:
            The snapshot's digest.

        Raises:
            DiskError: the folder can't be written.
        """
        place, durable = Path(folder), self._durable
        with self._replacing, writing(place):
            path = durable.save(place) if durable else store.save(place, self._bank.state(), keep=1)
            return snapshot.read_manifest(path).digest

    @ray.method(max_task_retries=-1)
    def load(self, folders: Sequence[str], shard: int = 0, shards: int = 1) -> None:
        """Replace the whole bank by a saved one.

        Args:
            folders: of the newest snapshots of every shard of that bank, in order; none: it begins anew.
            shard, shards: which part of it this one is to be; where it was saved in another number it is split anew.

        Raises:
            InputError: no snapshot in one of them that is whole and fits; the bank is then as before. Or it is found
                too large for the memory once the old bank is gone; the bank is then empty.
        """
        with self._replacing:
            if len(folders) == shards:
                self._load_one(folders[shard])
            else:
                state = shard_state((store.newest(each, snapshot.view)[1] for each in folders), shard, shards)
                self._load(lambda: state)

    def ping(self) -> int:
        """The number of rows: an answer means that the bank is up."""
        return len(self._bank)

    def _load_one(self, folder: str) -> None:
        """Replace the bank by a snapshot of its own size, with no more than one of them in memory: of an empty bank
        callers are told meanwhile."""
        if not len(self._bank):  # at the start of a run there is nothing to let go of, and one look is enough
            path, state = store.newest(folder, snapshot.read)
            self._load(lambda: state, path)
            return
        path, told = store.newest(folder, snapshot.verify)
        dim, capacity = self._settings["dim"], self._settings["capacity"]
        if told.dim != dim or told.rows > capacity:
            raise InputError(
                f"{path} holds {told.rows} rows of width {told.dim}, the bank takes {capacity} of width {dim}: give "
                "model.embedding_dim and bank.capacity as they were, or a larger capacity"
            )
        old, self._bank = weakref.ref(self._bank), KnowledgeShard(**self._settings)

        def read() -> State:
            deadline = time.monotonic() + LET_GO_SECONDS
            while old() is not None and time.monotonic() < deadline:  # calls in progress have it
                time.sleep(0.01)
            return snapshot.read(path)

        self._load(read, path, self._bank)

    def _load(
        self, read: Callable[[], State], path: Path | None = None, meanwhile: KnowledgeShard | None = None
    ) -> None:
        if self._durable:
            self._durable.load(read, path, meanwhile)
        self._bank = self._durable.bank if self._durable else self._made(read())

    def _made(self, state: State) -> KnowledgeShard:
        """A bank of a state; of an empty one, the bank that begins."""
        if not state and self._begins_with is not None:
            folder, weights, shard, shards = self._begins_with
            state = shard_state([external.load(folder, weights, self._settings["dim"])], shard, shards)
        return KnowledgeShard.from_state(state, **self._settings) if state else KnowledgeShard(**self._settings)

    def _follow(self, primary: str) -> None:
        mark, reached = Mark(), True
        while True:
            try:
                mark, reached = self._caught_up(ray.get_actor(primary), mark), True
            except Exception:  # what it holds goes on being searched
                if reached:
                    log.warning("the primary does not say what was written; it is asked again", exc_info=True)
                reached = False
            time.sleep(FOLLOW_SECONDS)

    def _caught_up(self, primary: Any, mark: Mark) -> Mark:
        """Take over what the primary has beyond a mark, all of it at once: no search meets half of a commit.

        Of another life of the primary a whole bank is made aside, and put in the place of the one that is searched.
        """
        bank, parts, more = self._bank, list[Changes](), True
        while more:
            changes = ray.get(primary.changes.remote(mark))
            mark, more = changes.mark, changes.more
            if changes.restart:
                bank, parts = KnowledgeShard(**self._settings), []
            parts.append(changes)
            if not more or bank is not self._bank:  # what nobody searches yet need not be whole
                bank.follow(parts)
                parts = []
        if len(bank) < len(self._bank):
            log.warning("the primary began anew with %d rows: the %d that were held go", len(bank), len(self._bank))
        self._bank = bank
        return mark

    def _maintain(self, pause: float) -> None:
        while True:
            time.sleep(pause)
            try:
                self._bank.maintain()
            except Exception:  # the older inverted files go on answering
                log.warning("inverted files could not be trained", exc_info=True)


RemoteBankActor = ray.remote(max_concurrency=LANES, max_restarts=-1)(BankActor)  # type: ignore[call-overload]
