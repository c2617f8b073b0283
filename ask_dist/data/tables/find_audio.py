"""Audio files below a folder by their names, since everybody unpacks published corpora in another way."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from ask_dist.data.table import Row
from ask_dist.errors import InputError

EXTENSIONS = (".flac", ".wav", ".ogg", ".opus", ".mp3", ".aif", ".aiff")


class AudioFiles:
    """The audio files below a folder, in whatever folders.

    Raises:
        InputError: there is no such folder, or no audio file below it.
    """

    def __init__(self, folder: Path) -> None:
        if not folder.is_dir():
            raise InputError(f"no audio folder {folder}: correct the path")
        self._by_stem: dict[str, list[str]] = {}
        for place, folders, files in os.walk(folder):
            folders.sort()
            for name in sorted(files):
                stem, extension = os.path.splitext(name)
                if extension.lower() in EXTENSIONS:
                    path = os.path.relpath(os.path.join(place, name), folder)
                    self._by_stem.setdefault(stem, []).append(path)
        if not self._by_stem:
            raise InputError(f"no audio file ({', '.join(EXTENSIONS)}) below {folder}: unpack them or correct the path")

    def give(self, row: Row, names: Sequence[str]) -> None:
        """Set the row's audio to the file with the first of the names, without extension, that there is one of.

        A row with none, or with several of which nobody says which one is meant, is refused.
        """
        found = next((name for name in names if name in self._by_stem), None)
        if found is None:
            row.audio, row.refused = names[0], f"no audio file is called {' or '.join(dict.fromkeys(names))}"
        else:
            row.audio, *others = self._by_stem[found]
            if others:
                row.refused = f"several audio files are called {found}, such as {row.audio} and {others[0]}"
