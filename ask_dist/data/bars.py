"""Progress of long work on clips: bars on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TaskID,
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

    Where there is no terminal (a job's log), the stage at work tells the same in a line, every `PLAIN_SECONDS`.
    """
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), RateColumn(), TimeElapsedColumn())
    progress = Progress(*columns, TimeRemainingColumn(), console=console, disable=not console.is_terminal)
    tasks: dict[str, TaskID] = {}
    begun: dict[str, tuple[float, int]] = {}  # when each stage was first heard of, and how far it was
    told = time.monotonic()
    with progress:

        def update(stage: str, done: int, total: int) -> None:
            nonlocal told
            start, before = begun.setdefault(stage, (time.monotonic(), done))
            if not console.is_terminal and time.monotonic() - told >= PLAIN_SECONDS:
                told = time.monotonic()
                pace = _pace(done - before, told - start, total - done)
                line = f"{stage}: {done:,} of {total:,} ({done / total:.0%}){pace}"
                console.print(line, highlight=False, soft_wrap=True)
            if stage not in tasks:
                tasks[stage] = progress.add_task(stage, total=total)
            progress.update(tasks[stage], completed=done, total=total)

        yield update


def _pace(done: int, seconds: float, left: int) -> str:
    """The rate of what was done in so many seconds, and the time that the rest takes at that."""
    if not seconds:
        return ""
    rate = done / seconds
    return f", {rate:.3g}/s" + (f", {timedelta(seconds=round(left / rate))} left" if rate else "")
