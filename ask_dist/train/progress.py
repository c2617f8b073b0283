"""What a person sees while a run goes on: a live bar fed by metrics.jsonl."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

POLL_SECONDS = 0.25
PLAIN_SECONDS = 10.0


class Follower:
    """Reads the rows that are appended to a metrics.jsonl after the follower was made."""

    def __init__(self, path: Path) -> None:
        self._path = path
        # A killed run's half row at the end does not count: the resumed run cuts it off before it appends.
        self._offset = path.read_bytes().rfind(b"\n") + 1 if path.is_file() else 0

    def rows(self) -> Iterator[dict[str, Any]]:
        """The complete rows since the last call."""
        if not self._path.is_file():
            return
        with open(self._path, "rb") as file:
            file.seek(self._offset)
            for line in file:
                if not line.endswith(b"\n"):
                    return
                self._offset += len(line)
                yield json.loads(line)


@contextmanager
def live(console: Console, path: Path, total_steps: int) -> Iterator[None]:
    """Shows the progress of the run that writes `path`, and its warnings, until the block ends.

    On a terminal a bar with loss, samples/s, bank rows, staleness, refiner commits and memory; elsewhere (a job's log)
    a line now and then.
    """
    stop = threading.Event()
    follower = Follower(path)
    thread = threading.Thread(target=_follow, args=(console, follower, total_steps, stop), daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def describe(row: dict[str, float]) -> str:
    """A row of metrics as the bar shows it."""
    parts = (
        ("loss", "train/loss", "{:.3f}"),
        ("samples/s", "train/samples_per_second", "{:.0f}"),
        ("bank", "bank/rows", "{:.0f}"),
        ("staleness", "bank/staleness", "{:.0f}"),
        ("commits", "bank/generation", "{:.0f}"),
        ("GiB", "memory/rss_gib", "{:.1f}"),
        ("GPU GiB", "memory/peak_gib", "{:.1f}"),
        ("R@1", "eval/validation/text_to_audio_R@1", "{:.1f}"),
    )
    known = [(name, row.get(key), form) for name, key, form in parts]
    return "  ".join(f"{name} {form.format(value)}" for name, value, form in known if value is not None)


def _follow(console: Console, follower: Follower, total_steps: int, stop: threading.Event) -> None:
    latest: dict[str, float] = {}
    progress = Progress(
        TextColumn("[bold]{task.description}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[facts]}"),
        console=console,
        disable=not console.is_terminal,
    )
    with progress:
        task = progress.add_task("starting", total=total_steps, facts="")
        quiet = 0.0
        while True:
            last_look = stop.is_set()
            for row in follower.rows():
                if "warning" in row:
                    line = escape(row.pop("warning"))
                    console.print(f"[yellow]warning:[/] {line}", highlight=False, soft_wrap=True)
                latest |= row
            quiet += POLL_SECONDS
            if latest:
                step = int(latest["step"])
                progress.update(task, completed=step, description="training", facts=describe(latest))
                if not console.is_terminal and (quiet >= PLAIN_SECONDS or last_look):
                    console.print(f"step {step}/{total_steps}  {describe(latest)}", highlight=False, soft_wrap=True)
                    quiet = 0.0
            if last_look:
                return
            stop.wait(POLL_SECONDS)
