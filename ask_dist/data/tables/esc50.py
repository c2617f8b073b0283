"""ESC-50 (Piczak, ACM Multimedia 2015) for zero-shot classification: the class, in a sentence, is the caption."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ask_dist.data.table import Row, read_lines, require
from ask_dist.data.tables.find_audio import AudioFiles
from ask_dist.data.tables.recordings import freesound

TEMPLATE = "this is the sound of {}"


def read(table: Path, audio_folder: Path, beside: Sequence[Path] = ()) -> list[Row]:
    """See Reader. The table is `meta/esc50.csv`; `category` becomes the class and `fold` stays in the JSON.

    A file is called fold-recording-take-class, the recording by its number at Freesound.
    """
    files = AudioFiles(audio_folder)
    rows = []
    for line, cells in read_lines(table):
        require(table, cells, ("filename", "fold", "category"))
        name = cells["category"].replace("_", " ")
        stem = Path(cells["filename"]).stem
        extra = {"fold": cells["fold"]} | freesound("".join(stem.split("-")[1:2]))
        row = Row(line, "", [TEMPLATE.format(name)], [name], extra, f"esc50-{stem}")
        files.give(row, [stem])
        rows.append(row)
    return rows
