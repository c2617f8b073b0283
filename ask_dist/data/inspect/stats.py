"""What a split of shards holds, in numbers."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np

from ask_dist.data import audio
from ask_dist.data.audio import BadSample
from ask_dist.data.inspect.tar_clips import clips_of
from ask_dist.data.inspect.verify import LONGEST_SECONDS
from ask_dist.data.packing import read_quarantine
from ask_dist.data.processes import in_processes, tick
from ask_dist.data.shards import read_sizes, stable_id
from ask_dist.errors import InputError

QUANTILES = {"least": 0.0, "5%": 0.05, "median": 0.5, "95%": 0.95, "most": 1.0}


@dataclass
class Measured:
    """Some shards' clips.

    Attributes:
        seconds: float32 [clips]: their lengths.
        loudness: float32 [clips]: level of the mono mix in dBFS, 20 log10 of its root mean square; a sine of full
            scale has -3.
        words: int32 [captions]: their lengths.
        captions: int64 [captions]: ids of their texts.
        rates: clips of each sample rate.
        unreadable: clips, and tars, with which something was wrong.
    """

    seconds: np.ndarray
    loudness: np.ndarray
    words: np.ndarray
    captions: np.ndarray
    rates: Counter[int] = field(default_factory=Counter)
    unreadable: int = 0


def measure(
    folder: Path, *, processes: int | None = None, progress: Callable[[int, int], None] | None = None
) -> Measured:
    """Decode all clips of a split.

    Args:
        folder: of the shards and their sizes.json.
        progress: called with clips measured and clips in all.

    Raises:
        InputError: the folder or its sizes.json is missing, or no clip is readable.
    """
    listed = read_sizes(folder)["shards"]
    total = sum(shard["clips"] for shard in listed.values())
    report = None if progress is None else (lambda done: progress(done, total))
    paths = (folder / name for name in sorted(listed))
    parts = [part for _, part in sorted(in_processes(_measure_shard, paths, processes, report), key=itemgetter(0))]
    measured = Measured(
        seconds=np.concatenate([part.seconds for part in parts]),
        loudness=np.concatenate([part.loudness for part in parts]),
        words=np.concatenate([part.words for part in parts]),
        captions=np.concatenate([part.captions for part in parts]),
        rates=sum((part.rates for part in parts), Counter[int]()),
        unreadable=sum(part.unreadable for part in parts),
    )
    if not len(measured.seconds):
        raise InputError(f"no readable clip in {folder}: see `ask-dist shards verify`")
    return measured


def _measure_shard(path: Path) -> tuple[str, Measured]:
    """The shard's name and its clips."""
    bad: list[str] = []
    seconds, loudness, words, captions = [], [], [], []
    rates: Counter[int] = Counter()
    for clip in clips_of(path, lambda key, reason: bad.append(key)):
        try:
            samples, rate = audio.decode(clip.audio, LONGEST_SECONDS)
        except BadSample:
            bad.append(clip.key)
        else:
            seconds.append(len(samples) / rate)
            loudness.append(20 * math.log10(float(np.sqrt(np.mean(np.square(samples, dtype=np.float64))))))
            words += [len(caption.split()) for caption in clip.description["captions"]]
            captions += [stable_id(_storable(caption)) for caption in clip.description["captions"]]
            rates[rate] += 1
        tick()
    return path.name, Measured(
        np.array(seconds, np.float32),
        np.array(loudness, np.float32),
        np.array(words, np.int32),
        np.array(captions, np.int64),
        rates,
        len(bad),
    )


def summarize(folder: Path, measured: Measured) -> dict[str, Any]:
    """The figures of a split, for JSON."""
    _, counts = np.unique(measured.captions, return_counts=True)
    return {
        "clips": len(measured.seconds),
        "hours": float(measured.seconds.sum(dtype=np.float64)) / 3600,
        "seconds": _quantiles(measured.seconds),
        "loudness_dbfs": _quantiles(measured.loudness),
        "sample_rates": {str(rate): count for rate, count in sorted(measured.rates.items())},
        "captions": len(measured.captions),
        "caption_words": _quantiles(measured.words),
        "captions_met_before": int((counts - 1).sum()),
        "most_repeated": int(counts.max()),
        "unreadable": measured.unreadable,
        "left_out_when_packed": sum(1 for _ in read_quarantine(folder)),
    }


def _storable(text: str) -> str:
    """Without the surrogates that JSON may hold and UTF-8 may not."""
    return text.encode(errors="replace").decode()


def _quantiles(values: np.ndarray) -> dict[str, float]:
    return {name: float(np.quantile(values, share)) for name, share in QUANTILES.items()}
