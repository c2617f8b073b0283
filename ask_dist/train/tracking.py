"""One `log(metrics, step)` and the clock of a step's stages."""

from __future__ import annotations

import json
import math
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from ask_dist.files import writing
from ask_dist.train.trackers import Feed

AUDIT = "audit.jsonl"  # in a run's folder


class MetricsLog:
    """Appends rows to a run's metrics.jsonl: {"step": ..., "time": seconds of the run, "<metric>": number, ...}.

    Args:
        path: the file; a resumed run goes on in it.
        elapsed: seconds that the run had taken before it was resumed.
        feeds: further places for the rows. One that fails is named in a row {"step", "time", "warning"}.

    Raises:
        DiskError: here, in `log` and in `warn`, the disk is full or can't be written.
    """

    def __init__(self, path: Path, elapsed: float = 0.0, feeds: Sequence[Feed] = ()) -> None:
        self._path = path
        with writing(path):
            _drop_cut_line(path)
            self._file = open(path, "a", encoding="utf-8")  # noqa: SIM115  (held for the length of the run)
        self._start = time.monotonic() - elapsed
        self._feeds = feeds
        self._step = 0

    def log(self, metrics: dict[str, float], step: int) -> None:
        """Writes one row at once, so that whoever follows the file sees it; values that are not finite become null."""
        self._step = step
        self._write({name: value if math.isfinite(value) else None for name, value in metrics.items()})
        for feed in self._feeds:
            feed.log(metrics, step)
        self._warn_of_feeds()

    def warn(self, problem: str) -> None:
        """Writes a row {"step", "time", "warning"}, which the console shows."""
        self._write({"warning": problem})

    def close(self) -> None:
        """Waits for the feeds too, a minute at most for each that does not answer."""
        for feed in self._feeds:
            feed.close()
        self._warn_of_feeds()
        self._file.close()

    def _warn_of_feeds(self) -> None:
        for problem in filter(None, [feed.take_problem() for feed in self._feeds]):
            self.warn(problem)

    def _write(self, values: dict[str, Any]) -> None:
        row = {"step": self._step, "time": round(time.monotonic() - self._start, 3)} | values
        with writing(self._path):
            self._file.write(json.dumps(row) + "\n")
            self._file.flush()


class AuditLog:
    """Appends what each step trained on to a run's audit.jsonl: {"step": from 0, "ids": of all ranks, in their order}.

    A step that is taken again after a resume is written again: its last line is the one that counts.

    Args:
        path: the file; a resumed run goes on in it.

    Raises:
        DiskError: here and in `log`, the disk is full or can't be written.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        with writing(path):
            _drop_cut_line(path)
            self._file = open(path, "a", encoding="utf-8")  # noqa: SIM115  (held for the length of the run)

    def log(self, step: int, ids: list[int]) -> None:
        """Writes one step at once, so that a process that is killed leaves all steps before."""
        with writing(self._path):
            self._file.write(json.dumps({"step": step, "ids": ids}) + "\n")
            self._file.flush()


def last_time(path: Path) -> float:
    """Seconds that the newest complete row of a metrics.jsonl gives; 0 where there is none."""
    if not path.is_file():
        return 0.0
    for line in reversed(path.read_text(encoding="utf-8").splitlines()):
        try:
            return float(json.loads(line)["time"])
        except (ValueError, KeyError, TypeError):
            continue  # the last line of a killed run may be cut
    return 0.0


def _drop_cut_line(path: Path) -> None:
    """Removes what follows the last line end: a killed run's half row, which the next row would be glued to."""
    if path.is_file():
        with open(path, "r+b") as file:
            file.truncate(file.read().rfind(b"\n") + 1)


class StageClock:
    """Mean seconds a step spends in each named stage.

    with clock("forward"): ...

    On CUDA a stage lasts from one event in the current stream to another: kernels that it queued count, host work that
    hides behind earlier ones does not, and nothing waits for a device before `take` does.

    Args:
        device: where the steps are computed.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._spans: dict[str, list[tuple[Any, Any]]] = defaultdict(list)
        self._steps = 0

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        start = self._now()
        try:
            yield
        finally:
            self._spans[stage].append((start, self._now()))

    def step(self) -> None:
        """Marks the end of a step."""
        self._steps += 1

    def take(self) -> dict[str, float]:
        """`time/<stage>` in seconds a step since the last call."""
        means = {
            f"time/{stage}": sum(self._seconds(*span) for span in spans) / max(1, self._steps)
            for stage, spans in self._spans.items()
        }
        self._spans.clear()
        self._steps = 0
        return means

    def _now(self) -> Any:
        if self._device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._device))
        return event

    def _seconds(self, start: Any, end: Any) -> float:
        if self._device.type != "cuda":
            return end - start
        end.synchronize()
        return start.elapsed_time(end) / 1000  # CUDA counts milliseconds
