"""What a run could not use: counted, and named once each in `quarantine.jsonl`."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ask_dist.files import write_atomically, writing

QUARANTINE = "quarantine.jsonl"
Record = dict[str, str]


@dataclass
class BadSamples:
    """The bad samples that a loader met.

    Attributes:
        file: gets a line for each new record as soon as it is met, so that a run that ends early has named them, but
            for those that an earlier start has named; None for no file. Several processes may share one.
        delivered: samples delivered so far, bad ones included.
        count: how many of them were bad.
        records: {"shard", "key", "reason"}, each once; the key is "" where a shard as a whole is meant.
    """

    file: Path | None = None
    delivered: int = 0
    count: int = 0
    records: list[Record] = field(default_factory=list)
    _met: set[tuple[str, ...]] = field(default_factory=set, repr=False)
    _named: set[str] = field(default_factory=set, repr=False)

    def __post_init__(self) -> None:
        self._named.update(_lines(self.file))

    def note(self, delivered: int, bad: Sequence[Record], notices: Sequence[Record] = ()) -> None:
        """Count a batch; `notices` are named as `bad` is, but are no samples.

        Raises:
            DiskError: the file can't be written.
        """
        self.delivered += delivered
        self.count += len(bad)
        new = []
        for record in (*notices, *bad):
            known = len(self._met)
            self._met.add(tuple(record.values()))
            if len(self._met) > known:
                new.append(record)
        self.records += new
        lines = [line for line in map(_line, new) if line not in self._named]
        if lines and self.file is not None:
            _append(self.file, lines)


def write_quarantine(path: Path, records: Iterable[Record]) -> list[Record]:
    """Makes the file whole: what it holds already, of earlier starts too, and `records`, each once.

    Returns:
        All that it names now; without any there is no file.

    Raises:
        OSError: the file can't be written.
    """
    lines = list(dict.fromkeys([*_lines(path), *map(_line, records)]))
    if lines:
        write_atomically(path, "".join(f"{line}\n" for line in lines).encode())
    return [json.loads(line) for line in lines]


def _lines(path: Path | None) -> Iterator[str]:
    """The whole lines of a file, if it is there."""
    if path is not None and path.is_file():
        yield from filter(_is_record, path.read_text(encoding="utf-8", errors="replace").split("\n"))


def _append(path: Path, lines: Iterable[str]) -> None:
    text = "".join(f"{line}\n" for line in lines).encode()
    with writing(path):
        descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            os.write(descriptor, text)  # in one piece: other ranks write here too
        finally:
            os.close(descriptor)


def _line(record: Record) -> str:
    return json.dumps(record, ensure_ascii=False)


def _is_record(line: str) -> bool:
    """Whether a line is whole: one that a crash or another machine's write cut is left out."""
    try:
        record = json.loads(line)
    except ValueError:
        return False
    return isinstance(record, dict) and record.keys() == {"shard", "key", "reason"}
