"""`python -m ask_dist.bench.train`: runs by encoder, ZeRO stage, precision and chunk, into runs/bench/train.json.

python -m ask_dist.bench.train --only chunks_of_4 --output chunks.json    # one case and its loops
"""

from __future__ import annotations

import json
import statistics
import tempfile
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from ask_dist import config as configuration
from ask_dist.bench.bare import bare_loop, peak_gib
from ask_dist.bench.machine import machine
from ask_dist.bench.towers import save_ast, save_clap_htsat, save_cnn14, save_whisper
from ask_dist.bench.trainer import WARM_UP, WINDOW, bench_config, trained
from ask_dist.config import Config
from ask_dist.data.pack import EncodedClip, write_shards
from ask_dist.data.samples import read_clips
from ask_dist.data.shards import ShardList
from ask_dist.files import write_atomically
from ask_dist.train import run

SCENES, RECORDINGS = Path("configs/quickstart.yaml"), Path("configs/recordings.yaml")
OUTPUT = Path("runs/bench/train.json")
FEW = 40  # clips, for towers that take a second for each
LEARNING: dict[str, Any] = {
    **{f"model.{tower}.freeze": "false" for tower in ("audio", "text")},
    "data.cache_embeddings": "false",
}


@dataclass(frozen=True)
class Comparison:
    """Runs that are compared with bare loops: a plain one, and one for each case that spares memory as the case does.

    Attributes:
        config_file: the runs.
        cases: settings by name; `knowledge` is a setting of its own.
        shared: settings of the loops, and of the cases but for their own.
        steps: of each run.
        window: steps a measurement.
        rounds: of all in turns.
        weights: puts those of the audio encoder into a folder, and gives what `model.audio.source` is then.
    """

    config_file: Path
    cases: dict[str, dict[str, Any]]
    shared: dict[str, Any] = field(default_factory=dict)
    steps: int = 80
    window: int = WINDOW
    rounds: int = 2
    weights: Callable[[Path], Path] | None = None

    def with_weights(self, folder: Path) -> Comparison:
        """The same with weights in the folder, if it needs any, and with few clips, as a run's test would take long."""
        if self.weights is None:
            return self
        data = configuration.load(self.config_file).data
        few = {"data.train": _few(data.train, folder / "train"), "data.test": _few(data.test, folder / "test")}
        source = self.weights(folder / "weights")
        return replace(self, shared=self.shared | few | {"model.audio.source": source}, weights=None)


def _few(place: Any, folder: Path) -> Path:
    """A corpus of the first clips of another."""
    shards = ShardList.load(place)
    seconds = shards.seconds / shards.clips
    clips = [
        EncodedClip(raw.key, raw.sound, raw.extension, raw.members["json"], 16_000, seconds, ())
        for raw in read_clips(shards, 0, 0, FEW)
    ]
    write_shards(clips, folder, "few", clips_per_shard=FEW // 4)
    return folder


def _learning(name: str, sample_rate: int, weights: Callable[[Path], Path]) -> Comparison:
    """An audio encoder of its published size, which learns beside MiniLM on two pairs a worker and step."""
    further = {"model.audio.name": name, "data.sample_rate": sample_rate, "data.lanes": 4}
    batch = {"optimization.micro_batch_size": 2, "optimization.train_batch_size": 4}
    return Comparison(RECORDINGS, {name: {}}, LEARNING | further | batch, steps=9, window=1, rounds=3, weights=weights)


COMPARISONS = {
    "conv + transformer, fp32": Comparison(
        SCENES,
        {
            **{f"zero_{stage}": {"optimization.zero_stage": stage} for stage in (0, 1, 2, 3)},
            **{
                f"chunks_of_{size}": {"optimization.micro_batch_size": size, "optimization.train_batch_size": 32}
                for size in (4, 8)
            },
            "activation_checkpointing": {"optimization.activation_checkpointing": "true"},
            "ask": {"knowledge.enabled": "true"},
        },
    ),
    "conv + transformer, bf16": Comparison(SCENES, {"bf16": {}}, {"optimization.precision": "bf16"}),
    "conv + transformer, fp16": Comparison(SCENES, {"fp16": {}}, {"optimization.precision": "fp16"}, steps=50),
    "yamnet + minilm, learning": Comparison(RECORDINGS, {"learning": {}}, LEARNING, steps=50),
    "yamnet + minilm, frozen": Comparison(
        RECORDINGS,
        {"frozen": {}, "cached": {"data.cache_embeddings": "true"}},
        {"data.cache_embeddings": "false"},
        steps=50,
    ),
    "clap-htsat + minilm, learning": _learning("clap-htsat", 48_000, save_clap_htsat),
    "ast + minilm, learning": _learning("ast", 16_000, save_ast),
    "whisper + minilm, learning": _learning("whisper", 16_000, save_whisper),
    "cnn14 + minilm, learning": _learning("cnn14", 32_000, save_cnn14),
}


CASES = [name for comparison in COMPARISONS.values() for name in comparison.cases]


def compare(comparison: Comparison) -> dict[str, dict[str, Any]]:
    """Runs the plain loop, every case and the loop that is alike in turns.

    Returns:
        By case, and for the plain loop as `bare`: samples_per_second (median of the windows) and peak_gib of rank 0; of
        a case also `ratio` of its samples/s to the plain loop's, `memory_ratio`, the same two as `alike_ratio` and
        `alike_memory_ratio` to the loop's that is alike, which may be the plain one, and `stages`, shares of a step by
        name.
    """
    rates: dict[str, list[float]] = defaultdict(list)
    peaks: dict[str, list[float]] = defaultdict(list)
    stages: dict[str, dict[str, float]] = {}

    def loop(name: str, config: Config, alike: bool) -> None:
        measured = bare_loop(config, comparison.window, alike)
        rates[name] += measured.rates[WARM_UP:]
        peaks[name].append(measured.peak_gib)

    with tempfile.TemporaryDirectory() as folder:
        comparison = comparison.with_weights(Path(folder))
        for number in range(comparison.rounds):
            place = Path(folder) / str(number)
            loop("bare", _config(comparison, "bare", place), False)
            for name in comparison.cases:
                config = _config(comparison, name, place)
                if not _is_plain(config):
                    loop(_alike(name), config, True)
                rows = trained(config)
                rates[name] += [row["train/samples_per_second"] for row in rows]
                peaks[name].append(max(map(peak_gib, rows)))
                stages[name] = _shares(rows, config.global_batch_size)
    found: dict[str, dict[str, Any]] = {
        name: {"samples_per_second": statistics.median(rates[name]), "peak_gib": max(peaks[name])} for name in rates
    }
    for name in comparison.cases:
        alike = found[_alike(name)] if _alike(name) in found else found["bare"]
        for prefix, other in (("", found["bare"]), ("alike_", alike)):
            found[name][f"{prefix}ratio"] = found[name]["samples_per_second"] / other["samples_per_second"]
            found[name][f"{prefix}memory_ratio"] = found[name]["peak_gib"] / other["peak_gib"]
        found[name]["stages"] = stages[name]
    return found


def _alike(name: str) -> str:
    return f"{name}, loop"


def _is_plain(config: Config) -> bool:
    """Whether a loop that is alike would be the plain one."""
    settings = config.optimization
    whole = settings.local_batch_size(config.cluster.num_workers) <= settings.micro_batch_size
    return whole and settings.zero_stage == 0 and not settings.activation_checkpointing


def _config(comparison: Comparison, name: str, folder: Path) -> Config:
    further = {"optimization.log_every": comparison.window} | comparison.shared | comparison.cases.get(name, {})
    knowledge = further.get("knowledge.enabled") == "true"
    config = bench_config(comparison.config_file, folder, name, comparison.steps, knowledge, further)
    if knowledge:  # a pair's neighbours can be asked for once the bank holds it
        epoch = run.steps_per_epoch(config, ShardList.load(config.data.train))
        config = bench_config(comparison.config_file, folder, name, comparison.steps + epoch, knowledge, further)
    return config


def _shares(rows: list[dict[str, float]], batch: int) -> dict[str, float]:
    """What each stage takes of a step's time, by the median window."""
    names = [name for name in rows[-1] if name.startswith("time/")]
    rate = "train/samples_per_second"
    return {
        name.removeprefix("time/"): statistics.median(row[name] * row[rate] / batch for row in rows) for name in names
    }


def main(
    only: Annotated[list[str] | None, typer.Option(help=f"one of {', '.join(CASES)}; may be given again")] = None,
    output: Annotated[Path, typer.Option(help="JSON file, of this call's cases alone")] = OUTPUT,
) -> None:
    """Measures one comparison after the other and writes what it found after each."""
    console = Console()
    if unknown := set(only or ()) - set(CASES):
        raise typer.BadParameter(f"{', '.join(sorted(unknown))}: no such case; there are {', '.join(CASES)}")
    measured: dict[str, Any] = {"machine": machine()}
    output.parent.mkdir(parents=True, exist_ok=True)
    for title, comparison in COMPARISONS.items():
        cases = {name: case for name, case in comparison.cases.items() if not only or name in only}
        if not cases:
            continue
        measured[title] = compare(replace(comparison, cases=cases))
        write_atomically(output, json.dumps(measured, indent=1).encode())
        for name, values in measured[title].items():
            ratio = ""
            if "ratio" in values:
                ratio = f", {values['ratio']:.3f} of bare, {values['alike_ratio']:.3f} of one alike"
            console.print(
                f"{title}: {name} {values['samples_per_second']:.4g} samples/s{ratio}, {values['peak_gib']:.3g} GiB",
                highlight=False,
            )


if __name__ == "__main__":
    typer.run(main)
