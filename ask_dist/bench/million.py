"""A bank of a million rows: built, searched exactly and by inverted files, saved, restored; and its memory."""

from __future__ import annotations

import gc
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from ask_dist.bank import store
from ask_dist.bank.memory import KnowledgeBank
from ask_dist.bench.process import alone, peak_bytes, seconds
from ask_dist.bench.rows import CENTRES_APART, clustered

RESIDENT_GIB = 10.0
NEIGHBOURS = 16
READ_BYTES = 16 * 2**20


def million_rows(
    folder: Path, *, rows: int = 1_000_000, dim: int = 512, queries: int = 256, rounds: int = 5
) -> dict[str, dict[str, Any]]:
    """Figures of `ivf_flat` over clustered float16 rows in both modalities, all in one process of its own.

    Args:
        folder: on the disk that is measured; a snapshot is written below it and removed.
        rows, dim: of the bank. queries: a search, of rows that the bank does not hold. rounds: of searches.

    Returns:
        `million_rows`, whose `ratio` is the process's peak resident size by 10 GiB; `restore_vs_disk`, by bytes a
        second; `inverted_vs_exact`, by queries a second, with the recall@16 that was measured.
    """
    return alone(_measure, folder=folder, rows=rows, dim=dim, queries=queries, rounds=rounds)


def _measure(folder: Path, rows: int, dim: int, queries: int, rounds: int) -> dict[str, dict[str, Any]]:
    settings: dict[str, Any] = {
        "dim": dim,
        "capacity": rows,
        "dtype": "float16",
        "threads": os.cpu_count() or 1,
        "index": "ivf_flat",
        "inverted_from": 1,
    }
    with tempfile.TemporaryDirectory(dir=folder) as saved:
        figures = _built(Path(saved), settings, rows, queries, rounds)  # its bank is gone when it returns
        gc.collect()
        restored = _restored(Path(saved), settings, rounds)
    peak = peak_bytes() / 2**30
    whole = {"ratio": peak / RESIDENT_GIB, "resident_gib": peak}
    figures["million_rows"] = whole | figures["million_rows"] | {"restore_seconds": restored["restore_seconds"]}
    return figures | {"restore_vs_disk": restored}


def _built(saved: Path, settings: dict[str, Any], rows: int, queries: int, rounds: int) -> dict[str, dict[str, Any]]:
    """Fills a bank, searches it before and after its inverted files are trained, and saves it."""
    bank, dim = KnowledgeBank(**settings), settings["dim"]
    built = sum(seconds(lambda chunk=chunk: bank.upsert(*chunk, None, 0)) for chunk in clustered(rows, dim))
    (_, audio, _), *_ = clustered(queries, dim, first=rows, centres=-(-rows // CENTRES_APART))
    vectors = audio.astype(np.float32)

    def search() -> np.ndarray:
        return bank.search(vectors, NEIGHBOURS, "audio")[1]

    exact, exact_seconds = search(), min(seconds(search) for _ in range(2))
    trained = seconds(bank.maintain)
    inverted, inverted_seconds = search(), min(seconds(search) for _ in range(rounds))
    found = [len(np.intersect1d(*pair)) / NEIGHBOURS for pair in zip(exact, inverted, strict=True)]
    setting = {"rows": rows, "dim": dim, "threads": settings["threads"]}
    return {
        "million_rows": {
            "build_seconds": built,
            "train_seconds": trained,
            "search_queries_per_s": queries / inverted_seconds,
            "snapshot_seconds": seconds(lambda: store.save(saved, bank.state())),
            **setting,
        },
        "inverted_vs_exact": {
            "ratio": exact_seconds / inverted_seconds,
            "recall_at_16": float(np.mean(found)),
            "inverted_queries_per_s": queries / inverted_seconds,
            "exact_queries_per_s": queries / exact_seconds,
            "queries": queries,
            **setting,
        },
    }


def _restored(folder: Path, settings: dict[str, Any], rounds: int) -> dict[str, float]:
    """Restoring the snapshot, checked and ready for exact search, against reading its file from end to end, in turns;
    medians.

    Before each the kernel is asked to drop the file's pages, so that both come from the disk; a virtual disk may still
    have them in its host's memory, for both alike. Inverted files are not saved: they are trained again by `maintain`.
    """
    (data,) = folder.glob("*.safetensors")
    size = data.stat().st_size
    reads, loads, fills = [], [], []
    for _ in range(rounds):
        _drop_pages(data)
        reads.append(seconds(lambda: _read(data)))
        _drop_pages(data)
        start = time.perf_counter()
        state = store.load(folder)
        loads.append(time.perf_counter() - start)
        fills.append(seconds(lambda state=state: KnowledgeBank.from_state(state, **settings)))
        del state
    read, restored = statistics.median(reads), statistics.median(map(sum, zip(loads, fills, strict=True)))
    return {
        "ratio": read / restored,
        "restore_seconds": restored,
        "load_seconds": statistics.median(loads),
        "fill_seconds": statistics.median(fills),
        "restore_bytes_per_s": size / restored,
        "disk_bytes_per_s": size / read,
        "bytes": size,
    }


def _drop_pages(path: Path) -> None:
    with open(path, "rb") as file:
        os.fsync(file.fileno())  # only clean pages can be dropped
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _read(path: Path) -> None:
    with open(path, "rb", buffering=0) as file:
        while file.read(READ_BYTES):
            pass
