"""How a process that computes on the CPU uses it: its threads, and the memory that it gives back."""

from __future__ import annotations

import ctypes

import torch

# <malloc.h>; values are bytes.
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD = -1, -2, -3
KEPT = 2**31 - 1
TOP_PAD = 200 * 2**20


def use_cpu(threads: float) -> None:
    """Prepares this process for many steps of the same kind on the CPU.

    glibc gives the large tensors of a step back to the system when they are freed, and the next step pays for each of
    their pages again: a fifth of a small model's step. So freed memory is kept, where the C library can be told so.

    Args:
        threads: cores that were reserved; torch gets one thread for each whole one, and one at least.
    """
    torch.set_num_threads(max(1, int(threads)))
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    # A glibc before 2.35 refuses so high a threshold. The others would then only stop it from adapting its own.
    if mallopt is not None and mallopt(M_MMAP_THRESHOLD, KEPT):
        mallopt(M_TRIM_THRESHOLD, KEPT)
        mallopt(M_TOP_PAD, TOP_PAD)
