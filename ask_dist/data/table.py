"""A table of audio files and captions (CSV or JSONL) as a list of rows, one an audio file."""

from __future__ import annotations

import csv
import itertools
import json
import posixpath
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ask_dist.errors import InputError

CAPTION_COLUMN = re.compile(r"captions?|caption_\d+")


@dataclass
class Row:
    """One audio file: its line in the table (the first, where it has several), its path as written, its texts."""

    line: int
    audio: str
    captions: list[str]
    classes: list[str]


def read_table(table: Path, audio_column: str, caption_columns: Sequence[str] | None) -> list[Row]:
    """Read `.csv` or `.jsonl`; rows that name the same audio are joined, captions that repeat are kept once.

    Captions come from `caption_columns`, by default from every column called "caption", "captions" or "caption_1"
    and so on; classes from the column "class" or "classes". A cell may be a string or, in JSONL, a list of strings;
    a CSV cell of classes separates them with ";".

    Raises:
        InputError: the file is missing, unreadable, empty, of another type, or lacks the columns.
    """
    rows: dict[str, Row] = {}
    columns: dict[str, None] = {}
    for line, cells in _lines(table):
        columns.update(dict.fromkeys(cells))
        names = (
            [name for name in cells if CAPTION_COLUMN.fullmatch(name)] if caption_columns is None else caption_columns
        )
        audio = _path(cells.get(audio_column))
        row = rows.setdefault(audio, Row(line, audio, [], []))
        row.captions = _joined(row.captions, *(_texts(cells.get(name)) for name in names))
        classes = _texts(cells.get("classes", cells.get("class")), ";" if table.suffix == ".csv" else None)
        row.classes = _joined(row.classes, classes)
    if not rows:
        raise InputError(f"{table} has no rows: give at least one audio file with a caption")
    missing = [name for name in (audio_column, *(caption_columns or ())) if name not in columns]
    if caption_columns is None and not any(map(CAPTION_COLUMN.fullmatch, columns)):
        missing.append("caption")
    if missing:
        raise InputError(f"{table} has no column {', '.join(missing)} among {', '.join(columns)}: rename or name yours")
    return list(rows.values())


def _path(cell: Any) -> str:
    """A path as written, but "a/./b" and "a//b" are "a/b", so that rows of one file meet; "" where there is none."""
    return posixpath.normpath(cell.strip()) if isinstance(cell, str) and cell.strip() else ""


def _lines(table: Path) -> Iterator[tuple[int, Mapping[str, Any]]]:
    if table.suffix not in (".csv", ".jsonl"):
        raise InputError(f"table {table} is neither .csv nor .jsonl: convert or rename it")
    try:
        with table.open(encoding="utf-8-sig", newline="") as file:
            if table.suffix == ".csv":
                reader = csv.DictReader(file, restval="", restkey="more cells than the header has")
                for cells in reader:
                    yield reader.line_num, cells
            else:
                for line, text in enumerate(file, 1):
                    if text.strip():
                        yield line, _object(table, line, text)
    except OSError as error:
        raise InputError(f"can't read the table {table} ({error.strerror}): check the path") from None
    except (UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{table} is not UTF-8 text in {table.suffix[1:]} format ({error}): export it again") from None


def _object(table: Path, line: int, text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError as error:
        raise InputError(f"{table}, line {line} is not JSON ({error}): one object a line is needed") from None
    if not isinstance(value, dict):
        raise InputError(f"{table}, line {line} is a {type(value).__name__}: one object a line is needed")
    return value


def _texts(cell: Any, separator: str | None = None) -> list[str]:
    """The strings of a cell, stripped, without empty ones."""
    texts = [text for text in (cell if isinstance(cell, list) else [cell]) if isinstance(text, str)]
    parts = [part.strip() for text in texts for part in (text.split(separator) if separator else [text])]
    return [part for part in parts if part]


def _joined(*lists: list[str]) -> list[str]:
    """All the strings in order, each once."""
    return list(dict.fromkeys(itertools.chain(*lists)))
