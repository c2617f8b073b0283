"""Ray: connecting to a cluster or starting one, and the actors of a run. The only module that reserves resources."""

from __future__ import annotations

import itertools
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import ray
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from ask_dist.bank.actor import RemoteBankActor
from ask_dist.bank.shard import capacity_of, shard_names
from ask_dist.config import Config
from ask_dist.errors import InputError

BANK = "bank"  # folder of a run: its durable bank, a folder a shard
# A local cluster's defaults; whoever sets one of them in the environment wins.
LOCAL_ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",  # the workers' torch threads are set in the loop; FAISS and BLAS in actors stay at one
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",  # nobody preempts a single machine
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "1",  # an actor that reserves no GPU sees none
}


@contextmanager
def session(*, dashboard: bool) -> Iterator[None]:
    """A connection to Ray for the length of a run.

    Inside `ray job submit`, or where RAY_ADDRESS names a cluster, that cluster is used; otherwise one is started on
    this machine, with token authentication (Ray's default), and stopped at the end. Within a running session nothing
    is started.
    """
    if ray.is_initialized():
        yield
        return
    if "RAY_ADDRESS" in os.environ:
        ray.init(log_to_driver=False, configure_logging=False)
    else:
        for name, value in LOCAL_ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        ray.init(
            address="local",
            include_dashboard=dashboard,
            log_to_driver=False,
            configure_logging=False,
            logging_level="error",
        )
    try:
        yield
    finally:
        ray.shutdown()


def resources(config: Config, gpu: bool) -> dict[str, dict[str, float]]:
    """What each part of a run will reserve: {"2 x worker": {"CPU": 1, "GPU": 0}, ...}, sums included.

    Args:
        config: the run.
        gpu: whether workers get a GPU each, see `use_gpu`.
    """
    cluster = config.cluster
    banks = config.bank.shards * config.bank.replicas
    parts = {
        f"{cluster.num_workers} x worker": {"CPU": cluster.cpus_per_worker, "GPU": cluster.gpus_per_worker * gpu},
        "bank" if banks == 1 else f"{banks} x bank": {"CPU": cluster.bank_cpus, "GPU": cluster.bank_gpus},
        "refiner": {"CPU": cluster.refine_cpus, "GPU": 0.0},
    }
    counts = [cluster.num_workers, banks, 1]
    total = {
        name: sum(count * part[name] for count, part in zip(counts, parts.values(), strict=True))
        for name in ("CPU", "GPU")
    }
    if gpu:  # no two workers fit on one
        total["GPU"] = max(total["GPU"], cluster.num_workers)
    return parts | {"in all": total}


def use_gpu(config: Config, gpus: float | None = None) -> bool:
    """Whether workers get a GPU each: as configured, else where there are enough.

    Args:
        config: the run.
        gpus: how many there are; None: those of the cluster.
    """
    cluster = config.cluster
    if cluster.use_gpu is not None:
        return cluster.use_gpu
    if gpus is None:
        gpus = ray.cluster_resources().get("GPU", 0)
    return gpus >= cluster.num_workers


def idle_gpus(config: Config) -> int:
    """GPUs of the cluster that a run leaves unused because they are fewer than its workers; 0 where it was told to."""
    gpus = int(ray.cluster_resources().get("GPU", 0))
    return gpus if config.cluster.use_gpu is None and not use_gpu(config) else 0


def check_resources(config: Config) -> None:
    """Refuses a run that the cluster can't hold.

    Raises:
        InputError: more of a resource is asked for than the cluster has in all, or by one worker or actor than any node
            has; Ray would wait for ever.
    """
    parts, present = resources(config, use_gpu(config)), ray.cluster_resources()
    asked = parts.pop("in all")
    for name in ("CPU", "GPU"):
        if asked[name] > present.get(name, 0):
            raise InputError(
                f"the run asks for {asked[name]:g} {name}, the cluster has {present.get(name, 0):g}; "
                "lower cluster.num_workers, cpus_per_worker, gpus_per_worker or the actors' shares, or add nodes"
            )
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    for part, needs in parts.items():
        if not any(all(node.get(name, 0) >= amount for name, amount in needs.items()) for node in nodes):
            told = " and ".join(f"{amount:g} {name}" for name, amount in needs.items() if amount)
            raise InputError(
                f"no node of the cluster has {told}, as {part.rpartition(' x ')[2]} asks for by itself; "
                "lower its share (cluster.*), or add larger nodes"
            )


@dataclass(frozen=True)
class Actors:
    """Handles of a run's actors.

    Attributes:
        bank: of each shard the primary, then its read replicas; without shards there is no bank.
        refiner: or None.
        group: reserves the bank's resources, spread over the nodes; None where the bank is one actor or reserves none.
    """

    bank: tuple[tuple[Any, ...], ...] = ()
    refiner: Any = None
    group: PlacementGroup | None = None

    @property
    def all(self) -> tuple[Any, ...]:
        """Every one of them."""
        return (*itertools.chain(*self.bank), *([] if self.refiner is None else [self.refiner]))

    @property
    def primaries(self) -> dict[str, Any]:
        """The first actor of each shard, by the name of the shard's folder in a checkpoint."""
        primaries = [primary for primary, *_ in self.bank]
        return dict(zip(shard_names(len(primaries)), primaries, strict=True))


def start_actors(config: Config, steps_per_epoch: int) -> Actors:
    """The bank, and the refiner where the strategy is not "none"; all start while the caller goes on.

    The bank begins with the rows of `bank.from`, where the run names one. The actors belong to the caller's process and
    end with it. All come back after a crash: a shard of the bank with all that was written to it where `bank.durable`
    is set, else as it began, to be filled by the workers' upserts; a replica as a copy of its shard, the refiner with a
    fresh network. In a deterministic run none comes back, since it would not be what it was: the run ends, for a
    resume. What an earlier run left of its bank goes: a run goes on from checkpoints, which share its snapshots.

    Args:
        config: the run.
        steps_per_epoch: what `bank.max_age_epochs` is measured in.
    """
    if not config.knowledge.enabled:
        return Actors()
    shutil.rmtree(config.run_dir / BANK, ignore_errors=True)
    name = f"bank-{config.name}-{uuid.uuid4().hex[:8]}"
    names = [f"{name}-{shard}" for shard in range(config.bank.shards)]
    group = _spread(config)
    copies, epochs = range(config.bank.replicas), config.bank.max_age_epochs
    max_age = None if epochs is None else round(epochs * steps_per_epoch)
    bank = tuple(
        tuple(_bank_actor(config, group, shard, copy, primary, max_age) for copy in copies)
        for shard, primary in enumerate(names)
    )
    if config.refine.strategy == "none":
        return Actors(bank, None, group)
    from ask_dist.refine.actor import RemoteRefineActor

    settings = config.refine.model_dump(exclude={"every", "corpus"})
    if config.refine.strategy == "reencode":  # by the workers; the refiner makes the prototypes
        settings["strategy"] = "none"
    refiner = RemoteRefineActor.options(num_cpus=config.cluster.refine_cpus, max_restarts=_restarts(config)).remote(
        names,
        prototypes=config.bank.prototypes,
        seed=config.seed,
        by_clock=not config.optimization.deterministic,
        **settings,
    )
    return Actors(bank, refiner, group)


def stop_actors(actors: Actors) -> None:
    """Ends the actors of a run at once, and gives back what was reserved for them."""
    for actor in actors.all:
        ray.kill(actor)
    if actors.group is not None:
        remove_placement_group(actors.group)


def _restarts(config: Config) -> int:
    """How often Ray restarts an actor; -1: always."""
    return 0 if config.optimization.deterministic else -1


def _spread(config: Config) -> PlacementGroup | None:
    """Room for every actor of the bank, each on another node as far as there are enough."""
    actors, cluster = config.bank.shards * config.bank.replicas, config.cluster
    needs = {name: amount for name, amount in (("CPU", cluster.bank_cpus), ("GPU", cluster.bank_gpus)) if amount}
    return placement_group([needs] * actors, strategy="SPREAD") if needs and actors > 1 else None


def _bank_actor(
    config: Config, group: PlacementGroup | None, shard: int, copy: int, primary: str, max_age: int | None
) -> Any:
    """One actor of the bank: the first of its shard bears the name, the others follow it."""
    kept = config.run_dir / BANK
    options: dict[str, Any] = {"num_cpus": config.cluster.bank_cpus, "num_gpus": config.cluster.bank_gpus}
    options["max_restarts"] = _restarts(config)
    if group is not None:
        bundle = shard * config.bank.replicas + copy
        options["scheduling_strategy"] = PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=bundle)
    return RemoteBankActor.options(**options, name=None if copy else primary).remote(
        primary=primary if copy else None,
        neighbours=config.knowledge.neighbours,
        durable_path=str(kept / str(shard)) if config.bank.durable and not copy else None,
        begins_with=None if copy else _external(config, shard),
        dim=config.model.embedding_dim,
        capacity=capacity_of(config.bank.capacity, config.bank.shards),
        dtype=config.bank.dtype,
        threads=config.bank.threads,
        minimum_reliability=config.bank.minimum_reliability,
        max_age=max_age,
        index=config.bank.index,
        inverted_from=config.bank.inverted_from,
        probes=config.bank.probes,
        recall=config.bank.recall,
        gpu=config.cluster.bank_gpus > 0,
    )


def _external(config: Config, shard: int) -> tuple[str, str, int, int] | None:
    """Of the external rows the folder, the digest of the weights that encoded them, and which of how many shards."""
    if config.bank.source is None or config.model.source is None:
        return None
    from ask_dist.models import saved

    return str(config.bank.source), saved.digest(config.model.source), shard, config.bank.shards
