"""What a worker's memory holds, and a trace of a few steps."""

from __future__ import annotations

import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import torch
from torch.profiler import ProfilerActivity, profile, record_function, schedule

from ask_dist.files import writing
from ask_dist.train.tracking import StageClock

FOLDER = "profile"
SKIPPED, WARM_UP, TRACED = 10, 2, 4  # steps


def memory(device: torch.device) -> dict[str, float]:
    """Memory of this process in GiB, now and at most: resident; on CUDA also what tensors take."""
    sizes = {
        "memory/rss_gib": psutil.Process().memory_info().rss,
        "memory/peak_rss_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,  # Linux gives KiB
    }
    if device.type == "cuda":
        sizes["memory/allocated_gib"] = torch.cuda.memory_allocated(device)
        sizes["memory/peak_gib"] = torch.cuda.max_memory_allocated(device)
    return {name: size / 2**30 for name, size in sizes.items()}


class TracingClock(StageClock):
    """A clock that also records `TRACED` steps with torch's profiler, the stages as ranges of their names.

    The steps before them (`SKIPPED` and `WARM_UP`) are not in the trace: first steps allocate and compile.

    Args:
        folder: gets `steps_<first>_<last>.json`, in the format of Chrome and Perfetto; counted from this start on.
        device: whose kernels are recorded beside the host's work.
    """

    def __init__(self, folder: Path, device: torch.device) -> None:
        super().__init__(device)
        self._folder = folder
        activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device.type == "cuda")
        plan = schedule(skip_first=SKIPPED, wait=0, warmup=WARM_UP, active=TRACED, repeat=1)
        self._profiler = profile(activities=activities, schedule=plan, on_trace_ready=self._write, acc_events=True)
        self._profiler.start()

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        with record_function(stage), super().__call__(stage):
            yield

    def step(self) -> None:
        super().step()
        self._profiler.step()

    def _write(self, profiler: profile) -> None:
        first = SKIPPED + WARM_UP + 1
        path = self._folder / f"steps_{first}_{first + TRACED - 1}.json"
        with writing(path):
            self._folder.mkdir(exist_ok=True)
            profiler.export_chrome_trace(str(path))
