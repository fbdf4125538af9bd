"""Where shards are computed: in this process or on Ray workers, behind one interface."""

from __future__ import annotations

from typing import TYPE_CHECKING

from jacray.executors.options import WorkerOptions

if TYPE_CHECKING:
    from jacray.executors.base import Executor


def make_executor(options: WorkerOptions) -> Executor:
    """The executor for an address. The one place where an address is given its meaning."""
    if options.address == "inline":
        from jacray.executors.inline import InlineExecutor

        return InlineExecutor(options)
    from jacray.executors.ray import RayExecutor

    return RayExecutor(options)
