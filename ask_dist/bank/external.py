"""External rows: a bank folder of other corpora, encoded by the weights that a run starts from, as its first rows."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from ask_dist.bank import snapshot, store
from ask_dist.bank.memory import COUNTERS
from ask_dist.bank.messages import EXTERNAL, State
from ask_dist.errors import InputError


def load(folder: Path | str, weights: str, dim: int) -> State:
    """A bank folder as the state of a bank at step 0 that nobody has written to yet.

    The embeddings are views of the file. Rows are valid for the weights of step 0. Their own step, `EXTERNAL`, tells
    them from rows of this run, until training meets a clip of the same id and takes the row over. How far their pairs
    can be trusted is not known.

    Args:
        folder: of `store.save`.
        weights: digest of the model that the run starts from.
        dim: of the run's bank.

    Raises:
        InputError: no whole bank there, or one that other weights encoded, or one of another width.
    """
    path, state = store.newest(folder, snapshot.view)
    told = snapshot.read_manifest(path)
    if told.weights != weights:
        raise InputError(
            f"bank.from={folder} was not encoded by the weights of model.from ({told.source or 'source unknown'}); "
            "name the run that encoded it, or build the bank again with that run as --checkpoint"
        )
    if told.dim != dim:
        raise InputError(f"bank.from={folder} holds rows of width {told.dim}, model.embedding_dim is {dim}")
    return {
        "ids": state["ids"],
        "audio": state["audio"],
        "text": state["text"],
        "step": np.full(told.rows, EXTERNAL, np.int64),
        "frame": np.zeros(told.rows, np.int64),
        "version": np.zeros(told.rows, np.int64),
        "reliability": np.full(told.rows, -1.0, np.float32),
        "generation": np.array(0),
        "newest_step": np.array(0),
        "counts": np.zeros(len(COUNTERS), np.int64),
    }
