"""The bank on disk: a folder of snapshots, each a safetensors file and a manifest that vouches for every block of it.

    snapshot-000000012.safetensors   the arrays of `KnowledgeBank.state()`
    snapshot-000000012.json          the manifest, one line of JSON and its SHA-256

The manifest comes last, so a save that got no further than the data is no snapshot. The one before stays, to be taken
if the newest turns out to be damaged.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import numpy as np
from safetensors.numpy import save_file

from ask_dist.bank import snapshot
from ask_dist.bank.messages import State
from ask_dist.bank.snapshot import DamagedSnapshot, Manifest
from ask_dist.errors import InputError
from ask_dist.files import sync_folder, write_atomically

KEEP = 2
NAME = re.compile(r"snapshot-(\d{9})\.json")

log = logging.getLogger(__name__)

Seen = TypeVar("Seen")


def save(
    folder: Path | str,
    state: State,
    *,
    source: str = "",
    weights: str = "",
    keep: int = KEEP,
    number: int | None = None,
) -> Path:
    """Write a bank's `state()` as the folder's newest snapshot; the folder is made if missing.

    Args:
        folder: of this bank alone; one writer at a time.
        state: of `KnowledgeBank.state()`.
        source: where the rows come from, for who inspects the folder.
        weights: digest of the model that encoded the rows.
        keep: snapshots that stay, this one included.
        number: of the snapshot, above all others' there; the next one if not given.

    Returns:
        The manifest's path.

    Raises:
        OSError, SafetensorError: the disk is full or can't be written; the older snapshots are then untouched.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    if number is None:
        number = max(map(number_of, snapshots(folder)), default=-1) + 1
    path = folder / f"snapshot-{number:09d}.json"
    data, aside = path.with_suffix(".safetensors"), folder / ".unfinished"
    try:
        save_file({name: np.asarray(value, order="C") for name, value in state.items()}, aside)
        with open(aside, "rb") as file:
            os.fsync(file.fileno())
        manifest = Manifest(
            rows=len(state["ids"]),
            dim=state["audio"].shape[1],
            dtype=str(state["audio"].dtype),  # type: ignore[arg-type]
            generation=int(state["generation"]),
            newest_step=int(state["newest_step"]),
            source=source,
            weights=weights,
            bytes=aside.stat().st_size,
            block_bytes=snapshot.BLOCK_BYTES,
            blocks=snapshot.looked_through(aside, snapshot.BLOCK_BYTES)[0],
        )
        os.replace(aside, data)
    finally:
        aside.unlink(missing_ok=True)
    write_atomically(path, f"{manifest.model_dump_json()}\n{manifest.digest}\n".encode())
    _prune(folder, keep)
    return path


def link(path: Path, folder: Path, number: int) -> None:
    """Make a snapshot the newest of another folder as well, without a copy: both names are hard links to one file.

    Args:
        path: of its manifest.
        folder: exists; of one bank alone.
        number: that it gets there, above all others'.

    Raises:
        OSError: the folder is on another file system, or on one that has no hard links.
    """
    linked = folder / f"snapshot-{number:09d}.json"
    os.link(path.with_suffix(".safetensors"), linked.with_suffix(".safetensors"))
    os.link(path, linked)
    sync_folder(folder)
    _prune(folder, KEEP)


def _prune(folder: Path, keep: int) -> None:
    """Remove what is not among the newest `keep` whole snapshots, and data without a manifest.

    The newest was just written. Of the others every byte is read: a damaged one is nothing to fall back on.
    """
    newest, *others = snapshots(folder)
    kept = [newest]
    for path in others:
        if len(kept) < keep and _is_whole(path):
            kept.append(path)
        else:
            path.unlink()  # before its data: what has no manifest is no snapshot
    for data in folder.glob("snapshot-*.safetensors"):
        if data.with_suffix(".json") not in kept:
            data.unlink()


def _is_whole(path: Path) -> bool:
    try:
        snapshot.check(path)
        return True
    except DamagedSnapshot:
        return False


def load(folder: Path | str) -> State:
    """The state of the newest snapshot that is whole. One that is damaged is named in a warning.

    Raises:
        InputError: no snapshot there, or none that is whole, or the newest does not fit into the memory.
    """
    return newest(folder, snapshot.read)[1]


def newest(folder: Path | str, look: Callable[[Path], Seen]) -> tuple[Path, Seen]:
    """The manifest's path of the newest snapshot that is whole, as `load` finds it, and what `snapshot.read`, `view` or
    `verify` gives of it.

    Raises:
        DamagedSnapshot: none of those there is whole.
        InputError: no snapshot there; or what `look` raises of one that is whole.
    """
    damaged = []
    for path in snapshots(folder):
        try:
            seen = look(path)
        except DamagedSnapshot as error:
            damaged.append(str(error))
            continue
        for reason in damaged:
            log.warning("%s; %s is used in its place", reason, path.name)
        return path, seen
    if damaged:
        raise DamagedSnapshot("; ".join(damaged))
    raise InputError(f"{folder} holds no readable bank: give a folder with snapshot-*.json")


def snapshots(folder: Path | str) -> list[Path]:
    """The manifests in a folder, newest first."""
    found = Path(folder).glob("snapshot-*.json")
    return sorted((path for path in found if NAME.fullmatch(path.name)), reverse=True)


def number_of(path: Path) -> int:
    """The number in the name of a snapshot."""
    return int(path.stem[-9:])
