"""What an ablation compares: a schema over YAML."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from ask_dist import config as configuration
from ask_dist.config import Count, Knowledge, Model, Positive, Refine, Section, Share

Seed = Annotated[int, Field(ge=0)]
Loss = Literal["ask", "info_nce", "siglip", "xbm", "global_contrast", "grad_cache"]


class Corpus(Section):
    """Scenes, the encoders that are trained on them, and for how long: the same in every arm."""

    shards: Path = Field(description="folder with train/, validation/ and test/")
    scenes: Count | None = Field(None, description="the first so many training scenes; null: all")
    knowledge_scenes: Annotated[int, Field(ge=0)] = Field(
        0, description="further training scenes that no arm trains on; arms with knowledge_corpus have them in the bank"
    )
    gallery: Count | None = Field(
        None, description="test scenes that a query is ranked among, the last ones among what is left; null: all"
    )
    clip_seconds: Positive = 4.0
    encoders: Literal["scratch", "frozen"] = Field(
        "scratch", description="scratch: conv and transformer on log-mel; frozen: heads on YAMNet and MiniLM"
    )
    model: Model = Model()
    epochs: Positive = 16.0
    learning_rate: Positive = 1e-3
    weight_decay: Share = 0.02


class Arm(Section):
    """One way to train."""

    loss: Loss = "ask"
    batch_size: Count = 32
    samples_share: Share = Field(1.0, description="of the samples that other arms see, where a sample costs more time")
    learning_rate_factor: Positive = 1.0
    memory: Count = Field(1024, description="pairs that xbm remembers")
    momentum: Share = Field(0.8, description="of global_contrast: weight of the newest value")
    knowledge: Knowledge = Knowledge()
    strategy: Literal["none", "linear", "knn_mean", "kernel", "mlp", "gnn", "reencode"] = Refine().strategy
    bank: Literal["live", "once"] = Field("live", description="once: encoded when the gate opens, never again")
    knowledge_corpus: bool = Field(False, description="the bank holds the corpus's knowledge_scenes too")


class Experiment(Section):
    """Arms that are compared with one baseline, on one corpus, at some shares of swapped captions."""

    corpus: str
    baseline: str
    arms: tuple[str, ...]
    swapped: tuple[Share, ...] = (0.0,)
    seeds: tuple[Seed, ...] | None = Field(None, min_length=1, description="null: those of the whole ablation")

    @property
    def all_arms(self) -> tuple[str, ...]:
        """Baseline and arms, each once."""
        return tuple(dict.fromkeys((self.baseline, *self.arms)))


class Ablation(Section):
    """A whole ablation."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
    output_dir: Path = Path("runs")
    seeds: tuple[Seed, ...] = Field((0, 1, 2), min_length=1)
    generations_per_epoch: Positive = Field(1.0, description="how often the bank is refined")
    prototypes: tuple[Count, ...] = (32, 128)
    refine: Refine = Refine()
    cpus_per_trial: Positive = 1.0
    corpora: dict[str, Corpus] = Field(min_length=1)
    arms: dict[str, Arm] = Field(min_length=1)
    experiments: tuple[Experiment, ...] = Field(min_length=1)

    @property
    def folder(self) -> Path:
        """Where results go."""
        return (self.output_dir / self.name).absolute()

    @model_validator(mode="after")
    def _names_exist(self) -> Ablation:
        for experiment in self.experiments:
            if experiment.corpus not in self.corpora:
                raise ValueError(
                    f"experiment on unknown corpus {experiment.corpus!r}; known: {', '.join(self.corpora)}"
                )
            for arm in experiment.all_arms:
                if arm not in self.arms:
                    raise ValueError(f"experiment with unknown arm {arm!r}; known: {', '.join(self.arms)}")
                if self.arms[arm].knowledge_corpus and not self.corpora[experiment.corpus].knowledge_scenes:
                    raise ValueError(f"arm {arm!r} needs corpora.{experiment.corpus}.knowledge_scenes above 0")
        return self

    def seeds_of(self, experiment: Experiment) -> tuple[int, ...]:
        """The seeds that an experiment's arms are run with."""
        return self.seeds if experiment.seeds is None else experiment.seeds

    def trials(self) -> list[Trial]:
        """Every arm of every experiment with every seed, each once."""
        found = {}
        planned = [(experiment, self.seeds_of(experiment)) for experiment in self.experiments]
        # Seed by seed: an interrupted ablation has whole comparisons of the first ones.
        for seed in dict.fromkeys(seed for _, seeds in planned for seed in seeds):
            for experiment in (experiment for experiment, seeds in planned if seed in seeds):
                for swapped in experiment.swapped:
                    for name in experiment.all_arms:
                        trial = Trial(
                            corpus_name=experiment.corpus,
                            corpus=self.corpora[experiment.corpus],
                            swapped=swapped,
                            arm_name=name,
                            arm=self.arms[name],
                            seed=seed,
                            generations_per_epoch=self.generations_per_epoch,
                            prototypes=self.prototypes,
                            refine=self.refine,
                        )
                        found[trial.key] = trial
        return list(found.values())


class Trial(Section):
    """One arm with one seed on one corpus: all that `trial.run` needs."""

    corpus_name: str
    corpus: Corpus
    swapped: Share
    arm_name: str
    arm: Arm
    seed: int
    generations_per_epoch: Positive
    prototypes: tuple[Count, ...]
    refine: Refine

    @property
    def key(self) -> str:
        """Name of the trial's files."""
        return f"{self.corpus_name}-{round(100 * self.swapped):02d}-{self.arm_name}-{self.seed}"


def smoke_of(ablation: Ablation) -> Ablation:
    """The same ablation in minutes: every arm, but few scenes, one epoch and one seed, in a folder of its own."""
    corpora = {
        name: corpus.model_copy(
            update={"scenes": 256, "knowledge_scenes": 128 if corpus.knowledge_scenes else 0, "epochs": 1.0}
        )
        for name, corpus in ablation.corpora.items()
        if (corpus.shards / "train").is_dir()
    }
    return Ablation.model_validate(
        ablation.model_dump()
        | {
            "name": f"{ablation.name}_smoke",
            "seeds": (0,),
            "refine": ablation.refine.model_dump() | {"minimum_fresh": 32, "steps": 5},
            "corpora": {name: corpus.model_dump() for name, corpus in corpora.items()},
            "experiments": [
                experiment.model_dump() | {"seeds": None}
                for experiment in ablation.experiments
                if experiment.corpus in corpora
            ],
        }
    )


def load(path: Path, overrides: list[str] | tuple[str, ...] = ()) -> Ablation:
    """Reads and validates an ablation.

    Raises:
        InputError: the file is missing or no mapping, a key is unknown, or a value is out of range.
    """
    tree = configuration.read(path, overrides, example="configs/ablation.yaml")
    return configuration.validated(Ablation, tree, path)
