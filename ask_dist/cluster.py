"""Ray: connecting to a cluster or starting one, and the actors of a run. The only module that reserves resources."""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import ray

from ask_dist.bank.actor import RemoteBankActor
from ask_dist.config import Config
from ask_dist.errors import InputError

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
    parts = {
        f"{cluster.num_workers} x worker": {"CPU": cluster.cpus_per_worker, "GPU": float(gpu)},
        "bank": {"CPU": cluster.bank_cpus, "GPU": cluster.bank_gpus},
        "refiner": {"CPU": cluster.refine_cpus, "GPU": 0.0},
    }
    counts = [cluster.num_workers, 1, 1]
    total = {
        name: sum(count * part[name] for count, part in zip(counts, parts.values(), strict=True))
        for name in ("CPU", "GPU")
    }
    return parts | {"in all": total}


def use_gpu(config: Config) -> bool:
    """Whether workers get a GPU each: as configured, else where the cluster has enough."""
    if config.cluster.use_gpu is not None:
        return config.cluster.use_gpu
    return ray.cluster_resources().get("GPU", 0) >= config.cluster.num_workers


def check_resources(config: Config) -> None:
    """Refuses a run that the cluster can't hold.

    Raises:
        InputError: more of a resource is asked for than the cluster has in all; Ray would wait for ever.
    """
    asked, present = resources(config, use_gpu(config))["in all"], ray.cluster_resources()
    for name in ("CPU", "GPU"):
        if asked[name] > present.get(name, 0):
            raise InputError(
                f"the run asks for {asked[name]:g} {name}, the cluster has {present.get(name, 0):g}; "
                "lower cluster.num_workers, cpus_per_worker or the actors' shares, or add nodes"
            )


def start_actors(config: Config) -> dict[str, Any]:
    """The bank, and the refiner where the strategy is not "none"; both start while the caller goes on.

    They belong to the caller's process and end with it. Both come back after a crash: the bank empty, to be filled by
    the workers' upserts, the refiner with a fresh network.
    """
    if not config.knowledge.enabled:
        return {}
    name = f"bank-{config.name}-{uuid.uuid4().hex[:8]}"
    options = {"name": name, "num_cpus": config.cluster.bank_cpus, "num_gpus": config.cluster.bank_gpus}
    bank = RemoteBankActor.options(**options).remote(
        neighbours=config.knowledge.neighbours,
        dim=config.model.embedding_dim,
        capacity=config.bank.capacity,
        dtype=config.bank.dtype,
        threads=config.bank.threads,
        minimum_reliability=config.bank.minimum_reliability,
        index=config.bank.index,
        inverted_from=config.bank.inverted_from,
        probes=config.bank.probes,
        recall=config.bank.recall,
    )
    if config.refine.strategy == "none":
        return {"bank": bank}
    from ask_dist.refine.actor import RemoteRefineActor

    refiner = RemoteRefineActor.options(num_cpus=config.cluster.refine_cpus).remote(
        name, prototypes=config.bank.prototypes, seed=config.seed, **config.refine.model_dump()
    )
    return {"bank": bank, "refiner": refiner}


def stop_actors(actors: dict[str, Any]) -> None:
    """Ends the actors of a run at once."""
    for actor in actors.values():
        ray.kill(actor)
