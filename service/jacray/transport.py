"""How models, inputs and results travel: a small pickle beside the bytes of every tensor.

A pickled torch tensor is copied several times on its way through Ray's object store; a numpy array is not copied on
arrival at all. So every storage is taken out of the pickle and sent as a numpy array of bytes. Working on storages
rather than tensors keeps what models rely on: tied parameters, views of one buffer, strides, dtypes that numpy
lacks.

What arrives from an object store is mapped into every process of the machine, so a write would change the numbers
of all of them. Hence only what is read by contract (parameters, inputs, weights, vectors) is used in place; every
other storage is copied on arrival, and `fingerprint` finds out whether the contract was kept.
"""

from __future__ import annotations

import io
import pickle
import warnings
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import cloudpickle
import numpy as np
import torch
from jacray_workers.models.torchvision_operators import with_operators
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils import _pytree as pytree

# A view is compacted before it travels when its storage is more than this many times its own size.
WASTE = 2


@dataclass(frozen=True)
class Packed:
    """An object as a pickle without its storages, and the storages' bytes.

    Attributes:
        pickled: the pickle; storages are numbered in it.
        storages: one array of bytes per storage.
        shared: per storage, whether it may be used where it lies.
    """

    pickled: bytes
    storages: tuple[NDArray[np.uint8], ...]
    shared: tuple[bool, ...]

    @property
    def nbytes(self) -> int:
        """How much travels."""
        return len(self.pickled) + sum(array.nbytes for array in self.storages)


def pack(value: Any, *, read_only: Iterable[Tensor] = (), copy: bool = False, compact: bool = False) -> Packed:
    """Take an object apart.

    Args:
        value: anything cloudpickle takes; classes and functions that cannot be imported travel by value.
        read_only: the tensors that the receiver only reads, and may therefore use in place.
        copy: whether the bytes are copied now, or are views that must be sent before their owner changes them.
        compact: send a tensor that is a small view of a large storage by itself, whatever else shares the storage.

    Raises:
        Exception: whatever the object's own pickling raises.
    """
    stream = io.BytesIO()
    pickler = _Pickler(stream, compact)
    pickler.dump(value)
    readable = {_key(tensor) for tensor in read_only}
    arrays = tuple(_bytes_of(storage, copy) for storage in pickler.storages)
    return Packed(stream.getvalue(), arrays, tuple(key in readable for key in pickler.keys))


def unpack(packed: Packed, *, in_place: bool = False) -> Any:
    """Put an object together again.

    Args:
        packed: what `pack` made.
        in_place: use every storage where it lies, for a receiver that owns them or writes to none.

    Raises:
        Exception: whatever the object's own unpickling raises, such as `ModuleNotFoundError`.
    """
    storages = [
        _storage(array, in_place or shared) for array, shared in zip(packed.storages, packed.shared, strict=True)
    ]
    return with_operators(lambda: _Unpickler(io.BytesIO(packed.pickled), storages).load())


def alone(value: Any) -> Any:
    """The same pytree with every tensor cut off from its graph, and from a storage much larger than itself."""
    return pytree.tree_map_only(Tensor, lambda tensor: _compact(tensor.detach()), value)


def parameters_only(module: nn.Module) -> list[Tensor]:
    """The parameters of a module that share no memory with a buffer, which may be written to."""
    written = {_key(buffer) for buffer in module.buffers()}
    return [p for p in module.parameters() if _key(p) not in written]


def fingerprint(packed: Packed) -> int:
    """A checksum over the storages that are used in place."""
    total = 0
    for array, shared in zip(packed.storages, packed.shared, strict=True):
        if shared:
            total = zlib.crc32(array.data, total)
    return total


class _Pickler(cloudpickle.Pickler):  # type: ignore[misc]
    """Numbers storages instead of writing them."""

    def __init__(self, stream: io.BytesIO, compact: bool) -> None:
        super().__init__(stream, protocol=5)
        self.compact = compact
        self.storages: list[torch.UntypedStorage] = []
        self.keys: list[int] = []
        self._numbers: dict[int, int] = {}

    def persistent_id(self, obj: Any) -> tuple[int, torch.dtype | None] | None:
        if isinstance(obj, torch.storage.TypedStorage):
            return self._number(obj._untyped_storage), obj.dtype
        return (self._number(obj), None) if isinstance(obj, torch.UntypedStorage) else None

    def reducer_override(self, obj: Any) -> Any:
        if self.compact and type(obj) is Tensor:
            return _compact(obj).__reduce_ex__(5)
        return super().reducer_override(obj)

    def _number(self, storage: torch.UntypedStorage) -> int:
        key = storage._cdata
        if key not in self._numbers:
            self._numbers[key] = len(self.storages)
            # Kept, so that no later storage can be given the same address while this pickle is written.
            self.storages.append(storage)
            self.keys.append(key)
        return self._numbers[key]


class _Unpickler(pickle.Unpickler):
    def __init__(self, stream: io.BytesIO, storages: Sequence[torch.UntypedStorage]) -> None:
        super().__init__(stream)
        self.storages = storages

    def persistent_load(self, pid: tuple[int, torch.dtype | None]) -> Any:
        number, dtype = pid
        if dtype is None:
            return self.storages[number]
        return torch.storage.TypedStorage(wrap_storage=self.storages[number], dtype=dtype, _internal=True)


def _key(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def _compact(tensor: Tensor) -> Tensor:
    if type(tensor) is not Tensor or tensor.layout != torch.strided or tensor.is_quantized:
        return tensor
    wasteful = tensor.untyped_storage().nbytes() > WASTE * tensor.numel() * tensor.element_size()
    return tensor.detach().clone() if wasteful else tensor


def _bytes_of(storage: torch.UntypedStorage, copy: bool) -> NDArray[np.uint8]:
    if storage.nbytes() == 0:
        return np.empty(0, np.uint8)
    here = torch.empty(0, dtype=torch.uint8).set_(storage.cpu())
    array: NDArray[np.uint8] = (here.clone() if copy else here).numpy()
    return array


def _storage(array: NDArray[np.uint8], in_place: bool) -> torch.UntypedStorage:
    if array.nbytes == 0:
        return torch.UntypedStorage(0)
    tensor = torch.from_numpy(array)
    return (tensor if in_place else tensor.clone()).untyped_storage()


def _let_torch_warn_once() -> None:
    """Use up torch's one warning that an array from the object store is read-only, which a tensor cannot express.

    Here and not around each use, because changing the warning filters is not safe in several threads.
    """
    array = np.zeros(1, np.uint8)
    array.flags.writeable = False
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.from_numpy(array)


_let_torch_warn_once()
