"""Rows out of outcomes whose differences are known."""

from __future__ import annotations

import numpy as np

from ask_dist.ablation.analysis import rows
from ask_dist.ablation.plots import plots
from ask_dist.ablation.space import Ablation
from ask_dist.ablation.trial import Outcome

ABLATION = Ablation.model_validate(
    {
        "name": "made_up",
        "seeds": [0, 1, 2],
        "corpora": {"scenes": {"shards": "nowhere"}},
        "arms": {"plain": {"loss": "info_nce"}, "ask": {}},
        "experiments": [{"corpus": "scenes", "baseline": "plain", "arms": ["ask"], "swapped": [0.0, 0.3]}],
    }
)


def outcome(recall: float, **metrics: float) -> Outcome:
    hits = np.repeat([0.0, 100.0], [100 - int(recall), int(recall)])
    return Outcome({"steps": 10.0, "seconds": 2.0, **metrics}, {"text_to_audio_R@1": hits})


def found_of(outcomes):
    return {(row.noise, row.arm, row.metric): row for row in rows(ABLATION, outcomes)}


def test_means_differences_and_intervals_are_those_of_the_finished_seeds():
    outcomes = {("scenes", 0.0, "plain", seed): outcome(40) for seed in (0, 1)}
    outcomes |= {("scenes", 0.0, "ask", seed): outcome(50 + 10 * seed, drift_audio=0.1) for seed in (0, 1, 2)}
    found = found_of(outcomes)
    row = found[0.0, "ask", "text_to_audio_R@1"]
    assert row.seeds == [0, 1]
    assert (row.mean, row.baseline, row.baseline_mean, row.difference) == (55.0, "plain", 40.0, 15.0)
    assert row.low < 15.0 < row.high
    assert (row.steps, row.seconds) == (10.0, 2.0)
    baseline = found[0.0, "plain", "text_to_audio_R@1"]
    assert (baseline.difference, baseline.low, baseline.high) == (0.0, 0.0, 0.0)
    assert not [key for key in found if key[0] == 0.3]  # nothing of it is done


def test_an_experiment_is_compared_on_its_own_seeds():
    tree = ABLATION.model_dump()
    tree["experiments"][0]["seeds"] = [2, 3]
    outcomes = {("scenes", 0.0, arm, seed): outcome(40 + seed) for arm in ("plain", "ask") for seed in range(4)}
    (row,) = (row for row in rows(Ablation.model_validate(tree), outcomes) if row.arm == "ask")
    assert (row.seeds, row.mean) == ([2, 3], 42.5)


def test_a_figure_that_the_baseline_lacks_is_told_without_a_comparison():
    outcomes = {
        ("scenes", 0.3, "plain", 0): outcome(40),
        ("scenes", 0.3, "ask", 0): outcome(60, drift_audio=0.25),
    }
    row = found_of(outcomes)[0.3, "ask", "drift_audio"]
    assert row.mean == 0.25
    assert np.isnan([row.baseline_mean, row.difference, row.low, row.high]).all()


def test_plots_are_pngs_of_what_is_there():
    outcomes = {
        ("scenes", noise, arm, seed): outcome(recall - 50 * noise)
        for noise in (0.0, 0.3)
        for arm, recall in (("plain", 40), ("ask", 60))
        for seed in (0, 1)
    }
    drawn = plots(rows(ABLATION, outcomes))
    assert set(drawn) == {"scenes_against_plain.png", "scenes_swapped_captions.png"}
    assert all(content.startswith(b"\x89PNG") for content in drawn.values())
    assert plots([]) == {}


def test_stored_rows_are_drawn_where_the_baseline_has_some_too():
    measures = {f"{measure}_{of}": 0.5 for measure in ("drift", "overlap") for of in ("audio", "text")}
    outcomes = {("scenes", 0.0, arm, 0): outcome(40, **measures) for arm in ("plain", "ask")}
    assert "scenes_bank_against_plain.png" in plots(rows(ABLATION, outcomes))


def test_a_comparison_needs_a_common_seed():
    assert rows(ABLATION, {("scenes", 0.0, "ask", 2): outcome(50)}) == []
