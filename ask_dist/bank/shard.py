"""One shard of a bank whose rows are split by a hash of their ids, and what joins the shards' answers.

A search by id takes three calls to each shard, since the rows that are searched with lie on other shards than those
that are found: `own_rows`, then `nearest` with every shard's own rows, then `chosen` with every shard's scores. So the
embeddings that travel are as many as in an answer of one bank, whatever the number of shards.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from itertools import chain

import numpy as np

from ask_dist.bank.memory import PER_ROW, KnowledgeBank
from ask_dist.bank.messages import Knowledge, Modality, State
from ask_dist.bank.rows import grown

CHANGES = 65_536  # rows that a replica is sent at a time: bounds what is copied while the bank's lock is held
SUMS = (
    "bank/rows",
    "bank/upserts",
    "bank/rejected",
    "bank/inverted_rows",
    "bank/journal_bytes",
    "bank/external_rows",
)
LARGEST = ("bank/seconds_since_commit", "bank/too_old_share")
MIX = np.uint64(0x9E3779B97F4A7C15)  # Knuth's multiplicative hash: ids that are numbered in a row spread evenly


@dataclass(frozen=True)
class OwnRows:
    """Rows of asked ids that a shard holds: ids, frame int64 [n]; audio, text [n, d] as stored; reliability [n]."""

    ids: np.ndarray
    audio: np.ndarray
    text: np.ndarray
    frame: np.ndarray
    reliability: np.ndarray


@dataclass(frozen=True)
class Found:
    """The nearest rows of one shard to n queries: by modality their scores float32 and ids int64, both [n, k], best
    first, a score of -inf where there are fewer; and the newest step that the shard knows of."""

    nearest: dict[Modality, tuple[np.ndarray, np.ndarray]]
    newest_step: int


@dataclass(frozen=True)
class Chosen:
    """A shard's part of an answer: ids, frame int64 [m]; audio, text float16 [m, d]; reliability float32 [m]; and of
    the shard its commits, its rows, and the newest step that it knows of."""

    ids: np.ndarray
    audio: np.ndarray
    text: np.ndarray
    frame: np.ndarray
    reliability: np.ndarray
    generation: int
    rows: int
    newest_step: int


@dataclass(frozen=True)
class Mark:
    """How far a replica has followed: the life of the bank that it followed, and the last write that it has of it."""

    life: str = ""
    write: int = 0


@dataclass(frozen=True)
class Changes:
    """Rows, at most `CHANGES`, that were written after a mark, earliest first, as arrays of `State`; and the mark after
    them. They `restart` a replica that followed another life of the bank: its rows are void. `more` are left."""

    mark: Mark
    restart: bool
    more: bool
    rows: State


class KnowledgeShard(KnowledgeBank):
    """A bank that holds some of the rows, or follows one that does."""

    def __init__(self, *arguments, **settings) -> None:
        super().__init__(*arguments, **settings)
        self._writes = 0
        self._written = np.zeros(0, np.int64)  # the write, counted a row, that each row is of

    def own_rows(self, ids: np.ndarray) -> OwnRows:
        """The rows of these ids (int64 [n]) that are stored here, in the order asked."""
        with self._lock:
            rows = self._rows(ids)
            return self._own(rows[rows >= 0])

    def nearest(self, ids: np.ndarray, k: int, *own: OwnRows) -> Found:
        """The k rows nearest to each of the asked ids' own rows, by either half.

        Args:
            ids: int64 [n], all that were asked for; none of them is answered.
            own: what each shard gave of their rows.
        """
        with self._lock:
            self._counts["searches"] += 1
            rows = self._rows(ids)
            asked = rows[rows >= 0]
            found: dict[Modality, tuple[np.ndarray, np.ndarray]] = {}
            for modality in ("audio", "text"):
                queries = np.concatenate([getattr(part, modality) for part in own]).astype(np.float32)
                scores, near = self._nearest(self._index[modality], queries, asked, k)
                found[modality] = scores, self._meta["ids"][near] if len(self) else near
            return Found(found, self._newest_step)

    def chosen(self, shard: int, *found: Found) -> Chosen:
        """The rows of this shard, the `shard`th, that are among the k nearest over all of them.

        As in one bank, the filters leave out rows afterwards, and a row's age counts from the newest step of all.
        """
        ids = np.unique(np.concatenate([_best(found, modality, shard) for modality in ("audio", "text")]))
        with self._lock:
            self._newest_step = max(self._newest_step, *(part.newest_step for part in found))
            rows = self._rows(ids)
            rows = self._trusted(rows[rows >= 0])
            own = self._own(rows)
            return Chosen(
                own.ids,
                own.audio.astype(np.float16),
                own.text.astype(np.float16),
                own.frame,
                own.reliability,
                self._generation,
                len(self),
                self._newest_step,
            )

    def changes(self, mark: Mark) -> Changes:
        """What was written after `mark`; everything, from the start, if that is of another life of the bank."""
        restart = mark.life != self._life
        with self._lock:
            since = 0 if restart else mark.write
            rows = np.flatnonzero(self._written[: len(self)] > since)
            more = len(rows) > CHANGES
            if more:
                rows = rows[np.argpartition(self._written[rows], CHANGES)[:CHANGES]]
            rows = rows[np.argsort(self._written[rows])]
            state: State = {name: values[rows] for name, values in self._meta.items()}
            state |= {name: index.rows.take(rows) for name, index in self._index.items()}
            state |= {"generation": np.array(self._generation), "newest_step": np.array(self._newest_step)}
            last = int(self._written[rows[-1]]) if len(rows) else since
        return Changes(Mark(self._life, last), restart, more, state)

    def follow(self, parts: Sequence[Changes]) -> None:
        """Take over what was written elsewhere, whatever is held of these rows.

        Args:
            parts: in order, up to one that leaves no more: together they are the other bank at the moment of the last.
        """
        with self._lock:
            for rows in (changes.rows for changes in parts):
                at = self._rows(rows["ids"])
                at = self._with_new_rows(rows["ids"], at, np.ones(len(at), bool))
                self._write(at, rows["audio"], rows["text"], 0)
                for name in PER_ROW:
                    self._meta[name][at] = rows[name]
                self._generation = int(rows["generation"])
                self._newest_step = max(self._newest_step, int(rows["newest_step"]))

    def _own(self, rows: np.ndarray) -> OwnRows:
        stored = {name: index.rows.take(rows) for name, index in self._index.items()}
        return OwnRows(**stored, **{name: self._meta[name][rows] for name in ("ids", "frame", "reliability")})

    def _note(self, rows: np.ndarray, audio: np.ndarray, frame: int) -> None:
        super()._note(rows, audio, frame)
        self._written = grown(self._written, len(self))
        self._written[rows] = self._writes + 1 + np.arange(len(rows))
        self._writes += len(rows)


def shard_of(ids: np.ndarray, shards: int) -> np.ndarray:
    """The shard, int64 [n], on which each id (int64 [n]) lives."""
    mixed = np.asarray(ids, np.int64).astype(np.uint64) * MIX
    return ((mixed >> np.uint64(32)) % np.uint64(shards)).astype(np.int64)


def shard_names(shards: int) -> list[str]:
    """What the shards are called in a checkpoint."""
    return ["bank"] if shards == 1 else [f"bank-{shard}" for shard in range(shards)]


def capacity_of(capacity: int, shards: int) -> int:
    """The rows that a shard must have room for where the bank is to hold `capacity`: hashes are as uneven as chance."""
    share = capacity / shards
    return min(capacity, int(share + 5 * share**0.5) + 1)


def joined(ids: np.ndarray, own: Sequence[OwnRows], chosen: Sequence[Chosen]) -> Knowledge:
    """What one bank would have answered for these ids (int64 [n]), from what each shard gave.

    Shards answer one after the other: a row that is written meanwhile is the older one or the newer one, never half of
    each. The generation is that of the first shard, which holds the prototypes.
    """
    newest_step = max(part.newest_step for part in chosen)
    near, stored = stacked(chosen), stacked(own)
    known = np.isin(ids, stored.ids)
    rows = np.searchsorted(stored.ids, ids[known])
    mine = {
        "audio": np.zeros((len(ids), near.audio.shape[1]), np.float16),
        "text": np.zeros((len(ids), near.text.shape[1]), np.float16),
        "frame": np.full(len(ids), newest_step + 1),  # an age of -1
        "reliability": np.full(len(ids), -1.0, np.float32),
    }
    for name, values in mine.items():
        values[known] = getattr(stored, name)[rows]
    return Knowledge(
        ids=near.ids,
        audio=near.audio,
        text=near.text,
        reliability=near.reliability,
        age=newest_step - near.frame,
        own_audio=mine["audio"],
        own_text=mine["text"],
        own_age=newest_step - mine["frame"],
        own_reliability=mine["reliability"],
        generation=chosen[0].generation,
        rows=sum(part.rows for part in chosen),
        newest_step=newest_step,
    )


def stacked(parts: Sequence[OwnRows] | Sequence[Chosen]) -> OwnRows:
    """The rows of all shards, by ascending id."""
    order = np.argsort(np.concatenate([part.ids for part in parts]))
    names = (field.name for field in fields(OwnRows))
    return OwnRows(**{name: np.concatenate([getattr(part, name) for part in parts])[order] for name in names})


def shard_state(states: Iterable[State], shard: int, shards: int) -> State:
    """The `KnowledgeBank.state()` of one of `shards` shards, from the states of a bank that was split otherwise.

    They are looked at one by one, so that no more than one of them and the result need to be in memory. Prototypes and
    counters go to the first shard. Of empty states an empty one is made.
    """
    parts: list[State] = []
    whole: State = {}
    for state in states:
        if not state:
            continue
        here = shard_of(state["ids"], shards) == shard
        parts.append({name: state[name][here] for name in (*PER_ROW, "audio", "text")})
        if not whole and shard == 0:
            whole = {name: value for name, value in state.items() if name.startswith("prototypes.")}
        counts = state["counts"] if shard == 0 else np.zeros_like(state["counts"])
        whole["counts"] = whole.get("counts", 0) + counts
        for name in ("generation", "newest_step"):
            whole[name] = np.maximum(whole.get(name, 0), state[name])
    if not parts:
        return {}
    return whole | {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def whole_metrics(shards: Sequence[Sequence[Mapping[str, float]]]) -> dict[str, float]:
    """`KnowledgeBank.metrics()` of a bank from those of each shard's primary and its replicas; {} is not known.

    A search visits every shard and counts once; replicas answer as primaries do. Of what can't be added up the worst
    shard's counts.
    """
    primaries = [actors[0] for actors in shards]
    if not all(primaries):
        return {}
    values = {name: min(said[name] for said in primaries) for name in primaries[0]}
    values |= {name: sum(said[name] for said in primaries) for name in SUMS if name in values}
    values |= {name: max(said[name] for said in primaries) for name in LARGEST if name in values}
    stale = sum(said["bank/staleness"] * said["bank/rows"] for said in primaries)
    values["bank/staleness"] = stale / max(1.0, values["bank/rows"])
    given = [(said["bank/given"], said["bank/external_share"]) for said in chain(*shards) if "bank/given" in said]
    values["bank/given"] = sum(rows for rows, _ in given)
    values["bank/external_share"] = sum(rows * share for rows, share in given) / max(1.0, values["bank/given"])
    values["bank/searches"] = max(sum(said.get("bank/searches", 0.0) for said in actors) for actors in shards)
    return values


def _best(found: Sequence[Found], modality: Modality, shard: int) -> np.ndarray:
    """The ids of this shard that are among the k nearest of any query over all shards; ties go to the first shard."""
    scores = np.concatenate([part.nearest[modality][0] for part in found], axis=1)
    k = scores.shape[1] // len(found)
    best = np.zeros(scores.shape, bool)
    np.put_along_axis(best, np.argsort(-scores, axis=1, kind="stable")[:, :k], True, axis=1)
    best &= ~np.isneginf(scores)
    return found[shard].nearest[modality][1][best[:, shard * k : (shard + 1) * k]]
