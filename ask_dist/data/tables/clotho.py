"""Clotho (Drossos et al., ICASSP 2020): a CSV of captions a split, five a clip, and one of metadata."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ask_dist.data.table import CAPTION_COLUMN, Row, joined, read_lines, require, texts
from ask_dist.data.tables.find_audio import AudioFiles
from ask_dist.data.tables.recordings import freesound


def read(table: Path, audio_folder: Path, beside: Sequence[Path] = ()) -> list[Row]:
    """See Reader. The table is `clotho_captions_*.csv`; `clotho_metadata_*.csv` may stand beside it.

    Of the metadata each clip's JSON gets `keywords`, a list, and `sound_id`, the clip's number at Freesound.
    """
    files = AudioFiles(audio_folder)
    metadata = {name: more for path in beside for name, more in _metadata(path)}
    rows: dict[str, Row] = {}
    for line, cells in read_lines(table):
        require(table, cells, ("file_name", "caption_1"))
        name = str(cells["file_name"])
        captions = joined(*(texts(cells[column]) for column in cells if CAPTION_COLUMN.fullmatch(column)))
        rows[name] = Row(line, name, captions, [], metadata.get(name, {}), f"clotho-{Path(name).stem}")
        files.give(rows[name], [Path(name).stem, Path(name.strip()).stem])
    return list(rows.values())


def _metadata(path: Path) -> list[tuple[str, dict[str, Any]]]:
    """The file's name and what is taken of its metadata, for each line."""
    found = []
    for _, cells in read_lines(path):
        require(path, cells, ("file_name", "keywords", "sound_id"))
        more = {"keywords": texts(_as_latin_1(cells["keywords"]), ";"), "sound_id": cells["sound_id"].strip()}
        found.append((cells["file_name"], more | freesound(cells["sound_id"])))
    return found


def _as_latin_1(cell: str) -> str:
    """The cell; if it has bytes that are not UTF-8, as Latin-1, in which some of these files are."""
    try:
        cell.encode()
    except UnicodeEncodeError:
        return cell.encode(errors="surrogateescape").decode("latin-1")
    return cell
