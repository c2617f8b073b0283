"""The bank on disk: a folder of snapshots, each a safetensors file and a manifest that vouches for every block of it.

    snapshot-000000012.safetensors   the arrays of `KnowledgeBank.state()`
    snapshot-000000012.json          the manifest, one line of JSON and its SHA-256

The manifest comes last, so a save that got no further than the data is no snapshot. The one before stays, to be taken
if the newest turns out to be damaged.
"""

from __future__ import annotations

import hashlib
import logging
import math
import os
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
from blake3 import blake3
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from ask_dist.bank.memory import COUNTERS, PER_ROW
from ask_dist.bank.messages import State
from ask_dist.errors import InputError
from ask_dist.files import sync_folder, write_atomically

KEEP = 2
BLOCK_BYTES = 16 * 2**20
HASHERS = 4  # threads; each holds one block
# The bits of a float without its sign, and those of infinity: what is not below them is infinite or no number.
BITS = {2: (np.uint16, 0x7FFF, 0x7C00), 4: (np.uint32, 0x7FFFFFFF, 0x7F800000)}
ROWS_AT_ONCE = 512  # so that a part stays in a core's cache
KINDS = {"I32": np.int32, "I64": np.int64, "F16": np.float16, "F32": np.float32, "F64": np.float64}
MANIFEST_BYTES = 16 * 2**20  # a manifest is read whole; this holds the checksums of 4 TB
NAME = re.compile(r"snapshot-(\d{9})\.json")

log = logging.getLogger(__name__)

Size = Annotated[int, Field(ge=0)]
Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class DamagedSnapshot(InputError):
    """A snapshot whose files are not what was written."""


class Manifest(BaseModel):
    """What a snapshot says of itself.

    Attributes:
        rows, dim, dtype: of the embeddings. generation, newest_step: of the bank at that moment.
        source: where the rows come from, in words. weights: digest of the model that encoded them; "" if unknown.
        bytes: of the data file. blocks: BLAKE3 of each `block_bytes` of it; the last may be shorter.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    format: Literal[4] = 4
    rows: Size
    dim: Annotated[int, Field(ge=1)]
    dtype: Literal["float16", "float32"]
    generation: Size
    newest_step: Size
    source: str = ""
    weights: Annotated[str, Field(pattern=r"^([0-9a-f]{64})?$")] = ""
    bytes: Size
    block_bytes: Annotated[int, Field(ge=1, le=BLOCK_BYTES)]
    blocks: tuple[Digest, ...]

    @property
    def digest(self) -> str:
        """SHA-256 that stands for the whole content: it covers the blocks' own."""
        return hashlib.sha256(self.model_dump_json().encode()).hexdigest()


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
            block_bytes=BLOCK_BYTES,
            blocks=_digests(aside, BLOCK_BYTES),
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
        check(path)
        return True
    except DamagedSnapshot:
        return False


def load(folder: Path | str) -> State:
    """The state of the newest snapshot that is whole. One that is damaged is named in a warning.

    Raises:
        InputError: no snapshot there, or none that is whole.
    """
    return newest(folder)[1]


def newest(folder: Path | str) -> tuple[Path, State]:
    """The manifest's path and the state of the newest snapshot that is whole, as `load` finds it."""
    damaged = []
    for path in snapshots(folder):
        try:
            state = read(path)
        except DamagedSnapshot as error:
            damaged.append(str(error))
            continue
        for reason in damaged:
            log.warning("%s; %s is used in its place", reason, path.name)
        return path, state
    raise InputError("; ".join(damaged) or f"{folder} holds no readable bank: give a folder with snapshot-*.json")


def snapshots(folder: Path | str) -> list[Path]:
    """The manifests in a folder, newest first."""
    found = Path(folder).glob("snapshot-*.json")
    return sorted((path for path in found if NAME.fullmatch(path.name)), reverse=True)


def number_of(path: Path) -> int:
    """The number in the name of a snapshot."""
    return int(path.stem[-9:])


def read(path: Path) -> State:
    """The state of one snapshot, every byte of it checked.

    Args:
        path: of its manifest.

    Returns:
        `audio` and `text` as read-only views of the file, so that they take no memory until they are used; they stay
        valid when the snapshot is removed.

    Raises:
        DamagedSnapshot: a file is missing or is not what was written, or its arrays are no bank.
    """
    manifest, data = check(path), path.with_suffix(".safetensors")
    try:
        state = _mapped(data)
    except (OSError, SafetensorError, TypeError) as error:  # TypeError: a dtype of another program
        raise DamagedSnapshot(f"{data} can't be read ({error}): {_remedy(path)}") from None
    problem = _problem(state, manifest)
    if problem:
        raise DamagedSnapshot(f"{data} is no bank: {problem}; {_remedy(path)}")
    return state


def check(path: Path) -> Manifest:
    """Compare every byte of one snapshot with its checksums, a few blocks at a time.

    Args:
        path: of its manifest.

    Raises:
        DamagedSnapshot: a file is missing or is not what was written.
    """
    manifest, data = read_manifest(path), path.with_suffix(".safetensors")
    try:
        size = data.stat().st_size
        if size != manifest.bytes:
            raise DamagedSnapshot(f"{data} has {size} bytes, not {manifest.bytes}: {_remedy(path)}")
        if len(manifest.blocks) != -(-size // manifest.block_bytes):
            raise DamagedSnapshot(f"{data}: {len(manifest.blocks)} checksums don't cover {size} bytes; {_remedy(path)}")
        found = _digests(data, manifest.block_bytes)
    except OSError as error:
        raise DamagedSnapshot(f"{data} can't be read ({error}): {_remedy(path)}") from None
    for number, (digest, wanted) in enumerate(zip(found, manifest.blocks, strict=True)):
        if digest != wanted:
            raise DamagedSnapshot(f"{data} does not match its checksum in block {number}: {_remedy(path)}")
    return manifest


def read_manifest(path: Path) -> Manifest:
    """What a snapshot says of itself; its data is not looked at.

    Raises:
        DamagedSnapshot: it is missing or is not what was written.
    """
    try:
        with open(path, "rb") as file:
            content = file.read(MANIFEST_BYTES)
        manifest = Manifest.model_validate_json(content.partition(b"\n")[0])
    except (OSError, ValidationError) as error:
        reason = error.errors()[0]["msg"] if isinstance(error, ValidationError) else error
        raise DamagedSnapshot(f"{path} is no manifest of a bank ({reason}): {_remedy(path)}") from None
    if content != f"{manifest.model_dump_json()}\n{manifest.digest}\n".encode():
        raise DamagedSnapshot(f"{path} does not match its checksum: {_remedy(path)}")
    return manifest


def _problem(state: State, manifest: Manifest) -> str | None:
    """Why arrays that were written like this are no bank, or None."""
    rows, dim = manifest.rows, manifest.dim
    wanted: dict[str, tuple[tuple[int, ...], np.dtype]] = {
        name: ((rows,), np.dtype(kind)) for name, kind in PER_ROW.items()
    }
    wanted |= {name: ((rows, dim), np.dtype(manifest.dtype)) for name in ("audio", "text")}
    wanted |= {name: ((), np.dtype(np.int64)) for name in ("generation", "newest_step")}
    wanted["counts"] = ((len(COUNTERS),), np.dtype(np.int64))
    for name, (shape, kind) in wanted.items():
        if name not in state:
            return f"{name} is missing"
        if (state[name].shape, state[name].dtype) != (shape, kind):
            return f"{name} is {state[name].dtype} {list(state[name].shape)}, not {kind} {list(shape)}"
    ids = np.sort(state["ids"])
    if (ids[1:] == ids[:-1]).any():
        return "an id occurs twice"
    if not all(_finite(state[name]) for name in ("audio", "text", "reliability")):
        return "a value is not finite"
    return _problem_of_prototypes({name: state[name] for name in state.keys() - wanted.keys()}, dim)


def _problem_of_prototypes(arrays: State, dim: int) -> str | None:
    if not arrays:
        return None
    levels = sum(name.startswith("prototypes.") and name.endswith(".audio") for name in arrays)
    wanted = {f"prototypes.{level}.{name}" for level in range(levels) for name in ("audio", "text")}
    odd = sorted(arrays.keys() ^ (wanted | {"prototypes.generation"}))
    if odd:
        return f"{odd[0]} is not known, or is missing"
    generation = arrays["prototypes.generation"]
    if (generation.shape, generation.dtype) != ((), np.dtype(np.int64)):
        return "prototypes.generation is no whole number"
    for level in range(levels):
        audio, text = (arrays[f"prototypes.{level}.{name}"] for name in ("audio", "text"))
        if audio.ndim != 2 or audio.shape != text.shape or audio.shape[1] != dim:
            return f"prototypes.{level} has shapes {list(audio.shape)} and {list(text.shape)}, not [n, {dim}] twice"
        if not all(values.dtype.kind == "f" and np.isfinite(values).all() for values in (audio, text)):
            return f"prototypes.{level} holds a value that is not finite"
    return None


def _finite(values: np.ndarray) -> bool:
    """Whether all are finite, by their bits: twelve times as fast as `np.isfinite` of float16."""
    kind, magnitude, infinity = BITS[values.itemsize]
    bits = values.view(kind)
    parts = (bits[start : start + ROWS_AT_ONCE] for start in range(0, len(bits), ROWS_AT_ONCE))
    return all((part & magnitude).max(initial=0) < infinity for part in parts)


def _mapped(data: Path) -> State:
    """The arrays of a safetensors file; the library vouches that they follow one another without a gap."""
    with safe_open(data, "numpy") as file:
        facts = {name: file.get_slice(name) for name in file.offset_keys()}
        shapes = {name: (tuple(told.get_shape()), told.get_dtype()) for name, told in facts.items()}
    whole = np.memmap(data, np.uint8, "r")
    begin = 8 + int.from_bytes(whole[:8].tobytes(), "little")
    state: State = {}
    for name, (shape, kind) in shapes.items():
        if kind not in KINDS:
            raise TypeError(f"{name} is {kind}")
        end = begin + math.prod(shape) * np.dtype(KINDS[kind]).itemsize
        values = np.asarray(whole[begin:end]).view(KINDS[kind]).reshape(shape)
        state[name] = values if name in ("audio", "text") else values.copy()
        begin = end
    return state


def _digests(path: Path, block_bytes: int) -> tuple[str, ...]:
    """BLAKE3 of each block, by threads that read and hash each its share; as fast as a disk, which SHA-256 is not."""
    with open(path, "rb") as file, ThreadPoolExecutor(HASHERS) as pool:
        starts = range(0, os.fstat(file.fileno()).st_size, block_bytes)
        found = [""] * len(starts)

        def share(first: int) -> None:
            buffer = memoryview(bytearray(block_bytes))  # one for all its blocks: fresh memory costs as much as reading
            for number in range(first, len(starts), HASHERS):
                size = os.preadv(file.fileno(), [buffer], starts[number])
                found[number] = blake3(buffer[:size]).hexdigest()

        list(pool.map(share, range(HASHERS)))
        return tuple(found)


def _remedy(path: Path) -> str:
    return f"remove {path.stem}.*, or restore it from a good copy"
