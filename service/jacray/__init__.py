"""jacray: per-sample Jacobians and weighted gradients of PyTorch models, in one process or over Ray.

    J = jacray.jacobian(model, x)                       # in this process
    with jacray.Client() as client:                     # on a local Ray
        result = client.submit(model, x).result()

Every name below is loaded when it is first used, so that `import jacray` costs neither torch nor Ray.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jacray_workers import errors
    from jacray_workers.errors import (
        BudgetError,
        BusyError,
        CancelledError,
        CoupledSamplesError,
        FaultError,
        InputError,
        JacrayError,
        JobError,
        MethodError,
        ModelError,
        NonFiniteError,
        RequestError,
        ShardError,
        SpecError,
        StorageError,
        UserError,
        VerificationError,
    )
    from jacray_workers.plan import Plan
    from jacray_workers.request import Request

    from jacray.api import compute, jacobian, plan, weighted_gradient
    from jacray.asynchronous import AsyncClient
    from jacray.client import Client
    from jacray.exporting import export
    from jacray.job import Job, JobStatus, JobTimeoutError
    from jacray.result import Result
    from jacray.runs import load

    __version__: str

__all__ = [
    "AsyncClient",
    "BudgetError",
    "BusyError",
    "CancelledError",
    "Client",
    "CoupledSamplesError",
    "FaultError",
    "InputError",
    "JacrayError",
    "Job",
    "JobError",
    "JobStatus",
    "JobTimeoutError",
    "MethodError",
    "ModelError",
    "NonFiniteError",
    "Plan",
    "Request",
    "RequestError",
    "Result",
    "ShardError",
    "SpecError",
    "StorageError",
    "UserError",
    "VerificationError",
    "__version__",
    "compute",
    "errors",
    "export",
    "jacobian",
    "load",
    "plan",
    "weighted_gradient",
]

_HOMES = {
    "jacray.api": ("compute", "jacobian", "plan", "weighted_gradient"),
    "jacray.asynchronous": ("AsyncClient",),
    "jacray.client": ("Client",),
    "jacray.exporting": ("export",),
    "jacray.job": ("Job", "JobStatus", "JobTimeoutError"),
    "jacray.result": ("Result",),
    "jacray.runs": ("load",),
    "jacray_workers.plan": ("Plan",),
    "jacray_workers.request": ("Request",),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}


def __getattr__(name: str) -> Any:
    """Load a public name on first use."""
    if name == "__version__":
        value: Any = _version()
    elif name == "errors":
        value = importlib.import_module("jacray_workers.errors")
    elif name in _HOME_OF:
        value = getattr(importlib.import_module(_HOME_OF[name]), name)
    elif name in __all__:
        value = getattr(importlib.import_module("jacray_workers.errors"), name)
    else:
        raise AttributeError(f"module 'jacray' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def _version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("jacray")
    except PackageNotFoundError:  # a checkout on the path that was never installed
        return "0+uninstalled"
