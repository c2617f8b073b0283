"""Checkpoints of a run: safetensors and JSON, nothing that could run code."""

from __future__ import annotations

import hashlib
import json
import shutil
import uuid
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
from pydantic import TypeAdapter, ValidationError
from safetensors.numpy import load_file as load_numpy
from safetensors.numpy import save_file as save_numpy
from safetensors.torch import load_file, save_file
from torch import Tensor

from ask_dist.bank import snapshot, store
from ask_dist.config import Config
from ask_dist.errors import InputError
from ask_dist.files import write_atomically, writing

FORMAT = 2
MANIFEST, ENGINE = "manifest.json", "engine.safetensors"
FOLDER = "checkpoints"  # of a run; Ray Train keeps its own files there too
UNFINISHED = ".unfinished"
HEARD = {"sample_rate", "clip_seconds", "length_step"}  # what the audio encoder gets of a clip


SaveBank = Callable[[Path], str]  # takes the snapshot's folder, gives its digest


class DamagedCheckpoint(InputError):
    """A checkpoint whose files are not what was written."""


@dataclass(frozen=True)
class Manifest:
    """What a checkpoint says of itself.

    Attributes:
        global_step, samples_seen: how far the run was; the loader's position follows from global_step alone.
        skipped_steps: of them, those without an update.
        lineage: digest of what must not change between a run and its continuation, see `lineage`.
        sha256: digest of each file, by name.
        snapshots: digest of each bank's snapshot, by the name of its folder.
    """

    global_step: int
    samples_seen: int
    lineage: str
    sha256: dict[str, str]
    snapshots: dict[str, str] = field(default_factory=dict)  # format 1 has none
    format: int = FORMAT
    skipped_steps: int = 0


def lineage(config: Config, data_fingerprint: str) -> str:
    """Digest of model, what it hears, batch, objective, seed and training data: those of a run and its continuation.

    What may change on resume (more epochs, other logging, another ZeRO stage, other actors' resources) is left out, and
    so is where the run's weights and encoders once came from.
    """
    tree = config.model_dump(
        mode="json",
        include={"model", "seed", "knowledge"},
        exclude={"model": {"source": True, "audio": {"source"}, "text": {"source"}}},
        exclude_none=True,  # settings that a run does not use, such as those of later versions
    )
    for part, chosen in {
        "augment": config.augment.model_dump(exclude_defaults=True),
        "heard": config.data.model_dump(include=HEARD, exclude_defaults=True),
    }.items():
        if chosen:  # not in the digest of runs without
            tree[part] = chosen
    tree["global_batch_size"] = config.global_batch_size
    tree["order"] = [config.data.lanes, config.data.shuffle_window, data_fingerprint]
    return hashlib.sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()[:16]


def write(
    run_dir: Path,
    keep: int,
    *,
    engine: dict[str, Tensor],
    arrays: Mapping[str, Mapping[str, np.ndarray]],
    banks: Mapping[str, SaveBank],
    global_step: int,
    samples_seen: int,
    skipped_steps: int,
    lineage: str,
) -> Path:
    """Writes a checkpoint into a run's folder and removes those that are no longer needed.

    It gets its name once it is whole, and older ones go only then: whatever happens, the last one stays.

    Args:
        run_dir: the run's folder.
        keep: how many checkpoints stay, this one included.
        engine: `Engine.state()`.
        arrays: of the refiner, by file name.
        banks: what writes a bank's snapshot, by the name that its folder gets.

    Returns:
        The checkpoint's folder.

    Raises:
        DiskError: the disk is full or can't be written.
        Exception: whatever `banks` raise.
    """
    parent = run_dir / FOLDER
    folder, aside = parent / f"checkpoint_{global_step:09d}", parent / UNFINISHED
    shutil.rmtree(aside, ignore_errors=True)  # of a run that was killed
    unfinished = aside / uuid.uuid4().hex  # its own: a bank that hung may still write into that of an earlier attempt
    try:
        with writing(folder):
            unfinished.mkdir(parents=True)
            save(
                unfinished,
                engine=engine,
                arrays=arrays,
                banks=banks,
                global_step=global_step,
                samples_seen=samples_seen,
                skipped_steps=skipped_steps,
                lineage=lineage,
            )
            if folder.exists():  # of a step that is taken again, because this one was damaged
                shutil.rmtree(folder)
            unfinished.rename(folder)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    # Later ones are damaged, or this run would have gone on from them. They are overwritten when it gets there.
    earlier = [path for path in _checkpoints(run_dir) if path.name < folder.name]
    for outdated in earlier[: max(0, len(earlier) + 1 - keep)]:
        shutil.rmtree(outdated, ignore_errors=True)
    return folder


def save(
    folder: Path,
    *,
    engine: dict[str, Tensor],
    arrays: Mapping[str, Mapping[str, np.ndarray]],
    banks: Mapping[str, SaveBank],
    global_step: int,
    samples_seen: int,
    skipped_steps: int,
    lineage: str,
) -> None:
    """Fills an empty folder with a checkpoint; the manifest comes last, so a folder without one is no checkpoint.

    Args:
        folder: exists and is private to the caller.
        engine: `Engine.state()`.
        arrays: of the refiner, by file name.
        banks: what writes a bank's snapshot, by the name that its folder gets.
    """
    save_file(engine, folder / ENGINE)
    for name, values in arrays.items():
        whole = {key: np.asarray(value, order="C") for key, value in values.items()}
        save_numpy(whole, folder / f"{name}.safetensors")
    digests = {path.name: _sha256(path) for path in sorted(folder.iterdir())}
    snapshots = {name: save_bank(folder / name) for name, save_bank in banks.items()}
    manifest = Manifest(global_step, samples_seen, lineage, digests, snapshots, skipped_steps=skipped_steps)
    write_atomically(folder / MANIFEST, json.dumps(asdict(manifest), indent=1).encode())


def load_manifest(folder: Path, expected_lineage: str) -> Manifest:
    """Reads and verifies a checkpoint's manifest and the digests of its files.

    Raises:
        DamagedCheckpoint: no manifest, or a file that is not what it vouches for.
        InputError: a checkpoint of another configuration, corpus or version.
    """
    try:
        manifest = TypeAdapter(Manifest).validate_json((folder / MANIFEST).read_bytes())
    except OSError as error:
        raise DamagedCheckpoint(f"{folder} is no checkpoint of this program: {error}") from None
    except ValidationError as error:
        problem = error.errors()[0]
        where = ".".join(map(str, problem["loc"])) or MANIFEST
        raise DamagedCheckpoint(f"{folder} is no checkpoint of this program: {where}: {problem['msg']}") from None
    if manifest.format != FORMAT:
        raise InputError(f"{folder} has checkpoint format {manifest.format}, this version reads {FORMAT}")
    if manifest.lineage != expected_lineage:
        raise InputError(
            f"{folder} is a checkpoint from another configuration: model, batch, knowledge, seed or training shards "
            "differ; restore them or choose another name=..."
        )
    if ENGINE not in manifest.sha256:
        raise DamagedCheckpoint(f"{folder} has a manifest without {ENGINE}")
    for name, digest in manifest.sha256.items():
        path = folder / Path(name).name
        if not path.is_file() or _sha256(path) != digest:
            raise DamagedCheckpoint(f"{path} is missing or damaged (its SHA-256 differs from the manifest)")
    for name, digest in manifest.snapshots.items():
        _check_bank(folder / Path(name).name, digest)
    return manifest


def _check_bank(folder: Path, digest: str) -> None:
    try:
        newest = store.snapshots(folder)[0]
        if snapshot.check(newest).digest != digest:
            raise DamagedCheckpoint(f"{newest} is another snapshot than that of the checkpoint")
    except IndexError:
        raise DamagedCheckpoint(f"{folder} is missing or damaged (it holds no snapshot of a bank)") from None
    except snapshot.DamagedSnapshot as error:
        raise DamagedCheckpoint(f"{folder} is missing or damaged ({error})") from None


def load_engine(folder: Path) -> dict[str, Tensor]:
    """`Engine.state()` of a verified checkpoint."""
    return load_file(folder / ENGINE)


def load_arrays(folder: Path, name: str) -> dict[str, np.ndarray]:
    """The arrays of the refiner of a verified checkpoint; empty when it had none."""
    path = folder / f"{name}.safetensors"
    return load_numpy(path) if path.is_file() else {}


def bank_folders(folder: Path) -> list[str]:
    """The folders with the bank's snapshots in a verified checkpoint, a shard each, in order."""
    return sorted(map(str, folder.glob("bank*")), key=lambda path: (len(path), path))


def newest_intact(run_dir: Path, expected_lineage: str) -> tuple[Path | None, list[str]]:
    """The checkpoint that a run goes on from, None where there is none, and what is wrong with newer ones.

    Raises:
        InputError: there are checkpoints, but none is intact; or the newest intact one is of another configuration.
    """
    damage = []
    for folder in reversed(_checkpoints(run_dir)):
        try:
            load_manifest(folder, expected_lineage)
        except DamagedCheckpoint as error:
            damage.append(str(error))
        else:
            return folder, damage
    if damage:
        raise InputError(f"{damage[0]}, and there is no intact one before it; restore it, or start anew: --overwrite")
    return None, []


def _checkpoints(run_dir: Path) -> list[Path]:
    """The folders of a run's checkpoints, oldest first."""
    return sorted(run_dir.glob(f"{FOLDER}/checkpoint_*[0-9]"))


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
