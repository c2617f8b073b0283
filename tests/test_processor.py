"""Threads and kept memory, in a process of its own: neither can be taken back."""

from __future__ import annotations

import json
import platform
import subprocess
import sys

import pytest

PROGRAM = """
import json, resource
import torch
from ask_dist.processor import use_cpu

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(20):
        torch.ones(10_000_000)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

before = faults()
use_cpu({threads})
faults()  # the heap grows to what it is to keep
print(json.dumps([torch.get_num_threads(), before, faults()]))
"""


def measured(threads: float) -> list[int]:
    program = PROGRAM.replace("{threads}", str(threads))
    return json.loads(subprocess.run([sys.executable, "-c", program], check=True, capture_output=True).stdout)


@pytest.mark.parametrize(("reserved", "threads"), [(0.5, 1), (3.5, 3)])
def test_torch_gets_a_thread_for_each_whole_core(reserved, threads):
    assert measured(reserved)[0] == threads


@pytest.mark.skipif(
    platform.libc_ver()[0] != "glibc" or tuple(map(int, platform.libc_ver()[1].split(".")[:2])) < (2, 35),
    reason="this C library takes no such settings",
)
def test_freed_memory_is_used_again_without_new_pages():
    _, before, after = measured(1)
    assert after < before / 10
