"""What is done with a finished run: scoring it on any shards, and searching with it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ask_dist.config import Config
from ask_dist.data.audio import BadSample, decode, fit_length, in_samples, own_length, resample
from ask_dist.data.cache import cache_of
from ask_dist.data.shards import ShardList
from ask_dist.errors import InputError
from ask_dist.evaluate.encode import encode, retrieval_results
from ask_dist.evaluate.report import Results, print_table
from ask_dist.evaluate.search import SearchIndex, extract_clip
from ask_dist.files import write_atomically
from ask_dist.models.dual_encoder import DualEncoder
from ask_dist.models.saved import load_model


def evaluate(run_dir: Path, shards: Path | str | None, output: Path | None, console: Console) -> Results:
    """Scores a run in both directions and prints the table.

    Args:
        run_dir: a finished run.
        shards: folder of shards, or its URL; None: the split that the run itself was tested on.
        output: JSON file for the scores, or None.
        console: where the table goes.

    Raises:
        InputError: no such run, no such shards.
    """
    config, model = load_model(run_dir)
    folder = shards or config.data.test or config.data.validation
    if folder is None:
        raise InputError(f"{run_dir} has no test split of its own; name one with --shards")
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    with console.status(f"encoding {folder}"):
        encoded = encode(model, ShardList.load(folder, cache=cache_of(config)), config, rank=0, world_size=1)
    results: Results = {**retrieval_results(encoded, _class_counts(config), config.seed), "dataset": str(folder)}  # type: ignore[typeddict-item]
    print_table(results, console)
    if encoded.bad:
        console.print(f"{len(encoded.bad)} samples skipped, the first: {encoded.bad[0]}", highlight=False)
    if output is not None:
        write_atomically(output, json.dumps(results, indent=2).encode())
    return results


def search(run_dir: Path, query: str | None, audio: Path | None, k: int, save: Path | None, console: Console) -> None:
    """Prints the k clips nearest to a sentence or to a sound file, and copies their sounds where asked.

    Raises:
        InputError: neither or both of query and audio, an unreadable sound, no finished run.
    """
    if (query is None) == (audio is None):
        raise InputError("search takes a sentence or --audio FILE, one of the two")
    config, model = load_model(run_dir)
    index = SearchIndex.load(run_dir / "index")
    hits = index.search(embed_query(model, config, query, audio), k)
    table = Table("", "score", "caption", "clip", title=escape(query or str(audio)), title_justify="left")
    for place, hit in enumerate(hits, 1):
        table.add_row(str(place), f"{hit.score:.3f}", escape(hit.caption), f"{hit.shard}: {hit.key}")
    console.print(table)
    if save is not None:
        folders = {"train": config.data.train, "validation": config.data.validation, "test": config.data.test}
        save.mkdir(parents=True, exist_ok=True)
        cache = cache_of(config)
        shards = {split: ShardList.load(folders[split] or (), cache=cache) for split in {hit.split for hit in hits}}
        for place, hit in enumerate(hits, 1):
            extract_clip(shards[hit.split], hit, save / f"{place:02d}-{hit.key}")
        console.print(f"{len(hits)} sounds in {save}", highlight=False)


@torch.no_grad()
def embed_query(model: DualEncoder, config: Config, query: str | None, audio: Path | None) -> np.ndarray:
    """The embedding, float32 [dim] at unit length, of a sentence, or of a sound file where one is given.

    Raises:
        InputError: the sentence is empty, or the sound can't be used.
    """
    if audio is None:
        assert query is not None
        if not query.strip():
            raise InputError("the sentence is empty; describe a sound")
        return model.encode_text(model.text.tokenize([query]))[0].numpy()
    try:
        waveform, rate = decode(audio.read_bytes())
        waveform = resample(waveform, rate, config.data.sample_rate)
    except OSError as error:
        raise InputError(f"{audio} can't be read: {error.strerror}") from None
    except BadSample as error:
        raise InputError(f"{audio} can't be used: {error}; give a sound file such as WAV, FLAC, OGG or MP3") from None
    data = config.data
    longest, step = in_samples(data.sample_rate, data.clip_seconds, data.length_step)
    samples = own_length(len(waveform), longest, step)
    return model.encode_audio(torch.from_numpy(fit_length(waveform, samples, None)).unsqueeze(0))[0].numpy()


def _class_counts(config: Config) -> dict[str, int]:
    """Training frequencies for head, mid and tail; none when the training shards are not on this machine."""
    try:
        return ShardList.load(config.data.train, cache=cache_of(config)).classes
    except InputError:
        return {}
