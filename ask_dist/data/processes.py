"""Many clips through a function in processes of this machine, with a count of what is done."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from typing import Any, TypeVar

from ask_dist.errors import InputError

Task = TypeVar("Task")
Result = TypeVar("Result")
LOOK_SECONDS = 0.2  # between two looks at the count

_count: Any = None  # of a process that works: the shared number of clips done, and whether to stop
_stop: Any = None


class Stopped(Exception):
    """The work was called off."""


def tick() -> None:
    """To be called by the function after each clip.

    Raises:
        Stopped: the work was called off.
    """
    if _count is not None:
        with _count.get_lock():
            _count.value += 1
        if _stop.is_set():
            raise Stopped


def in_processes(
    function: Callable[[Task], Result],
    tasks: Iterable[Task],
    processes: int | None,
    progress: Callable[[int], None] | None = None,
) -> Iterator[Result]:
    """The results of `function` for each task, in the order in which they are ready.

    The processes end with this one, however it ends; closing the iterator stops them after the clip they are at.

    Args:
        function: at the top of a module; it calls `tick` after each clip.
        tasks: what it takes; they are drawn a few ahead.
        processes: how many; None: one a core.
        progress: called now and then with the number of clips done.

    Raises:
        InputError: a process was killed; and what `function` raises.
    """
    count = processes or len(os.sched_getaffinity(0))
    context = multiprocessing.get_context("forkserver")
    done, stop = context.Value("q", 0), context.Event()
    executor = ProcessPoolExecutor(count, mp_context=context, initializer=_begin, initargs=(done, stop))
    report = progress or (lambda done: None)
    waiting: set[Future[Result]] = set()
    source = iter(tasks)
    try:
        while True:
            for task in source:
                waiting.add(executor.submit(function, task))
                if len(waiting) >= 2 * count:
                    break
            if not waiting:
                break
            ready, waiting = wait(waiting, LOOK_SECONDS, FIRST_COMPLETED)
            report(done.value)
            for future in ready:
                yield future.result()
        report(done.value)
    except BrokenProcessPool:
        raise InputError(
            f"one of {count} processes was killed, perhaps for want of memory: run again with fewer --processes"
        ) from None
    finally:
        stop.set()
        executor.shutdown(cancel_futures=True)


def _begin(done: Any, stop: Any) -> None:
    """Prepare a process that works."""
    global _count, _stop
    _count, _stop = done, stop
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent gets it too and calls the work off
    os.environ["OMP_NUM_THREADS"] = "1"  # torch, where the function imports it, would take every core in each process
    end_with_parent()


def end_with_parent() -> None:
    """From now on this process ends when the one that asked for it does, however that ends: a forkserver, and what it
    started, would keep each other alive."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    threading.Thread(target=_follow, args=(parent,), daemon=True).start()


def _follow(parent: Any) -> None:
    parent.join()
    os._exit(1)
