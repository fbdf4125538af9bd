"""A batch of inputs that is read by range: by the client in part, by each worker its own samples."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from jacray_workers.errors import InputError, Plain
from jacray_workers.sources.arrays import Leaf, Part, Reader, check_memory, check_unchanged
from jacray_workers.sources.loaded import Loaded
from jacray_workers.sources.preprocess import preprocess

HASHED_BYTES = 1 << 26
"""Up to here a digest is that of the numbers; beyond, of the spec and of what the system says of each file."""
_SIZED_BY = {"random": ".shape", "inline": ".values", "": ""}


@dataclass(frozen=True)
class Rows:
    """A source of samples, opened.

    It holds no open file and no data but what the spec itself holds, may be pickled and sent to workers, and may be
    read from several threads at once.

    Attributes:
        spec: where it comes from.
        reader: reads rows of the source.
        steps: the preprocessing.
        samples: how many samples there are.
        start: the place of the first sample in the source.
        inputs: what one sample of each input is; the empty name for a bare tensor.
        fields: likewise, of the fields.
    """

    spec: Any
    reader: Reader
    steps: tuple[Any, ...]
    samples: int
    start: int
    inputs: Mapping[str, Leaf]
    fields: Mapping[str, Leaf]

    def __len__(self) -> int:
        return self.samples

    @property
    def nbytes(self) -> int:
        """Of all inputs and fields of all samples."""
        return self.samples * sum(leaf.nbytes for leaf in (*self.inputs.values(), *self.fields.values()))

    def read(self, start: int, stop: int) -> Loaded:
        """The samples from start to stop, counted from the first of this source.

        Raises:
            InputError: the range is not within the samples, the source has changed since it was opened, a sample
                differs in shape or type from the first, or the samples do not fit into memory.
        """
        if not 0 <= start < stop <= self.samples:
            rule = f"must be a range within the {self.samples} samples"
            raise InputError(f"{self.reader.argument}.range", rule, [start, stop])
        check_unchanged(self.reader.places)
        raw, fields = self.reader.read(self.start + start, self.start + stop)
        # Again: what was written to in the meantime may be half old and half new.
        check_unchanged([(place, stamp) for place, stamp in self.reader.places if not place.folder])
        parts = preprocess(raw, self.steps, self.start + start)
        self._check(parts, self.inputs, self.reader.argument, stop - start)
        self._check(fields, self.fields, f"{self.reader.argument}.fields", stop - start)
        named: dict[str, Any] = dict(parts)
        return Loaded(named[""] if list(named) == [""] else named, fields, self.start + start)

    def whole(self) -> Loaded:
        """All samples.

        Raises:
            InputError: as `read`.
        """
        check_memory(self.nbytes, f"{self.reader.argument}{_SIZED_BY.get(getattr(self.spec, 'kind', ''), '.path')}")
        return self.read(0, self.samples)

    def all_fields(self) -> dict[str, Tensor]:
        """The fields of all samples, read some samples at a time, without the inputs where the source can.

        Raises:
            InputError: as `read`.
        """
        if not self.fields:
            return {}
        held = self.samples * sum(leaf.nbytes for leaf in self.fields.values())
        check_memory(2 * held, f"{self.reader.argument}.fields")
        step = max(1, self.samples * HASHED_BYTES // max(self.nbytes, 1))
        parts = [self.read_fields(start, min(start + step, self.samples)) for start in range(0, self.samples, step)]
        return {name: torch.cat([part[name] for part in parts]) for name in self.fields}

    def read_fields(self, start: int, stop: int) -> Mapping[str, Tensor]:
        """The fields of the samples from start to stop, without the inputs where the source can.

        Raises:
            InputError: as `read`.
        """
        alone = getattr(self.reader, "read_fields", None)
        if alone is None:
            return self.read(start, stop).fields
        check_unchanged(self.reader.places)
        found: dict[str, Tensor] = alone(self.start + start, self.start + stop)
        self._check(found, self.fields, f"{self.reader.argument}.fields", stop - start)
        return found

    @cached_property
    def digest(self) -> str:
        """A sha256 that is equal only where the samples are.

        It is that of the numbers, or where these are many, of the spec and of each file's size, time and number (a
        copied file then counts as another).
        """
        if self.nbytes <= HASHED_BYTES:
            return self.whole().digest
        if any(len(stamp) < 2 for _, stamp in self.reader.places):
            return self._read_through()
        spec = self.spec if isinstance(self.spec, Mapping) else {"": self.spec}
        content = {name: part.model_dump(mode="json") for name, part in spec.items()}
        stamps = [(place.path, *stamp) for place, stamp in self.reader.places]
        return hashlib.sha256(json.dumps([content, stamps], sort_keys=True).encode()).hexdigest()

    def _read_through(self) -> str:
        """A sha256 over all samples, some at a time: for files of which nothing is told but their size."""
        found, step = hashlib.sha256(), max(1, self.samples * HASHED_BYTES // max(self.nbytes, 1))
        for start in range(0, self.samples, step):
            found.update(self.read(start, min(start + step, self.samples)).digest.encode())
        return found.hexdigest()

    def _check(self, parts: Mapping[str, Part], leaves: Mapping[str, Leaf], argument: str, samples: int) -> None:
        for name, leaf in leaves.items():
            part = parts[name]
            found = (tuple(part.shape), part.dtype) if isinstance(part, Tensor) else None
            if found != ((samples, *leaf.shape), leaf.dtype):
                shown = Plain(f"{str(found)[:80]} where the first sample is {leaf.shape} of {str(leaf.dtype)[6:]}")
                raise InputError(
                    f"{argument}.{name}".rstrip("."), "must have one shape and type in every sample", shown
                )

    def __getstate__(self) -> dict[str, Any]:
        # Not the digest's cache: it may hold the numbers' owner.
        return {name: getattr(self, name) for name in self.__dataclass_fields__}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
