"""How fast packing is beside a bare loop that encodes and archives the same files on the same cores."""

from __future__ import annotations

import io
import json
import os
import shutil
import statistics
import tarfile
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import soundfile

from ask_dist.data.pack_rows import PackSettings
from ask_dist.data.packing import pack_table
from ask_dist.data.sources import Source
from ask_dist.data.table import Row

RATE = 16000
CLIPS_PER_SHARD = 50


def pack_vs_bare_loop(clips: int = 2000, seconds: float = 10.0, rounds: int = 3) -> dict[str, float]:
    """Pack a folder of WAV files a round with each, in turns, with a process a core, whose start counts.

    The yardstick reads each file with soundfile, writes it as FLAC and puts it into a tar with its caption, no more.
    Packing also checks audio and captions, digests and syncs the shards, and keeps what a restart needs.

    Returns:
        Medians over the rounds: "pack" and "bare_loop" in clips/s, and their "ratio".
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        rows = _record(folder, clips, seconds)
        rates: dict[str, list[float]] = {"pack": [], "bare_loop": []}
        runs: dict[str, Callable[[Path, list[Row], Path], None]] = {"pack": _pack, "bare_loop": _bare_loop}
        for round_number in range(rounds):
            for kind in sorted(rates, reverse=bool(round_number % 2)):
                start = time.perf_counter()
                runs[kind](folder, rows, folder / "packed")
                rates[kind].append(clips / (time.perf_counter() - start))
                shutil.rmtree(folder / "packed")
    medians = {kind: statistics.median(values) for kind, values in rates.items()}
    return {**medians, "ratio": medians["pack"] / medians["bare_loop"]}


def _record(folder: Path, clips: int, seconds: float) -> list[Row]:
    """Files of coloured noise, which FLAC compresses about as it does recordings."""
    rng = np.random.default_rng(0)
    rows = []
    for number in range(clips):
        noise = np.cumsum(rng.standard_normal(round(seconds * RATE)))
        noise -= np.linspace(0, noise[-1], len(noise))
        soundfile.write(folder / f"{number}.wav", 0.5 * noise / np.abs(noise).max(), RATE)
        rows.append(Row(number, f"{number}.wav", [f"noise number {number}"], []))
    return rows


def _pack(folder: Path, rows: list[Row], out: Path) -> None:
    pack_table(rows, Source(folder), out, PackSettings(sample_rate=RATE, clips_per_shard=CLIPS_PER_SHARD))


def _bare_loop(folder: Path, rows: list[Row], out: Path) -> None:
    out.mkdir()
    runs = [rows[first : first + CLIPS_PER_SHARD] for first in range(0, len(rows), CLIPS_PER_SHARD)]
    with ProcessPoolExecutor(len(os.sched_getaffinity(0)), mp_context=get_context("forkserver")) as executor:
        tars = [out / f"{number}.tar" for number in range(len(runs))]
        list(executor.map(_bare_tar, [folder] * len(runs), runs, tars))


def _bare_tar(folder: Path, rows: Sequence[Row], path: Path) -> None:
    with tarfile.open(path, "w") as tar:
        for row in rows:
            audio, rate = soundfile.read(folder / row.audio, dtype="float32")
            flac = io.BytesIO()
            soundfile.write(flac, audio, rate, format="FLAC", subtype="PCM_16")
            key = Path(row.audio).stem
            for name, content in ((f"{key}.flac", flac.getvalue()), (f"{key}.json", json.dumps(row.captions).encode())):
                member = tarfile.TarInfo(name)
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
