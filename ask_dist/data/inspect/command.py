"""`ask-dist shards`: for a person, with progress while it runs and tables at the end."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ask_dist.data.bars import bars
from ask_dist.data.inspect import plot
from ask_dist.data.inspect.stats import measure, summarize
from ask_dist.data.inspect.tar_clips import TarClip, clips_of
from ask_dist.data.inspect.verify import verify as problems_of
from ask_dist.data.shards import read_sizes, write_text
from ask_dist.errors import InputError
from ask_dist.files import write_atomically

MOST_SHOWN = 100  # problems
FEW = 10  # clips


def verify(folder: Path, decode: bool, processes: int | None, console: Console) -> None:
    """Names everything that is wrong with the shards of a folder.

    Raises:
        InputError: something is.
    """
    with bars(console) as update:
        problems = problems_of(
            folder, decode=decode, processes=processes, progress=lambda done, total: update("verifying", done, total)
        )
    for problem in problems[:MOST_SHOWN]:
        console.print(escape(_printable(str(problem))), highlight=False, soft_wrap=True)
    if problems:
        raise InputError(
            f"{folder}: {len(problems)} problems, the first: {_printable(str(problems[0]))}; restore the shards from a "
            "copy or pack them again"
        )
    shards = read_sizes(folder)["shards"]
    done = "every clip decoded" if decode else "--decode would decode every clip too"
    clips = sum(shard["clips"] for shard in shards.values())
    console.print(
        f"{folder}: {len(shards)} shards, {clips} clips, all as packed; {done}", highlight=False, soft_wrap=True
    )


def stats(folder: Path, output: Path | None, picture: Path | None, processes: int | None, console: Console) -> None:
    """Prints what the shards of a folder hold; writes it as JSON to `output` and as a PNG to `picture`, if asked."""
    with bars(console) as update:
        measured = measure(folder, processes=processes, progress=lambda done, total: update("measuring", done, total))
    figures = summarize(folder, measured)
    console.print(_stats_table(folder, figures))
    if output:
        write_text(output, json.dumps(figures, indent=1) + "\n")
    if picture:
        plot.plot(measured, f"{folder}: {figures['clips']:,} clips, {figures['hours']:.1f} hours", picture)


def _stats_table(folder: Path, figures: dict[str, Any]) -> Table:
    table = Table(title=escape(str(folder)), title_justify="left", show_header=False)
    for name, value in figures.items():
        if isinstance(value, dict):
            value = ", ".join(f"{key}: {part:,.4g}" for key, part in value.items())
        else:
            value = f"{value:,.2f}" if isinstance(value, float) else f"{value:,}"
        table.add_row(name.replace("_", " "), value)
    return table


def show(folder: Path, key: str | None, save: Path | None, console: Console) -> None:
    """Prints the description of one clip, or the captions of the first few; copies their audio, if asked.

    Raises:
        InputError: there is no such clip.
    """
    found: list[tuple[str, TarClip]] = []
    for shard, clip in _clips(folder):
        if key in (None, clip.key):
            found.append((shard, clip))
        if len(found) == (FEW if key is None else 1):
            break
    if not found:
        raise InputError(f"no clip {key!r} in {folder}: `ask-dist shards show {folder}` shows some keys")
    for shard, clip in found:
        console.print(f"[bold]{clip.key}[/] ({shard}, {clip.extension}, {len(clip.audio):,} bytes)", highlight=False)
        for caption in clip.description["captions"]:
            console.print(f"  {escape(_printable(caption))}", highlight=False, soft_wrap=True)
        rest = {name: value for name, value in clip.description.items() if name != "captions"}
        console.print(f"  {escape(json.dumps(rest))}", highlight=False, soft_wrap=True)
        if save:
            save.mkdir(parents=True, exist_ok=True)
            write_atomically(save / f"{clip.key}.{clip.extension}", clip.audio)


def _clips(folder: Path) -> Iterator[tuple[str, TarClip]]:
    for name in sorted(read_sizes(folder)["shards"]):
        for clip in clips_of(folder / name, lambda key, reason: None):
            yield name, clip


def _printable(text: str) -> str:
    """Without what would steer a terminal."""
    return "".join(letter if letter.isprintable() else "\ufffd" for letter in text)
