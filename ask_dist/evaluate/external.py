"""Knowledge from outside: a corpus that training never visits, encoded by a finished run into a bank folder."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from ask_dist.bank import snapshot, store
from ask_dist.bank.memory import KnowledgeBank
from ask_dist.bank.messages import Modality
from ask_dist.config import Config
from ask_dist.data.audio import BadSample
from ask_dist.data.cache import cache_of
from ask_dist.data.leaks import LEAK, HeldOut
from ask_dist.data.places import is_url
from ask_dist.data.quarantine import QUARANTINE, Record, write_quarantine
from ask_dist.data.shards import ShardList, stable_id
from ask_dist.data.table import read_captions
from ask_dist.errors import InputError
from ask_dist.evaluate.encode import caption_key, caption_rows, encode, paired_rows
from ask_dist.evaluate.run import embed_query
from ask_dist.files import write_atomically, writing
from ask_dist.models.dual_encoder import DualEncoder
from ask_dist.models.saved import digest, load_model

CLIPS = "clips.jsonl"
PART = 1000  # clips encoded between two looks at the progress bar
# Ids, audio and text; what the rows are; what was left out.
Part = tuple[tuple[np.ndarray, np.ndarray, np.ndarray], list["BankedClip"], list[Record]]


class BankedClip(BaseModel):
    """A row of a bank folder: its id in the bank, the clip that it stands for, the digest of its sound in hex, which is
    empty for a caption alone, and the recording that it was cut from, which is empty where the clip names none."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    id: int
    key: str
    captions: Annotated[tuple[str, ...], Field(min_length=1)]
    shard: str
    sound: str = ""
    recording: str = ""

    @property
    def is_caption(self) -> bool:
        """Whether it is a caption without audio."""
        return self.key == caption_key(self.captions[0])


def build(run_dir: Path, corpus: Path | str, folder: Path, console: Console) -> Path:
    """Encodes a corpus with a run's model, a row a clip; its text is the mean of its captions at unit length.

    Clips of the run's validation and test splits, and of its `data.held_out`, are left out, by their keys, sounds and
    recordings, with its `data.fingerprints` also what sounds like them; of captions alone those that read as one of
    theirs. `quarantine.jsonl` in the folder names what was left out.

    Args:
        run_dir: a finished run.
        corpus: folder of shards, or its URL; or a file of captions (`.txt`, `.csv` and so on), each a row without an
            audio half.
        folder: where the bank goes; an older bank there stays as its snapshot before.
        console: where progress goes.

    Returns:
        The manifest's path.

    Raises:
        InputError: no such run, no such corpus, or nothing in it can be used.
    """
    config, model = load_model(run_dir)
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    found, held_out = load_corpus(corpus, config), _held_out(config, console)
    if isinstance(found, list):
        size, parts = len(found), _caption_parts(model, found, Path(corpus).name, config, held_out)
    else:
        size, parts = found.clips, _clip_parts(model, found, config, held_out)
    bank = KnowledgeBank(config.model.embedding_dim, size)
    clips: dict[int, BankedClip] = {}
    left_out: list[Record] = [*held_out.unread]
    with _bar(console) as bar:
        for rows, told, bad in bar.track(parts, total=max(1, size // PART), description=f"encoding {corpus}"):
            bank.upsert(*rows, None, step=0)
            clips |= {clip.id: clip for clip in told}
            left_out += bad
    place = corpus if is_url(corpus) else Path(corpus).resolve()
    with writing(folder):
        source = f"{place} by {run_dir.resolve()}"
        path = store.save(folder, bank.state(), source=source, weights=digest(run_dir))
        # With those of the snapshot before, which may be fallen back on; what is damaged is written anew.
        with contextlib.suppress(InputError):
            clips = banked_clips(folder) | clips
        lines = (json.dumps(clip.model_dump()) + "\n" for clip in clips.values())
        write_atomically(folder / CLIPS, "".join(lines).encode())
        (folder / QUARANTINE).unlink(missing_ok=True)
        write_quarantine(folder / QUARANTINE, left_out)
    leaks = sum(record["reason"].startswith(LEAK) for record in left_out)
    console.print(
        f"{len(bank)} rows in {folder}, {size - len(bank)} clips left out, {leaks} of them because they are held out",
        highlight=False,
        soft_wrap=True,
    )
    return path


def load_corpus(place: Path | str, config: Config) -> ShardList | list[str]:
    """The captions of a file, or else the shards of a folder or URL.

    Raises:
        InputError: nothing of the kind there.
    """
    if not is_url(place) and Path(place).is_file():
        return read_captions(Path(place))
    return ShardList.load(place, cache=cache_of(config))


def banked_clips(folder: Path) -> dict[int, BankedClip]:
    """What the rows of a bank folder are, by id; nothing for a bank that came without.

    Raises:
        InputError: the list is damaged.
    """
    path = folder / CLIPS
    if not path.is_file():
        return {}
    try:
        found = map(BankedClip.model_validate_json, path.read_text(encoding="utf-8").splitlines())
        return {clip.id: clip for clip in found}
    except (ValidationError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is damaged ({str(error).splitlines()[0]}): build the bank again") from None


def inspect(folder: Path, console: Console) -> None:
    """Prints what the snapshots of a bank folder say of themselves, newest first; their data is not read.

    Raises:
        InputError: no snapshot there.
    """
    table = Table("snapshot", "rows", "dim", "dtype", "generation", "newest step", "MiB", "content", "source")
    for path in _snapshots(folder):
        try:
            told = snapshot.read_manifest(path)
        except snapshot.DamagedSnapshot:
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
            rows = snapshot.verify(path).rows
            console.print(f"{path.stem}: {rows} rows, every checksum right", highlight=False)
        except snapshot.DamagedSnapshot as error:
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
        InputError: neither or both of query and audio, an unreadable sound, no bank, or one of another width or half.
    """
    if (query is None) == (audio is None):
        raise InputError("search takes a sentence or --audio FILE, one of the two")
    config, model = load_model(run_dir)
    state = store.load(folder)
    dim, width = state["audio"].shape[1], config.model.embedding_dim
    if dim != width:
        raise InputError(f"{folder} holds rows of width {dim}, {run_dir} embeds to {width}: name the run that built it")
    if by == "audio" and not state["audio"].any():
        raise InputError(f"{folder} holds captions alone, which have no audio to compare: search it with --by text")
    bank = KnowledgeBank.from_state(state, dim=dim, capacity=len(state["ids"]))
    scores, ids = bank.search(embed_query(model, config, query, audio)[None], k, by)
    clips = banked_clips(folder)
    table = Table("", "score", "caption", "clip", title=escape(query or str(audio)), title_justify="left")
    for place, (score, row) in enumerate(zip(scores[0].tolist(), ids[0].tolist(), strict=True), 1):
        clip = clips.get(row)
        told = (escape(clip.captions[0]), f"{clip.shard}: {clip.key}") if clip else ("", f"id {row}")
        table.add_row(str(place), f"{score:.3f}", *told)
    console.print(table)


def _held_out(config: Config, console: Console) -> HeldOut:
    """What the run must not learn from, and so the bank must not hold; what can't be read here is named."""
    splits: dict[str, ShardList] = {}
    data = config.data
    for split, place in (("validation", data.validation), ("test", data.test), ("held_out", data.held_out)):
        try:
            splits |= {split: ShardList.load(place, cache=cache_of(config))} if place is not None else {}
        except InputError as error:
            console.print(f"[yellow]warning:[/] not checked against the {split} split: {escape(str(error))}")
    held_out = HeldOut.of(splits, fingerprints=data.fingerprints, max_clip_seconds=data.max_clip_seconds)
    for warning in held_out.warnings:
        console.print(f"[yellow]warning:[/] {escape(warning)}", highlight=False, soft_wrap=True)
    return held_out


def _clip_parts(model: DualEncoder, shards: ShardList, config: Config, held_out: HeldOut) -> Iterator[Part]:
    """Part by part, the clips that can be used and are not held out."""
    parts, found, first = max(1, shards.clips // PART), False, list[Record]()
    for part in range(parts):
        encoded = encode(model, shards, config, rank=part, world_size=parts, held_out=held_out)
        found, first = found or bool(encoded.keys), first or encoded.bad[:1]
        told = zip(encoded.keys, encoded.captions, encoded.shards, encoded.sounds, encoded.recordings, strict=True)
        yield paired_rows(encoded), [_told(*clip) for clip in told], encoded.bad
    if not found:
        reason = f", the first: {first[0]}" if first else ""
        raise InputError(f"the shards hold no clip that can be used{reason}; pack them again")


def _caption_parts(
    model: DualEncoder, captions: list[str], file: str, config: Config, held_out: HeldOut
) -> Iterator[Part]:
    """Part by part, rows with zeros for audio. Equal captions of two files are one row, as their ids say."""
    parts, found = max(1, len(captions) // PART), False
    for texts in np.array_split(np.array(captions, object), parts):
        kept: list[str] = []
        bad: list[Record] = []
        for text in texts:
            try:
                held_out.refuse_caption(text)
                kept.append(text)
            except BadSample as error:
                bad.append({"shard": file, "key": caption_key(text), "reason": str(error)})
        told = [_told(caption_key(text), [text], file) for text in kept]
        found |= bool(kept)
        yield caption_rows(model, kept, config.model.embedding_dim), told, bad
    if not found:
        raise InputError(f"every caption of {file} is held out, the first: {bad[0]['reason']}; name others")


def _told(key: str, captions: list[str], shard: str, sound: bytes = b"", recording: str = "") -> BankedClip:
    return BankedClip(
        id=stable_id(key), key=key, captions=tuple(captions), shard=shard, sound=sound.hex(), recording=recording
    )


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
