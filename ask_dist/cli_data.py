"""The commands that make shards and look into them: `ask-dist pack`, `ask-dist shards`."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from ask_dist.files import writing

shards_app = typer.Typer(help="Look into shards: check, measure, show.", no_args_is_help=True)
console = Console()

ShardFolder = Annotated[Path, typer.Argument(metavar="FOLDER", help="folder of shards, such as shards/mine/train")]
Processes = Annotated[int | None, typer.Option(min=1, help="default: one a core")]


class AudioFormat(StrEnum):
    """What a shard holds of an audio file."""

    flac = "flac"
    original = "original"


class PublishedTable(StrEnum):
    """Published corpora whose tables are read as they are."""

    audiocaps = "audiocaps"
    audiosetcaps = "audiosetcaps"
    clotho = "clotho"
    esc50 = "esc50"
    wavcaps = "wavcaps"


def pack(
    table: Annotated[Path, typer.Argument(help="CSV, JSONL or Parquet of audio path or URL and caption(s)")],
    folder: Annotated[Path, typer.Argument(help="folder for the shards of this split")],
    audio_folder: Annotated[
        Path | None, typer.Option(help="where the paths begin; default: the table's folder")
    ] = None,
    recipe: Annotated[PublishedTable | None, typer.Option(help="the table is one that was published")] = None,
    beside: Annotated[
        list[Path] | None, typer.Option(help="with --recipe: metadata (clotho), blacklist (wavcaps); repeatable")
    ] = None,
    audio_column: Annotated[str, typer.Option(help="column of paths or URLs")] = "audio",
    caption_column: Annotated[
        list[str] | None, typer.Option(help="repeatable; default: caption, captions, caption_1, ...")
    ] = None,
    split: Annotated[str, typer.Option(help="name of the split, used in the shards' names")] = "train",
    audio_format: Annotated[
        AudioFormat, typer.Option("--format", help="16-bit FLAC, or FLAC, WAV, OGG and MP3 as they are")
    ] = AudioFormat.flac,
    sample_rate: Annotated[int, typer.Option(min=0, max=192000, help="Hz of the FLAC; 0: each file's own")] = 16000,
    keep_channels: Annotated[bool, typer.Option("--keep-channels", help="FLAC with all channels, not mono")] = False,
    clips_per_shard: Annotated[int, typer.Option(min=1, help="clips a tar file")] = 250,
    shard_mib: Annotated[int, typer.Option(min=1, help="a tar file that has reached this size ends")] = 1024,
    key_prefix: Annotated[str, typer.Option(help="of all keys, which must be unique over folders used together")] = "",
    max_seconds: Annotated[float, typer.Option(min=0.1, help="longer audio is skipped")] = 600.0,
    max_mib: Annotated[int, typer.Option(min=1, help="larger audio files are skipped")] = 128,
    timeout: Annotated[float, typer.Option(min=0.1, help="seconds to wait for a URL")] = 30.0,
    tries: Annotated[int, typer.Option(min=1, help="of a URL that fails")] = 3,
    processes: Processes = None,
    again: Annotated[bool, typer.Option("--again", help="keep nothing that an earlier call packed")] = False,
) -> None:
    """Write WebDataset shards from a table of clips and captions; a second call goes on where one stopped.

    Example: ask-dist pack captions.csv shards/mine/train --audio-folder recordings
    """
    from ask_dist.data.command import pack as run
    from ask_dist.data.pack_rows import PackSettings
    from ask_dist.data.sources import Source

    settings = PackSettings(
        split,
        audio_format is AudioFormat.original,
        sample_rate,
        keep_channels,
        clips_per_shard,
        shard_mib,
        max_seconds,
        key_prefix,
    )
    with writing(folder):
        run(
            table,
            Source(audio_folder or table.parent, max_mib * 2**20, timeout, tries),
            folder,
            settings,
            console,
            recipe=recipe and recipe.value,
            beside=beside or [],
            audio_column=audio_column,
            caption_columns=caption_column or None,
            processes=processes,
            again=again,
        )


@shards_app.command("verify")
def shards_verify(
    folder: ShardFolder,
    decode: Annotated[bool, typer.Option("--decode", help="decode every clip too")] = False,
    processes: Processes = None,
) -> None:
    """Read every byte of a folder's shards; exit code 2 names shard and key of what is not as packed.

    Example: ask-dist shards verify shards/mine/train --decode
    """
    from ask_dist.data.inspect.command import verify

    verify(folder, decode, processes, console)


@shards_app.command("stats")
def shards_stats(
    folder: ShardFolder,
    output: Annotated[Path | None, typer.Option(help="also write the figures to this JSON file")] = None,
    plot: Annotated[Path | None, typer.Option(help="also draw them into this PNG file")] = None,
    processes: Processes = None,
) -> None:
    """Count clips, hours and captions, and measure lengths, levels and rates.

    Example: ask-dist shards stats shards/mine/train --plot stats.png
    """
    from ask_dist.data.inspect.command import stats

    stats(folder, output, plot, processes, console)


@shards_app.command("show")
def shards_show(
    folder: ShardFolder,
    key: Annotated[str | None, typer.Argument(help="of a clip; default: the first ten")] = None,
    save: Annotated[Path | None, typer.Option(help="copy the audio into this folder")] = None,
) -> None:
    """Show what a clip's captions say.

    Example: ask-dist shards show shards/mine/train dogs_bark_01 --save hits
    """
    from ask_dist.data.inspect.command import show

    show(folder, key, save, console)
