"""Building corpora for a person: progress while it runs, a summary at the end."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from rich.console import Console

from ask_dist.data.bars import bars
from ask_dist.data.corpora import BuildSummary, open_sounds, sampled_scenes

RECIPES: dict[str, Callable[..., BuildSummary]] = {
    "sampled-scenes": sampled_scenes.build,
    "open-sounds": open_sounds.build,
}


def build_with_progress(
    recipe: str, folder: Path, seed: int, sizes: dict[str, int], swap_captions: float, console: Console
) -> None:
    """Builds a corpus by its recipe's name and prints what is in it, where it comes from and under which licence."""
    with bars(console) as update:
        summary = RECIPES[recipe](folder, seed=seed, swap_captions=swap_captions, progress=update, **sizes)
    console.print(f"{folder}: {summary}", highlight=False, soft_wrap=True)
