"""A worker's memory, and the trace of a few steps."""

from __future__ import annotations

import json
import mmap

import torch

from ask_dist.train.profiling import SKIPPED, TRACED, WARM_UP, TracingClock, memory

STAGES = ("data", "forward", "backward")


def work(clock: TracingClock, steps: int) -> None:
    weight = torch.randn(16, 16, requires_grad=True)
    for _ in range(steps):
        with clock("data"):
            batch = torch.randn(4, 16)
        with clock("forward"):
            loss = (batch @ weight).square().mean()
        with clock("backward"):
            loss.backward()
        clock.step()


def test_a_trace_has_a_few_steps_with_every_stage_by_name(tmp_path):
    clock = TracingClock(tmp_path / "profile", torch.device("cpu"))
    work(clock, SKIPPED + WARM_UP + TRACED + 2)
    (path,) = (tmp_path / "profile").iterdir()
    assert path.name == "steps_13_16.json"
    events = json.loads(path.read_text())["traceEvents"]
    named = [event["name"] for event in events if event.get("ph") == "X"]
    assert {stage: named.count(stage) for stage in STAGES} == dict.fromkeys(STAGES, TRACED)
    assert "aten::mm" in named
    assert set(clock.take()) == {f"time/{stage}" for stage in STAGES}


def test_a_run_that_ends_earlier_leaves_no_trace(tmp_path):
    work(TracingClock(tmp_path / "profile", torch.device("cpu")), SKIPPED)
    assert not (tmp_path / "profile").exists()


def test_memory_is_of_this_process_in_gib():
    before = memory(torch.device("cpu"))["memory/rss_gib"]
    with mmap.mmap(-1, 2**28) as held:  # a quarter of a GiB of its own: an allocator may have that much left over
        held[:: mmap.PAGESIZE] = b"1" * (2**28 // mmap.PAGESIZE)
        after = memory(torch.device("cpu"))["memory/rss_gib"]
    assert 0.2 < after - before < 0.3
