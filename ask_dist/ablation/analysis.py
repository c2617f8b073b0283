"""From trials' outcomes to rows: each arm against its baseline, metric by metric."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass

import numpy as np

from ask_dist.ablation.space import Ablation, Experiment
from ask_dist.ablation.statistics import compare
from ask_dist.ablation.trial import Outcome

# (corpus, swapped, arm, seed) -> what that trial found
Outcomes = Mapping[tuple[str, float, str, int], Outcome]


@dataclass(frozen=True)
class Row:
    """One arm, one metric, against one baseline.

    Attributes:
        corpus, noise, arm, metric: what was measured; noise is the share of swapped captions.
        seeds: that both arms have finished.
        mean: of the arm, over seeds and queries.
        baseline: name of the arm compared with; baseline_mean: its mean.
        difference, low, high: mean - baseline_mean and its 95% paired-bootstrap interval over seeds and queries.
        steps, seconds: of the arm's training, means over seeds.
    """

    corpus: str
    noise: float
    arm: str
    metric: str
    seeds: list[int]
    mean: float
    baseline: str
    baseline_mean: float
    difference: float
    low: float
    high: float
    steps: float
    seconds: float


def rows(ablation: Ablation, outcomes: Outcomes) -> list[Row]:
    """All rows that the finished trials allow; a comparison needs one common seed at least."""
    found: dict[tuple, Row] = {}
    for experiment in ablation.experiments:
        for noise in experiment.swapped:
            for arm in experiment.all_arms:
                for row in _compared(experiment, noise, arm, ablation.seeds_of(experiment), outcomes):
                    found[row.corpus, row.noise, row.arm, row.metric, row.baseline] = row
    return list(found.values())


def _compared(
    experiment: Experiment, noise: float, arm: str, seeds: tuple[int, ...], outcomes: Outcomes
) -> Iterator[Row]:
    def of(name: str) -> dict[int, Outcome]:
        keys = {seed: (experiment.corpus, noise, name, seed) for seed in seeds}
        return {seed: outcomes[key] for seed, key in keys.items() if key in outcomes}

    ours, theirs = of(arm), of(experiment.baseline)
    common = [seed for seed in ours if seed in theirs]
    if not common:
        return
    timing = {name: float(np.mean([ours[seed].metrics[name] for seed in common])) for name in ("steps", "seconds")}
    for metric in _metrics(ours[common[0]]):
        ours_values = np.stack([_values(ours[seed], metric) for seed in common])
        if metric in _metrics(theirs[common[0]]):
            theirs_values = np.stack([_values(theirs[seed], metric) for seed in common])
        else:  # a baseline without a bank has no drift to compare with
            theirs_values = np.full_like(ours_values, np.nan)
        if np.isfinite(ours_values - theirs_values).all(axis=0).any():
            found = asdict(compare(ours_values, theirs_values))
        elif np.isfinite(ours_values).all(axis=0).any():
            found = {"mean": float(np.nanmean(ours_values))} | dict.fromkeys(
                ("baseline_mean", "difference", "low", "high"), float("nan")
            )
        else:
            continue
        yield Row(experiment.corpus, noise, arm, metric, common, baseline=experiment.baseline, **found, **timing)


def _metrics(outcome: Outcome) -> list[str]:
    return [*outcome.values, *(name for name in outcome.metrics if name not in ("steps", "seconds"))]


def _values(outcome: Outcome, metric: str) -> np.ndarray:
    return outcome.values[metric] if metric in outcome.values else np.array([outcome.metrics[metric]])
