"""Knowledge from outside: a corpus that training never visits, encoded by a finished run into a bank folder."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from ask_dist.bank import store
from ask_dist.bank.memory import KnowledgeBank
from ask_dist.bank.messages import Modality
from ask_dist.bank.prototypes import unit_rows
from ask_dist.config import Config
from ask_dist.data.leaks import HeldOut
from ask_dist.data.places import is_url
from ask_dist.data.shards import ShardList, stable_id
from ask_dist.errors import InputError
from ask_dist.evaluate.encode import Encoded, encode
from ask_dist.evaluate.run import embed_query
from ask_dist.files import write_atomically, writing
from ask_dist.models.saved import load_model

CLIPS = "clips.jsonl"
PART = 1000  # clips encoded between two looks at the progress bar


class BankedClip(BaseModel):
    """A row of a bank folder, for people: its id in the bank, and the clip that it stands for."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    id: int
    key: str
    captions: tuple[str, ...]
    shard: str


def build(run_dir: Path, shards: Path | str, folder: Path, console: Console) -> Path:
    """Encodes a corpus with a run's model, a row a clip; its text is the mean of its captions at unit length.

    Clips of the run's validation and test splits are left out, by their keys and by their sounds.

    Args:
        run_dir: a finished run.
        shards: folder of shards, or its URL.
        folder: where the bank goes; an older bank there stays as its snapshot before.
        console: where progress goes.

    Returns:
        The manifest's path.

    Raises:
        InputError: no such run, no such shards, or nothing in them can be used.
    """
    config, model = load_model(run_dir)
    corpus = ShardList.load(shards)
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    bank = KnowledgeBank(config.model.embedding_dim, corpus.clips)
    held_out = _held_out(config, console)
    parts, refused = max(1, corpus.clips // PART), ""
    clips: dict[int, BankedClip] = {}
    with _bar(console) as bar:
        for part in bar.track(range(parts), description=f"encoding {shards}"):
            try:
                encoded = encode(model, corpus, config, rank=part, world_size=parts, held_out=held_out)
            except InputError as error:  # all of this part is bad, of a damaged shard for one; the others may be good
                refused = str(error)
                continue
            bank.upsert(*_rows(encoded), None, step=0)
            clips |= _clips_of(encoded)
    if not len(bank):
        raise InputError(refused or f"{shards} holds no clip that can be used; pack it again")
    place = shards if is_url(shards) else Path(shards).resolve()
    with writing(folder):
        path = store.save(folder, bank.state(), source=f"{place} by {run_dir.resolve()}")
        # With those of the snapshot before, which may be fallen back on; what is damaged is written anew.
        with contextlib.suppress(InputError):
            clips = _clips(folder) | clips
        lines = (json.dumps(clip.model_dump()) + "\n" for clip in clips.values())
        write_atomically(folder / CLIPS, "".join(lines).encode())
    skipped = corpus.clips - len(bank)
    console.print(f"{len(bank)} rows in {folder}, {skipped} clips left out", highlight=False, soft_wrap=True)
    return path


def inspect(folder: Path, console: Console) -> None:
    """Prints what the snapshots of a bank folder say of themselves, newest first; their data is not read.

    Raises:
        InputError: no snapshot there.
    """
    table = Table("snapshot", "rows", "dim", "dtype", "generation", "newest step", "MiB", "content", "source")
    for path in _snapshots(folder):
        try:
            told = store.read_manifest(path)
        except store.DamagedSnapshot:
            table.add_row(path.stem, "[red]damaged[/]")
            continue
        facts = (told.rows, told.dim, told.dtype, told.generation, told.newest_step, f"{told.bytes / 2**20:.1f}")
        table.add_row(path.stem, *map(str, facts), told.digest[:16], escape(told.source))
    console.print(table)


def verify(folder: Path, console: Console) -> None:
    """Reads every byte of every snapshot.

    Raises:
        InputError: no snapshot there, or one that is damaged.
    """
    damaged = []
    for path in _snapshots(folder):
        try:
            rows = len(store.read(path)["ids"])
            console.print(f"{path.stem}: {rows} rows, every checksum right", highlight=False)
        except store.DamagedSnapshot as error:
            damaged.append(str(error))
    if damaged:
        raise InputError("; ".join(damaged))


def search(
    folder: Path, run_dir: Path, query: str | None, audio: Path | None, k: int, by: Modality, console: Console
) -> None:
    """Prints the k rows of a bank folder nearest to a sentence or to a sound file.

    Args:
        folder: of the bank.
        run_dir: the run that encoded it.
        query, audio: a sentence or a sound file, one of the two.
        k: answers.
        by: which half of a row is compared.
        console: where the table goes.

    Raises:
        InputError: neither or both of query and audio, an unreadable sound, no bank, or one of another width.
    """
    if (query is None) == (audio is None):
        raise InputError("search takes a sentence or --audio FILE, one of the two")
    config, model = load_model(run_dir)
    state = store.load(folder)
    dim, width = state["audio"].shape[1], config.model.embedding_dim
    if dim != width:
        raise InputError(f"{folder} holds rows of width {dim}, {run_dir} embeds to {width}: name the run that built it")
    bank = KnowledgeBank.from_state(state, dim=dim, capacity=len(state["ids"]))
    scores, ids = bank.search(embed_query(model, config, query, audio)[None], k, by)
    clips = _clips(folder)
    table = Table("", "score", "caption", "clip", title=escape(query or str(audio)), title_justify="left")
    for place, (score, row) in enumerate(zip(scores[0].tolist(), ids[0].tolist(), strict=True), 1):
        clip = clips.get(row)
        told = (escape(clip.captions[0]), f"{clip.shard}: {clip.key}") if clip else ("", f"id {row}")
        table.add_row(str(place), f"{score:.3f}", *told)
    console.print(table)


def _held_out(config: Config, console: Console) -> HeldOut:
    """The run's validation and test clips, which the bank must not hold; what can't be read here is named."""
    splits: dict[str, ShardList] = {}
    for split, place in (("validation", config.data.validation), ("test", config.data.test)):
        try:
            splits |= {split: ShardList.load(place)} if place is not None else {}
        except InputError as error:
            console.print(f"[yellow]warning:[/] not checked against the {split} split: {escape(str(error))}")
    return HeldOut.of(splits)


def _rows(encoded: Encoded) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    ids = np.array([stable_id(key) for key in encoded.keys], np.int64)
    sums = torch.zeros_like(encoded.audio_features).index_add_(0, encoded.owner, encoded.text_features)
    return ids, encoded.audio_features.numpy(), unit_rows(sums.numpy())


def _clips_of(encoded: Encoded) -> dict[int, BankedClip]:
    return {
        stable_id(key): BankedClip(id=stable_id(key), key=key, captions=tuple(captions), shard=shard)
        for key, captions, shard in zip(encoded.keys, encoded.captions, encoded.shards, strict=True)
    }


def _clips(folder: Path) -> dict[int, BankedClip]:
    """The clips by id; none for a bank that came without."""
    path = folder / CLIPS
    if not path.is_file():
        return {}
    try:
        found = map(BankedClip.model_validate_json, path.read_text(encoding="utf-8").splitlines())
        return {clip.id: clip for clip in found}
    except (ValidationError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is damaged ({str(error).splitlines()[0]}): build the bank again") from None


def _snapshots(folder: Path) -> list[Path]:
    found = store.snapshots(folder)
    if not found:
        raise InputError(
            f"{folder} holds no bank: give a folder with snapshot-*.json, as `ask-dist bank build` makes it"
        )
    return found


def _bar(console: Console) -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    return Progress(*columns, TimeRemainingColumn(), console=console, disable=not console.is_terminal)
