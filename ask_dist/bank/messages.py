"""What goes into the bank and comes out of it, as plain arrays that Ray can carry."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

Modality = Literal["audio", "text"]
State = dict[str, np.ndarray]

EXTERNAL = -1  # the step of a row that the run itself never encoded


@dataclass(frozen=True)
class Knowledge:
    """An answer to `search_ids`: m rows of the bank, in the bank's row order (of several shards: by
    ascending id), and the stored rows of the n asked ids.

    Attributes:
        ids: int64 [m], none of them asked for.
        audio, text: float16 [m, d], unit length; zeros for the audio of a row that is a text alone.
        reliability: float32 [m].
        age: int64 [m], global steps between the bank's newest row and the weights this row is valid for.
        own_audio, own_text: float16 [n, d], the asked ids' own rows in the order asked; zeros where the id is unknown.
        own_age: int64 [n]; -1 where the id is unknown. own_reliability: float32 [n]; -1 where that is not known.
        generation: commits so far. rows: rows in the bank. newest_step: the global step of its newest row.
    """

    ids: np.ndarray
    audio: np.ndarray
    text: np.ndarray
    reliability: np.ndarray
    age: np.ndarray
    own_audio: np.ndarray
    own_text: np.ndarray
    own_age: np.ndarray
    own_reliability: np.ndarray
    generation: int
    rows: int
    newest_step: int


@dataclass(frozen=True)
class Snapshot:
    """A consistent copy of every row: ids, step, frame, version int64 [n]; audio, text [n, d]; reliability [n].

    `step` is `EXTERNAL` where the run itself never encoded the row. `life` is of the bank: another one after a restart
    or a load, when rows may have the same versions again.
    """

    ids: np.ndarray
    audio: np.ndarray
    text: np.ndarray
    step: np.ndarray
    frame: np.ndarray
    version: np.ndarray
    reliability: np.ndarray
    generation: int
    newest_step: int
    life: str = ""


@dataclass(frozen=True)
class Commit:
    """Corrected rows: ids int64 [n], audio and text [n, d], the versions int64 [n] that were corrected, and the global
    step that the corrected rows are valid for. Prototype levels, if given, replace the bank's. `life` is of the
    snapshot that was corrected; "": of the bank that it is given to."""

    ids: np.ndarray
    audio: np.ndarray
    text: np.ndarray
    versions: np.ndarray
    frame: int
    prototypes: list[tuple[np.ndarray, np.ndarray]] | None = None
    life: str = ""

    @classmethod
    def of_prototypes(cls, prototypes: list[tuple[np.ndarray, np.ndarray]], snapshot: Snapshot) -> Commit:
        """A commit that corrects no row."""
        none = np.zeros(0, np.int64)
        return cls(none, snapshot.audio[:0], snapshot.text[:0], none, snapshot.newest_step, prototypes, snapshot.life)


@dataclass(frozen=True)
class CommitResult:
    """Rows written, rows left alone because they got newer meanwhile (or are unknown), and the new generation."""

    applied: int
    skipped: int
    generation: int
