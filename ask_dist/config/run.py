"""A whole run: its sections together, and what they must not say at once."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, model_validator

from ask_dist.config.sections import (
    SIGMOID,
    Augment,
    Bank,
    Cluster,
    Data,
    Knowledge,
    Model,
    Optimization,
    Refine,
    Section,
    Tracking,
)

FP16_SEARCH = 16  # halvings from the first loss scale, 2^16, to the least


class Config(Section):
    """A whole run."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0
    output_dir: Path = Path("runs")
    cluster: Cluster = Cluster()
    data: Data
    model: Model = Model()
    augment: Augment = Augment()
    optimization: Optimization = Optimization()
    knowledge: Knowledge = Knowledge()
    bank: Bank = Bank()
    refine: Refine = Refine()
    tracking: Tracking = Tracking()

    @property
    def run_dir(self) -> Path:
        """Folder of the run's files, made absolute: workers have another working folder than the driver."""
        return (self.output_dir / self.name).absolute()

    @property
    def global_batch_size(self) -> int:
        """Pairs a global step, over all workers."""
        return self.optimization.train_batch_size or self.optimization.micro_batch_size * self.cluster.num_workers

    def anchored(self) -> Config:
        """The same run with absolute paths, for processes that have another working folder."""
        tree = self.model_dump(mode="json")
        tree["output_dir"] = str(self.output_dir.absolute())
        for key in ("train", "validation", "test", "held_out", "cache_dir"):
            tree["data"][key] = _anchored(getattr(self.data, key))
        for tower in (tree["model"]["audio"], tree["model"]["text"]):
            if tower["source"] is not None and Path(tower["source"]).exists():  # else the id of a hub
                tower["source"] = str(Path(tower["source"]).absolute())
        tree["refine"]["corpus"] = _anchored(self.refine.corpus)
        for section in ("model", "bank"):
            if tree[section]["from"] is not None:
                tree[section]["from"] = str(Path(tree[section]["from"]).absolute())
        return Config.model_validate(tree)

    @model_validator(mode="before")
    @classmethod
    def _sigmoid_defaults(cls, tree: Any) -> Any:
        """Under the sigmoid loss the model starts with another scale and with a bias, where nothing else is said."""
        match tree:
            case {"optimization": {"loss": "siglip"}}:
                model = tree.get("model", {})
            case _:
                return tree
        if not isinstance(model, dict):
            return tree
        said = {key: value for key, value in model.items() if key not in SIGMOID or value is not None}
        return tree | {"model": SIGMOID | said}

    @model_validator(mode="after")
    def _cross_checks(self) -> Config:
        checks = (_check_batch, _check_precision, _check_loss, _check_towers, _check_inputs, _check_bank, _check_refine)
        for check in checks:
            check(self)
        return self


def _anchored(place: Any) -> Any:
    """A place, or several, with local paths absolute."""
    if isinstance(place, tuple):
        return tuple(map(_anchored, place))
    return place.absolute() if isinstance(place, Path) else place


def _check_batch(config: Config) -> None:
    workers, lanes = config.cluster.num_workers, config.data.lanes
    if lanes % workers:
        fit = workers * max(1, lanes // workers)
        raise ValueError(f"data.lanes={lanes} is no multiple of cluster.num_workers={workers}; set it to {fit}")
    if config.global_batch_size % lanes:
        fit = max(1, round(config.global_batch_size / lanes)) * lanes
        key, what = "train_batch_size", "optimization.train_batch_size"
        if config.optimization.train_batch_size is None:
            fit, key, what = fit // workers, "micro_batch_size", "optimization.micro_batch_size x cluster.num_workers"
        raise ValueError(
            f"the global batch of {config.global_batch_size} ({what}) is no multiple of data.lanes={lanes}; "
            f"set optimization.{key}={fit} or other lanes"
        )


def _check_precision(config: Config) -> None:
    """What of precision and offload DeepSpeed can't do."""
    optimization = config.optimization
    if optimization.precision == "fp16" and optimization.max_skipped <= FP16_SEARCH:
        raise ValueError(
            f"optimization.max_skipped={optimization.max_skipped} may end a run of optimization.precision=fp16 that "
            f"looks for its loss scale, which takes up to {FP16_SEARCH} steps; set it to {FP16_SEARCH + 1} or more"
        )
    stage = {"none": 0, "optimizer": 1, "all": 3}[optimization.offload]
    if optimization.zero_stage < stage:
        raise ValueError(
            f"optimization.offload={optimization.offload} moves what ZeRO divides, from stage {stage} on, and "
            f"optimization.zero_stage={optimization.zero_stage}; set optimization.zero_stage={stage}"
        )


def _check_loss(config: Config) -> None:
    bias = config.model.logit_bias_init
    if bias is not None and config.optimization.loss != "siglip":
        raise ValueError(
            f"model.logit_bias_init={bias:g} is of the sigmoid loss, InfoNCE has no bias; set it to null or "
            "optimization.loss to siglip"
        )


def _check_towers(config: Config) -> None:
    if config.model.text.width % config.model.text.heads:
        text = config.model.text
        raise ValueError(f"model.text.width={text.width} is no multiple of model.text.heads={text.heads}")
    for side, tower in (("audio", config.model.audio), ("text", config.model.text)):
        if tower.unfreeze_at is not None and not tower.freeze:
            raise ValueError(
                f"model.{side}.unfreeze_at={tower.unfreeze_at} is of a frozen tower; set model.{side}.freeze=true"
            )
        if tower.lora is not None and tower.freeze:
            raise ValueError(
                f"model.{side}.freeze=true leaves nothing of model.{side}.lora to learn, which freezes the tower's "
                "own weights itself; leave one out"
            )


def _check_inputs(config: Config) -> None:
    """What the towers are given: shards, augmentation, vectors that were kept."""
    sources = len(config.data.train) if isinstance(config.data.train, tuple) else 1
    if config.data.weights is not None and len(config.data.weights) != sources:
        raise ValueError(f"data.weights has {len(config.data.weights)} numbers for {sources} entries of data.train")
    data = config.data
    if data.fingerprints and data.validation is None and data.test is None and data.held_out is None:
        raise ValueError(
            "data.fingerprints=true compares with data.validation, data.test and data.held_out, which are null; name "
            "one of them, or set it to false"
        )
    _check_lengths(config)
    masked = max(config.augment.time_mask, config.augment.frequency_mask)
    if masked and config.model.audio.freeze:
        raise ValueError(
            f"augment.time_mask and frequency_mask ({masked:g}) are for towers that learn; set both to 0 or "
            "model.audio.freeze=false"
        )
    cached = config.data.cache_embeddings
    if cached and not (config.model.audio.freeze or config.model.text.freeze):
        raise ValueError(
            "data.cache_embeddings=true keeps vectors of frozen towers, and both towers learn; set it to false, or "
            "model.audio.freeze or model.text.freeze to true"
        )
    for side, tower in (("audio", config.model.audio), ("text", config.model.text)):
        if cached and tower.unfreeze_at is not None:
            raise ValueError(
                f"model.{side}.unfreeze_at={tower.unfreeze_at:g} lets a tower learn, whose vectors "
                "data.cache_embeddings=true keeps; leave one out"
            )
    if cached and config.augment.mix_share:
        raise ValueError(
            f"augment.mix_share={config.augment.mix_share:g} makes new clips in every step, which "
            "data.cache_embeddings=true can't have kept; set one of them to 0 or false"
        )


def _check_lengths(config: Config) -> None:
    step, clip, stage = config.data.length_step, config.data.clip_seconds, config.optimization.zero_stage
    if step is None:
        return
    if step >= clip:
        raise ValueError(
            f"data.length_step={step:g} pads every clip to data.clip_seconds={clip:g}; set it to less, or to null"
        )
    if stage == 3 and not (config.data.cache_embeddings and config.model.audio.freeze):
        raise ValueError(
            f"data.length_step={step:g} lets ranks run the audio tower once for each length of their clips, and under "
            "optimization.zero_stage=3 they would wait for each other; set optimization.zero_stage to 2 or "
            "data.length_step to null"
        )


def _check_bank(config: Config) -> None:
    if config.optimization.deterministic and config.bank.replicas > 1:
        raise ValueError(
            f"bank.replicas={config.bank.replicas} follow their shard by the clock, which "
            "optimization.deterministic excludes; set bank.replicas=1"
        )
    if config.optimization.deterministic and config.bank.index != "flat":
        raise ValueError(
            f"bank.index={config.bank.index} is trained by the clock, which optimization.deterministic excludes; "
            "set bank.index=flat"
        )
    if config.bank.source is not None and config.model.source is None:
        raise ValueError(
            f"bank.from={config.bank.source} holds rows of another run's weights, which new weights can't read; "
            "set model.from=RUN, the run that encoded them"
        )
    if config.bank.source is not None and not config.knowledge.enabled:
        raise ValueError(f"bank.from={config.bank.source} needs a bank, knowledge.enabled is false; leave one out")


def _check_refine(config: Config) -> None:
    reencoded, corpus = config.refine.strategy == "reencode", config.refine.corpus
    if corpus is not None and not reencoded:
        raise ValueError(
            f"refine.corpus={corpus} is for refine.strategy=reencode, and the strategy is {config.refine.strategy}; "
            "set that, or leave the corpus out"
        )
    if reencoded and config.bank.source is not None and corpus is None:
        raise ValueError(
            f"refine.strategy=reencode can't encode bank.from={config.bank.source} again without its clips; set "
            "refine.corpus to the shards or captions that it was built of"
        )
    if reencoded and not config.knowledge.enabled:
        raise ValueError("refine.strategy=reencode needs a bank, knowledge.enabled is false; leave one out")
