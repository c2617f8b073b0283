"""One snapshot of a bank: a safetensors file, and the manifest that vouches for every block of it."""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import psutil
from blake3 import blake3
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError, safe_open

from ask_dist.bank.memory import COUNTERS, PER_ROW
from ask_dist.bank.messages import State
from ask_dist.errors import InputError
from ask_dist.files import regular_size

BLOCK_BYTES = 16 * 2**20
PART_BYTES = 2**20  # are read, hashed and looked through at a time, while they are in a core's cache
READERS = 8  # threads; each holds one part
# The bits of a float without its sign, and those of infinity: what is not below them is infinite or no number.
BITS = {2: (np.uint16, 0x7FFF, 0x7C00), 4: (np.uint32, 0x7FFFFFFF, 0x7F800000)}
EMBEDDINGS = ("audio", "text")
FLOATS = (*EMBEDDINGS, "reliability")
KINDS = {"I32": np.int32, "I64": np.int64, "F16": np.float16, "F32": np.float32, "F64": np.float64}
CGROUP = Path("/sys/fs/cgroup")
MANIFEST_BYTES = 16 * 2**20  # a manifest is read whole; this holds the checksums of 4 TB
HEADER_BYTES = 2**20  # so is the data's header, a hundred bytes an array

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
    block_bytes: Annotated[int, Field(ge=1, le=BLOCK_BYTES, multiple_of=8)]
    blocks: tuple[Digest, ...]

    @property
    def digest(self) -> str:
        """SHA-256 that stands for the whole content: it covers the blocks' own."""
        return hashlib.sha256(self.model_dump_json().encode()).hexdigest()


def read(path: Path) -> State:
    """The state of one snapshot, every byte of it checked on its way into memory.

    Args:
        path: of its manifest.

    Returns:
        Arrays that belong to the caller.

    Raises:
        DamagedSnapshot: a file is missing or is not what was written, or its arrays are no bank.
        InputError: it does not fit into the memory.
    """
    return _sound(path, _sized(path), whole=True)


def _free_memory() -> int:
    """Bytes that the machine has left, or the container that this process is in (cgroup 2), whichever are fewer."""
    free = psutil.virtual_memory().available
    with suppress(OSError, ValueError):  # no cgroup 2, or "max": no limit
        most, held = (int((CGROUP / f"memory.{name}").read_text()) for name in ("max", "current"))
        counts = dict(line.split() for line in (CGROUP / "memory.stat").read_text().splitlines())
        free = min(free, most - held + int(counts["inactive_file"]))  # of the page cache, which is given up for it
    return free


def view(path: Path) -> State:
    """As `read`, but the embeddings are read-only views of the file: for who takes a part of them."""
    return _sound(path, _sized(path))


def verify(path: Path) -> Manifest:
    """As `read`, with no more memory than for what is not embeddings: these are looked at and not kept."""
    manifest = _sized(path)
    _sound(path, manifest)
    return manifest


def check(path: Path) -> Manifest:
    """Compare every byte of one snapshot with its checksums, a few blocks at a time.

    Args:
        path: of its manifest.

    Raises:
        DamagedSnapshot: a file is missing or is not what was written.
    """
    manifest = _sized(path)
    _compare(path, manifest)
    return manifest


def read_manifest(path: Path) -> Manifest:
    """What a snapshot says of itself; its data is not looked at.

    Raises:
        DamagedSnapshot: it is missing or is not what was written.
    """
    try:
        regular_size(path)
        with open(path, "rb") as file:
            content = file.read(MANIFEST_BYTES)
        manifest = Manifest.model_validate_json(content.partition(b"\n")[0])
    except (OSError, ValidationError) as error:
        reason = error.errors()[0]["msg"] if isinstance(error, ValidationError) else error
        raise DamagedSnapshot(f"{path} is no manifest of a bank ({reason}): {_remedy(path)}") from None
    if content != f"{manifest.model_dump_json()}\n{manifest.digest}\n".encode():
        raise DamagedSnapshot(f"{path} does not match its checksum: {_remedy(path)}")
    return manifest


@dataclass(frozen=True)
class Span:
    """Where an array lies in a file, in bytes from its start."""

    begin: int
    end: int
    kind: np.dtype
    shape: tuple[int, ...]


def _sized(path: Path) -> Manifest:
    """The manifest of a snapshot whose data is as large as that says."""
    manifest, data = read_manifest(path), path.with_suffix(".safetensors")
    try:
        size = regular_size(data)
    except OSError as error:
        raise DamagedSnapshot(f"{data} can't be read ({error}): {_remedy(path)}") from None
    if size != manifest.bytes:
        raise DamagedSnapshot(f"{data} has {size} bytes, not {manifest.bytes}: {_remedy(path)}")
    if len(manifest.blocks) != -(-size // manifest.block_bytes):
        raise DamagedSnapshot(f"{data}: {len(manifest.blocks)} checksums don't cover {size} bytes; {_remedy(path)}")
    return manifest


def _sound(path: Path, manifest: Manifest, *, whole: bool = False) -> State:
    """The arrays of a snapshot that is one of a bank: the `whole` of it in memory, or its embeddings in the file."""
    data = path.with_suffix(".safetensors")
    try:
        spans = _spans(data)
    except (OSError, SafetensorError, TypeError) as error:
        raise DamagedSnapshot(f"{data} can't be read ({error}): {_remedy(path)}") from None
    problem = _problem_of_names(spans, manifest)
    if problem is None:
        _check_memory(path, manifest, spans, whole)
        content = np.empty(manifest.bytes, np.uint8) if whole else None
        finite = _compare(path, manifest, [spans[name] for name in FLOATS], content)
        state = _arrays(np.memmap(data, np.uint8, "r") if content is None else content, spans)
        problem = _problem_of_values(state) or (None if finite else "a value is not finite")
    if problem:
        raise DamagedSnapshot(f"{data} is no bank: {problem}; {_remedy(path)}")
    return state


def _check_memory(path: Path, manifest: Manifest, spans: dict[str, Span], whole: bool) -> None:
    """Raises InputError where the arrays outgrow the memory: a file of zeros takes no disk, and Linux promises more
    than it has."""
    copied = sum(span.end - span.begin for name, span in spans.items() if name not in EMBEDDINGS)
    needed = 2 * copied + (manifest.bytes if whole else 0)  # to look through a copy takes no more than itself
    free = _free_memory()
    if needed > free:
        told = f"{manifest.rows} rows and takes {needed / 2**30:.1f} GiB"
        raise InputError(f"{path} holds {told}, this machine has {free / 2**30:.1f} GiB free: use a larger machine")


def _compare(path: Path, manifest: Manifest, floats: Sequence[Span] = (), content: np.ndarray | None = None) -> bool:
    """Whether all of these floats are finite, of data that has its checksums; as `looked_through`."""
    data = path.with_suffix(".safetensors")
    try:
        found, finite = looked_through(data, manifest.block_bytes, floats, content)
    except OSError as error:
        raise DamagedSnapshot(f"{data} can't be read ({error}): {_remedy(path)}") from None
    for number, (digest, wanted) in enumerate(zip(found, manifest.blocks, strict=True)):
        if digest != wanted:
            raise DamagedSnapshot(f"{data} does not match its checksum in block {number}: {_remedy(path)}")
    return finite


def _problem_of_names(spans: dict[str, Span], manifest: Manifest) -> str | None:
    """Why arrays of these names, shapes and dtypes are no bank, or None; nothing of them is read."""
    rows, dim = manifest.rows, manifest.dim
    wanted: dict[str, tuple[tuple[int, ...], np.dtype]] = {
        name: ((rows,), np.dtype(kind)) for name, kind in PER_ROW.items()
    }
    wanted |= {name: ((rows, dim), np.dtype(manifest.dtype)) for name in EMBEDDINGS}
    wanted |= {name: ((), np.dtype(np.int64)) for name in ("generation", "newest_step")}
    wanted["counts"] = ((len(COUNTERS),), np.dtype(np.int64))
    for name, (shape, kind) in wanted.items():
        if name not in spans:
            return f"{name} is missing"
        if (spans[name].shape, spans[name].kind) != (shape, kind):
            return f"{name} is {spans[name].kind} {list(spans[name].shape)}, not {kind} {list(shape)}"
    return _problem_of_prototypes({name: spans[name] for name in spans.keys() - wanted.keys()}, dim)


def _problem_of_prototypes(spans: dict[str, Span], dim: int) -> str | None:
    if not spans:
        return None
    levels = sum(name.startswith("prototypes.") and name.endswith(".audio") for name in spans)
    wanted = {f"prototypes.{level}.{name}" for level in range(levels) for name in EMBEDDINGS}
    odd = sorted(spans.keys() ^ (wanted | {"prototypes.generation"}))
    if odd:
        return f"{odd[0]} is not known, or is missing"
    generation = spans["prototypes.generation"]
    if (generation.shape, generation.kind) != ((), np.dtype(np.int64)):
        return "prototypes.generation is no whole number"
    for level in range(levels):
        audio, text = (spans[f"prototypes.{level}.{name}"] for name in EMBEDDINGS)
        if len(audio.shape) != 2 or audio.shape != text.shape or audio.shape[1] != dim:
            return f"prototypes.{level} has shapes {list(audio.shape)} and {list(text.shape)}, not [n, {dim}] twice"
        if audio.kind.kind != "f" or text.kind.kind != "f":
            return f"prototypes.{level} is {audio.kind} and {text.kind}, not of floats"
    return None


def _problem_of_values(state: State) -> str | None:
    """Why values are no bank's, or None; whether embeddings and reliability are finite is not looked at."""
    ids = np.sort(state["ids"])
    if (ids[1:] == ids[:-1]).any():
        return "an id occurs twice"
    for name, values in state.items():
        if name.startswith("prototypes.") and not np.isfinite(values).all():
            return f"{name.rpartition('.')[0]} holds a value that is not finite"
    return None


def _spans(data: Path) -> dict[str, Span]:
    """The arrays of a safetensors file; the library vouches that they follow one another without a gap.

    Raises:
        OSError, SafetensorError, TypeError: no such file, or not with arrays of a bank's kinds.
    """
    with open(data, "rb") as stream:
        begin = 8 + int.from_bytes(stream.read(8), "little")
    if begin > HEADER_BYTES:
        raise TypeError(f"its header has {begin} bytes, that of a bank at most {HEADER_BYTES}")
    with safe_open(data, "numpy") as file:
        facts = {name: file.get_slice(name) for name in file.offset_keys()}
        shapes = {name: (tuple(told.get_shape()), told.get_dtype()) for name, told in facts.items()}
    spans = {}
    for name, (shape, kind) in shapes.items():
        if kind not in KINDS or begin % np.dtype(KINDS[kind]).itemsize:
            raise TypeError(f"{name} is {kind} at byte {begin}")
        end = begin + math.prod(shape) * np.dtype(KINDS[kind]).itemsize
        spans[name] = Span(begin, end, np.dtype(KINDS[kind]), shape)
        begin = end
    return spans


def _arrays(content: np.ndarray, spans: dict[str, Span]) -> State:
    """Embeddings as views of a file's content, the rest as copies."""
    state: State = {}
    for name, span in spans.items():
        values = np.asarray(content[span.begin : span.end]).view(span.kind).reshape(span.shape)
        state[name] = values if name in EMBEDDINGS else values.copy()
    return state


def looked_through(
    path: Path, block_bytes: int, floats: Sequence[Span] = (), content: np.ndarray | None = None
) -> tuple[tuple[str, ...], bool]:
    """BLAKE3 of each block, and whether all of these floats are finite: every byte is read once, into `content` (uint8
    [bytes]) if that is given, by threads that each have their share of the blocks."""
    with open(path, "rb") as file, ThreadPoolExecutor(READERS) as pool:
        size = os.fstat(file.fileno()).st_size
        starts = range(0, size, block_bytes)
        found, finite = [""] * len(starts), [True] * READERS

        def share(reader: int) -> None:
            buffer = np.empty(PART_BYTES, np.uint8)  # one for all parts: fresh memory costs as much as reading
            for number in range(reader, len(starts), READERS):
                digest, end = blake3(), min(size, starts[number] + block_bytes)
                for start in range(starts[number], end, PART_BYTES):
                    stop = min(end, start + PART_BYTES)
                    part = buffer[: stop - start] if content is None else content[start:stop]
                    if os.preadv(file.fileno(), [part.data], start) < len(part):
                        raise OSError("it became shorter")
                    digest.update(part.data)
                    finite[reader] &= all(_finite(part, start, span) for span in floats)
                found[number] = digest.hexdigest()

        list(pool.map(share, range(READERS)))
        return tuple(found), all(finite)


def _finite(part: np.ndarray, start: int, span: Span) -> bool:
    """Whether the floats of the span that lie in a part of the file are finite, by their bits: twelve times as fast as
    `np.isfinite` of float16.

    Args:
        part: uint8 [bytes] of the file from byte `start` on, a multiple of 8.
    """
    inside = part[max(0, span.begin - start) : max(0, span.end - start)]
    if span.kind.itemsize not in BITS:
        return bool(np.isfinite(inside.view(span.kind)).all())
    kind, magnitude, infinity = BITS[span.kind.itemsize]
    return bool((inside.view(kind) & magnitude).max(initial=0) < infinity)


def _remedy(path: Path) -> str:
    return f"remove {path.stem}.*, or restore it from a good copy"
