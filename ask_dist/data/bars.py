"""Progress of long work on clips: bars on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

PLAIN_SECONDS = 30.0


class RateColumn(ProgressColumn):
    """Clips a second, lately."""

    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text("" if speed is None else f"{speed:.3g}/s")


@contextmanager
def bars(console: Console) -> Iterator[Callable[[str, int, int], None]]:
    """A bar for each stage, with rate and time left; what it yields is called with a stage's name, done and in all.

    Where there is no terminal (a job's log), the stage at work tells how far it is, every `PLAIN_SECONDS`.
    """
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), RateColumn(), TimeElapsedColumn())
    progress = Progress(*columns, TimeRemainingColumn(), console=console, disable=not console.is_terminal)
    tasks = {}
    told = time.monotonic()
    with progress:

        def update(stage: str, done: int, total: int) -> None:
            nonlocal told
            if not console.is_terminal and time.monotonic() - told >= PLAIN_SECONDS:
                told = time.monotonic()
                console.print(f"{stage}: {done:,} of {total:,} ({done / total:.0%})", highlight=False)
            if stage not in tasks:
                tasks[stage] = progress.add_task(stage, total=total)
            progress.update(tasks[stage], completed=done, total=total)

        yield update
