"""The sections of a run's configuration: their keys, defaults and limits."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

Share = Annotated[float, Field(ge=0.0, le=1.0)]
Positive = Annotated[float, Field(gt=0.0)]
Weight = Annotated[float, Field(ge=0.0)]
Count = Annotated[int, Field(ge=1)]
BatchLoss = Literal["info_nce", "siglip"]


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
    gpus_per_worker: Annotated[float, Field(gt=0.5, le=1.0)] = Field(
        1.0, description="share of its GPU that a worker reserves; less than 1 leaves room there for `bank_gpus`"
    )
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
    held_out: Places | None = Field(
        None, description="further shards that nothing may learn from, such as those that later tests are on"
    )
    sample_rate: Annotated[int, Field(ge=1000, le=192_000)] = Field(16000, description="Hz")
    clip_seconds: Annotated[float, Field(ge=0.1)] = 4.0
    length_step: Annotated[float, Field(ge=0.1)] | None = Field(
        None, description="shorter clips are padded to a multiple of so many seconds; null: all to clip_seconds"
    )
    lanes: Count = Field(8, description="streams a global batch is drawn from; a multiple of num_workers")
    shuffle_window: Count = Field(512, description="samples shuffled together within a lane")
    loader_processes: Annotated[int, Field(ge=0)] = Field(0, description="decoding processes a worker")
    max_bad_share: Share = Field(0.01, description="share of unreadable samples above which the run stops")
    max_clip_seconds: Positive = Field(600.0, description="longer audio is not decoded and counts as unreadable")
    cache_dir: Path | None = Field(None, description="of shards behind URLs; null: ~/.cache/ask-dist/shards")
    cache_gib: Positive = Field(
        20.0, description="size of that folder and of the cached vectors, each beyond what is in use"
    )
    audit: bool = Field(False, description="write what each step trained on into the run's audit.jsonl")
    fingerprints: bool = Field(
        False, description="refuse in training and in banks also what sounds like a held-out clip"
    )
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
    source: str | None = Field(
        None, description="of a pretrained one: its folder or file, or on a hub OWNER/NAME[/FILE]"
    )
    freeze: bool = Field(False, description="its weights stay as they are")
    unfreeze_at: Share | None = Field(None, description="share of the run after which a frozen tower learns")
    lora: Lora | None = Field(None, description="adapters that learn in place of its weights; null: none")
    width: Count = Field(24, description="of conv")
    mel_bins: Count = Field(64, description="of conv")
    options: dict[str, Any] = Field({}, description="settings of an encoder that another package registers")


class TextModel(Section):
    """The text encoder, by its registered name."""

    name: str = "transformer"
    source: str | None = Field(None, description="of a pretrained one: its folder, or on a hub OWNER/NAME")
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
    logit_scale_init: Positive | None = Field(None, description="null: that of a whole CLAP, else 14.3")
    logit_scale_max: Positive = 100.0
    logit_bias_init: float | None = Field(None, description="of a learned bias, for the sigmoid loss; null: none")
    source: Path | None = Field(None, alias="from", description="finished run whose weights and tokenizer it takes")


# What a model starts with under the sigmoid loss (Zhai et al. 2023, section 3.2).
SIGMOID = {"logit_scale_init": 10.0, "logit_bias_init": -10.0}


class Augment(Section):
    """What training makes of clips; validation and test hear them as they are."""

    time_mask: Share = Field(0.0, description="longest mask over a log-mel's frames, as a share of them")
    frequency_mask: Share = Field(0.0, description="longest mask over its bands, as a share of them")
    mix_share: Share = Field(0.0, description="share of a batch's rows that are two of its clips at once")


class Optimization(Section):
    """How the encoders are trained."""

    epochs: Positive = Field(10.0, description="passes over the training shards; fractions are allowed")
    max_steps: Count | None = Field(None, description="ends the run at this global step, before `epochs`")
    loss: BatchLoss = Field("info_nce", description="what contrasts the pairs of the global batch")
    micro_batch_size: Count = Field(32, description="most pairs that a worker embeds at once")
    train_batch_size: Count | None = Field(
        None, description="pairs a step over all workers, in chunks of micro_batch_size; null: one chunk a worker"
    )
    learning_rate: Positive = 1e-3
    weight_decay: Weight = 0.02
    layer_decay: Annotated[float, Field(gt=0.0, le=1.0)] = Field(
        1.0, description="each block of a tower has the rate of the one above it times this"
    )
    warmup_share: Share = 0.05
    gradient_clip: Weight = 1.0
    zero_stage: Literal[0, 1, 2, 3] = Field(
        0, description="what workers keep a part of: nothing, Adam's state, gradients too, weights too"
    )
    precision: Literal["fp32", "bf16", "fp16"] = Field("fp32", description="of products; weights are always fp32")
    offload: Literal["none", "optimizer", "all"] = Field(
        "none", description="what lies in the host's memory: nothing, Adam's state, or that and the weights"
    )
    ema_decay: Annotated[float, Field(gt=0.0, lt=1.0)] | None = Field(
        None, description="of an average of the weights, which evaluation and the saved model use; null: none"
    )
    activation_checkpointing: bool = Field(False, description="compute blocks again in the backward pass")
    deterministic: bool = Field(False, description="nothing goes by the clock: a run can be repeated bit for bit")
    log_every: Count = 10
    evaluate_every: Positive = Field(2.0, description="epochs between evaluations on the validation shards")
    checkpoint_every: Positive = Field(2.0, description="epochs between checkpoints")
    keep_checkpoints: Count = 2
    max_skipped: Count = Field(
        20, description="steps in a row that are not finite, after which the run goes back to its last checkpoint"
    )

    def local_batch_size(self, world_size: int) -> int:
        """Pairs a worker and step."""
        return self.micro_batch_size if self.train_batch_size is None else self.train_batch_size // world_size


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

    @property
    def asked_from(self) -> float:
        """Share of the run after which the bank is asked for neighbours, for the first of the gates."""
        return min(self.start, self.reliability.start) if self.reliability.enabled else self.start


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
    probes: Count = Field(4, description="least lists that a search of inverted files looks into")
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

    strategy: Literal["none", "linear", "knn_mean", "kernel", "mlp", "gnn", "reencode"] = "kernel"
    corpus: Place | None = Field(
        None,
        description="of reencode: shards or a file of captions that the workers encode; null: data.train",
    )
    interval: Weight = Field(2.0, description="least seconds between two generations")
    cpu_share: Annotated[float, Field(gt=0.0, le=1.0)] = Field(0.1, description="most of one core that it takes")
    every: Positive = Field(
        0.5, description="epochs between two generations of reencode, or where optimization.deterministic is set"
    )
    neighbours: Count = Field(16, description="edges a row of the graph")
    hidden: Count = 128
    steps: Count = Field(60, description="optimizer steps a generation")
    minimum_fresh: Count = Field(128, description="re-encoded rows that a generation needs")


class Tracking(Section):
    """Who shows the metrics beside metrics.jsonl. Keys and passwords come from the environment alone."""

    tensorboard: bool = Field(False, description="event files in the run's folder")
    wandb: Annotated[str, Field(min_length=1)] | None = Field(None, description="project of Weights & Biases")
    wandb_mode: Literal["online", "offline"] = "online"
    mlflow: Annotated[str, Field(min_length=1)] | None = Field(None, description="URI of an MLflow tracking server")
    profile: bool = Field(False, description="trace of a few steps, by torch's profiler")
