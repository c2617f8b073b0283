"""The bank on disk: one safetensors file and a manifest that vouches for it.

The manifest names its data file, whose name carries the data's checksum; replacing the manifest is the one moment at
which a new store takes the old one's place, so a crash at any point leaves a store that loads.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import safetensors.numpy
from safetensors import SafetensorError

from ask_dist.bank.memory import State
from ask_dist.errors import InputError
from ask_dist.files import write_atomically

FORMAT = 1
MANIFEST = "bank.json"


def save(folder: Path | str, state: State) -> None:
    """Write a bank's `state()` into the folder, made if missing; an older store there is replaced atomically."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    data = safetensors.numpy.save({name: np.asarray(value, order="C") for name, value in state.items()})
    sha256 = hashlib.sha256(data).hexdigest()
    manifest = {
        "format": FORMAT,
        "file": f"bank-{sha256[:16]}.safetensors",
        "sha256": sha256,
        "dtype": str(state["audio"].dtype),
        "rows": len(state["ids"]),
        "dim": state["audio"].shape[1],
        "generation": int(state["generation"]),
        "newest_step": int(state["newest_step"]),
    }
    write_atomically(folder / manifest["file"], data)
    write_atomically(folder / MANIFEST, json.dumps(manifest, indent=2).encode())
    for old in folder.glob("bank-*.safetensors"):
        if old.name != manifest["file"]:
            old.unlink()


def load(folder: Path | str) -> State:
    """The state that `save` wrote.

    Raises:
        InputError: no store there, one of another format, or one whose data does not match its manifest.
    """
    folder = Path(folder)
    try:
        manifest = json.loads((folder / MANIFEST).read_bytes())
        if manifest["format"] != FORMAT:
            raise InputError(f"{folder} has bank format {manifest['format']}, not {FORMAT}: save the bank again")
        data = (folder / Path(manifest["file"]).name).read_bytes()
        if hashlib.sha256(data).hexdigest() != manifest["sha256"]:
            raise InputError(f"{folder / manifest['file']} does not match its checksum: restore it from a good copy")
        state = safetensors.numpy.load(data)
        shape = (manifest["rows"], manifest["dim"])
        if not state["audio"].shape == state["text"].shape == shape or len(state["ids"]) != shape[0]:
            raise InputError(f"{folder} holds rows of shape {state['audio'].shape}, its manifest says {shape}")
    except (OSError, KeyError, TypeError, json.JSONDecodeError, UnicodeDecodeError, SafetensorError) as error:
        raise InputError(f"{folder} holds no readable bank ({type(error).__name__}: {error})") from error
    return state


def exists(folder: Path | str) -> bool:
    """Whether a bank was saved into the folder."""
    return (Path(folder) / MANIFEST).exists()
