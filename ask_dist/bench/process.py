"""Time and memory of a piece of work. Nothing heavy is imported, so that a process of its own begins quickly."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any, TypeVar

Result = TypeVar("Result")


def seconds(call: Callable[[], Any]) -> float:
    """How long a call takes."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def alone(function: Callable[..., Result], **arguments: Any) -> Result:
    """The function's answer from a process of its own, so that no other work counts among its memory."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(function, **arguments).result()


def peak_bytes() -> int:
    """The most that this process had resident. Not from getrusage, which counts what its parent had before it."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024
