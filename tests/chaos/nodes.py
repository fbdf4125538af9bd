"""A cluster of several nodes on this machine: one is killed in the middle, another joins late."""

from __future__ import annotations

import dataclasses
import random

import jacray
from jacray.journal import Journal

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
            # By now on the worker that is left: the other one's place stays empty until there is a node for it.
            wait_for(job, job.status().shards_done + 3)
            cluster.add_node(num_cpus=1)
            job.result(timeout=250)
        verdict = judge(ground, 1)
        # The head has one CPU, so what was hired after the loss can only be on the node that came late.
        hired = len(_workers(ground))
        faults = [] if hired == 3 else [f"{hired} workers computed, and not two, and one on the node that came late"]
        return dataclasses.replace(verdict, faults=(*verdict.faults, *faults))
    finally:
        cluster.shutdown()


def _workers(ground: Ground) -> set[str]:
    """Who computed shards, by the journal."""
    with Journal(ground.run / "journal.sqlite", read_only=True) as journal:
        return {row.worker for row in journal.shards(journal.jobs()[0].id)}


def _address(cluster: object) -> str:
    import os

    os.environ["RAY_ADDRESS"] = str(cluster.address)  # type: ignore[attr-defined]
    return "auto"


def wait_for(job: jacray.Job, done: int) -> None:
    """Wait until so many shards are done."""
    for _ in job.events():
        if job.status().shards_done >= done:
            return
