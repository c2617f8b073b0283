"""Building and packing corpora for a person: progress while it runs, a summary at the end."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from ask_dist.data.corpora import BuildSummary, open_sounds, sampled_scenes
from ask_dist.data.pack import pack_table

RECIPES: dict[str, Callable[..., BuildSummary]] = {
    "sampled-scenes": sampled_scenes.build,
    "open-sounds": open_sounds.build,
}


def build_with_progress(
    recipe: str, folder: Path, seed: int, sizes: dict[str, int], swap_captions: float, console: Console
) -> None:
    """Builds a corpus by its recipe's name and prints what is in it, where it comes from and under which licence."""
    with _bars(console) as update:
        summary = RECIPES[recipe](folder, seed=seed, swap_captions=swap_captions, progress=update, **sizes)
    console.print(f"{folder}: {summary}", highlight=False, soft_wrap=True)


def pack_with_progress(
    table: Path,
    audio_folder: Path,
    folder: Path,
    split: str,
    sample_rate: int,
    clips_per_shard: int,
    console: Console,
) -> None:
    """Packs a table of clips into shards and prints how many were packed and why others were not."""
    with _bars(console) as update:
        summary = pack_table(
            table,
            audio_folder,
            folder,
            split,
            sample_rate=sample_rate,
            clips_per_shard=clips_per_shard,
            progress=lambda done, total: update(split, done, total),
        )
    skipped = f", {len(summary.skipped)} skipped (see {folder / 'quarantine.jsonl'})" if summary.skipped else ""
    console.print(
        f"{folder}: {summary.clips} clips, {summary.seconds / 3600:.2f} hours, {summary.shards} shards{skipped}",
        highlight=False,
        soft_wrap=True,
    )


@contextmanager
def _bars(console: Console) -> Iterator[Callable[[str, int, int], None]]:
    progress = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=console,
        disable=not console.is_terminal,
    )
    tasks = {}
    with progress:

        def update(stage: str, done: int, total: int) -> None:
            if stage not in tasks:
                tasks[stage] = progress.add_task(stage, total=total)
            progress.update(tasks[stage], completed=done, total=total)

        yield update
