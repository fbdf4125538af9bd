"""Where a tape can be cut: the single tensors that everything passes through, their widths, and what lies between."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import flop_registry

from jacray_workers.chain.bracket import Chain, merge, useful
from jacray_workers.chain.sink import Slot, arguments
from jacray_workers.chain.tape import Node, Tape
from jacray_workers.planning.watching import Watcher

# Operations that one number costs a call that does no matrix product: memory traffic, in units of a product's speed.
ELEMENT = 32.0
# The same for writing one number of a Jacobian.
WRITE = 16.0
# The same for setting vectors going through a segment, spread over a batch of usual size. The actual size does not
# matter, so that one model is bracketed the same way in every chunk.
LAUNCH = 5e7
BATCH = 32
# More inner cuts than this make the dynamic programme slow and nothing cheaper.
MOST_CUTS = 40
# Calls that only rename the axes or keep the order of the numbers as it is.
KEEPS_ORDER = frozenset(
    {"reshape", "view", "flatten", "unflatten", "squeeze", "unsqueeze", "contiguous", "view_as", "reshape_as"}
)
_FREE = KEEPS_ORDER | {"transpose", "permute", "__getitem__", "select", "T", "mT", "swapaxes", "movedim", "expand"}
_GATES = {"lstm": 4, "gru": 3, "rnn_tanh": 1, "rnn_relu": 1}


@dataclass(frozen=True)
class Layout:
    """Where the samples stand in a tensor: it is a `(outer, samples, inner)` once reshaped.

    Attributes:
        shape: of the tensor for the whole batch.
        outer, samples, inner: their product is the number of elements.
    """

    shape: tuple[int, ...]
    outer: int
    samples: int
    inner: int

    @property
    def width(self) -> int:
        """How many numbers one sample has."""
        return self.outer * self.inner

    def gather(self, vectors: Tensor) -> Tensor:
        """`(K, *shape)` as `(K, samples, width)`."""
        parts = vectors.reshape(-1, self.outer, self.samples, self.inner)
        return parts.transpose(1, 2).reshape(-1, self.samples, self.width)

    def spread(self, vectors: Tensor) -> Tensor:
        """`(K, samples, width)` as `(K, *shape)`."""
        parts = vectors.reshape(-1, self.samples, self.outer, self.inner)
        return parts.transpose(1, 2).reshape(-1, *self.shape)


def layouts(shape: tuple[int, ...], samples: int) -> list[Layout]:
    """Every way the samples may stand along one axis of the tensor, slow or fast within it."""
    found = []
    for axis, size in enumerate(shape):
        if size % samples or not math.prod(shape):
            continue
        before, after = math.prod(shape[:axis]), math.prod(shape[axis + 1 :])
        found.append(Layout(shape, before, samples, size // samples * after))
        found.append(Layout(shape, before * (size // samples), samples, after))
    return list(dict.fromkeys(found))


@dataclass(frozen=True)
class Cut:
    """A place where the tape can be cut.

    Attributes:
        value: the single value that passes; -1 for the leaves together.
        after: how many nodes lie before the cut.
        name: what made it, for people.
        layouts: where the samples stand; one per leaf for the leaves, else a single one.
    """

    value: int
    after: int
    name: str
    layouts: tuple[Layout, ...]

    @property
    def width(self) -> int:
        """How many numbers pass per sample."""
        return sum(layout.width for layout in self.layouts)


@dataclass(frozen=True)
class Weight:
    """A matrix on the tape that is an element's Jacobian as it stands.

    Attributes:
        value: where it is.
        transposed: it stands as `(in, out)`.
    """

    value: int
    transposed: bool


@dataclass(frozen=True)
class Cuttings:
    """A tape cut into a chain.

    Attributes:
        tape: the tape.
        cuts: the leaves, the useful inner cuts, the output.
        nodes: per element, the calls that a derivative passes through.
        weights: per element, its Jacobian where it is at hand.
        chain: the numbers of all this.
        widest: per element, the most numbers per sample that a call in it makes.
        activations: numbers per sample that the whole tape makes on the way of derivatives.
        itemsize: bytes of one number.
    """

    tape: Tape
    cuts: tuple[Cut, ...]
    nodes: tuple[tuple[Node, ...], ...]
    weights: tuple[Weight | None, ...]
    chain: Chain
    widest: tuple[int, ...]
    activations: int
    itemsize: int

    def between(self, start: int, stop: int) -> tuple[Node, ...]:
        """The calls between two cuts."""
        return tuple(itertools.chain.from_iterable(self.nodes[start:stop]))


def bottlenecks(tape: Tape) -> list[int]:
    """The nodes after which a single value carries all that derivatives pass through."""
    last: dict[int, int] = {tape.output: len(tape.nodes)}
    for at, node in enumerate(tape.nodes):
        last.update((value, at) for value in node.needs if value != tape.output)
    live = set(tape.leaves) & set(last)
    found = []
    for at, node in enumerate(tape.nodes):
        live.update(value for value in node.makes if value in tape.dep and value in last)
        live = {value for value in live if last[value] > at}
        if len(live) == 1 and live <= set(node.makes):
            found.append(at)
    return found


class _Flops(Watcher):
    """Counts the arithmetic of operators that torch has a formula for: matrix products, convolutions, attention."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0.0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call and count."""
        result = func(*args, **(kwargs or {}))
        formula = flop_registry.get(func._overloadpacket)
        if formula is not None:
            self.total += formula(*args, **(kwargs or {}), out_val=result)
        return result


def operations(tape: Tape, env: list[Any], samples: int) -> list[float]:
    """Operations per sample of each node: its matrix products, and its traffic. Fills `env` on the way."""
    found = []
    with torch.no_grad(), _Flops() as flops:
        for node in tape.nodes:
            before = flops.total
            node.run(env)
            counted = flops.total - before
            made = sum(env[value].numel() for value in node.makes if value in tape.dep)
            traffic = 0.0 if node.name in _FREE else ELEMENT * made
            found.append(((counted or _by_weights(node, env, made)) + traffic) / samples)
    return found


def _by_weights(node: Node, env: Sequence[Any], made: int) -> float:
    """Operations of a recurrent layer, which comes as one call whose kernel has no formula."""
    gates = _GATES.get(node.name)
    matrices = [env[value] for value in node.needs if isinstance(env[value], Tensor) and env[value].dim() == 2]
    if gates is None or not matrices:
        return 0.0
    hidden = max(matrix.shape[0] for matrix in matrices) / gates
    return float(2 * sum(matrix.numel() for matrix in matrices) * made / hidden)


def cuttings(
    tape: Tape, env: Sequence[Tensor], ends: Cut, inner: dict[int, Layout], costs: Sequence[float]
) -> Cuttings:
    """Cut the tape.

    Args:
        tape: the tape.
        env: its values, all kept.
        ends: the cut at the leaves.
        inner: where the samples stand in each value that may be cut at; the output among them.
        costs: operations per sample of each node.
    """
    every = [ends, *_named(tape, inner)]
    every = _without_renamings(tape, every)
    spans = list(itertools.pairwise(every))
    nodes = [tuple(n for n in tape.nodes[a.after : b.after] if n.dep) for a, b in spans]
    weights = [_weight(part, tape, env, a, b) for part, (a, b) in zip(nodes, spans, strict=True)]
    passing = [cost if node.dep else 0.0 for cost, node in zip(costs, tape.nodes, strict=True)]
    chain = Chain(
        widths=tuple(cut.width for cut in every),
        costs=tuple(sum(passing[a.after : b.after]) for a, b in spans),
        known=tuple(weight is not None for weight in weights),
        forward=(True,) * len(spans),
        write=WRITE,
        launch=LAUNCH / BATCH,
    )
    kept = useful(chain, MOST_CUTS)
    joined = [tuple(itertools.chain.from_iterable(nodes[a:b])) for a, b in itertools.pairwise(kept)]
    at_hand = [weights[a] if b == a + 1 else None for a, b in itertools.pairwise(kept)]
    samples = ends.layouts[0].samples
    sizes = [[env[v].numel() // samples for node in part for v in node.makes if v in tape.dep] for part in joined]
    return Cuttings(
        tape,
        tuple(every[k] for k in kept),
        tuple(joined),
        tuple(at_hand),
        merge(chain, kept),
        tuple(max(part, default=0) for part in sizes),
        sum(sum(part) for part in sizes),
        env[tape.output].dtype.itemsize,
    )


def _named(tape: Tape, inner: dict[int, Layout]) -> list[Cut]:
    """The inner cuts in order, named after the call that makes them and its number among calls of that name."""
    seen: Counter[str] = Counter()
    found = []
    places = set(bottlenecks(tape))
    for at, node in enumerate(tape.nodes):
        seen[node.name] += node.dep
        value = next((v for v in node.makes if v in inner), None)
        if at in places and value is not None:
            name = "the output" if value == tape.output else f"{node.name} {seen[node.name]}"
            found.append(Cut(value, at + 1, name, (inner[value],)))
    return found


def _without_renamings(tape: Tape, cuts: list[Cut]) -> list[Cut]:
    """Of two cuts with nothing but reshapes between them only one: an end where one is an end, else the later."""
    kept = [cuts[0]]
    for cut in cuts[1:]:
        between = [node for node in tape.nodes[kept[-1].after : cut.after] if node.dep]
        if len(cut.layouts) != len(kept[-1].layouts) or not all(node.name in KEEPS_ORDER for node in between):
            kept.append(cut)
        elif len(kept) > 1:
            kept[-1] = cut
        elif cut.value == tape.output:
            kept.append(cut)
    return kept


def _weight(nodes: Sequence[Node], tape: Tape, env: Sequence[Tensor], start: Cut, stop: Cut) -> Weight | None:
    """The element's Jacobian, where it is one matrix product with a weight and renamings around it."""
    products = [node for node in nodes if not _is_identity(node, tape, env)]
    if len(products) != 1 or len(start.layouts) != 1 or (start.layouts[0].outer, stop.layouts[0].outer) != (1, 1):
        return None
    weight = _factor(products[0], tape)
    if weight is None or env[weight.value].dim() != 2:
        return None
    rows, columns = env[weight.value].shape if not weight.transposed else env[weight.value].shape[::-1]
    return weight if (rows, columns) == (stop.width, start.width) else None


def _is_identity(node: Node, tape: Tape, env: Sequence[Tensor]) -> bool:
    """Whether the call's Jacobian is the identity in the order of the numbers: a renaming, or a constant added."""
    if node.name in KEEPS_ORDER:
        return True
    if node.name not in ("add", "__add__", "sub", "__sub__") or node.keys or node.writes >= 0:
        return False
    sources = [value for value in node.needs if value in tape.dep]
    made = node.makes[0]
    return len(sources) == 1 and node.slots[0][1] == sources[0] and env[made].shape == env[sources[0]].shape


def _factor(node: Node, tape: Tape) -> Weight | None:
    """The weight that a call multiplies by."""
    args, kwargs = arguments(node)
    places = {"linear": (0, 1), "matmul": (0, 1), "__matmul__": (0, 1), "mm": (0, 1), "addmm": (1, 2)}.get(node.name)
    if places is None or len(args) <= places[1] or any(key != "bias" for key in kwargs):
        return None
    source, weight = (args[at] for at in places)
    if not isinstance(source, Slot) or not isinstance(weight, Slot):
        return None
    dep = [value for value in node.needs if value in tape.dep]
    return Weight(weight.value, node.name != "linear") if dep == [source.value] else None
