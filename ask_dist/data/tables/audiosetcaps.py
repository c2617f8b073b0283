"""AudioSetCaps (Bai et al., 2024): one CSV each for AudioSet, VGGSound and YouTube-8M, a line a clip."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from ask_dist.data.table import Row, joined, read_lines, require, texts
from ask_dist.data.tables.find_audio import AudioFiles
from ask_dist.data.tables.recordings import youtube


def read(table: Path, audio_folder: Path, beside: Sequence[Path] = ()) -> list[Row]:
    """See Reader. The audio is called as its `id`, with the Y that stands before AudioSet's ids or without it.

    Of the other two tables an id is a video's with the place of the clip in it, such as `OxPnZzn1_L8_000883`.

    Beside it may stand tables with a column `youtube_id`, such as AudioCaps' test split: these clips are not packed.
    """
    held_out = {video: path for path in beside for video in _videos(path)}
    files = AudioFiles(audio_folder)
    rows: dict[str, Row] = {}
    for line, cells in read_lines(table):
        require(table, cells, ("id", "caption"))
        clip = str(cells["id"]).strip()
        row = rows.setdefault(clip, Row(line, "", [], [], {"id": clip} | youtube(clip), f"audiosetcaps-{clip}"))
        row.captions += texts(cells["caption"])
    for clip, row in rows.items():
        row.captions = joined(row.captions)
        files.give(row, [clip, clip.removeprefix("Y")])
        video = row.extra.get("recording")
        if video in held_out:
            row.refused = f"in {held_out[video].name}"
    return list(rows.values())


def _videos(path: Path) -> Iterator[str]:
    for _, cells in read_lines(path):
        require(path, cells, ("youtube_id",))
        yield from youtube(cells["youtube_id"]).values()
