"""AudioCaps (Kim et al., NAACL 2019): a CSV a split, a line a caption; a test clip has five."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ask_dist.data.table import Row, joined, read_lines, require, texts
from ask_dist.data.tables.find_audio import AudioFiles
from ask_dist.data.tables.recordings import youtube

COLUMNS = ("audiocap_id", "youtube_id", "start_time", "caption")


def read(table: Path, audio_folder: Path, beside: Sequence[Path] = ()) -> list[Row]:
    """See Reader. A clip is a `youtube_id` with its `start_time`; both stay in its JSON.

    The audio is `<youtube_id>_<start_time>`, `<youtube_id>`, either with a Y before it, or, as some download scripts
    have it, the `<audiocap_id>` of any of the clip's captions.
    """
    files = AudioFiles(audio_folder)
    rows: dict[tuple[str, str], Row] = {}
    names: dict[tuple[str, str], list[str]] = {}
    for line, cells in read_lines(table):
        require(table, cells, COLUMNS)
        number, video, start = (str(cells[name]).strip() for name in COLUMNS[:3])
        clip = video, start
        extra = {"youtube_id": video, "start_time": start} | youtube(video)
        row = rows.setdefault(clip, Row(line, "", [], [], extra, f"audiocaps-{video}_{start}"))
        row.captions += texts(cells["caption"])
        names.setdefault(clip, [f"{video}_{start}", f"Y{video}_{start}", video, f"Y{video}"]).append(number)
    for clip, row in rows.items():
        row.captions = joined(row.captions)
        files.give(row, names[clip])
    return list(rows.values())
