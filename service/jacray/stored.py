"""Results that stay where the workers wrote them, and are read when they are asked for."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from jacray_workers.errors import JobError
from torch import Tensor

from jacray import store
from jacray.folders import RECEIPT, RunFolder
from jacray.result import Result
from jacray.store import Store, StoredArray
from jacray.target import Target
from jacray.trees import from_json


class StoredResult(Result):
    """The results of a run on disk or in an object store.

    An attribute is a tensor, or a tree of them, where its arrays take up to 64 MiB (`target.small`) together; above
    that, and while the job is not done, each array is a `StoredArray`: it has a shape and a dtype, slices of it are
    tensors, and `.dense()` or `torch.as_tensor` reads all of it.

    Attributes:
        target: where it is.
        complete: whether the job had finished when this was opened.
        arrays: by key, every array as a `StoredArray`, whatever its size: `result.arrays["jacobian"][:10]`.
        fields: what else was known of each sample, such as `target`, by name.
    """

    def __init__(self, opened: Store, receipt: Callable[[], Mapping[str, Any]] | None = None) -> None:
        super().__init__(
            _Lazy(opened.structure, lambda name: _tree(opened, name)),
            opened.plan,
            receipt or (lambda: _receipt(opened)),
        )
        self.target: Target = opened.target
        self.complete = opened.complete
        self.arrays: Mapping[str, StoredArray] = _Lazy(
            opened.arrays, lambda key: StoredArray(opened, opened.arrays[key])
        )
        self.fields: Mapping[str, Tensor] = _Lazy(opened.fields, lambda name: store.read_field(opened, name))

    @property
    def folder(self) -> RunFolder:
        """The run's paths.

        Raises:
            JobError: it is behind a URL.
        """
        if self.target.path is None:
            raise JobError("folder", "is there for a run on this machine's disks only", self.target.url)
        return RunFolder(self.target.path)

    @property
    def written(self) -> list[tuple[int, int]]:
        """The ranges of samples of which every array is there; all of them once the job is done."""
        found = [array.written for array in self.arrays.values() if array.axis >= 0]
        return [pair for pair in found[0] if all(pair in other for other in found)] if found else []

    def __repr__(self) -> str:
        shapes = ", ".join(f"{a.key}: {a.shape} {a.dtype}" for a in self.plan.arrays)
        state = "" if self.complete else "unfinished, "
        return f"StoredResult({state}{shapes}; {self.plan.samples} samples by {self.plan.method}, in {self.target.url})"


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
    """One result in the structure that its user expects: read whole where it is small and there."""
    arrays = opened.arrays
    whole = opened.complete and _bytes(opened, name) <= opened.target.small

    def leaf(key: str) -> Any:
        return store.read_block(opened, arrays[key]) if whole else StoredArray(opened, arrays[key])

    return from_json(opened.structure[name], leaf)


def _bytes(opened: Store, name: str) -> int:
    """How much memory a result takes as it is kept: the plan counts what factors take together with all the rest."""
    mine = [array for array in opened.plan.array(name) if not array.factored]
    dense = sum(StoredArray(opened, array).nbytes for array in mine)
    if len(mine) == len(opened.plan.array(name)):
        return dense
    others = [array for array in opened.plan.arrays if not array.factored and array not in mine]
    return opened.plan.bytes_out - sum(StoredArray(opened, array).nbytes for array in others)


def _receipt(opened: Store) -> Mapping[str, Any]:
    text = opened.target.read(RECEIPT)
    if text is None:
        rule = "is written when a run has finished, which this one has not"
        raise JobError("receipt", rule, opened.target.url, "wait for its job, or run it again: what is finished stays")
    found: Mapping[str, Any] = json.loads(text)
    return found
