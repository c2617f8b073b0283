"""Real ranks for tests: gloo processes on this machine, each with the result of one function."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

# Loaded once by the server that all ranks are forked from: every one of them would take seconds for it.
mp.set_forkserver_preload(["deepspeed", "transformers"])


def run_ranks(function: Callable[..., Any], world_size: int, folder: Path, *arguments: Any) -> list[Any]:
    """What `function(rank, *arguments)` returns (tensors, numbers, lists, dicts) in each of `world_size` processes.

    Args:
        function: of a module's top level; torch.distributed is initialised when it is called.
        folder: an empty folder for the rendezvous and the results.
    """
    folder.mkdir(parents=True, exist_ok=True)
    mp.start_processes(
        _rank, args=(world_size, str(folder), function, arguments), nprocs=world_size, start_method="forkserver"
    )
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(world_size)]


def _rank(rank: int, world_size: int, folder: str, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size))  # as Ray Train sets them
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world_size)
    try:
        torch.save(function(rank, *arguments), f"{folder}/{rank}.pt")
        dist.barrier()  # nobody leaves while another still waits for its part of a collective
    finally:
        dist.destroy_process_group()
