"""Whole ablations on a few rendered scenes: real encoders, bank, refiner and Ray tasks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from ask_dist.ablation.driver import ablate
from ask_dist.ablation.space import Ablation, Trial
from ask_dist.ablation.trial import run_trial
from ask_dist.data.corpora import sampled_scenes
from ask_dist.errors import InputError

ROW = {
    *("corpus", "noise", "arm", "metric", "seeds", "mean", "baseline", "baseline_mean", "difference"),
    *("low", "high", "steps", "seconds"),
}
KNOWLEDGE = {"start": 0.3, "neighbours": 4, "reliability": {"rank": 8, "start": 0.2}}


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("scenes")
    sampled_scenes.build(folder, train=128, validation=12, test=24, seconds=2.0, processes=1)
    return folder


@pytest.fixture
def ablation(scenes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Ablation:
    monkeypatch.chdir(tmp_path)
    model = {"embedding_dim": 16, "audio": {"width": 8, "mel_bins": 16}, "text": {"width": 16, "heads": 2}}
    corpus = {"shards": scenes, "scenes": 96, "knowledge_scenes": 32, "clip_seconds": 2.0, "epochs": 2, "model": model}
    return Ablation.model_validate(
        {
            "name": "small",
            "output_dir": tmp_path / "runs",
            "seeds": [0],
            "prototypes": [4],
            "refine": {"minimum_fresh": 8, "steps": 2, "hidden": 8, "neighbours": 4},
            "corpora": {"scenes": corpus},
            "arms": {"plain": {"loss": "info_nce"}, "ask": {"knowledge": KNOWLEDGE}},
            "experiments": [{"corpus": "scenes", "baseline": "plain", "arms": ["ask"], "swapped": [0.0, 0.5]}],
        }
    )


def trial(ablation: Ablation, **arm: Any) -> Trial:
    whole = ablation.model_dump()
    whole["arms"]["chosen"] = {"knowledge": KNOWLEDGE} | arm
    whole["experiments"] = [{"corpus": "scenes", "baseline": "chosen", "arms": []}]
    return Ablation.model_validate(whole).trials()[0]


@pytest.mark.ray
def test_an_ablation_reports_its_rows_and_goes_on_where_it_stopped(ablation: Ablation, local_ray: None) -> None:
    folder = ablate(ablation, Console(quiet=True))
    rows = json.loads((folder / "ablation.json").read_text())
    assert all(set(row) == ROW for row in rows)
    metrics = {row["metric"] for row in rows if row["arm"] == "ask" and row["noise"] == 0.5}
    assert {"text_to_audio_R@1", "audio_to_text_R@1", "tail_text_to_audio_R@1", "probe_order", "auroc"} <= metrics
    assert {"drift_audio", "overlap_text"} <= metrics
    page = (folder / "ablation.html").read_text()
    assert page.count("data:image/png;base64") == len(list(folder.glob("*.png"))) >= 2

    files = {path.name: path.stat().st_mtime_ns for path in (folder / "trials").iterdir()}
    assert len(files) == 4
    damaged = folder / "trials" / "scenes-00-plain-0.json"
    damaged.write_bytes(damaged.read_bytes()[:100])
    changed = ablation.model_dump()
    changed["experiments"][0]["swapped"] = [0.0]
    changed["arms"]["ask"]["batch_size"] = 16
    ablate(Ablation.model_validate(changed), Console(quiet=True))
    again = {path.name: path.stat().st_mtime_ns for path in (folder / "trials").iterdir()}
    assert {name for name in files if files[name] != again[name]} == {damaged.name, "scenes-00-ask-0.json"}


@pytest.mark.parametrize(
    "arm",
    [
        {"loss": "info_nce"},
        {"loss": "siglip"},
        {"loss": "xbm", "memory": 64},
        {"loss": "global_contrast"},
        {"loss": "grad_cache", "batch_size": 48},
        {"strategy": "none", "bank": "once"},
        {"knowledge_corpus": True, "strategy": "gnn"},
        {"knowledge_corpus": True, "strategy": "reencode"},
    ],
    ids=lambda arm: "-".join(map(str, arm.values())),
)
def test_every_kind_of_arm_trains_and_repeats_itself(ablation: Ablation, arm: dict[str, Any]) -> None:
    chosen = trial(ablation, **arm)
    first, second = (run_trial(chosen, Path("cache")) for _ in range(2))
    assert set(first.values) >= {"text_to_audio_R@1", "audio_to_text_R@1", "probe_count"}
    for name, values in first.values.items():
        np.testing.assert_array_equal(values, second.values[name])
    assert first.metrics["steps"] == 96 // chosen.arm.batch_size * 2
    if arm.get("strategy") == "reencode":
        assert first.metrics["drift_audio"] == pytest.approx(0.0, abs=1e-5)
        assert first.metrics["overlap_text"] > 0.95


def test_a_larger_batch_sees_the_same_pairs_in_the_same_order(ablation: Ablation) -> None:
    from ask_dist.ablation.inputs import load_inputs
    from ask_dist.ablation.trial import _Run

    orders = []
    for batch_size in (16, 48):
        chosen = trial(ablation, loss="info_nce", batch_size=batch_size)
        train = load_inputs(chosen.corpus, "train", Path("cache"))
        run = _Run(chosen, train.part(0, 96), train.part(96, 128))
        orders.append(np.concatenate([ids.numpy() for ids in run.batches()]))
    np.testing.assert_array_equal(*orders)
    assert sorted(orders[0][:96]) == list(range(96))


def test_queries_are_ranked_within_their_gallery(ablation: Ablation) -> None:
    chosen = trial(ablation, loss="info_nce")
    ranked = chosen.model_copy(update={"corpus": chosen.corpus.model_copy(update={"gallery": 1})})
    alone, among = (run_trial(settings, Path("cache")) for settings in (ranked, chosen))
    assert alone.values["text_to_audio_R@1"].mean() == 100.0  # the only one
    assert among.values["text_to_audio_R@1"].mean() < 100.0
    assert alone.values["text_to_audio_R@1"].shape == among.values["text_to_audio_R@1"].shape


def test_nothing_done_and_nothing_to_run_is_an_input_error(ablation: Ablation) -> None:
    with pytest.raises(InputError, match="is done: nothing was run"):
        ablate(ablation, Console(quiet=True), only_report=True)
