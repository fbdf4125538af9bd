"""Record the torch calls that a model makes, as a tape.

Where Python looked at the numbers of what is differentiated, or where a tensor appears that no recorded call made, the
tape would not hold for other inputs, so there is none: `Untraceable` says why. Numbers of a mask may be looked at: the
tape then holds for that mask.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from jacray_workers.chain.tape import Node, Tape, trim
from jacray_workers.problem.problem import Problem

# Methods that tell something about a tensor without looking at its numbers.
_METADATA = frozenset(
    {
        *("size", "dim", "ndimension", "numel", "nelement", "stride", "storage_offset", "element_size", "__len__"),
        *("is_contiguous", "is_floating_point", "is_complex", "is_signed", "is_same_size", "is_conj", "is_neg"),
        *("is_inference", "is_shared", "is_pinned", "is_set_to", "is_tensor", "has_names", "dim_order", "data_ptr"),
        *("get_device", "type", "result_type", "can_cast", "__hash__"),
    }
)
# Types of arguments that hold nothing else.
_LEAVES = frozenset({Tensor, torch.nn.Parameter, bool, int, float, str, slice, type(None), torch.dtype, torch.device})
# Calls that differentiate, or change what differentiation means: a tape would replay the value and lose the meaning.
_MEDDLING = frozenset(
    {"grad", "backward", "register_hook", "register_post_accumulate_grad_hook", "retain_grad", "__set__"}
)


class Untraceable(Exception):  # noqa: N818  # a finding about the model, which becomes a refusal
    """The model's calls do not make a tape that holds for other inputs."""


def record(problem: Problem, values: Sequence[Tensor], batch: Sequence[Tensor]) -> tuple[Tape, Tensor]:
    """Run the problem's forward once and record its calls.

    Returns:
        The tape, and what the problem's forward returned.

    Raises:
        Untraceable: the calls do not make a tape that holds for other inputs.
    """
    leaves = [value.detach().requires_grad_() for value in values]
    recorder = Recorder(leaves, batch)
    with recorder:
        output = problem.forward(leaves, batch)
    return recorder.tape(output), output.detach()


@dataclass(frozen=True)
class _Call:
    """A call as it is made: what `Node` keeps of it, and the tensors themselves."""

    func: Callable[..., Any]
    name: str
    leaves: list[Any]
    spec: pytree.TreeSpec | None
    keys: tuple[str, ...]

    @classmethod
    def of(cls, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> _Call:
        plain = [*args, *kwargs.values()]
        if _LEAVES.issuperset(map(type, plain)):
            return cls(func, call_name(func), plain, None, tuple(kwargs))
        leaves, spec = pytree.tree_flatten((args, kwargs))
        flat = len(plain) == len(leaves) and all(a is b for a, b in zip(plain, leaves, strict=True))
        return cls(func, call_name(func), leaves, None if flat else spec, tuple(kwargs) if flat else ())

    @property
    def asks_in_place(self) -> int:
        """The place among the leaves of a keyword `inplace=True`, or -1."""
        at = len(self.leaves) - len(self.keys) + self.keys.index("inplace") if "inplace" in self.keys else -1
        return at if at >= 0 and self.leaves[at] is True else -1


class Recorder(TorchFunctionMode):
    """Number every tensor that the calls take and make."""

    def __init__(self, leaves: Sequence[Tensor], batch: Sequence[Tensor]) -> None:
        super().__init__()
        self.nodes: list[Node] = []
        self.alive: list[Tensor] = []  # keeps every identity unique while recording
        self.value: dict[int, int] = {}
        self.state: dict[int, tuple[int, bool]] = {}
        self.dep: set[int] = set()
        self.moves: set[int] = set()
        self.pure: set[int] = set()
        self.reads = False
        self.constants: dict[int, Tensor] = {}
        self.leaves = tuple(self._name(leaf) for leaf in leaves)
        self.dep.update(self.leaves)
        self.moves.update(self.leaves)
        self.inputs = [(self._name(t), i) for i, t in enumerate(batch) if id(t) not in self.value]

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Make the call and record it."""
        del types
        call = _Call.of(func, args, kwargs or {})
        _refuse(call)
        slots = [(at, self._take(leaf, call.name)) for at, leaf in enumerate(call.leaves) if isinstance(leaf, Tensor)]
        result = func(*args, **(kwargs or {}))
        written = {id(call.leaves[at]): at for at, _ in slots if self._changed(call.leaves[at])}
        results = [result] if type(result) is Tensor else pytree.tree_leaves(result)
        made = [(at, t) for at, t in enumerate(results) if isinstance(t, Tensor)]
        if written:
            self._write(call, slots, written, made)
        elif made:
            if any(id(t) not in self.value for _, t in made):
                self._append(call, slots, made)
        elif not _tells_metadata(call):
            self._read(call.name, {value for _, value in slots})
        return result

    def tape(self, output: Tensor) -> Tape:
        """What was recorded, without the calls that the output does not need.

        Raises:
            Untraceable: no recorded call made the output, or nothing in it depends on the leaves.
        """
        made = self._take(output, "the output")
        if made not in self.dep:
            raise Untraceable("the outputs do not depend on what is differentiated")
        constants = {**self.constants, **self._fold()}
        nodes = [node for node in self.nodes if not self.pure.issuperset(node.makes)]
        return trim(
            Tape(
                nodes=tuple(nodes),
                leaves=self.leaves,
                inputs=tuple(self.inputs),
                constants=tuple(constants.items()),
                output=made,
                count=len(self.alive),
                dep=frozenset(self.dep),
                reads=self.reads,
            )
        )

    def _read(self, name: str, values: set[int]) -> None:
        """Python looks at the numbers of these: of masks and constants it may, as every batch is recorded anew.

        Raises:
            Untraceable: they change with what is differentiated.
        """
        if not self.moves.isdisjoint(values):
            raise Untraceable(f"Python looks at the numbers of a tensor ({name})")
        self.reads = self.reads or not self.pure.issuperset(values)

    def _name(self, tensor: Tensor) -> int:
        """A new number for a tensor that is new, or was overwritten."""
        self.alive.append(tensor)
        number = len(self.alive) - 1
        self.value[id(tensor)] = number
        self.state[id(tensor)] = tensor._version, tensor.requires_grad
        return number

    def _changed(self, tensor: Tensor) -> bool:
        return bool(tensor._version != self.state[id(tensor)][0])

    def _take(self, tensor: Tensor, name: str) -> int:
        """The number of a tensor that a call takes; one never seen before comes from outside and is a constant."""
        if id(tensor) not in self.value:
            if torch._C._functorch.is_functorch_wrapped_tensor(tensor) or tensor.grad_fn is not None:
                raise Untraceable(f"{name} takes a tensor that no torch call visible from Python made")
            if type(tensor) not in (Tensor, torch.nn.Parameter, torch.nn.Buffer):
                raise Untraceable(f"{name} takes a {type(tensor).__name__}")
            number = self._name(tensor)
            self.constants[number] = tensor
            return number
        # Views share a version counter, so this also finds what was written through another view.
        if self.state[id(tensor)] != (tensor._version, tensor.requires_grad):
            raise Untraceable(
                f"{name} takes a tensor that was changed through a view of it, or by a custom autograd.Function"
            )
        return self.value[id(tensor)]

    def _append(
        self, call: _Call, slots: list[tuple[int, int]], made: list[tuple[int, Tensor]], writes: int = -1
    ) -> None:
        """Record a call whose results get new numbers; with `writes`, the tensor at that place gets one too."""
        needs = [value for _, value in slots]
        dep = any(value in self.dep for value in needs)
        outs = tuple((at, self._name(tensor)) for at, tensor in made)
        written = -1
        if writes >= 0:
            target = call.leaves[writes]
            written = next((value for value in (v for _, v in outs) if self.alive[value] is target), -1)
            written = self._name(target) if written < 0 else written
        new = {value for _, value in outs} | ({written} if writes >= 0 else set())
        self.dep.update(value for value in new if dep and self.alive[value].requires_grad)
        if self.pure.issuperset(needs):
            self.pure.update(new)
        if not self.moves.isdisjoint(needs):
            self.moves.update(new)
        self.nodes.append(
            Node(
                func=call.func,
                name=call.name,
                leaves=tuple(None if isinstance(leaf, Tensor) else leaf for leaf in call.leaves),
                slots=tuple(slots),
                spec=call.spec,
                keys=call.keys,
                outs=outs,
                writes=writes,
                written=written,
                dep=not self.dep.isdisjoint(new),
            )
        )

    def _write(
        self, call: _Call, slots: list[tuple[int, int]], written: dict[int, int], made: list[tuple[int, Tensor]]
    ) -> None:
        """Record a call that writes in place."""
        if len(written) > 1:
            raise Untraceable(f"{call.name} writes into several tensors at once")
        flag = call.asks_in_place
        if flag >= 0 and [id(tensor) for _, tensor in made] == list(written):
            # The functional form of relu(x, inplace=True) saves the copy.
            leaves = [*call.leaves[:flag], False, *call.leaves[flag + 1 :]]
            self._append(replace(call, leaves=leaves), slots, made)
            return
        self._append(call, slots, made, writes=next(iter(written.values())))

    def _fold(self) -> dict[int, Tensor]:
        """The values of the calls that depend on nothing from outside, run once for all replays."""
        env: dict[int, Any] = {}
        with torch.no_grad():
            for node in self.nodes:
                if self.pure.issuperset(node.makes):
                    node.run(env)
        return env


def call_name(func: Any) -> str:
    """The short name of what was called: of a property, the property's; of an operator overload, the operator's."""
    name = str(getattr(func, "__name__", type(func).__name__))
    if name == "__get__":
        return str(getattr(func.__self__, "__name__", name))
    return name.split(".", maxsplit=1)[0]


def _tells_metadata(call: _Call) -> bool:
    """Whether a call without a tensor as its result leaves the numbers alone; every such property does."""
    return call.name in _METADATA or getattr(call.func, "__name__", "") == "__get__"


def _refuse(call: _Call) -> None:
    """Refuse what a tape cannot hold.

    Raises:
        Untraceable: the call is of such a kind.
    """
    if call.name in _MEDDLING:
        raise Untraceable(f"the model differentiates, or sets hooks or attributes of tensors, by itself ({call.name})")
    if torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled("cuda"):
        raise Untraceable("the model switches autocast on")
    slices = [leaf for leaf in call.leaves if isinstance(leaf, slice)]
    if any(isinstance(part, Tensor) for leaf in slices for part in (leaf.start, leaf.stop, leaf.step)):
        raise Untraceable("a tensor bounds a slice")
