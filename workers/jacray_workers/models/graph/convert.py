"""From torch.export's program to the nodes, state and output of a graph file."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from jacray_workers.errors import ModelError, Plain
from jacray_workers.models.graph.batch import FRAMES, Draft, writes
from jacray_workers.models.graph.operators import find, is_allowed
from jacray_workers.models.graph.values import Ref, State, encode

_INNER = "inner."
_WHOLE = {
    operator.add: "int.add", operator.sub: "int.sub", operator.mul: "int.mul", operator.floordiv: "int.floordiv",
    operator.mod: "int.mod", operator.neg: "int.neg", torch.sym_max: "int.max", torch.sym_min: "int.min",
}  # fmt: skip
_CONSTANTS = "constants_"


@dataclass(frozen=True)
class Named:
    """A module's parameters and buffers: their tensors, and all names of each.

    Attributes:
        names: by the tensor's id.
        tensors: by the first name, in the module's own order.
        persistent: names of the buffers that a state dict holds.
        trains: names of the parameters that have `requires_grad`.
    """

    names: dict[int, list[str]]
    tensors: dict[str, Tensor]
    persistent: frozenset[str]
    trains: frozenset[str]

    @staticmethod
    def of(module: nn.Module) -> Named:
        """The state of this module."""
        everything = [
            *module.named_parameters(remove_duplicate=False),
            *module.named_buffers(remove_duplicate=False),
        ]
        names: dict[int, list[str]] = {}
        for name, tensor in everything:
            names.setdefault(id(tensor), []).append(name)
        tensors = {found[0]: tensor for _, tensor in everything if (found := names[id(tensor)])}
        trains = frozenset(name for name, p in module.named_parameters(remove_duplicate=False) if p.requires_grad)
        return Named(names, tensors, frozenset(module.state_dict(keep_vars=True)), trains)

    def first(self, name: str) -> str:
        """The name under which a tensor is stored."""
        return next(names[0] for names in self.names.values() if name in names)


class Converter:
    """Drafts the nodes of one program of torch.export, keeps what matters, and numbers it.

    Attributes:
        draft: the parts of a graph file.
    """

    def __init__(self, program: Any, inputs: int, tree: Any, named: Named) -> None:
        self.program, self.named, self.inputs = program, named, inputs
        self._tensors = dict(named.tensors)
        self._state = [self._entry(name, tensor) for name, tensor in named.tensors.items()]
        self._constants: dict[str, str] = {}
        self._drafts: list[tuple[str, Any, Any]] = []
        returned = self._graph(program.graph_module, self._placeholders())
        kept = self._needed(returned)
        self._numbers = {old: inputs + new for new, old in enumerate(kept)} | {i: i for i in range(inputs)}
        nodes = [self._final(self._drafts[old - inputs]) for old in kept]
        self.draft = Draft(nodes, self._state, self._tensors, self._placed(tree, returned))

    def _entry(self, name: str, tensor: Tensor, names: Sequence[str] = ()) -> dict[str, Any]:
        parameter = isinstance(tensor, nn.Parameter)
        return {
            "names": list(names or self.named.names[id(tensor)]),
            "kind": "parameter" if parameter else "buffer",
            "persistent": parameter or name in self.named.persistent,
            "trains": not parameter or name in self.named.trains,
            "pairs": tensor.is_complex(),
        }

    def _placeholders(self) -> dict[Any, Any]:
        """What each placeholder of the program stands for."""
        from torch.export.graph_signature import InputKind

        found: dict[Any, Any] = {}
        place = 0
        nodes = [node for node in self.program.graph.nodes if node.op == "placeholder"]
        for node, spec in zip(nodes, self.program.graph_signature.input_specs, strict=True):
            if spec.kind == InputKind.USER_INPUT:
                found[node] = Ref(place)
                place += 1
            elif spec.kind in (InputKind.PARAMETER, InputKind.BUFFER):
                found[node] = State(self.named.first(spec.target.removeprefix(_INNER)))
            elif spec.kind == InputKind.CONSTANT_TENSOR:
                found[node] = State(self._constant(spec.target))
            else:
                raise _refused(f"uses an object that is no tensor ({spec.kind.name.lower()})")
        return found

    def _constant(self, target: str) -> str:
        """A tensor that the module holds as a plain attribute or makes from numbers, kept as a buffer."""
        if target not in self._constants:
            name = f"{_CONSTANTS}{len(self._constants)}"
            tensor = self.program.constants[target]
            if not isinstance(tensor, Tensor):
                raise _refused(f"uses a constant that is no tensor ({type(tensor).__name__})")
            if name in self._tensors:
                raise _refused(f"has a parameter with the name {name}, which graph files use")
            tensor = tensor.detach()
            self._constants[target] = name
            self._tensors[name] = tensor
            self._state.append(self._entry(name, tensor, [name]) | {"persistent": False})
        return self._constants[target]

    def _graph(self, module: Any, values: dict[Any, Any]) -> list[Any]:
        """Draft the nodes of a graph, and of the graphs inside it; gives what it returns."""
        for node in module.graph.nodes:
            if node.op == "output":
                return [self._value(part, values) for part in node.args[0]]
            if node.op == "call_function":
                values[node] = self._call(node, values)
            elif node.op == "get_attr":
                values[node] = getattr(module, node.target)
        raise _refused("has a graph without an output")

    def _call(self, node: Any, values: dict[Any, Any]) -> Any:
        target = node.target
        args = [self._value(a, values) for a in node.args]
        kwargs = {k: self._value(v, values) for k, v in node.kwargs.items()}
        if isinstance(target, torch._ops.HigherOrderOperator):
            return self._inner_graph(target, args)
        if target is operator.getitem:
            return args[0][args[1]] if isinstance(args[0], list) else self._draft("item", args, {})
        if target in _WHOLE:
            return self._draft(_WHOLE[target], args, {})
        if not isinstance(target, torch._ops.OpOverload):
            # Comparisons and the like of sizes: they feed assertions only, or nothing that a file could hold.
            return self._draft(f"python.{getattr(target, '__name__', target)}", args, {})
        name = str(target)
        if name == "jacray.mark.default":
            what, _, inner = args[1].partition(" ")
            return self._draft(what, inner, args[0])
        if name == "aten.sym_size.int":
            return self._draft("size", args, {})
        return self._draft(name, args, kwargs)

    def _inner_graph(self, target: Any, args: list[Any]) -> list[Any]:
        """Code that ran without gradients or outside of autocast, drafted in its place."""
        name = target.name() if callable(getattr(target, "name", None)) else str(target)
        if name == "wrap_with_set_grad_enabled":
            found = self._graph(args[1], self._given(args[1], args[2:]))
            return found if args[0] else [self._draft("aten.detach.default", [v], {}) for v in found]
        if name == "wrap_with_autocast" and args[2] is False:
            return self._graph(args[4], self._given(args[4], args[5:]))
        raise _refused(f"uses {name}, which graph files do not hold")

    @staticmethod
    def _given(module: Any, args: list[Any]) -> dict[Any, Any]:
        return dict(zip([n for n in module.graph.nodes if n.op == "placeholder"], args, strict=True))

    def _value(self, value: Any, values: dict[Any, Any]) -> Any:
        if isinstance(value, torch.fx.Node):
            return values[value]
        if isinstance(value, list | tuple):
            return [self._value(part, values) for part in value]
        if isinstance(value, slice):
            raise _refused("passes a slice to an operator")
        return value

    def _draft(self, name: str, args: Any, kwargs: Any) -> Ref:
        self._drafts.append((name, args, kwargs))
        return Ref(self.inputs + len(self._drafts) - 1)

    def _needed(self, returned: list[Any]) -> list[int]:
        """The numbers of the drafts that matter: what is returned, written in place or framed, and what these read."""
        wanted = {ref.index for ref in _refs(returned)}
        kept: list[int] = []
        for old in range(self.inputs + len(self._drafts) - 1, self.inputs - 1, -1):
            name, args, kwargs = self._drafts[old - self.inputs]
            frames = name in ("enter", "leave")
            if old in wanted or frames or (not name.startswith("aten._assert") and writes(name)):
                kept.append(old)
                wanted |= {ref.index for ref in _refs(kwargs if frames else [args, kwargs])}
        return self._matched(kept[::-1])

    def _matched(self, kept: list[int]) -> list[int]:
        """Frames in pairs: a module that gave no tensor is not framed, one that took none has an output only."""
        stack: list[int] = []
        for old in kept:
            name, module, _ = self._drafts[old - self.inputs]
            if name == "enter":
                stack.append(old)
            elif name == "leave":
                while any(self._drafts[o - self.inputs][1] == module for o in stack):
                    if self._drafts[stack[-1] - self.inputs][1] == module:
                        stack.pop()
                        break
                    self._unframe(stack.pop())
                else:
                    self._drafts[old - self.inputs] = ("output", module, self._drafts[old - self.inputs][2])
        for old in stack:
            self._unframe(old)
        return kept

    def _unframe(self, old: int) -> None:
        self._drafts[old - self.inputs] = ("aten.alias.default", [self._drafts[old - self.inputs][2]], {})

    def _final(self, draft: tuple[str, Any, Any]) -> list[Any]:
        name, args, kwargs = draft
        if name in FRAMES:
            return [name, args, encode(self._moved(kwargs))]
        if not (name.startswith("aten.") and is_allowed(name.split(".")[1])) and not name.startswith(
            ("int.", "size", "item")
        ):
            raise _refused(f"calls {name}, which graph files do not hold")
        find(name)
        return [name, encode(self._moved(args)), {k: encode(self._moved(v)) for k, v in kwargs.items()}]

    def _moved(self, value: Any) -> Any:
        """The same with values under their final numbers."""
        if isinstance(value, Ref):
            return Ref(self._numbers[value.index])
        return [self._moved(part) for part in value] if isinstance(value, list) else value

    def _placed(self, tree: Any, returned: list[Any]) -> Any:
        if isinstance(tree, dict):
            ((tag, inner),) = tree.items()
            pairs = [[k, self._placed(v, returned)] for k, v in inner] if tag == "dict" else None
            return {tag: pairs if pairs is not None else [self._placed(part, returned) for part in inner]}
        return encode(self._moved(returned[tree.index]) if isinstance(tree, Ref) else tree)


def _refs(value: Any) -> list[Ref]:
    if isinstance(value, Ref):
        return [value]
    if isinstance(value, dict):
        return [ref for part in value.values() for ref in _refs(part)]
    return [ref for part in value for ref in _refs(part)] if isinstance(value, list) else []


def _refused(what: str) -> ModelError:
    way_out = "describe it as a model spec (import, layers), or keep to your own process or Ray, which take any module"
    return ModelError("model", f"{what}", Plain("a module for a graph file"), way_out)
