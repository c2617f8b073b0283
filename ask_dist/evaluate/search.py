"""A searchable folder of a run's own audio embeddings, and the way from a hit back to its sound."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated

import numpy as np
from pydantic import Field, TypeAdapter, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from ask_dist.bank.index import exact_search
from ask_dist.data.audio import BadSample
from ask_dist.data.samples import find_clip
from ask_dist.data.shards import ShardList, write_text
from ask_dist.errors import InputError
from ask_dist.files import write_atomically

FEATURES, CLIPS = "audio_features.safetensors", "clips.jsonl"
FORMAT = "1"


@dataclass(frozen=True)
class IndexedClip:
    """A clip that the index can find: its key, its captions, and the shard and split that hold its sound."""

    key: Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]+$")]
    captions: tuple[str, ...]
    shard: Annotated[str, Field(pattern=r"^[A-Za-z0-9_-][A-Za-z0-9._-]*\.tar$")]
    split: str


@dataclass(frozen=True)
class Hit:
    """One answer of a search: the cosine with the query, and the clip with the first of its captions, "" for none."""

    score: float
    key: str
    caption: str
    shard: str
    split: str


@dataclass(frozen=True)
class SearchIndex:
    """Embeddings and what they belong to, row by row.

    Attributes:
        audio_features: [n, d] float16 or float32, of any length (compared by cosine). Saved in the type given.
        clips: the n clips.
    """

    audio_features: np.ndarray
    clips: Sequence[IndexedClip]

    def __post_init__(self) -> None:
        features = self.audio_features
        if features.ndim != 2 or features.dtype not in (np.float16, np.float32):
            raise InputError(f"audio_features are {features.dtype} {features.shape}: give [n, d] float16 or float32")
        if len(features) != len(self.clips):
            raise InputError(f"{len(features)} embeddings but {len(self.clips)} clips: build the index again")
        if not np.isfinite(features).all():
            raise InputError("audio_features hold a value that is not finite: build the index from a sound checkpoint")

    def write(self, folder: Path) -> None:
        """Save into a folder, made where needed. A crash midway leaves a folder that `load` refuses."""
        folder.mkdir(parents=True, exist_ok=True)
        lines = "".join(json.dumps(asdict(clip)) + "\n" for clip in self.clips)
        metadata = {"format": FORMAT, "clips_sha256": _digest(lines)}
        write_atomically(folder / FEATURES, save({"audio_features": self.audio_features}, metadata))
        write_text(folder / CLIPS, lines)

    @classmethod
    def load(cls, folder: Path) -> SearchIndex:
        """Read what `write` saved.

        Raises:
            InputError: a file is missing, damaged, of another format, or the two don't belong together.
        """
        remedy = "build the index again"
        for name in (FEATURES, CLIPS):
            if not (folder / name).is_file():
                raise InputError(f"no {name} in {folder}: {remedy}, or correct the path")
        try:
            with safe_open(folder / FEATURES, framework="numpy") as file:
                metadata, features = file.metadata() or {}, file.get_tensor("audio_features")
        except (SafetensorError, OSError) as error:
            raise InputError(f"{folder / FEATURES} can't be read ({error}): {remedy}") from None
        if metadata.get("format") != FORMAT:
            raise InputError(f"{folder / FEATURES} has format {metadata.get('format')}, not {FORMAT}: {remedy}")
        try:
            lines = (folder / CLIPS).read_text(encoding="utf-8")
        except UnicodeDecodeError:
            raise InputError(f"{folder / CLIPS} is not UTF-8 text: {remedy}") from None
        if _digest(lines) != metadata.get("clips_sha256"):
            raise InputError(f"{CLIPS} and {FEATURES} in {folder} don't belong together: {remedy}")
        clip = TypeAdapter(IndexedClip)
        try:
            return cls(features, tuple(clip.validate_json(line) for line in lines.splitlines()))
        except ValidationError as error:
            raise InputError(f"{folder / CLIPS}: {error.errors()[0]['msg']}: {remedy}") from None

    def search(self, query: np.ndarray, k: int) -> list[Hit]:
        """The min(k, n) clips nearest to a query by cosine, best first.

        Args:
            query: [d] an embedding of either encoder.

        Raises:
            InputError: the query has another width than the index, or a value that is not finite.
        """
        query = np.asarray(query, dtype=np.float32)
        if query.shape != self.audio_features.shape[1:]:
            width = self.audio_features.shape[1]
            raise InputError(
                f"the query has shape {query.shape}, the index [{width}]: use the checkpoint that built it"
            )
        if not np.isfinite(query).all():
            raise InputError("the query's embedding is not finite: use a sound checkpoint")
        scores, positions = exact_search(_unit(query[None]), self._rows, k)
        return [self._hit(float(score), int(row)) for score, row in zip(scores[0], positions[0], strict=True)]

    def _hit(self, score: float, row: int) -> Hit:
        clip = self.clips[row]
        return Hit(score, clip.key, clip.captions[0] if clip.captions else "", clip.shard, clip.split)

    @cached_property
    def _rows(self) -> np.ndarray:
        return _unit(self.audio_features.astype(np.float32))


def extract_clip(shards: ShardList, hit: Hit, out: Path) -> Path:
    """Copy the sound of a hit out of its shard, as it is there. The file appears whole or not at all.

    Args:
        shards: of the hit's split. Where several folders have a shard of that name, the one with the key is meant.
        hit: the clip.
        out: file to write, without the extension of the sound; replaced where it exists.

    Returns:
        The file's path, with the extension.

    Raises:
        InputError: no such shard, it can't be had, or it holds no sound of that key.
    """
    places = [place for place, name in enumerate(shards.names) if name == hit.shard]
    try:
        for place in places:
            with shards.at_hand(place) as path:
                raw = find_clip(path, hit.key)
            if raw is None:
                continue
            if raw.problem:
                raise BadSample(raw.problem)
            file = out.with_name(f"{out.name}.{raw.extension}")
            write_atomically(file, raw.sound)
            return file
    except (BadSample, OSError) as error:
        raise InputError(f"{hit.shard} {hit.key}: {error}; correct that, or leave --save out") from None
    what = f"clip {hit.key} in {hit.shard}" if places else f"shard {hit.shard}"
    raise InputError(
        f"no {what} of {', '.join(sorted(set(shards.folders)))}: the shards changed since the index was built; "
        "build it again"
    )


def _unit(rows: np.ndarray) -> np.ndarray:
    return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), np.finfo(np.float32).tiny)


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
