"""Work and results as messages, and back: trees of tensors as a JSON tree beside named tensors."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from jacray_workers.blocks.block import Block
from jacray_workers.errors import FaultError, InputError, Plain
from jacray_workers.plan import Plan
from torch import Tensor

from jacray.http.wire import ITEM, Entry, Header, load, write_header
from jacray.plans import read_plan
from jacray.result import Result
from jacray.trees import from_json, to_json

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
NAMES = {dtype: name for name, dtype in DTYPES.items()}
_MAX_DEPTH = 64


@dataclass
class Message:
    """JSON data and tensors on their way out.

    Attributes:
        about: what is said besides the tensors.
        tensors: by name, on the CPU.
    """

    about: dict[str, Any] = field(default_factory=dict)
    tensors: dict[str, Tensor] = field(default_factory=dict)

    def put(self, tree: Any, prefix: str) -> dict[str, Any]:
        """Take a tree of tensors along; returns what stands in its place.

        Raises:
            InputError: a leaf is no tensor of numbers, or the tree is made of more than dicts, lists and tuples.
        """

        def add(leaf: Any) -> str:
            tensor = _plain(leaf, prefix)
            name = f"{prefix}.{len(self.tensors)}"
            self.tensors[name] = tensor
            return name

        _check_containers(tree, prefix)
        return {"tensors": to_json(tree, add)}

    def encode(self) -> tuple[bytes, list[memoryview]]:
        """The header, and each tensor's bytes in order."""
        order = self.order()
        rows = [(name, NAMES[self.tensors[name].dtype], tuple(self.tensors[name].shape)) for name in order]
        return write_header(self.about, rows), [raw(self.tensors[name]) for name in order]

    def order(self) -> list[str]:
        """The tensors' names in the order of their bytes."""
        # Wide numbers first, so that every tensor starts at a multiple of its own width.
        return sorted(self.tensors, key=lambda name: -self.tensors[name].element_size())


def raw(tensor: Tensor) -> memoryview:
    """The bytes of a tensor, without a copy where it is contiguous and on the CPU."""
    if tensor.numel() == 0:
        return memoryview(b"")
    flat = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    return flat.numpy().data.cast("B")


def tensors(header: Header, data: bytearray | memoryview) -> dict[str, Tensor]:
    """The tensors of a whole message, as views of its memory where their places allow it."""
    return {entry.name: tensor_at(entry, data, header.size) for entry in header.entries}


def tensor_at(entry: Entry, data: bytearray | memoryview, offset: int) -> Tensor:
    """One tensor of a message that lies in writable memory."""
    count, item = math.prod(entry.shape), ITEM[entry.dtype]
    dtype = DTYPES[entry.dtype]
    if count == 0:
        return torch.empty(entry.shape, dtype=dtype)
    at = offset + entry.start
    if at % item:
        data, at = bytearray(memoryview(data)[at : at + count * item]), 0
    if dtype == torch.bool:  # any byte may stand there, and a bool that is neither 0 nor 1 breaks what torch relies on
        return (torch.frombuffer(data, dtype=torch.uint8, count=count, offset=at) != 0).reshape(entry.shape)
    return torch.frombuffer(data, dtype=dtype, count=count, offset=at).reshape(entry.shape)


def tree(found: Any, known: Mapping[str, Tensor], argument: str) -> Any:
    """The tree of tensors that `Message.put` described.

    Raises:
        InputError: it is none, or names a tensor that the message lacks.
    """
    _check_tree(found, known, argument, 0)
    return from_json(found, lambda name: known[name])


def _check_tree(found: Any, known: Mapping[str, Any], argument: str, depth: int) -> None:
    rule = 'must be {"key": NAME}, {"dict": [[NAME, PART], ...]}, {"list": [...]} or {"tuple": [...]}'
    if depth > _MAX_DEPTH or not isinstance(found, dict) or len(found) != 1:
        raise InputError(argument, rule, found)
    ((kind, inner),) = found.items()
    if kind == "key":
        if not isinstance(inner, str) or inner not in known:
            raise InputError(argument, "names a tensor that the body lacks", inner)
        return
    if kind not in ("dict", "list", "tuple") or not isinstance(inner, list):
        raise InputError(argument, rule, found)
    for part in inner:
        if kind == "dict":
            if not isinstance(part, list) or len(part) != 2 or not isinstance(part[0], str):
                raise InputError(argument, rule, part)
            _check_tree(part[1], known, f"{argument}.{part[0]}", depth + 1)
        else:
            _check_tree(part, known, argument, depth + 1)


def _plain(leaf: Any, argument: str) -> Tensor:
    if not isinstance(leaf, Tensor):
        try:
            leaf = torch.as_tensor(leaf)
        except (TypeError, ValueError, RuntimeError):
            raise InputError(argument, "must be made of tensors to travel", type(leaf).__name__) from None
    if leaf.dtype not in NAMES or leaf.layout != torch.strided:
        rule = f"must be dense and of one of the types {', '.join(str(d)[6:] for d in NAMES)} to travel"
        raise InputError(argument, rule, Plain(f"{leaf.dtype}, {leaf.layout}"))
    found: Tensor = leaf.detach()
    return found


def _check_containers(value: Any, argument: str) -> None:
    """Refuse containers that would come back as other ones."""
    if isinstance(value, dict):
        if not all(isinstance(name, str) for name in value):
            raise InputError(argument, "must have texts as names to travel", list(value))
        parts: Iterable[Any] = value.values()
    elif type(value) in (list, tuple):
        parts = value
    elif isinstance(value, tuple):
        way_out = "give a dict, list or tuple, or compute in this process"
        raise InputError(argument, "must be made of dicts, lists and tuples to travel", type(value).__name__, way_out)
    else:
        return
    for part in parts:
        _check_containers(part, argument)


# Results ----------------------------------------------------------------------------------------------------------


def pack_result(values: Iterable[tuple[str, Any]], plan: Plan) -> Message:
    """The arrays of a result under their keys of the plan, and their structure; blocks in factors stay so."""
    structure, arrays = keyed(values, plan)
    message = Message({"results": structure, "blocks": {}})
    for key, value in arrays.items():
        put_array(message, key, value)
    return message


def keyed(values: Iterable[tuple[str, Any]], plan: Plan) -> tuple[dict[str, Any], dict[str, Any]]:
    """Each result's tree with array keys in place of arrays, and the arrays by key."""
    arrays: dict[str, Any] = {}
    return {name: to_json(value, _Keys(plan, name, arrays)) for name, value in values}, arrays


class _Keys:
    """Gives each array of a result's tree its key: distinct ones come in the plan's order."""

    def __init__(self, plan: Plan, name: str, arrays: dict[str, Any]) -> None:
        self.left = iter(plan.array(name))
        self.arrays = arrays
        self.known: dict[int, str] = {}

    def __call__(self, value: Any) -> str:
        if id(value) not in self.known:
            array = next(self.left, None)
            if array is None or tuple(array.shape) != tuple(value.shape):
                raise FaultError(f"a result holds an array of shape {tuple(value.shape)} that its plan does not list")
            self.known[id(value)] = array.key
            self.arrays[array.key] = value
        return self.known[id(value)]


def put_array(message: Message, key: str, value: Any) -> None:
    """One array of a result, or the factors of a block."""
    if isinstance(value, Block):
        message.about["blocks"][key] = value.meta()
        message.tensors.update({f"{key}/{name}": part.detach().cpu() for name, part in value.factors().items()})
    else:
        message.tensors[key] = value.detach().cpu()


def unpack_result(about: Mapping[str, Any], found: Mapping[str, Tensor]) -> dict[str, Any]:
    """Result name -> the user's structure."""
    return {name: from_json(part, lambda key: array_of(key, about, found)) for name, part in about["results"].items()}


def array_of(key: str, about: Mapping[str, Any], found: Mapping[str, Tensor]) -> Tensor:
    """One array of a result, or the block that its factors make."""
    blocks = about.get("blocks", {})
    return _block(key, blocks[key], found) if key in blocks else found[key]


def _block(key: str, meta: Mapping[str, Any], found: Mapping[str, Tensor]) -> Block:
    start = f"{key}/"
    factors = {name.removeprefix(start): part for name, part in found.items() if name.startswith(start)}
    return Block.from_factors(meta, factors)


RECEIPT = "receipt"
"""The name of the tensor of bytes that holds a result's receipt, as JSON text."""


class RemoteResult(Result):
    """A result that came over HTTP. Its receipt came as a text, which is read when somebody asks."""

    def __init__(self, values: Mapping[str, Any], receipt: bytes) -> None:
        self._values = dict(values)
        self._receipt = lambda: load(receipt, "receipt")

    @functools.cached_property
    def plan(self) -> Plan:  # type: ignore[override]
        """The plan that was followed."""
        return read_plan(self.receipt["plan"])


def result_of(header: Header, data: bytearray | memoryview) -> RemoteResult:
    """The result that a whole message holds."""
    found = tensors(header, data)
    receipt = bytes(raw(found.pop(RECEIPT)))
    return RemoteResult(unpack_result(header.about, found), receipt)


def lists(message: Message, limit: int) -> dict[str, Any]:
    """A small result as nested lists, for requests written by hand; NaN and infinities are texts.

    Raises:
        InputError: it holds more numbers than that is meant for.
    """
    count = sum(part.numel() for part in message.tensors.values())
    if count > limit:
        way_out = "ask for application/x-safetensors in the Accept header"
        raise InputError("Accept", f"JSON is for at most {limit:,} numbers", count, way_out)

    def read(key: str) -> Any:
        if key in message.about["blocks"]:
            return _numbers(_block(key, message.about["blocks"][key], message.tensors).dense())
        return _numbers(message.tensors[key])

    return {name: from_json(part, read) for name, part in message.about["results"].items()}


def _numbers(tensor: Tensor) -> Any:
    wide = tensor.double() if tensor.is_floating_point() else tensor
    found = wide.tolist()
    return found if bool(torch.isfinite(wide).all()) else _texts(found)


def _texts(value: Any) -> Any:
    if isinstance(value, list):
        return [_texts(part) for part in value]
    return value if not isinstance(value, float) or math.isfinite(value) else str(value)
