"""AudioSetCaps (Bai et al., 2024): one CSV each for AudioSet, VGGSound and YouTube-8M, a line a clip."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ask_dist.data.table import Row, joined, read_lines, require, texts
from ask_dist.data.tables.find_audio import AudioFiles


def read(table: Path, audio_folder: Path, beside: Sequence[Path] = ()) -> list[Row]:
    """See Reader. The audio is called as its `id`, with the Y that stands before AudioSet's ids or without it."""
    files = AudioFiles(audio_folder)
    rows: dict[str, Row] = {}
    for line, cells in read_lines(table):
        require(table, cells, ("id", "caption"))
        clip = str(cells["id"]).strip()
        row = rows.setdefault(clip, Row(line, "", [], [], {"id": clip}))
        row.captions = joined(row.captions, texts(cells["caption"]))
    for clip, row in rows.items():
        files.give(row, [clip, clip.removeprefix("Y")])
    return list(rows.values())
