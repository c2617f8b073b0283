"""Embeddings of frozen encoders, computed once for a split and kept on disk, for heads that train on them."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn

from ask_dist.errors import InputError
from ask_dist.files import write_atomically
from ask_dist.models.audio import AudioEncoder
from ask_dist.models.text import TextEncoder

# Raise it when the same encoders and clips come to give other features, for example with another front end.
VERSION = 1
ARRAYS, CLIPS = "features.safetensors", "clips.json"


class Split(Protocol):
    """What is asked of a split; `data.shards.ShardList` is one."""

    @property
    def fingerprint(self) -> str:
        """Changes when any clip changes."""

    @property
    def clips(self) -> int:
        """How many there are."""


AnySplit = TypeVar("AnySplit", bound=Split)
# read(split, sample_rate, clip_seconds) gives key, float32 [samples] of one length, and the JSON of each good clip.
ReadClips = Callable[[AnySplit, int, float], Iterable[tuple[str, np.ndarray, dict[str, Any]]]]


@dataclass(frozen=True)
class FrozenFeatures:
    """A split as two frozen encoders see it, on the CPU.

    Attributes:
        audio: float16 [clips, patches, width], in the order of time.
        text: float32 [texts, width], clip by clip; [texts, 0] without a text encoder.
        owner: int64 [texts], the clip of each text.
        keys: names of the clips.
        descriptions: the JSON of each clip as its shard has it: captions, classes, swapped, whatever else.
    """

    audio: Tensor
    text: Tensor
    owner: Tensor
    keys: list[str]
    descriptions: list[dict[str, Any]]

    @property
    def captions(self) -> list[list[str]]:
        """One or more a clip."""
        return [description["captions"] for description in self.descriptions]

    @property
    def classes(self) -> list[list[str]]:
        """Of each clip; may be empty."""
        return [description.get("classes", []) for description in self.descriptions]

    @property
    def swapped(self) -> Tensor:
        """bool [clips]: given another's captions on purpose."""
        return torch.tensor([bool(description.get("swapped", False)) for description in self.descriptions])


def frozen_features(
    split: AnySplit,
    read: ReadClips[AnySplit],
    audio: AudioEncoder,
    text: TextEncoder | None,
    *,
    clip_seconds: float,
    cache: Path = Path(".cache/frozen"),
    batch_size: int = 32,
) -> FrozenFeatures:
    """The features of a split, out of the cache if the same encoders met the same clips before.

    An encoder with a method `patches` ([batch, samples] -> [batch, patches, width]) gives these, another one its single
    vector a clip. Both encoders are put in evaluation mode and compute where their weights are.

    Args:
        split: names the clips.
        read: opens them; not called when the cache has them.
        audio, text: the encoders; without a text encoder captions stay words alone.
        clip_seconds: handed to `read`.
        cache: gets a folder for each set of clips, encoders and `clip_seconds`. A folder that can't be read is
            replaced.
        batch_size: clips that are encoded together.

    Raises:
        InputError: `read` gives no clip.
        OSError: the cache can't be written.
    """
    inputs = {
        "version": VERSION,
        "clips": split.fingerprint,
        "clip_seconds": clip_seconds,
        "audio": encoder_digest(audio),
        "text": text and encoder_digest(text, *text.assets().values(), str(getattr(text, "max_tokens", None)).encode()),
    }
    folder = cache / hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()[:24]
    features = _load(folder)
    if features is None:
        clips = _counted(read(split, audio.sample_rate, clip_seconds), split.clips)
        features = _encode(clips, audio.eval(), text and text.eval(), batch_size)
        _save(folder, features, inputs)
    return features


@torch.no_grad()
def _encode(
    clips: Iterator[tuple[str, np.ndarray, dict[str, Any]]],
    audio: AudioEncoder,
    text: TextEncoder | None,
    batch_size: int,
) -> FrozenFeatures:
    keys, descriptions, counts = [], [], []
    audio_parts, text_parts = [], []
    patches = getattr(audio, "patches", lambda waveforms: audio(waveforms).unsqueeze(1))
    while batch := list(itertools.islice(clips, batch_size)):
        names, waveforms, details = zip(*batch, strict=True)
        captions = [detail["captions"] for detail in details]
        flat = list(itertools.chain.from_iterable(captions))
        audio_parts.append(patches(torch.from_numpy(np.stack(waveforms)).to(_device(audio))).half().cpu())
        words = text(text.tokenize(flat).to(_device(text))) if text else torch.zeros(len(flat), 0)
        text_parts.append(words.float().cpu())
        keys += names
        descriptions += details
        counts += [len(texts) for texts in captions]
    if not keys:
        raise InputError("no clip to encode: all of the split are bad; pack it again")
    owner = torch.repeat_interleave(torch.arange(len(keys)), torch.tensor(counts))
    return FrozenFeatures(torch.cat(audio_parts), torch.cat(text_parts), owner, keys, descriptions)


def _load(folder: Path) -> FrozenFeatures | None:
    try:
        stored = json.loads((folder / CLIPS).read_text(encoding="utf-8"))
        arrays = load_file(folder / ARRAYS)
        return FrozenFeatures(**arrays, keys=stored["keys"], descriptions=stored["descriptions"])
    except (OSError, ValueError, KeyError, TypeError, SafetensorError):
        return None


def _save(folder: Path, features: FrozenFeatures, inputs: dict[str, Any]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    arrays = {"audio": features.audio, "text": features.text, "owner": features.owner}
    write_atomically(folder / ARRAYS, save(arrays))
    stored = {"inputs": inputs, "keys": features.keys, "descriptions": features.descriptions}
    write_atomically(folder / CLIPS, json.dumps(stored).encode())  # last: without it the folder counts as empty


def encoder_digest(encoder: nn.Module, *more: bytes) -> str:
    """SHA-256 of what an encoder computes by: its class, its weights and buffers, and what else is given."""
    digest = hashlib.sha256(type(encoder).__name__.encode())
    for name, tensor in encoder.state_dict().items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    for content in more:
        digest.update(hashlib.sha256(content).digest())
    return digest.hexdigest()


def _device(encoder: nn.Module) -> torch.device:
    return next(itertools.chain(encoder.parameters(), encoder.buffers())).device


def _counted(clips: Iterable[Any], total: int) -> Iterator[Any]:
    """The clips, with a progress bar on a terminal's stderr."""
    columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    console = Console(stderr=True)
    with Progress(TextColumn("{task.description}"), *columns, console=console, disable=not console.is_terminal) as bar:
        yield from bar.track(clips, total=total, description="encoding clips")
