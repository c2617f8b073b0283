"""What a sweep searches: a schema over YAML, and its translation to Ray Tune's distributions."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import Field, model_validator

from ask_dist import config as configuration
from ask_dist.config import Config, Count, Section


class Distribution(Section):
    """One of: uniform [low, high], loguniform [low, high], choice [values]."""

    uniform: tuple[float, float] | None = None
    loguniform: tuple[float, float] | None = None
    choice: tuple[Any, ...] | None = None

    @model_validator(mode="after")
    def _one(self) -> Distribution:
        given = self.model_dump(exclude_none=True)
        if len(given) != 1:
            raise ValueError("give exactly one of uniform, loguniform, choice")
        bounds = self.uniform or self.loguniform
        if bounds and bounds[0] >= bounds[1]:
            raise ValueError(f"the low end {bounds[0]} is not below the high end {bounds[1]}")
        return self


class Sweep(Section):
    """A search around a base configuration.

    The metric is one that training reports at each validation; higher is better.
    """

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
    base: Path = Field(description="configuration of a run, relative to the working folder")
    overrides: dict[str, Any] = Field(default_factory=dict, description="section.key: value, for all trials")
    search: dict[str, Distribution] = Field(description="section.key: distribution", min_length=1)
    metric: str = "eval/validation/text_to_audio_R@1"
    trials: Count = 8
    concurrent: Count = 2
    grace_evaluations: Count = Field(1, description="validations before ASHA may stop a trial")
    reduction: Annotated[int, Field(ge=2)] = Field(2, description="ASHA keeps one in so many")
    output_dir: Path = Path("runs")
    seed: int = 0

    def trial_config(self, sample: dict[str, Any], name: str, output_dir: Path) -> Config:
        """The run of one trial."""
        settings = self.overrides | sample | {"name": name, "output_dir": str(output_dir)}
        return configuration.load(
            self.base, [f"{key}={yaml.safe_dump(value).strip()}" for key, value in settings.items()]
        )


def load(path: Path, overrides: list[str] | tuple[str, ...] = ()) -> Sweep:
    """Reads and validates a sweep and its base configuration; raises InputError as `config.load` does."""
    tree = configuration.read(path, overrides, example="configs/tune_reliability.yaml")
    sweep = configuration.validated(Sweep, tree, path)
    lowest = {key: _lowest(distribution) for key, distribution in sweep.search.items()}
    sweep.trial_config(lowest, sweep.name, sweep.output_dir)  # every searched key must exist
    return sweep


def _lowest(distribution: Distribution) -> Any:
    given = distribution.uniform or distribution.loguniform or distribution.choice
    assert given is not None
    return given[0]
