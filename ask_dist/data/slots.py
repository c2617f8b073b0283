"""Memory that decoding processes write sounds into, where the process that trains reads them."""

from __future__ import annotations

import numpy as np
import torch

from ask_dist.errors import InputError

AHEAD = 2  # parts that a decoding process may be ahead: the DataLoader's prefetch_factor


class Slots:
    """For each decoding process room for a few parts, which it fills in turns.

    A part sent through a DataLoader would be copied into fresh shared memory and mapped anew, which takes longer than
    to copy it out of here. Nothing is locked: a process begins part n + AHEAD + 1 only when part n + 1 was taken, and
    by then part n was copied.

    Args:
        processes: that decode.
        clips: of a process's part, at most.
        samples: of a clip.

    Raises:
        InputError: there is not so much shared memory.
    """

    def __init__(self, processes: int, clips: int, samples: int) -> None:
        shape = (processes, AHEAD + 1, clips, samples)
        try:
            self._audio = torch.empty(shape).share_memory_()
        except (RuntimeError, OSError):  # torch says which file, and "Success"
            mebibytes = 4 * torch.Size(shape).numel() / 2**20
            raise InputError(
                f"{mebibytes:.0f} MiB of shared memory for {processes} decoding processes can't be had: "
                "enlarge /dev/shm (docker's --shm-size), or set data.loader_processes=0"
            ) from None

    def of(self, process: int, part: int, clips: int) -> np.ndarray:
        """Float32 [clips, samples]: where a process's part of that number, from 0, lies."""
        slots = self._audio[process]
        return slots[part % len(slots), :clips].numpy()
