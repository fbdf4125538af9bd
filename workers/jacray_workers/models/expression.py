"""A small language for functions of tensors, such as `2*(a[0]**2 + a[1])`: no `eval`, no attributes, bounded.

The grammar is Python's, narrowed to an allow-list of nodes, operators and functions. A text is checked once, when
it is parsed; evaluation walks the checked tree.
"""

from __future__ import annotations

import ast
import inspect
import math
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from jacray_workers.errors import Plain, SpecError
from jacray_workers.validation import nearest

if TYPE_CHECKING:
    from torch import Tensor

MAX_LENGTH = 2_000
MAX_DEPTH = 60
MAX_NODES = 1_000
MAX_EXPONENT = 64
MAX_INTEGER = 10**15
MAX_SIZE = 2**24
"""The most numbers that any intermediate value of one sample may hold."""

_BINARY: dict[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: lambda a, b: a + b,
    ast.Sub: lambda a, b: a - b,
    ast.Mult: lambda a, b: a * b,
    ast.Div: lambda a, b: a / b,
    ast.Pow: lambda a, b: a**b,
    ast.MatMult: lambda a, b: a @ b,
}
_COMPARE: dict[type[ast.cmpop], Callable[[Any, Any], Any]] = {
    ast.Lt: lambda a, b: a < b,
    ast.LtE: lambda a, b: a <= b,
    ast.Gt: lambda a, b: a > b,
    ast.GtE: lambda a, b: a >= b,
    ast.Eq: lambda a, b: a == b,
    ast.NotEq: lambda a, b: a != b,
}
_CONSTANTS = {"pi": math.pi}
_FREE = (
    ast.Name, ast.Subscript, ast.Slice, ast.List, ast.Tuple,
    ast.expr_context, ast.operator, ast.unaryop, ast.cmpop, ast.keyword,
)  # fmt: skip
_WAY_OUT = "write something like 2*(a[0]**2 + a[1])"


@dataclass(frozen=True)
class Expression:
    """A checked expression.

    Attributes:
        text: as it was written.
        names: the names it reads, in the order of their first use.
    """

    text: str
    names: tuple[str, ...]
    tree: ast.expr = field(repr=False, compare=False)

    def __call__(self, values: Mapping[str, Any]) -> Any:
        """The value with these tensors for the names.

        Args:
            values: a tensor for each of `names`; at least one.

        Returns:
            A tensor, or a number where the expression reads no name.

        Raises:
            SpecError: an intermediate value would be too large.
        """
        return _Evaluator(values).value(self.tree)


def parse(text: str, argument: str = "expression") -> Expression:
    """Check a text and keep its tree.

    Raises:
        SpecError: naming the argument, what is not allowed, where it stands, and the nearest allowed name.
    """
    if len(text) > MAX_LENGTH:
        raise SpecError(argument, f"must have at most {MAX_LENGTH} characters", Plain(f"{len(text)} characters"))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", SyntaxWarning)
            tree = ast.parse(text.strip(), mode="eval").body
    except SyntaxError as error:
        where = f" (column {error.offset})" if error.offset else ""
        raise SpecError(argument, f"must be an expression, but {error.msg}{where}", text, _WAY_OUT) from None
    except (ValueError, RecursionError, MemoryError):
        raise SpecError(argument, "must be an expression", text, _WAY_OUT) from None
    _check_size(tree, text, argument)
    names: dict[str, None] = {}
    called: set[int] = set()
    for node in ast.walk(tree):
        _check(node, argument, text, called)
        if isinstance(node, ast.Name) and id(node) not in called and node.id not in _CONSTANTS:
            names[node.id] = None
    order = sorted(names, key=lambda name: _first_use(tree, name))
    return Expression(text, tuple(order), tree)


def _first_use(tree: ast.expr, name: str) -> tuple[int, int]:
    return min((n.lineno, n.col_offset) for n in ast.walk(tree) if isinstance(n, ast.Name) and n.id == name)


def _check_size(tree: ast.expr, text: str, argument: str) -> None:
    layer: list[ast.AST] = [tree]
    depth = nodes = 0
    while layer:
        depth, nodes = depth + 1, nodes + len(layer)
        if depth > MAX_DEPTH or nodes > MAX_NODES:
            raise SpecError(argument, f"must nest at most {MAX_DEPTH} deep with at most {MAX_NODES} parts", text)
        layer = [child for node in layer for child in ast.iter_child_nodes(node)]


def _check(node: ast.AST, argument: str, text: str, called: set[int]) -> None:
    """Refuse a node that is not in the grammar; a called function's name is noted in `called`."""

    def refuse(rule: str, way_out: str = "") -> SpecError:
        part = ast.get_source_segment(text.strip(), node) if isinstance(node, ast.expr) else None
        return SpecError(argument, rule, part or text, way_out)

    if isinstance(node, ast.Attribute):
        raise refuse("may not reach for attributes", f"known functions: {', '.join(functions())}")
    if isinstance(node, ast.Call):
        called.add(id(node.func))
    if type(node) in _CHECKS:
        _CHECKS[type(node)](node, refuse)
    elif not isinstance(node, _FREE):
        raise refuse(f"may not hold {type(node).__name__}", _WAY_OUT)


def _check_binary(node: ast.BinOp, refuse: Any) -> None:
    if type(node.op) not in _BINARY:
        raise refuse("may use only the operators + - * / ** @")
    inner = node.right.operand if isinstance(node.right, ast.UnaryOp) else node.right
    if isinstance(node.op, ast.Pow) and isinstance(inner, ast.Constant):
        _check_exponent(inner.value, refuse)


def _check_sign(node: ast.UnaryOp, refuse: Any) -> None:
    if not isinstance(node.op, ast.USub | ast.UAdd):
        raise refuse("may use only the signs + and -")


def _check_compare(node: ast.Compare, refuse: Any) -> None:
    if len(node.ops) != 1 or type(node.ops[0]) not in _COMPARE:
        raise refuse("may compare only two things with < <= > >= == !=")


def _check_constant(node: ast.Constant, refuse: Any) -> None:
    value = node.value
    if value is None or value is Ellipsis or isinstance(value, bool):
        return
    if not isinstance(value, int | float):
        raise refuse("may hold only real numbers and names")
    if isinstance(value, int) and abs(value) > MAX_INTEGER:
        raise refuse(f"may hold whole numbers up to {MAX_INTEGER:.0e} only")
    if not math.isfinite(value):
        raise refuse("may hold finite numbers only")


def _check_exponent(value: Any, refuse: Any) -> None:
    if isinstance(value, int | float) and abs(value) > MAX_EXPONENT:
        raise refuse(f"may raise to powers up to {MAX_EXPONENT} only")


def _check_call(node: ast.Call, refuse: Any) -> None:
    known = functions()
    if not isinstance(node.func, ast.Name):
        raise refuse("may call only functions by name", f"known functions: {', '.join(known)}")
    name = node.func.id
    if name not in known:
        raise refuse(f"calls {name}, which is not a known function", nearest(name, known))
    if any(isinstance(a, ast.Starred) for a in node.args) or any(k.arg is None for k in node.keywords):
        raise refuse("may not use * or ** in a call")
    try:
        inspect.signature(known[name]).bind(*node.args, **{str(k.arg): k.value for k in node.keywords})
    except TypeError as error:
        usage = f"{name}({', '.join(inspect.signature(known[name]).parameters)})"
        raise refuse(f"calls {name} with the wrong arguments: {error}", f"write {usage}") from None


_CHECKS: dict[type[ast.AST], Callable[[Any, Any], None]] = {
    ast.Constant: _check_constant,
    ast.BinOp: _check_binary,
    ast.UnaryOp: _check_sign,
    ast.Compare: _check_compare,
    ast.Call: _check_call,
}


def functions() -> Mapping[str, Any]:
    """The functions that an expression may call, by name."""
    from jacray_workers.models.functions import FUNCTIONS

    return FUNCTIONS


class _Evaluator:
    """Values of the nodes of one tree, for one set of tensors."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        self.values = values

    def value(self, node: ast.expr) -> Any:
        found = self._value(node)
        size = found.numel() if hasattr(found, "numel") else 1
        if size > MAX_SIZE:
            raise SpecError("expression", f"may hold at most {MAX_SIZE:,} numbers per sample at any point", size)
        if isinstance(found, int | float) and not isinstance(found, bool) and not abs(found) <= 1e300:
            raise SpecError("expression", "overflows", Plain(ast.unparse(node)))
        return found

    def _value(self, node: ast.expr) -> Any:
        match node:
            case ast.Constant():
                return node.value
            case ast.Name():
                return self.values[node.id] if node.id in self.values else _CONSTANTS[node.id]
            case ast.List() | ast.Tuple():
                return [self.value(part) for part in node.elts]
            case ast.UnaryOp():
                inner = self.value(node.operand)
                return -inner if isinstance(node.op, ast.USub) else +inner
            case ast.BinOp():
                return self._binary(node)
            case ast.Compare():
                return _COMPARE[type(node.ops[0])](self.value(node.left), self.value(node.comparators[0]))
            case ast.Subscript():
                return self.value(node.value)[self._index(node.slice)]
            case ast.Call():
                return self._call(node)
        raise SpecError("expression", "may not be written so", Plain(ast.unparse(node)))

    def _binary(self, node: ast.BinOp) -> Any:
        left, right = self.value(node.left), self.value(node.right)
        written = Plain(ast.unparse(node))
        if isinstance(left, list) or isinstance(right, list):
            raise SpecError("expression", "may not do arithmetic on lists", written, "use stack([...])")
        if not all(isinstance(v, int | float) for v in (left, right)):
            return _BINARY[type(node.op)](left, right)
        # Python's whole numbers grow without limit and its powers of floats raise; torch's do neither.
        if isinstance(node.op, ast.Pow):
            _check_exponent(right, lambda rule: SpecError("expression", rule, written))
        try:
            return _BINARY[type(node.op)](left, right)
        except (ArithmeticError, TypeError) as error:
            raise SpecError("expression", f"has no value: {error}", written) from None

    def _index(self, node: ast.expr) -> Any:
        if isinstance(node, ast.Tuple):
            return tuple(self._index(part) for part in node.elts)
        if isinstance(node, ast.Slice):
            return slice(*(None if part is None else self._index(part) for part in (node.lower, node.upper, node.step)))
        found = self.value(node)
        if found is None or found is Ellipsis or (isinstance(found, int) and not isinstance(found, bool)):
            return found
        raise SpecError("expression", "may index with whole numbers and slices only", Plain(ast.unparse(node)))

    def _call(self, node: ast.Call) -> Any:
        from jacray_workers.models.functions import call

        args = [self.value(part) for part in node.args]
        kwargs = {str(part.arg): self.value(part.value) for part in node.keywords}
        return call(ast.unparse(node.func), args, kwargs, self._like())

    def _like(self) -> Tensor:
        """A tensor whose precision and device numbers take on."""
        tensors = [v for v in self.values.values() if hasattr(v, "is_floating_point")]
        found: Tensor = next((t for t in tensors if t.is_floating_point()), tensors[0])
        return found
