"""Snapshots of a bank that someone else's program made."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np

from ask_dist.bank import snapshot


def crafted(path: Path, rows: int, **more: tuple[str, list[int]]) -> None:
    """In a snapshot's place: zeros of width 8 that take no disk, of so many rows and of `more` arrays (kind, shape).

    Their checksums are none: who reads the data before names and sizes are found wrong says so.

    Args:
        path: of its manifest.
    """
    told = {name: ("I64", [rows]) for name in ("ids", "step", "frame", "version")} | {"reliability": ("F32", [rows])}
    told |= {"audio": ("F16", [rows, 8]), "text": ("F16", [rows, 8]), "counts": ("I64", [3])}
    told |= {"generation": ("I64", []), "newest_step": ("I64", [])} | more
    header, begin = {}, 0
    for name, (kind, shape) in told.items():
        end = begin + int(np.prod(shape)) * int(kind[1:]) // 8
        header[name], begin = {"dtype": kind, "shape": shape, "data_offsets": [begin, end]}, end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    data = path.with_suffix(".safetensors")
    data.write_bytes(len(text).to_bytes(8, "little") + text)
    size = 8 + len(text) + begin
    os.truncate(data, size)
    blocks = ("0" * 64,) * -(-size // snapshot.BLOCK_BYTES)
    manifest = snapshot.read_manifest(path).model_copy(update={"bytes": size, "blocks": blocks, "rows": rows})
    path.write_text(f"{manifest.model_dump_json()}\n{manifest.digest}\n")
