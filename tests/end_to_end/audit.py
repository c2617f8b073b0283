"""What a run over the tones said it trained on, step by step (`data.audit`)."""

from __future__ import annotations

import itertools
import json
from contextlib import suppress
from pathlib import Path

from ask_dist.data.shards import stable_id

CLIPS, EPOCH = 160, 5  # clips and steps an epoch, at a global batch of 32


def audited(run: Path) -> list[tuple[int, list[int]]]:
    """Step and ids of every step that was taken, in time's order."""
    with suppress(FileNotFoundError):
        lines = (run / "audit.jsonl").read_text().splitlines(keepends=True)
        return [(row["step"], row["ids"]) for row in map(json.loads, (line for line in lines if line.endswith("\n")))]
    return []


def check_audit(run: Path, epochs: int, repeated: bool) -> None:
    """Every clip once an epoch, by what the workers said they trained on at the steps that count.

    Args:
        run: its folder.
        epochs: that it trained.
        repeated: whether some steps were taken again.
    """
    taken = audited(run)
    counting = dict(taken)  # the last line of a step
    assert sorted(counting) == list(range(EPOCH * epochs))
    everything = sorted(stable_id(f"train-{number:04d}") for number in range(CLIPS))
    for steps in (range(first, first + EPOCH) for first in range(0, EPOCH * epochs, EPOCH)):
        assert sorted(itertools.chain(*(counting[step] for step in steps))) == everything
    assert (len(taken) > len(counting)) == repeated
