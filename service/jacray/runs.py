"""Runs on disk: written whole, and opened again as results that are read when they are asked for."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from jacray_workers.errors import FaultError, Plain, UserError
from jacray_workers.plan import Plan
from torch import Tensor

from jacray import emit, store
from jacray.folders import RunFolder, replacing
from jacray.result import Result
from jacray.spec import Pin, Run, resolved
from jacray.store import Store
from jacray.trees import from_json, to_json
from jacray.work import Work


def save(run: Run, work: Work, result: Result) -> RunFolder:
    """Write a run's folder: `spec.yaml`, `results.zarr`, `receipt.json` and, if asked for, `report.html`.

    The folder appears whole or not at all.
    """
    spec = resolved(run, pins(result.plan))
    receipt = {**result.receipt, "spec": spec, "digests": work.digests}
    with replacing(run.folder) as path:
        folder = RunFolder(path)
        folder.spec.write_text(
            emit.dump(spec, f"Replays this run: jacray run {run.folder}/spec.yaml"), encoding="utf-8"
        )
        _write_results(folder.results, result, work)
        folder.receipt.write_text(json.dumps(store.plain(receipt), indent=1, default=str) + "\n", encoding="utf-8")
        if run.spec.output.report:
            _write_report(path, run, work, Result(dict(result), result.plan, receipt))
    return RunFolder(run.folder)


def pins(plan: Plan) -> dict[Pin, Any]:
    """What makes a rerun take the same decisions as this plan, and so give the same bits."""
    return {"method": plan.method, "chunk_size": plan.chunk_size, "memory_budget": plan.budget_bytes}


def _write_report(path: Path, run: Run, work: Work, result: Result) -> None:
    from jacray.report import write_report

    write_report(path, result, inputs=work.loaded.inputs, fields=work.loaded.fields, title=run.folder.name)


def _write_results(path: Path, result: Result, work: Work) -> None:
    structure: dict[str, Any] = {}
    blocks: dict[str, Any] = {}
    for name, tree in result:
        structure[name] = to_json(tree, _Namer(result.plan, name, blocks))
    made = store.create(path, result.plan, structure, work.loaded.fields, work.loaded.start)
    for array in result.plan.arrays:
        store.write_block(made, array, blocks[array.key])


class _Namer:
    """Gives each array of a result's tree its key: distinct ones come in the plan's order."""

    def __init__(self, plan: Plan, name: str, blocks: dict[str, Any]) -> None:
        self.left = iter(plan.array(name))
        self.blocks = blocks
        self.keys: dict[int, str] = {}

    def __call__(self, value: Tensor) -> str:
        if id(value) not in self.keys:
            array = next(self.left, None)
            if array is None or tuple(array.shape) != tuple(value.shape):
                raise FaultError(f"the result holds an array of shape {tuple(value.shape)} that its plan does not list")
            self.keys[id(value)] = array.key
            self.blocks[array.key] = value
        return self.keys[id(value)]


def load(path: str | Path) -> StoredResult:
    """Open a run's folder.

    Returns:
        A result whose attributes are read from disk when they are first asked for. `arrays` reads less: slicing one
        of its arrays reads the slice.

    Raises:
        UserError: there is no run at this path.
    """
    folder = RunFolder(Path(path))
    if not folder.results.is_dir():
        rule = f"must be a run's folder, which holds {folder.results.name}"
        raise UserError("path", rule, Plain(str(path)))
    return StoredResult(folder)


class StoredResult(Result):
    """The results of a run on disk.

    Attributes:
        folder: the run's paths.
        arrays: by key, zarr arrays that read what a slice needs; `result.arrays["jacobian"][:10]` is a numpy array.
            A block in factors is the zarr group of its factors.
        fields: what else was known of each sample, such as `target`, by name.
    """

    def __init__(self, folder: RunFolder) -> None:
        opened = store.open_store(folder.results)
        super().__init__(
            _Lazy(opened.structure, lambda name: _tree(opened, name)), opened.plan, lambda: _receipt(folder)
        )
        self.folder = folder
        self.arrays: Mapping[str, Any] = _Lazy(opened.arrays, opened.node)
        self.fields: Mapping[str, Tensor] = _Lazy(opened.fields, lambda name: store.read_field(opened, name))

    def __repr__(self) -> str:
        shapes = ", ".join(f"{a.key}: {a.shape} {a.dtype}" for a in self.plan.arrays)
        return f"StoredResult({shapes}; {self.plan.samples} samples by {self.plan.method}, in {self.folder.path})"


class _Lazy(Mapping[str, Any]):
    """Values by name, each read once, when it is first asked for."""

    def __init__(self, names: Iterable[str], read: Callable[[str], Any]) -> None:
        self._names = tuple(names)
        self._read = read
        self._known: dict[str, Any] = {}

    def __getitem__(self, name: str) -> Any:
        if name not in self._names:
            raise KeyError(f"{name}; there are {', '.join(self._names) or 'none'}")
        if name not in self._known:
            self._known[name] = self._read(name)
        return self._known[name]

    def __contains__(self, name: object) -> bool:
        return name in self._names

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def _tree(opened: Store, name: str) -> Any:
    """One result with its arrays read, in the structure that its user expects."""
    arrays = opened.arrays
    return from_json(opened.structure[name], lambda key: store.read_block(opened, arrays[key]))


def _receipt(folder: RunFolder) -> Mapping[str, Any]:
    found: Mapping[str, Any] = json.loads(folder.receipt.read_text(encoding="utf-8"))
    return found
