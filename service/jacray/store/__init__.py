"""Results on disk or in an object store: a zarr group (format 3) with an array per result and named dimensions.

The only package that imports zarr here. A client makes the store, workers write into it, the client finishes it, and
whoever wants reads it, before and after.
"""

from jacray.store.blocks import read_block, read_field, write_block, write_whole
from jacray.store.check import Damage, damaged_shard, damaged_sums, damages, look, standing, verify
from jacray.store.collect import Collector
from jacray.store.faults import writing
from jacray.store.group import (
    Store,
    as_numpy,
    create,
    exists,
    finish,
    node_name,
    open_store,
    plain,
    remove,
    reopen,
    sweep,
)
from jacray.store.lazy import StoredArray
from jacray.store.sums import added_up
from jacray.store.writer import Writer

__all__ = [
    "Collector",
    "Damage",
    "Store",
    "StoredArray",
    "Writer",
    "added_up",
    "as_numpy",
    "create",
    "damaged_shard",
    "damaged_sums",
    "damages",
    "exists",
    "finish",
    "look",
    "node_name",
    "open_store",
    "plain",
    "read_block",
    "read_field",
    "remove",
    "reopen",
    "standing",
    "sweep",
    "verify",
    "write_block",
    "write_whole",
    "writing",
]
