"""WavCaps (Mei et al., 2023): a JSON file for each of its four sources, and blacklists of what test sets hold."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ask_dist.data.table import Row, texts
from ask_dist.data.tables.find_audio import AudioFiles
from ask_dist.data.tables.recordings import freesound, youtube
from ask_dist.errors import InputError

# What begins the published file's name, and what the blacklists call the source. BBC and SoundBible stand in none of
# them, but have ids that look like Freesound's.
SOURCES = {"as": "AudioSet", "fsd": "FreeSound", "bbc": "BBC", "sb": "SoundBible"}
RECORDINGS = {"AudioSet": youtube, "FreeSound": freesound}  # of the others no test set is made


def read(table: Path, audio_folder: Path, beside: Sequence[Path] = ()) -> list[Row]:
    """See Reader. The table is one of `as_final.json`, `fsd_final.json`, `bbc_final.json` and `sb_final.json`.

    Blacklists may stand beside it; the clips that they name are not packed. The audio is called as its `id`.
    """
    source = SOURCES.get(table.name.partition("_")[0])
    if source is None:
        raise InputError(
            f"{table}: its source is told by its published name, {', '.join(SOURCES)}_final.json; rename it"
        )
    banned = {name: path for path in beside for name in _blacklist(path, source)}
    files = AudioFiles(audio_folder)
    rows: dict[str, Row] = {}
    for number, item in enumerate(_items(table), 1):
        clip = str(item["id"])
        stem = _stem(clip)
        extra = {"id": clip} | (RECORDINGS[source](stem) if source in RECORDINGS else {})
        row = rows.setdefault(clip, Row(number, "", texts(item["caption"]), [], extra, f"{source.lower()}-{stem}"))
        files.give(row, [stem])
        if stem in banned:
            row.refused = f"in {banned[stem].name}"
    return list(rows.values())


def _items(table: Path) -> list[dict[str, Any]]:
    content = _json(table)
    items = content.get("data") if isinstance(content, dict) else content
    if not isinstance(items, list) or not items or not all(isinstance(item, dict) for item in items):
        raise InputError(f"{table} has no list of clips under 'data': give one of WavCaps' *_final.json")
    for number, item in enumerate(items, 1):
        if "id" not in item or "caption" not in item:
            raise InputError(f"{table}, clip {number} has no id and caption: give one of WavCaps' *_final.json")
    return items


def _blacklist(path: Path, source: str) -> list[str]:
    """The ids that a blacklist has of a source, without extension."""
    content = _json(path)
    if not isinstance(content, dict) or not all(isinstance(ids, list) for ids in content.values()):
        raise InputError(f"{path} is no blacklist: an object with a list of ids for each source is needed")
    if source in RECORDINGS and source not in content:
        found = ", ".join(list(content)[: len(SOURCES)]) or "nothing"
        raise InputError(f"{path} has no list of {source}'s ids, only {found}: give one of WavCaps' blacklists")
    return [_stem(str(name)) for name in content.get(source, [])]


def _stem(clip: str) -> str:
    return clip.removesuffix(".wav")


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"can't read {path} ({error.strerror}): check the path") from None
    except (ValueError, RecursionError) as error:
        raise InputError(
            f"{path} is not JSON ({error}): download it again, with Git LFS where it is kept there"
        ) from None
