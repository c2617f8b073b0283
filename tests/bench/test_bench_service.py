"""The bench of the bank in tiny sizes: every figure is measured for real, and nothing is said of the times."""

from __future__ import annotations

import json
import pkgutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from ask_dist.bench.service import MEASUREMENTS, NAMES, Goal, markdown, table
from ask_dist.data.pack import write_shards
from ask_dist.data.shards import Clip
from ask_dist.plan.constants import SHIPPED, Constants, load

SMALL = {name: measurement for measurement in MEASUREMENTS for name in measurement.figures}
ROOT = Path(__file__).parents[2]


def measured(name: str, **given: object) -> dict:
    """What the measurement of a figure gives in its small form."""
    function = pkgutil.resolve_name(f"ask_dist.bench.{SMALL[name].function}")
    return function(**given, **SMALL[name].small)


def service(*arguments: str | Path) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "ask_dist.bench.service", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=280, cwd=ROOT)


@pytest.mark.ray
def test_the_actor_is_compared_at_every_number_of_queries(local_ray):
    figure = measured("search_actor_vs_in_process")
    sizes = SMALL["search_actor_vs_in_process"].small["sizes"]
    ratios = [figure[f"of_{size}"]["ratio"] for size in sizes]
    assert figure["ratio"] == min(ratios) > 0
    one = figure[f"of_{sizes[0]}"]
    assert one["ratio"] == pytest.approx(one["actor_queries_per_s"] / one["in_process_queries_per_s"])


@pytest.mark.ray
def test_callers_are_measured_with_and_without_upserts(local_ray):
    figure = measured("search_p99_under_upserts")
    assert figure["ratio"] == pytest.approx(figure["p99_seconds_busy"] / figure["p99_seconds_idle"])
    for side in ("idle", "busy"):
        assert 0 < figure[f"median_seconds_{side}"] <= figure[f"p99_seconds_{side}"]


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.multiprocess
def test_the_measured_constants_are_those_that_the_model_takes(local_ray, tones):
    found = Constants.model_validate(measured("planner_constants", config_file=tones))
    assert set(found.indexes(gpu=False)) == set(found.upsert) == set(found.memory)
    assert all(line.at(10_000) > 0 for line in (*found.search.values(), *found.refine.values()))
    assert min(found.snapshot, found.commit, found.byte, *found.upsert.values()) > 0
    assert found.look.at(10_000) > 0
    assert found.bytes_a_row("flat", "float32", 64) > 2 * 64 * 2  # at least what is stored
    assert {"kernel", "reencode"} <= set(found.refine)
    assert found.prototypes.at(1000) > 0
    assert found.encoding > 0


@pytest.mark.ray
def test_simulated_workers_are_set_beside_the_model(local_ray):
    figure = measured("plan_vs_simulated_workers", constants=load(SHIPPED))
    assert figure["ratio"] == pytest.approx(figure["served_steps_per_s"] / figure["predicted_steps_per_s"])
    small = SMALL["plan_vs_simulated_workers"].small
    settings = {f"busy_{share:g}": share for share in small["shares"]}
    settings |= dict.fromkeys(("busy_0.1_flat_2", "busy_0.1_ivf_flat_1"), small["others_share"])
    for name, share in settings.items():
        found = figure[name]
        assert found["predicted_busy"] == pytest.approx(share, abs=0.5 / found["workers"])
        assert 0 < found["mean_seconds"] <= found["p99_seconds"]
        assert 0 <= found["late_share"] <= 1
    assert figure["lockstep"]["p99_seconds"] > 0


@pytest.mark.multiprocess
def test_the_command_writes_what_it_measured_and_leaves_the_rest(tmp_path):
    output = tmp_path / "bank.json"
    older = {"ratio": 1.5, "goal": "at most 2", "met": True, "machine": {"commit": "0a1b2c3"}}
    output.write_text(json.dumps({"search_p99_under_upserts": older}))
    done = service("--small", "--only", "inverted_vs_exact", "--output", output)
    assert done.returncode == 0, done.stderr
    figures = json.loads(output.read_text())
    assert set(figures) == {"search_p99_under_upserts", "million_rows", "restore_vs_disk", "inverted_vs_exact"}
    million, inverted = figures["million_rows"], figures["inverted_vs_exact"]
    assert million["ratio"] == pytest.approx(million["resident_gib"] / 10)
    assert million["met"] is (million["ratio"] <= 1)
    assert inverted["recall_at_16"] > 0.9
    assert inverted["met"] is (inverted["ratio"] >= 10)
    assert figures["restore_vs_disk"]["bytes"] > 2 * 3000 * 32 * 2
    assert million["machine"]["cores"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bank.json", "bank.md"]
    assert f"| at most 1 | {million['ratio']:.3f} |" in (tmp_path / "bank.md").read_text()
    assert "at most 2" in done.stdout


def test_a_figure_that_there_is_not_is_refused(tmp_path):
    done = service("--only", "speed", "--output", tmp_path / "bank.json")
    assert done.returncode == 2
    assert "no such figure" in done.stderr
    assert not (tmp_path / "bank.json").exists()


def test_goals_say_which_side_is_good():
    assert Goal(0.9, at_least=True).met(0.95)
    assert not Goal(0.9, at_least=True).met(0.85)
    assert Goal(2.0).met(1.5)
    assert not Goal(2.0).met(2.5)
    assert (str(Goal(0.9, at_least=True)), str(Goal(2.0))) == ("at least 0.9", "at most 2")


def test_the_table_has_every_figure_that_is_there():
    shown = table({name: {"ratio": 1.0, "goal": "at most 2", "met": False, "part": {"a": 0.5}} for name in NAMES})
    assert shown.row_count == len(NAMES)


def test_the_model_and_the_simulated_workers_stand_side_by_side():
    setting = {"workers": 8, "late_share": 0.25, "mean_seconds": 0.5, "p99_seconds": 2.0, "predicted_p99_seconds": 1.5}
    figure = {"ratio": 0.9, "rows": 10, "busy_0.6": setting, "machine": {"commit": "0a1b2c3"}}
    text = markdown({"plan_vs_simulated_workers": figure})
    assert "| `plan_vs_simulated_workers` |  | 0.900 | 0a1b2c3 |" in text
    assert "| busy_0.6, 8 workers | - / - | 0.25 / - | 0.5 / - | 2 / 1.5 |" in text


@pytest.fixture(scope="module")
def tones(tmp_path_factory) -> Path:
    """A configuration of a small model on 64 tones in 4 shards."""
    folder = tmp_path_factory.mktemp("tones")
    wave = np.sin(np.arange(8000) / 20, dtype=np.float32) / 2
    clips = [Clip(f"t{number}", np.roll(wave, number), 8000, (f"tone {number}",)) for number in range(64)]
    write_shards(clips, folder / "shards", "train", clips_per_shard=16)
    path = folder / "run.yaml"
    path.write_text(f"""
name: tones
data: {{train: {folder / "shards"}, test: {folder / "shards"}, clip_seconds: 1.0, sample_rate: 8000, lanes: 4}}
model: {{embedding_dim: 32, audio: {{width: 8, mel_bins: 16}}, text: {{width: 16, layers: 1, vocabulary: 300}}}}
optimization: {{micro_batch_size: 8, learning_rate: 0.003}}
knowledge: {{neighbours: 4, reliability: {{rank: 4}}}}
bank: {{prototypes: [4]}}
refine: {{minimum_fresh: 8, interval: 0.1}}
""")
    return path


@pytest.mark.slow
@pytest.mark.ray
def test_a_step_with_a_large_bank_is_set_beside_plain_ones(tones):
    figure = measured("knowledge_step_100k", config_file=tones)
    assert 0 < figure["first_quartile"] <= figure["ratio"] <= figure["third_quartile"]
    assert figure["pairs"] > 0
    assert 0 <= figure["late_share"] <= 1
    assert figure["more_knowledge"] > 0


@pytest.mark.slow
@pytest.mark.ray
def test_the_same_is_measured_with_pretrained_towers_that_learn(tones):
    figure = measured("knowledge_step_100k_pretrained", config_file=tones)
    assert figure["ratio"] > 0
    assert figure["pairs"] > 0


@pytest.mark.slow
@pytest.mark.ray
def test_a_refiner_is_set_beside_none(tones):
    figure = measured("refiner_slowdown", config_file=tones)
    for prefix in ("", "shared_"):
        assert figure[f"{prefix}ratio"] > 0
        assert figure[f"{prefix}generations"] > 0
