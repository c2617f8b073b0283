"""The end of a run: test, drift of the bank, search index, weights, report."""

from __future__ import annotations

import os
import platform
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.distributed as dist

from ask_dist.data.leaks import LEAK
from ask_dist.data.quarantine import QUARANTINE, write_quarantine
from ask_dist.data.shards import stable_id
from ask_dist.evaluate.drift import auroc, mean_drift, neighbour_overlap
from ask_dist.evaluate.encode import Encoded, encode, gather_encoded, retrieval_results, search_index
from ask_dist.evaluate.report import read_series, write_report
from ask_dist.files import writing
from ask_dist.models.saved import save_model

if TYPE_CHECKING:
    from ask_dist.train.state import TrainState

PROBE_CLIPS = 512
LIBRARIES = ("torch", "torchaudio", "ray", "deepspeed", "faiss-gpu", "torch-geometric", "webdataset")


def finish(state: TrainState) -> None:
    """Evaluates the trained model on all ranks and writes the run's results on rank 0. A collective.

    Raises:
        InputError: no clip of the split that it is tested on can be used; the model is written all the same.
        DiskError: the disk is full or can't be written; the last checkpoint is still there.
    """
    split = "test" if "test" in state.shards else "validation" if "validation" in state.shards else "train"
    model = state.engine.whole()
    part = encode(model, state.shards[split], state.config, state.rank, state.world_size)
    probe = encode(model, state.shards["train"], state.config, state.rank, state.world_size, limit=PROBE_CLIPS)
    encoded, probe = gather_encoded(part), gather_encoded(probe)
    trusted, bad = _gather_facts(state)
    if state.rank == 0:
        with writing(state.config.run_dir):  # first: whatever the scores come to, the model is there
            save_model(state.config.run_dir / "model", model)
        results = retrieval_results(encoded, state.shards["train"].classes, state.config.seed)
        results |= {"dataset": split, "reliability": _reliability(trusted)}
        results |= _run_facts(state) | _bank_facts(state, probe)
        with writing(state.config.run_dir):
            records = write_quarantine(state.config.run_dir / QUARANTINE, bad + encoded.bad)
        examples = [{"name": f"{r['shard']}: {r['key']}", "reason": r["reason"]} for r in records[:20]]
        leaks = sum(record["reason"].startswith(LEAK) for record in records)
        results["quarantine"] = {"count": len(records), "leaks": leaks, "examples": examples}
        index = search_index(encoded, split)
        if state.log is not None:
            state.log.close()
        with writing(state.config.run_dir):
            index.write(state.config.run_dir / "index")
            write_report(state.config.run_dir, results)
    dist.barrier()


def _gather_facts(state: TrainState) -> tuple[tuple[np.ndarray, np.ndarray], list[dict[str, str]]]:
    """Reliability and swapped flags of the last epoch, and records of bad samples, over all ranks."""
    values = [torch.cat(column).numpy() for column in zip(*state.trusted, strict=True)] or [
        np.zeros(0),
        np.zeros(0, bool),
    ]
    parts: list[Any] = [None] * state.world_size
    dist.all_gather_object(parts, (*values, state.loader.bad.records))
    reliability, swapped, records = zip(*parts, strict=True)
    return (np.concatenate(reliability), np.concatenate(swapped)), [r for part in records for r in part]


def _reliability(trusted: tuple[np.ndarray, np.ndarray]) -> dict[str, Any] | None:
    reliability, swapped = trusted
    if len(reliability) == 0:
        return None
    edges = np.linspace(0.0, 1.0, 41)
    clean, wrong = (np.histogram(reliability[mask], edges)[0].tolist() for mask in (~swapped, swapped))
    histogram = {"edges": edges.tolist(), "clean": clean, "swapped": wrong if swapped.any() else None}
    return {"histogram": histogram, "auroc": auroc(reliability, ~swapped) if swapped.any() else None}


def _bank_facts(state: TrainState, probe: Encoded) -> dict[str, Any]:
    """What the bank held at the end, against a fresh encoding of some training clips (RDM)."""
    if state.knowledge is None:
        return {"bank": None, "refine": None, "drift": None}
    bank = state.knowledge.stored_rows(np.array([stable_id(key) for key in probe.keys]))
    row_of = {} if bank is None else {int(key): row for row, key in enumerate(bank.ids)}
    first_text = np.unique(probe.owner.numpy(), return_index=True)[1]
    found = [(clip, row_of[stable_id(key)]) for clip, key in enumerate(probe.keys) if stable_id(key) in row_of]
    drift = None
    if bank is not None and len(found) > 10:
        clips, rows = np.array(found).T
        fresh = {"audio": probe.audio_features.numpy()[clips], "text": probe.text_features.numpy()[first_text][clips]}
        stored = {"audio": bank.audio[rows].astype(np.float32), "text": bank.text[rows].astype(np.float32)}
        drift = {name: mean_drift(stored[name], fresh[name]) for name in stored}
        drift |= {f"overlap_{name}": neighbour_overlap(stored[name], fresh[name]) for name in stored}
    facts = state.knowledge.last_metrics()

    def under(prefix: str) -> dict[str, float]:
        return {name.removeprefix(prefix): value for name, value in facts.items() if name.startswith(prefix)}

    return {"drift": drift, "bank": under("bank/"), "refine": under("refine/") or None}


def _run_facts(state: TrainState) -> dict[str, Any]:
    """Throughput, diagnostics and surroundings."""
    series = read_series(state.config.run_dir / "metrics.jsonl")

    def median(name: str) -> float | None:
        return float(np.median(list(series[name].values()))) if series.get(name) else None

    open_gate = [
        value
        for step, value in series.get("train/out_of_batch_gradient_share", {}).items()
        if step > state.config.knowledge.start * state.total_steps
    ]
    seconds = series.get("time", {})
    return {
        "throughput": {
            "samples_per_second": median("train/samples_per_second"),
            "audio_hours_per_second": median("train/audio_hours_per_second"),
            "samples_seen": state.samples_seen,
            "global_steps": state.engine.global_step,
            "skipped_steps": state.skipped_steps,
            **{name: median(name) for name in sorted(series) if name.startswith("time/")},
            **{name: max(series[name].values()) for name in sorted(series) if name.startswith("memory/")},
        },
        "diagnostics": {
            "out_of_batch_gradient_share": float(np.median(open_gate)) if open_gate else None,
            "gradient_norm_ratio": median("train/gradient_norm_ratio"),
        },
        "seconds": max(seconds.values(), default=0.0),
        "config": state.config.model_dump(mode="json"),
        "versions": {"ask-dist": version("ask-dist")} | {name: version(name) for name in LIBRARIES},
        "machine": {
            "processor": platform.processor() or platform.machine(),
            "cores": os.cpu_count(),
            "device": torch.cuda.get_device_name() if state.engine.device.type == "cuda" else "cpu",
            "workers": state.world_size,
        },
        "command": os.environ.get("ASK_DIST_COMMAND"),
    }
