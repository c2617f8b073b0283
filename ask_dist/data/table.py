"""A table of audio files and captions (CSV, JSONL or Parquet) as a list of rows, one an audio file."""

from __future__ import annotations

import csv
import itertools
import json
import posixpath
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ask_dist.errors import InputError

CAPTION_COLUMN = re.compile(r"captions?|caption_\d+")
URL = re.compile(r"[a-z][a-z0-9+.-]*://")
LONGEST_CELL = 2**24  # characters; the csv module's own limit is 128 KiB, and one such cell would end the table


@dataclass(slots=True)
class Row:
    """One audio file.

    Attributes:
        line: in the table; the first, where it has several.
        audio: its path as written, or its URL.
        captions: each once. What was not UTF-8 in the table is in them as surrogates.
        classes: what sounds in it.
        extra: what else its clip's JSON says.
        name: what its key is made from; "" for its audio.
        refused: why it is not to be packed; "" where nothing is known against it.
    """

    line: int
    audio: str
    captions: list[str]
    classes: list[str]
    extra: dict[str, Any] = field(default_factory=dict)
    name: str = ""
    refused: str = ""


def read_table(table: Path, audio_column: str = "audio", caption_columns: Sequence[str] | None = None) -> list[Row]:
    """Read `.csv`, `.jsonl` or `.parquet`; rows that name the same audio are joined, repeated captions kept once. One
    that names none is refused.

    Captions come from `caption_columns`, by default from every column called "caption", "captions" or "caption_1"
    and so on; classes from the column "class" or "classes". A cell may be a string or, in JSONL and Parquet, a list of
    strings; a CSV cell of classes separates them with ";".

    Raises:
        InputError: the file is missing, unreadable, empty, of another type, or lacks the columns.
    """
    rows: dict[str | int, Row] = {}
    columns: dict[str, None] = {}
    for line, cells in read_lines(table):
        columns.update(dict.fromkeys(cells))
        names = (
            [name for name in cells if CAPTION_COLUMN.fullmatch(name)] if caption_columns is None else caption_columns
        )
        audio, refused = _place(cells.get(audio_column))
        row = rows.setdefault(line if refused else audio, Row(line, audio, [], [], refused=refused))
        row.captions += (text for name in names for text in texts(cells.get(name)))
        row.classes += texts(cells.get("classes", cells.get("class")), ";" if table.suffix == ".csv" else None)
    if not rows:
        raise InputError(f"{table} has no rows: give at least one audio file with a caption")
    require(table, columns, [audio_column, *(caption_columns or ())])
    if caption_columns is None and not any(map(CAPTION_COLUMN.fullmatch, columns)):
        require(table, columns, ["caption"])
    for row in rows.values():
        row.captions, row.classes = joined(row.captions), joined(row.classes)
    return list(rows.values())


def require(table: Path, columns: Mapping[str, Any], names: Sequence[str]) -> None:
    """Raise InputError unless the table has all the columns called `names`."""
    missing = [name for name in names if name not in columns]
    if missing:
        raise InputError(f"{table} has no column {', '.join(missing)} among {', '.join(columns)}: rename or name yours")


def read_captions(table: Path) -> list[str]:
    """The distinct captions of `.txt` (one a line), or of a table as in `read_table`, in order.

    Raises:
        InputError: the file is missing, unreadable, of another type, or holds no caption.
    """
    if table.suffix == ".txt":
        try:
            lists = [texts(line) for line in table.read_text(encoding="utf-8-sig").split("\n")]
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"{table} is no readable UTF-8 text ({error}): check it, or export it again") from None
    else:
        named = ((name, cell) for _, cells in read_lines(table) for name, cell in cells.items())
        lists = [texts(cell) for name, cell in named if CAPTION_COLUMN.fullmatch(name)]
    captions = [caption.encode("utf-8", "replace").decode() for caption in joined(*lists)]
    if not captions:
        raise InputError(f"{table} holds no caption: give one a line, or a column named caption")
    return captions


def read_lines(table: Path) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """The number and the cells by column of each line of a `.csv`, `.jsonl` or `.parquet`.

    Raises:
        InputError: the file is missing, unreadable or of another type.
    """
    readers = {".csv": _csv_lines, ".jsonl": _json_lines, ".parquet": _parquet_lines}
    if table.suffix not in readers:
        raise InputError(f"table {table} is neither {', '.join(readers)}: convert or rename it")
    try:
        yield from readers[table.suffix](table)
    except OSError as error:
        raise InputError(f"can't read the table {table} ({error.strerror or error}): check the path") from None
    except (UnicodeError, csv.Error) as error:
        raise InputError(f"{table} is not UTF-8 text in {table.suffix[1:]} format ({error}): export it again") from None


def _csv_lines(table: Path) -> Iterator[tuple[int, Mapping[str, Any]]]:
    csv.field_size_limit(LONGEST_CELL)
    # One caption in another encoding must not cost the whole table: it is carried along and named when it is packed.
    with table.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        reader = csv.DictReader(file, restval="", restkey="more cells than the header has")
        for name in reader.fieldnames or ():
            name.encode("utf-8")
        for cells in reader:
            yield reader.line_num, cells


def _json_lines(table: Path) -> Iterator[tuple[int, Mapping[str, Any]]]:
    with table.open(encoding="utf-8-sig", errors="surrogateescape") as file:
        for line, text in enumerate(file, 1):
            if text.strip():
                yield line, _object(table, line, text)


def _parquet_lines(table: Path) -> Iterator[tuple[int, Mapping[str, Any]]]:
    import pyarrow
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(table) as file:
            # Audio that some put into the table itself would be read for nothing.
            names = [column.name for column in file.schema_arrow if not _is_binary(column.type)]
            batches = (batch.to_pylist() for batch in file.iter_batches(columns=names))
            yield from enumerate(itertools.chain.from_iterable(batches), 1)
    except pyarrow.ArrowInvalid as error:
        raise InputError(f"{table} is not Parquet ({str(error).splitlines()[0]}): export it again") from None


def _is_binary(kind: Any) -> bool:
    from pyarrow import types

    return types.is_binary(kind) or types.is_large_binary(kind) or types.is_struct(kind)


def _object(table: Path, line: int, text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{table}, line {line} is not JSON ({error}): one object a line is needed") from None
    if not isinstance(value, dict):
        raise InputError(f"{table}, line {line} is a {type(value).__name__}: one object a line is needed")
    return value


def _place(cell: Any) -> tuple[str, str]:
    """A URL, or a path where "a/./b" and "a//b" are "a/b", so that rows of one file meet; and what is wrong with it."""
    if cell is not None and not isinstance(cell, str):
        return "", f"the path is of type {type(cell).__name__}, not a string"
    text = (cell or "").strip()
    return posixpath.normpath(text) if text and not URL.match(text) else text, "" if text else "no path"


def texts(cell: Any, separator: str | None = None) -> list[str]:
    """The strings of a cell, stripped, without empty ones."""
    found = [text for text in (cell if isinstance(cell, list) else [cell]) if isinstance(text, str)]
    parts = [part.strip() for text in found for part in (text.split(separator) if separator else [text])]
    return [part for part in parts if part]


def joined(*lists: list[str]) -> list[str]:
    """All the strings in order, each once."""
    return list(dict.fromkeys(itertools.chain(*lists)))
