"""Results on disk or in an object store: a zarr group (format 3) with an array per result and named dimensions.

The only package that imports zarr here.
"""

from jacray.store.group import Store, create, node_name, open_store, plain, read_block, read_field, write_block

__all__ = ["Store", "create", "node_name", "open_store", "plain", "read_block", "read_field", "write_block"]
