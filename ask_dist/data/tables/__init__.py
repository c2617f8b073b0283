"""Tables of published corpora, read as they are, into rows for packing. docs/data.md says where they come from."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from ask_dist.data.table import Row
from ask_dist.data.tables import audiocaps, audiosetcaps, clotho, esc50, wavcaps


class Reader(Protocol):
    """Reads one kind of published table."""

    def __call__(self, table: Path, audio_folder: Path, beside: Sequence[Path] = ()) -> list[Row]:
        """The rows of the table, one an audio file, with paths below `audio_folder`.

        Args:
            table: the published file.
            audio_folder: where the audio lies, in any folders below.
            beside: further published files that belong to it, such as blacklists.

        Raises:
            InputError: a file is missing, or is not what was published.
        """
        ...


LEAVE_OUT = ("audiosetcaps", "wavcaps")  # these leave out the clips that the files beside their table name
TAKE_BESIDE = ("audiosetcaps", "clotho", "wavcaps")
READERS: dict[str, Reader] = {
    "audiocaps": audiocaps.read,
    "audiosetcaps": audiosetcaps.read,
    "clotho": clotho.read,
    "esc50": esc50.read,
    "wavcaps": wavcaps.read,
}
