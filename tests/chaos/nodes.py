"""A cluster of several nodes on this machine: one is killed in the middle, another joins late."""

from __future__ import annotations

import random
import threading

import jacray

from tests.chaos.ground import FIELDS, Ground, Verdict, judge


def node_killed(ground: Ground, seed: int) -> Verdict:
    """SIGKILL of a Ray node and all that runs on it; the place that it leaves is taken by a node that joins later."""
    from ray.cluster_utils import Cluster

    cluster = Cluster(
        initialize_head=True,
        head_node_args={
            "num_cpus": 1, "include_dashboard": False,
            # A lost node is noticed after 16 s by default.
            "_system_config": {
                "health_check_period_ms": 1000, "health_check_failure_threshold": 3, "health_check_timeout_ms": 1000
            },
        },
    )  # fmt: skip
    try:
        victim = cluster.add_node(num_cpus=1)
        cluster.wait_for_nodes()
        with jacray.Client(_address(cluster), workers=2, shard_size=4, shard_timeout=60) as client:
            job = client.submit(ground.model(), ground.inputs, to=ground.run, **FIELDS)
            wait_for(job, random.Random(seed).randrange(5, ground.shards // 3))
            cluster.remove_node(victim, allow_graceful=False)
            late = threading.Timer(3.0, lambda: cluster.add_node(num_cpus=1))
            late.start()
            job.result(timeout=250)
            late.join()
        return judge(ground, 1)
    finally:
        cluster.shutdown()


def _address(cluster: object) -> str:
    import os

    os.environ["RAY_ADDRESS"] = str(cluster.address)  # type: ignore[attr-defined]
    return "auto"


def wait_for(job: jacray.Job, done: int) -> None:
    """Wait until so many shards are done."""
    for _ in job.events():
        if job.status().shards_done >= done:
            return
