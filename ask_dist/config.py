"""The schema of a run: one YAML file, validated as a whole before anything starts.

Imports neither ray nor torch, so that `ask-dist --help` and a configuration error are quick.
"""

from __future__ import annotations

import difflib
import json
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args, get_origin

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from ask_dist.errors import InputError

Share = Annotated[float, Field(ge=0.0, le=1.0)]
Positive = Annotated[float, Field(gt=0.0)]
Weight = Annotated[float, Field(ge=0.0)]
Count = Annotated[int, Field(ge=1)]
Checked = TypeVar("Checked", bound=BaseModel)


def _place(value: Any) -> Path | str:
    if not isinstance(value, str | Path) or not str(value):
        raise ValueError("name a folder or the URL of one")
    return str(value) if "://" in str(value) else Path(value)


def _places(value: Any) -> Path | str | tuple[Path | str, ...]:
    if not isinstance(value, list | tuple):
        return _place(value)
    if not value:
        raise ValueError("name at least one folder")
    return tuple(map(_place, value))


# Shards: a folder, the URL of one, or a pattern of either (`{a,b}`, `*`). In Places, or several of these.
Place = Annotated[Path | str, BeforeValidator(_place)]
Places = Annotated[Path | str | tuple[Path | str, ...], BeforeValidator(_places)]


class Section(BaseModel):
    """A part of the configuration: unknown keys are errors, values are read-only."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, serialize_by_alias=True)


class Cluster(Section):
    """What the run takes of the Ray cluster."""

    num_workers: Count = 2
    cpus_per_worker: Positive = 1.0
    use_gpu: bool | None = Field(None, description="null: one GPU a worker where the cluster has enough of them")
    bank_cpus: Weight = Field(0.0, description="cores reserved for each actor of the bank; 0 shares the workers' cores")
    bank_gpus: Weight = Field(0.0, description="GPUs reserved for the FAISS search of each actor of the bank")
    refine_cpus: Weight = Field(0.0, description="cores reserved for the refiner; 0 shares the workers' cores")
    max_failures: Annotated[int, Field(ge=0)] = Field(
        1, description="restarts from the last checkpoint before giving up"
    )
    dashboard: bool = True


class Data(Section):
    """Where the shards are and how they are read."""

    train: Places
    weights: tuple[Positive, ...] | None = Field(
        None, description="how often an epoch meets each clip of each entry of train; fractions are allowed"
    )
    validation: Place | None = None
    test: Place | None = None
    sample_rate: Annotated[int, Field(ge=1000, le=192_000)] = Field(16000, description="Hz")
    clip_seconds: Annotated[float, Field(ge=0.1)] = 4.0
    lanes: Count = Field(8, description="streams a global batch is drawn from; a multiple of num_workers")
    shuffle_window: Count = Field(512, description="samples shuffled together within a lane")
    loader_processes: Annotated[int, Field(ge=0)] = Field(0, description="decoding processes a worker")
    max_bad_share: Share = Field(0.01, description="share of unreadable samples above which the run stops")
    max_clip_seconds: Positive = Field(600.0, description="longer audio is not decoded and counts as unreadable")
    cache_dir: Path | None = Field(None, description="of shards behind URLs; null: ~/.cache/ask-dist/shards")
    cache_gib: Positive = Field(20.0, description="size of that folder, beyond the shards that are being read")
    audit: bool = Field(False, description="write what each step trained on into the run's audit.jsonl")
    cache_embeddings: bool = Field(False, description="vectors of frozen towers are computed once and kept on disk")


class Lora(Section):
    """Low-rank adapters of a tower (Hu et al. 2021): they learn in place of its own weights."""

    rank: Count = 8
    alpha: Positive = Field(16.0, description="what an adapter adds is scaled by alpha / rank")
    dropout: Annotated[float, Field(ge=0.0, lt=1.0)] = Field(0.0, description="of what an adapter sees")
    targets: tuple[str, ...] | Literal["all-linear"] = Field(
        ("query", "value", "q_proj", "v_proj", "q", "v"), description="names of the layers that get one"
    )


class AudioModel(Section):
    """The audio encoder, by its registered name."""

    name: str = "conv"
    source: str | None = Field(None, description="of a pretrained one: its folder or file, or the id of a hub")
    freeze: bool = Field(False, description="its weights stay as they are")
    unfreeze_at: Share | None = Field(None, description="share of the run after which a frozen tower learns")
    lora: Lora | None = Field(None, description="adapters that learn in place of its weights; null: none")
    width: Count = Field(24, description="of conv")
    mel_bins: Count = Field(64, description="of conv")
    options: dict[str, Any] = Field({}, description="settings of an encoder that another package registers")


class TextModel(Section):
    """The text encoder, by its registered name."""

    name: str = "transformer"
    source: str | None = Field(None, description="of a pretrained one: its folder, or the id of a hub")
    freeze: bool = Field(False, description="its weights stay as they are")
    unfreeze_at: Share | None = Field(None, description="share of the run after which a frozen tower learns")
    lora: Lora | None = Field(None, description="adapters that learn in place of its weights; null: none")
    pooling: Literal["mean", "cls"] = Field("mean", description="of automodel: a caption's vector from its tokens'")
    width: Count = Field(128, description="of transformer")
    layers: Count = Field(1, description="of transformer")
    heads: Count = Field(4, description="of transformer")
    max_tokens: Count = 32
    vocabulary: Count = Field(8000, description="largest size of the tokenizer trained on the captions")
    options: dict[str, Any] = Field({}, description="settings of an encoder that another package registers")


class Model(Section):
    """Two encoders and the space that they share."""

    embedding_dim: Count = 256
    projection: Literal["mlp", "none"] = Field("mlp", description="none: the encoders' own vectors are compared")
    dropout: Share = 0.1
    audio: AudioModel = AudioModel()
    text: TextModel = TextModel()
    logit_scale_init: Positive = 14.3
    logit_scale_max: Positive = 100.0
    source: Path | None = Field(None, alias="from", description="finished run whose weights and tokenizer it takes")


class Augment(Section):
    """What training makes of clips; validation and test hear them as they are."""

    time_mask: Share = Field(0.0, description="longest mask over a log-mel's frames, as a share of them")
    frequency_mask: Share = Field(0.0, description="longest mask over its bands, as a share of them")
    mix_share: Share = Field(0.0, description="share of a batch's rows that are two of its clips at once")


class Optimization(Section):
    """How the encoders are trained."""

    epochs: Positive = Field(10.0, description="passes over the training shards; fractions are allowed")
    max_steps: Count | None = Field(None, description="ends the run at this global step, before `epochs`")
    micro_batch_size: Count = Field(32, description="pairs a worker and step")
    learning_rate: Positive = 1e-3
    weight_decay: Weight = 0.02
    layer_decay: Annotated[float, Field(gt=0.0, le=1.0)] = Field(
        1.0, description="each block of a tower has the rate of the one above it times this"
    )
    warmup_share: Share = 0.05
    gradient_clip: Weight = 1.0
    zero_stage: Literal[0, 1, 2, 3] = 1
    precision: Literal["fp32", "bf16"] = "fp32"
    ema_decay: Annotated[float, Field(gt=0.0, lt=1.0)] | None = Field(
        None, description="of an average of the weights, which evaluation and the saved model use; null: none"
    )
    activation_checkpointing: bool = Field(False, description="compute blocks again in the backward pass")
    deterministic: bool = Field(False, description="nothing goes by the clock: a run can be repeated bit for bit")
    log_every: Count = 10
    evaluate_every: Positive = Field(2.0, description="epochs between evaluations on the validation shards")
    checkpoint_every: Positive = Field(2.0, description="epochs between checkpoints")
    keep_checkpoints: Count = 2


class Reliability(Section):
    """How much a pair is trusted, by how its halves agree about the bank, against wrong pairs."""

    enabled: bool = True
    gamma: Weight = Field(
        50.0, description="weight r^(gamma x share x (1 - share)), of wrong pairs by estimate; 0 weighs all alike"
    )
    momentum: Share = Field(0.7, description="of the running mean of r that the bank keeps a pair")
    shape: Positive = Field(3.0, description="divides the per-query temperature (best - nth best similarity)")
    rank: Annotated[int, Field(ge=2)] = Field(32, description="the n of the nth best similarity")
    start: Share = Field(0.12, description="share of the run after which pairs are weighted")


class Knowledge(Section):
    """What the bank contributes to the loss."""

    enabled: bool = True
    start: Share = Field(0.25, description="share of the run after which the knowledge terms join; before it they hurt")
    neighbours: Annotated[int, Field(ge=1, le=1024)] = Field(16, description="rows a query, modality and search")
    temperature: Positive = Field(0.07, description="of the distributions that the consistency terms compare")
    half_life: Positive = Field(2.0, description="epochs after which a row that was not renewed counts half")
    contrast_weight: Share = Field(0.5, description="share of the contrast that is against the bank (fine)")
    consistency_weight: Weight = Field(1.0, description="agreement over the neighbours (fine)")
    coarse_weight: Weight = Field(0.25, description="agreement over the prototypes (coarse)")
    reliability: Reliability = Reliability()


class Bank(Section):
    """The knowledge bank."""

    capacity: Count = Field(1_000_000, description="most rows that it may hold")
    dtype: Literal["float16", "float32"] = "float32"
    durable: bool = Field(False, description="keep a journal and snapshots in the run's folder: no crash empties it")
    prototypes: tuple[Count, ...] = Field((32, 128), description="granularities of the coarse knowledge")
    threads: Count = Field(1, description="FAISS threads")
    index: Literal["flat", "ivf_flat", "ivf_pq"] = Field(
        "flat", description="exact, or by inverted files of rows or codes"
    )
    inverted_from: Count = Field(50_000, description="rows from which there are inverted files; fewer: search is exact")
    probes: Count = Field(16, description="least lists that a search of inverted files looks into")
    recall: Share = Field(0.95, description="below it, inverted files are trained anew")
    shards: Count = Field(1, description="actors that the rows are split over")
    replicas: Count = Field(1, description="actors that search a shard; all but the first are copies that follow it")
    max_in_flight: Count = Field(4, description="unanswered calls a worker may have outstanding")
    max_late_share: Share = Field(1.0, description="share of late or failed answers above which the run stops")
    max_missed: Count = Field(10_000, description="answers late or failed in a row after which the run stops")
    minimum_reliability: Share = Field(0.0, description="rows below it are not given as knowledge")
    max_age_epochs: Positive | None = Field(None, description="rows that are older than this are not given; null: all")
    source: Path | None = Field(None, alias="from", description="bank folder of other corpora that it starts with")


class Refine(Section):
    """The refiner that keeps the bank in step with the moving encoders."""

    strategy: Literal["none", "linear", "knn_mean", "kernel", "mlp", "gnn"] = "kernel"
    interval: Weight = Field(2.0, description="least seconds between two generations")
    cpu_share: Annotated[float, Field(gt=0.0, le=1.0)] = Field(0.1, description="most of one core that it takes")
    every: Positive = Field(0.5, description="epochs between two generations where optimization.deterministic is set")
    neighbours: Count = Field(16, description="edges a row of the graph")
    hidden: Count = 128
    steps: Count = Field(60, description="optimizer steps a generation")
    minimum_fresh: Count = Field(128, description="re-encoded rows that a generation needs")


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

    @property
    def run_dir(self) -> Path:
        """Folder of the run's files, made absolute: workers have another working folder than the driver."""
        return (self.output_dir / self.name).absolute()

    @property
    def global_batch_size(self) -> int:
        """Pairs a global step, over all workers."""
        return self.optimization.micro_batch_size * self.cluster.num_workers

    def anchored(self) -> Config:
        """The same run with absolute paths, for processes that have another working folder."""
        tree = self.model_dump(mode="json")
        tree["output_dir"] = str(self.output_dir.absolute())
        for key in ("train", "validation", "test", "cache_dir"):
            tree["data"][key] = _anchored(getattr(self.data, key))
        for tower in (tree["model"]["audio"], tree["model"]["text"]):
            if tower["source"] is not None and Path(tower["source"]).exists():  # else the id of a hub
                tower["source"] = str(Path(tower["source"]).absolute())
        for section in ("model", "bank"):
            if tree[section]["from"] is not None:
                tree[section]["from"] = str(Path(tree[section]["from"]).absolute())
        return Config.model_validate(tree)

    @model_validator(mode="after")
    def _cross_checks(self) -> Config:
        workers, lanes = self.cluster.num_workers, self.data.lanes
        if lanes % workers:
            fit = workers * max(1, lanes // workers)
            raise ValueError(f"data.lanes={lanes} is no multiple of cluster.num_workers={workers}; set it to {fit}")
        if self.global_batch_size % lanes:
            fit = max(1, round(self.global_batch_size / lanes)) * lanes // workers
            raise ValueError(
                f"the global batch of {self.global_batch_size} (optimization.micro_batch_size x cluster.num_workers) "
                f"is no multiple of data.lanes={lanes}; set optimization.micro_batch_size={fit} or other lanes"
            )
        sources = len(self.data.train) if isinstance(self.data.train, tuple) else 1
        if self.data.weights is not None and len(self.data.weights) != sources:
            raise ValueError(f"data.weights has {len(self.data.weights)} numbers for {sources} entries of data.train")
        if self.model.text.width % self.model.text.heads:
            text = self.model.text
            raise ValueError(f"model.text.width={text.width} is no multiple of model.text.heads={text.heads}")
        for side, tower in (("audio", self.model.audio), ("text", self.model.text)):
            if tower.unfreeze_at is not None and not tower.freeze:
                raise ValueError(
                    f"model.{side}.unfreeze_at={tower.unfreeze_at} is of a frozen tower; set model.{side}.freeze=true"
                )
            if tower.lora is not None and tower.freeze:
                raise ValueError(
                    f"model.{side}.freeze=true leaves nothing of model.{side}.lora to learn, which freezes the tower's "
                    "own weights itself; leave one out"
                )
        if self.optimization.deterministic and self.bank.replicas > 1:
            raise ValueError(
                f"bank.replicas={self.bank.replicas} follow their shard by the clock, which "
                "optimization.deterministic excludes; set bank.replicas=1"
            )
        if self.optimization.deterministic and self.bank.index != "flat":
            raise ValueError(
                f"bank.index={self.bank.index} is trained by the clock, which optimization.deterministic excludes; "
                "set bank.index=flat"
            )
        if self.bank.source is not None and self.model.source is None:
            raise ValueError(
                f"bank.from={self.bank.source} holds rows of another run's weights, which new weights can't read; "
                "set model.from=RUN, the run that encoded them"
            )
        if self.bank.source is not None and not self.knowledge.enabled:
            raise ValueError(f"bank.from={self.bank.source} needs a bank, knowledge.enabled is false; leave one out")
        masked = max(self.augment.time_mask, self.augment.frequency_mask)
        if masked and self.model.audio.freeze:
            raise ValueError(
                f"augment.time_mask and frequency_mask ({masked:g}) are for towers that learn; set both to 0 or "
                "model.audio.freeze=false"
            )
        cached = self.data.cache_embeddings
        if cached and not (self.model.audio.freeze or self.model.text.freeze):
            raise ValueError(
                "data.cache_embeddings=true keeps vectors of frozen towers, and both towers learn; set it to false, or "
                "model.audio.freeze or model.text.freeze to true"
            )
        if cached and self.augment.mix_share:
            raise ValueError(
                f"augment.mix_share={self.augment.mix_share:g} makes new clips in every step, which "
                "data.cache_embeddings=true can't have kept; set one of them to 0 or false"
            )
        if self.optimization.precision == "bf16" and self.cluster.use_gpu is False:
            raise ValueError("optimization.precision=bf16 needs GPUs, cluster.use_gpu is false; use fp32")
        return self


def _anchored(place: Any) -> Any:
    """A place, or several, with local paths absolute."""
    if isinstance(place, tuple):
        return tuple(map(_anchored, place))
    return place.absolute() if isinstance(place, Path) else place


def load(path: Path, overrides: list[str] | tuple[str, ...] = ()) -> Config:
    """Reads and validates a YAML file.

    Args:
        path: the file.
        overrides: `section.key=value` each; the value is read as YAML.

    Raises:
        InputError: the file is missing or not a mapping, a key is unknown (the nearest is named), or a value is out of
            range.
    """
    return parse(read(path, overrides))


def parse(tree: dict[str, Any]) -> Config:
    """Validates a mapping; raises InputError with one line that names every problem."""
    return validated(Config, tree)


def read(
    path: Path, overrides: list[str] | tuple[str, ...] = (), *, example: str = "configs/quickstart.yaml"
) -> dict[str, Any]:
    """A YAML mapping with its overrides applied, before any schema looks at it.

    Args:
        path: the file.
        overrides: `section.key=value` each; the value is read as YAML.
        example: a file of this kind, for who gave another.

    Raises:
        InputError: the file is missing, unreadable or not a mapping, or an override has another form.
    """
    try:
        tree = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"no configuration file {path}; the ones shipped are in configs/") from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise InputError(f"{path} is not readable YAML: {' '.join(str(error).split())}") from None
    if not isinstance(tree, dict):
        raise InputError(f"{path} holds {type(tree).__name__}, not a mapping of sections; see {example}")
    for override in overrides:
        apply_override(tree, override)
    return tree


def validated(schema: type[Checked], tree: dict[str, Any], file: Path | None = None) -> Checked:
    """A mapping as the schema has it; raises InputError with one line that names the file and every problem."""
    try:
        return schema.model_validate(tree)
    except ValidationError as error:
        problems = "; ".join(_explain(schema, problem) for problem in error.errors())
        raise InputError(f"{file}: {problems}" if file else problems) from None


def apply_override(tree: dict[str, Any], override: str) -> None:
    """Sets one `section.key=value` in a mapping, in place."""
    key, separator, value = override.partition("=")
    if not separator or not key:
        raise InputError(f"override {override!r} is not of the form section.key=value")
    *sections, leaf = key.split(".")
    node = tree
    for section in sections:
        node = node.setdefault(section, {})
        if not isinstance(node, dict):
            raise InputError(f"override {override!r}: {section!r} is a value, not a section")
    try:
        node[leaf] = yaml.safe_load(value)
    except yaml.YAMLError:
        raise InputError(f"override {override!r}: the value is not YAML; quote it") from None


def dump(config: Config) -> str:
    """The resolved configuration as YAML that `load` takes."""
    return yaml.safe_dump(json.loads(config.model_dump_json()), sort_keys=False)


def _explain(schema: type[BaseModel], problem: Any) -> str:
    """One problem of pydantic's list, as one line with value and remedy."""
    location = [str(part) for part in problem["loc"]]
    name = ".".join(location) or "configuration"
    if problem["type"] == "extra_forbidden":
        fields = _section(schema, location[:-1]).model_fields
        known = [field.alias or name for name, field in fields.items()]
        near = difflib.get_close_matches(location[-1], known, n=1, cutoff=0.5)
        remedy = f"did you mean {'.'.join([*location[:-1], near[0]])}?" if near else f"known here: {', '.join(known)}"
        return f"unknown key {name}; {remedy}"
    if problem["type"] == "missing":
        override = "" if any(isinstance(part, int) for part in problem["loc"]) else f" or as {name}=VALUE"
        return f"{name} is missing; set it in the file{override}"
    message = problem["msg"].removeprefix("Value error, ")
    if not location:
        return message
    return f"{name}={problem['input']!r}: {message[0].lower()}{message[1:]}"


def _section(schema: type[BaseModel], location: list[str]) -> type[BaseModel]:
    section: Any = schema
    for part in location:
        if get_origin(section) is None:
            section = section.model_fields[part].annotation
        else:  # a mapping's values, or a tuple's entries
            section = next(kind for kind in reversed(get_args(section)) if kind is not Ellipsis)
        if type(None) in get_args(section):  # a section that may be left out
            section = get_args(section)[0]
    return section
