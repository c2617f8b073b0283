"""Packing tables and looking into shards for a person: progress while it runs, a summary at the end."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from ask_dist.data.bars import bars
from ask_dist.data.pack_rows import PackSettings
from ask_dist.data.packing import QUARANTINE, pack_table
from ask_dist.data.sources import Source
from ask_dist.data.table import read_table
from ask_dist.data.tables import LEAVE_OUT, READERS, TAKE_BESIDE
from ask_dist.errors import InputError


def pack(
    table: Path,
    source: Source,
    folder: Path,
    settings: PackSettings,
    console: Console,
    *,
    recipe: str | None = None,
    beside: Sequence[Path] = (),
    audio_column: str = "audio",
    caption_columns: Sequence[str] | None = None,
    processes: int | None = None,
    again: bool = False,
) -> None:
    """Packs a table of clips into shards and prints how many were packed and why others were not.

    Args:
        recipe: the name of a reader in tables/, which knows the columns; None: `audio_column` and `caption_columns`.
        beside: what the recipe reads beside the table.
    """
    if re.match(r"[a-z][a-z0-9+.-]*:/", str(folder)):
        raise InputError(f"{folder}: shards are written into local folders; pack into one and copy it there")
    if not source.folder.is_dir():
        raise InputError(f"no audio folder {source.folder}: correct the path")
    if beside and recipe not in TAKE_BESIDE:
        raise InputError(f"{beside[0]}: only --recipe {', '.join(TAKE_BESIDE)} reads files beside the table")
    if recipe is None:
        rows = read_table(table, audio_column, caption_columns)
    else:
        rows = READERS[recipe](table, source.folder, beside)
    if beside and recipe in LEAVE_OUT:
        left_out = sum(row.refused in {f"in {path.name}" for path in beside} for row in rows)
        names = ", ".join(path.name for path in beside)
        console.print(f"{names}: {left_out} of {len(rows)} rows are left out", highlight=False, soft_wrap=True)
    with bars(console) as update:
        summary = pack_table(
            rows,
            source,
            folder,
            settings,
            name=str(table),
            processes=processes,
            again=again,
            progress=lambda done, total: update(settings.split, done, total),
        )
    kept = f" ({summary.kept} of the table's files were done before; --again packs them anew)" if summary.kept else ""
    skipped = f", {len(summary.skipped)} skipped (see {folder / QUARANTINE})" if summary.skipped else ""
    if summary.lost:
        skipped += f", {summary.lost} of them out of reach: the same command tries these again"
    console.print(
        f"{folder}: {summary.clips} clips, {summary.seconds / 3600:.2f} hours, {summary.shards} shards{skipped}{kept}",
        highlight=False,
        soft_wrap=True,
    )
