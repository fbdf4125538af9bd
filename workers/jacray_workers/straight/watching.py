"""Read a plain feed-forward net off the calls that a model makes: the same nets as a user's own class.

What a `forward` of somebody's own does can only be told by running it. It is run once on the batch, which the forward
pass costs anyway, and every call of torch is looked at: each must be a Linear with the model's own weights or a
function of one number, taking what the call before it gave and nothing else of the batch. A way that shows itself in
full is known to the last bit, for this batch and this call; of anything else nothing is said, and nothing is kept.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812  # the field's name for it
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from jacray_workers.straight.curves import CURVES, Curve
from jacray_workers.straight.reading import DTYPES, Bent, Line, changed
from jacray_workers.straight.running import Diagonal, Passage

Kwargs = Mapping[str, Any]
_NUMBERS = (bool, int, float, str)
_saved_hooks: Callable[[bool], Any] = torch._C._autograd._top_saved_tensors_default_hooks


class Settings(NamedTuple):
    """A function of torch that is a function of one number.

    Attributes:
        curve: the function.
        names: of its arguments behind the first.
        defaults: their values where they are not given.
        inplace: it writes to its argument.
    """

    curve: Curve
    names: tuple[str, ...] = ()
    defaults: tuple[Any, ...] = ()
    inplace: bool = False


def _functions() -> dict[Any, Settings]:
    """Every such function under each of its names."""
    relu, tanh, sigmoid = (Settings(CURVES[kind]) for kind in (nn.ReLU, nn.Tanh, nn.Sigmoid))
    over = ("inplace",), (False,)
    found: dict[Any, Settings] = {
        F.relu: Settings(CURVES[nn.ReLU], *over),
        F.gelu: Settings(CURVES[nn.GELU], ("approximate",), ("none",)),
        F.silu: Settings(CURVES[nn.SiLU], *over),
        F.elu: Settings(CURVES[nn.ELU], ("alpha", "inplace"), (1.0, False)),
        F.selu: Settings(CURVES[nn.SELU], *over),
        F.celu: Settings(CURVES[nn.CELU], ("alpha", "inplace"), (1.0, False)),
        F.softplus: Settings(CURVES[nn.Softplus], ("beta", "threshold"), (1.0, 20.0)),
        F.mish: Settings(CURVES[nn.Mish], *over),
        F.leaky_relu: Settings(CURVES[nn.LeakyReLU], ("negative_slope", "inplace"), (0.01, False)),
        F.logsigmoid: Settings(CURVES[nn.LogSigmoid]),
        F.softsign: Settings(CURVES[nn.Softsign]),
        F.tanhshrink: Settings(CURVES[nn.Tanhshrink]),
    }
    several: list[tuple[tuple[Any, ...], Settings]] = [
        ((torch.relu, Tensor.relu), relu),
        ((torch.tanh, Tensor.tanh, F.tanh), tanh),
        ((torch.sigmoid, Tensor.sigmoid, F.sigmoid), sigmoid),
        ((torch.relu_, Tensor.relu_), relu._replace(inplace=True)),
    ]
    return found | {function: known for functions, known in several for function in functions}


_FUNCTIONS = _functions()
_LINEAR = F.linear
_NONE = SimpleNamespace()
_KINDS = (nn.Parameter, Tensor)
_FLATTENS = frozenset((torch.flatten, Tensor.flatten, torch.reshape, Tensor.reshape, Tensor.view))
# What tells of a tensor all but its numbers.
_LOOKS = frozenset(
    (
        Tensor.size, Tensor.dim, Tensor.numel, Tensor.__len__, Tensor.shape.__get__,  # type: ignore[attr-defined]
        Tensor.ndim.__get__, Tensor.dtype.__get__, Tensor.device.__get__,  # type: ignore[attr-defined]
    )
)  # fmt: skip


class Watched(NamedTuple):
    """A net as one run of a model showed it, and what the run made of the batch."""

    line: Line
    passage: Passage


def watch(run: Callable[[Tensor], Any], x: Tensor, own: Mapping[int, str]) -> Watched | None:
    """The net that a model is for this batch; None where its calls are others.

    Args:
        run: the model, which is left as it was by whoever calls this; it is handed a tensor that shares the memory of
            `x`, and may be stopped nowhere: what it raises comes through.
        x: `(B, *in)`.
        own: the names of the tensors that stand for its parameters, by `id`.
    """
    if changed() or x.dim() < 2 or x.shape[0] == 0 or x.dtype not in DTYPES or x.layout is not torch.strided:
        return None
    start = x.detach().requires_grad_()
    seen = _Calls(start, own)
    with torch.enable_grad(), seen:
        y = run(start)
    return seen.found(y)


class _Calls(TorchFunctionMode):
    """Follows one batch through a model's calls for as long as these are a plain net's.

    Gradients are recorded: within a custom autograd function, whose backward may be anything, and where a model
    switches them off, results require none, and the net is no plain one.
    """

    def __init__(self, x: Tensor, own: Mapping[int, str]) -> None:
        super().__init__()
        self.own, self.samples, self.dtype, self.device = own, x.shape[0], x.dtype, x.device
        # Where the batch is, and how often that tensor was written to: an operator that no mode sees may write.
        self.at, self.version = x, x._version
        self.straight = True
        self.flat = False
        self.weights: list[Tensor] = []
        self.biases: list[Tensor | None] = []
        self.names: list[tuple[str, str]] = []
        self.acts: list[Tensor] = []
        self.gaps: list[list[tuple[Bent, Tensor, Tensor]]] = [[]]

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **kwargs) if kwargs else func(*args)
        if self.straight:
            # What hooks make of the tensors that a backward pass needs, as a checkpoint's do, nobody can tell.
            self.straight = _saved_hooks(False) is None and self._takes(func, args, kwargs or {}, out)
        return out

    def found(self, y: Any) -> Watched | None:
        """What was seen, where the model's result `y` is where the batch has come to."""
        if not self.straight or y is not self.at or y._version != self.version or not self.weights:
            return None
        gaps = [[bent for bent, _, _ in gap] for gap in self.gaps]
        line = Line.of(self.weights, self.biases, gaps, self.flat, self.names)
        with torch.no_grad():
            diagonals = [_bent(gap) for gap in self.gaps]
        return Watched(line, Passage(self.acts, diagonals))

    def _takes(self, func: Any, args: tuple[Any, ...], kwargs: Kwargs, out: Any) -> bool:
        """Whether a call goes on with the net."""
        if func in _LOOKS:
            return True
        h = args[0] if args else kwargs.get("input")
        if h is not self.at:
            return False
        known = _FUNCTIONS.get(func)
        if known is not None:
            taken = self._bends(known, h, args, kwargs, out)
        elif h._version != self.version:
            return False
        elif func is _LINEAR:
            weight, bias = (*args[1:], None)[:2] if len(args) > 1 else (kwargs.get("weight"), None)
            taken = self._multiplies(h, weight, kwargs.get("bias") if bias is None else bias)
        elif func in _FLATTENS:
            self.flat = self.flat or not self.weights
            taken = True
        else:
            taken = func is F.dropout and kwargs.get("training", args[2] if len(args) > 2 else True) is False
        return taken and self._stands(out)

    def _stands(self, out: Any) -> bool:
        """Go on from a call's result, `(B, width)`."""
        if type(out) is not Tensor or not out.requires_grad or out.dtype is not self.dtype:
            return False
        self.at, self.version, shape = out, out._version, out.shape
        return len(shape) == 2 and shape[0] == self.samples

    def _multiplies(self, h: Tensor, weight: Any, bias: Any) -> bool:
        # The call would have failed where types, devices or widths do not fit.
        name, beside = self.own.get(id(weight)), "" if bias is None else self.own.get(id(bias))
        if name is None or beside is None or h.dim() != 2 or not _plain(weight) or weight.dim() != 2:
            return False
        self.weights.append(weight)
        self.biases.append(bias)
        self.names.append((name, beside))
        self.acts.append(h)
        self.gaps.append([])
        return True

    def _bends(self, known: Settings, h: Tensor, args: tuple[Any, ...], kwargs: Kwargs, out: Tensor) -> bool:
        settings = _settings(known, args, kwargs) if known.names or kwargs or len(args) > 1 else _NONE
        if settings is None or h.dim() != 2:
            return False
        inplace = known.inplace or getattr(settings, "inplace", False) is not False
        # What was there before is gone: a gate needs no more than what it gave, but others may have given that.
        if h._version != self.version + inplace or (inplace and (not known.curve.gate or self.gaps[-1] != [])):
            return False
        self.gaps[-1].append((Bent(known.curve, settings), h, out))
        return True


def _settings(known: Settings, args: tuple[Any, ...], kwargs: Kwargs) -> SimpleNamespace | None:
    """The arguments behind the first, by name; None where they are others than are known."""
    given = dict(zip(known.names, known.defaults, strict=True))
    given |= zip(known.names, args[1:], strict=False)
    given |= {name: value for name, value in kwargs.items() if name != "input"}
    if len(args) > 1 + len(known.names) or len(given) != len(known.names):
        return None
    return SimpleNamespace(**given) if all(type(value) in _NUMBERS for value in given.values()) else None


def _plain(tensor: Any) -> bool:
    return type(tensor) in _KINDS and tensor.layout is torch.strided


def _bent(gap: list[tuple[Bent, Tensor, Tensor]]) -> Diagonal | None:
    """The derivatives at a width, from the argument and the values of each function there."""
    found: Diagonal | None = None
    for (curve, part), h, y in gap:
        made = Diagonal(curve.slope(part, h, y), curve.gate)
        found = made if found is None else made.after(found)
    return found
