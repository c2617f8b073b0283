"""The actors of a run: as many as configured, where there is room, and gone at its end."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import ray

from ask_dist import cluster, config
from ask_dist.config import Config
from ask_dist.errors import InputError

pytestmark = pytest.mark.ray

TWO_NODES = """
import time
import ray
from ray.cluster_utils import Cluster
from ray.util.placement_group import placement_group_table
from ask_dist import cluster, config
from ask_dist.errors import InputError

nodes = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "include_dashboard": False})
nodes.add_node(num_cpus=2)
ray.init(address=nodes.address, log_to_driver=False)
run = config.parse({"name": "spread", "data": {"train": "unread"}, "cluster": {"bank_cpus": 1},
                    "bank": {"shards": 2}, "refine": {"strategy": "none"}})
actors = cluster.start_actors(run, steps_per_epoch=10)
where = [primary.__ray_call__.remote(lambda _: ray.get_runtime_context().get_node_id()) for primary, in actors.bank]
assert len(set(ray.get(where))) == 2
cluster.stop_actors(actors)
while ray.available_resources().get("CPU") != 4:
    time.sleep(0.05)
cluster.check_resources(run)
run = config.parse({"name": "large", "data": {"train": "unread"}, "cluster": {"bank_cpus": 3, "num_workers": 1}})
try:
    cluster.check_resources(run)
    raise SystemExit("no node has 3 CPU")
except InputError as error:
    assert "no node of the cluster has 3 CPU, as bank asks for by itself" in str(error)
assert cluster.idle_gpus(run) == 0
nodes.add_node(num_cpus=2, num_gpus=1)
two = config.parse({"name": "few", "data": {"train": "unread"}, "cluster": {"num_workers": 2}})
told = config.parse({"name": "told", "data": {"train": "unread"}, "cluster": {"num_workers": 2, "use_gpu": False}})
assert [cluster.idle_gpus(run), cluster.idle_gpus(two), cluster.idle_gpus(told)] == [0, 1, 0]
ray.shutdown()
nodes.shutdown()
"""


def run_config(**sections) -> Config:
    return config.parse({"name": "actors", "data": {"train": "unread"}, **sections})


def test_a_bank_has_an_actor_for_each_shard_and_replica_and_a_refiner_for_all(local_ray):
    run = run_config(
        bank={"shards": 2, "replicas": 2, "capacity": 400, "prototypes": [4]},
        model={"embedding_dim": 8},
        refine={"interval": 0.0, "cpu_share": 1.0},
    )
    actors = cluster.start_actors(run, steps_per_epoch=10)
    try:
        assert [len(shard) for shard in actors.bank] == [2, 2]
        assert list(actors.primaries) == ["bank-0", "bank-1"]
        assert actors.group is None  # nothing is reserved
        rows = np.eye(8, dtype=np.float32)[np.arange(80) % 8]
        for shard, (primary, _) in enumerate(actors.bank):
            ray.get(primary.upsert.remote(np.arange(80) + 100 * shard, rows, rows, None, 1))
        prototypes = None
        while prototypes is None or len(prototypes.levels[0][0]) < 4:
            prototypes = ray.get(actors.bank[0][0].prototypes.remote())
        assert ray.get(actors.bank[1][0].prototypes.remote()) is None
        state = {}
        while not {"0.generation.source.audio.ids", "1.generation.source.audio.ids"} <= set(state):
            state = ray.get(actors.refiner.state.remote())
        assert state["1.generation.source.audio.ids"].min() == 100
        ray.get(actors.refiner.load_state.remote(state))
        while ray.get(actors.bank[1][1].ping.remote()) < 80:
            pass
    finally:
        cluster.stop_actors(actors)


def test_what_shards_and_replicas_reserve_is_counted_and_refused_where_there_is_too_little(local_ray):
    run = run_config(bank={"shards": 3, "replicas": 2}, cluster={"bank_cpus": 2})
    assert cluster.resources(run, gpu=False)["6 x bank"] == {"CPU": 2, "GPU": 0}
    assert cluster.resources(run, gpu=False)["in all"]["CPU"] == 14
    with pytest.raises(InputError, match="the run asks for 14 CPU, the cluster has 2"):
        cluster.check_resources(run)


def test_a_worker_leaves_part_of_its_gpu_to_the_bank():
    run = run_config(cluster={"num_workers": 1, "gpus_per_worker": 0.75, "bank_gpus": 0.25})
    assert cluster.use_gpu(run, gpus=1)
    assert cluster.resources(run, gpu=True)["in all"]["GPU"] == 1
    assert cluster.resources(run, gpu=False)["in all"]["GPU"] == 0.25
    four = run_config(cluster={"num_workers": 4, "gpus_per_worker": 0.75})  # each on another GPU
    assert [cluster.use_gpu(four, gpus) for gpus in (3, 4)] == [False, True]
    assert cluster.resources(four, gpu=True)["in all"]["GPU"] == 4


def test_shards_are_spread_over_nodes_and_give_back_what_they_reserved():
    done = subprocess.run([sys.executable, "-c", TWO_NODES], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
