"""Our side: the public functions as a user calls them, or the engine alone where only that is installed."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from benchmarks.task import Arrays, Ready, Side, Task


def as_users_call(task: Task, method: str = "auto") -> Ready:
    """`jacray.jacobian(model, x, ...)`, or `jacray.compute` for what is no Jacobian. Nothing is passed in but that."""
    import jacray

    asked = {**task.case.request, "method": method}
    if task.case.returns == "jacobian":
        return Ready(lambda: jacray.jacobian(task.model, task.x, **asked), _read)
    name = task.case.returns
    return Ready(lambda: getattr(jacray.compute(task.model, task.x, returns=[name], **asked), name), _reader(task))


def by_the_engine(task: Task, method: str = "auto", **fields: Any) -> Ready:
    """The same by the package of the workers alone: what `jacray.compute` does, without the front."""
    from jacray_workers.engine import assemble, combine, prepare, run_shard
    from jacray_workers.request import make_request

    name = task.case.returns
    request = make_request(returns=[name], **{**task.case.request, "method": method, **fields})

    def call() -> Any:
        prepared = prepare(task.model, task.x, request)
        results = [run_shard(prepared, shard) for shard in prepared.plan.shards()]
        return assemble(prepared, combine(prepared.plan, results))[name]

    return Ready(call, _reader(task))


def on_the_device(task: Task, method: str = "auto", **fields: Any) -> Ready:
    """The engine's shards written into memory of the model's device, where peers leave their results too."""
    import torch
    from jacray_workers.buffers import TORCH_OF
    from jacray_workers.engine import assemble, combine, prepare, run_shard
    from jacray_workers.request import make_request

    name = task.case.returns
    request = make_request(returns=[name], **{**task.case.request, "method": method, **fields})
    device = task.x.device

    def call() -> Any:
        prepared = prepare(task.model, task.x, request)
        results = []
        for shard in prepared.plan.shards():
            into = {}
            for array in prepared.plan.arrays:
                if array.axis >= 0 and not array.factored:
                    shape = list(array.shape)
                    shape[array.axis] = shard.stop - shard.start
                    into[array.key] = torch.empty(shape, dtype=TORCH_OF[array.dtype], device=device)
            results.append(run_shard(prepared, shard, into=into))
        return assemble(prepared, combine(prepared.plan, results))[name]

    return Ready(call, _reader(task))


def _reader(task: Task) -> Any:
    if task.case.returns != "ntk":
        return _read
    return lambda found: {"ntk": found}


def _read(found: Tensor | dict[str, Tensor]) -> Arrays:
    return found if isinstance(found, dict) else {"": found}


OURS = Side("jacray", as_users_call)
ENGINE = Side("jacray", by_the_engine)
ON_DEVICE = Side("jacray", on_the_device)
