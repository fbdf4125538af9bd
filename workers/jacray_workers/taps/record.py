"""One pass of a model with its taps, and the terms that cotangents make of them."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import Node, get_gradient_edge

from jacray_workers import rules
from jacray_workers.blocks.block import write_terms
from jacray_workers.blocks.join import join
from jacray_workers.blocks.terms import Dense, Outer, Term, View
from jacray_workers.errors import JacrayError
from jacray_workers.kernels.common import basis, unwritten
from jacray_workers.kernels.pullback import Point, Trust, nodes_from, pull
from jacray_workers.kernels.sweep import ordered
from jacray_workers.planning.memory import out_of_memory
from jacray_workers.problem.problem import Problem
from jacray_workers.rules.linear import LINEAR
from jacray_workers.taps.follow import Entry, Recorder, Source, Tap, Watch, enter, name_of, walk
from jacray_workers.taps.probe import sites, trust
from jacray_workers.taps.sites import OUT, Axis, defeat

LIMIT = 1 << 24
# Where the notes on pulling cotangents say that no call of the model is rewritten.
PLAIN = (-1,)
_VIEWS = ("View", "ReshapeAlias", "UnsafeView", "Alias", "Squeeze", "Unsqueeze")


@dataclass(frozen=True, eq=False)
class Tape:
    """A forward pass that cotangents can be pulled back through.

    Attributes:
        problem: what was run.
        size: the batch size.
        y: the outputs `(B, rows)`.
        entry: the leaves.
        taps: the calls that lie on the way back from `y`.
        tail: the last linear call, where `y` is nothing but its result; its cotangents are rows of the identity.
        trust: what earlier calls found out about pulling many cotangents at once.
    """

    problem: Problem
    size: int
    y: Tensor
    entry: Entry
    taps: list[Tap]
    tail: Tap | None
    trust: Trust

    @property
    def widest(self) -> int:
        """Bytes of the largest tensor that one cotangent of the whole batch becomes on its way back.

        Only what lies on the way to a tap or a leaf: the graph also leads to parameters, which no cotangent reaches.
        """
        start = self.y if self.tail is None else self.tail.args[0]
        if not start.requires_grad:
            return 0
        leaves = zip(self.problem.leaves, self.entry.leaves, strict=True)
        targets = {get_gradient_edge(t).node for leaf, t in leaves if leaf.side != "param"}
        targets |= {tap.target.edge.node for tap in self.taps if tap is not self.tail}
        metadata = (m for node in ordered(get_gradient_edge(start).node, targets) for m in node._input_metadata)
        return max((math.prod(m.shape) * m.dtype.itemsize for m in metadata), default=0)


@dataclass(frozen=True, eq=False)
class Pulled:
    """What one set of cotangents brought.

    Attributes:
        grads: for each leaf that has a value per sample `(n, B, *leaf)`; None for parameters.
        terms: for each parameter leaf its terms; empty for other leaves.
    """

    grads: list[Tensor | None]
    terms: list[list[Term]]


def record(problem: Problem, batch: Sequence[Tensor]) -> Tape:
    """Run the model on the batch.

    Raises:
        MethodError: a use of a parameter cannot be followed.
    """
    if not any(leaf.side == "param" for leaf in problem.leaves):
        return _record_data(problem, batch)
    with _Explained():
        entry, recorder, y = _run(problem, batch, copies=False)
        if any(t._version != v for tap in recorder.taps for t, v in tap.used):
            # The model overwrote what a tap needs: once more, with copies.
            entry, recorder, y = _run(problem, batch, copies=True)
    nodes = nodes_from(y.grad_fn)
    taps = [tap for tap in recorder.taps if tap.target.edge.node in nodes]
    _check_versions(taps)
    _check_nodes(problem, entry, nodes, recorder.started)
    _check_blind(problem, entry, recorder)
    # Copies stand outside the graph, so cotangents cannot start from them.
    tail = None if recorder.copies else _tail(y, taps)
    return Tape(problem, batch[0].shape[0], y, entry, taps, tail, trust(problem, batch))


def _record_data(problem: Problem, batch: Sequence[Tensor]) -> Tape:
    """Without parameters there is nothing to tap; a mode is needed only for calls that are rewritten."""
    known = trust(problem, batch)
    entry = enter(problem, batch)
    watch = None if known.get(PLAIN) else Watch({})
    with _Explained(), unwritten(entry.leaves), watch or contextlib.nullcontext():
        y = problem.forward(entry.values, entry.batch)
    if watch is not None:
        known[PLAIN] = "" if watch.rewrote else "plain"
    return Tape(problem, batch[0].shape[0], y, entry, [], None, known)


def _run(problem: Problem, batch: Sequence[Tensor], *, copies: bool) -> tuple[Entry, Recorder, Tensor]:
    entry = enter(problem, batch)
    recorder = Recorder(entry.known, sites(problem, batch), batch[0].shape[0], copies)
    with recorder:
        y = problem.forward(entry.values, entry.batch)
    return entry, recorder, y


class _Explained:
    """Turns what the model raises while it is watched into a `MethodError`; running out of memory stays itself."""

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, Exception) and not isinstance(error, JacrayError) and not out_of_memory(error):
            text = f"the model raised {type(error).__name__} while its calls were followed: {error}"
            raise defeat(text) from error


def _check_versions(taps: Sequence[Tap]) -> None:
    for tap in taps:
        for source in tap.sources.values():
            if source.tensor._version != source.version:
                raise defeat(f"what {name_of(tap.site.func)} used of a parameter was overwritten later")


def _check_nodes(problem: Problem, entry: Entry, nodes: set[Node], started: Sequence[Tensor]) -> None:
    """No parameter may be reached but through a tap, and no leaf that this pass did not make."""
    names = {id(t): leaf.name for leaf, t in zip(problem.leaves, entry.leaves, strict=True) if leaf.side == "param"}
    expected = {id(t) for t in (*entry.leaves, *started)}
    for node in nodes:
        if node.name() == "CheckpointFunctionBackward":
            raise defeat("a reentrant checkpoint hides its calls")
        leaf = getattr(node, "variable", None)
        if leaf is not None and id(leaf) in names:
            name = names[id(leaf)]
            raise defeat(f"parameter {name} is used where its calls cannot be seen, as in a custom autograd function")
        if leaf is not None and id(leaf) not in expected:
            raise defeat("the model uses a tensor that requires gradients and is none of its inputs and parameters")


def _check_blind(problem: Problem, entry: Entry, recorder: Recorder) -> None:
    """A parameter that is only ever used without gradients may be used by a reentrant checkpoint."""
    if not recorder.blind:
        return
    edges = [source.edge for tap in recorder.taps for source in tap.sources.values()]
    met = {id(getattr(node, "variable", None)) for edge in edges for node in nodes_from(edge.node)}
    for leaf, t in zip(problem.leaves, entry.leaves, strict=True):
        if leaf.side == "param" and id(t) not in met and any(t is b for b in recorder.blind):
            raise defeat(f"parameter {leaf.name} is used only where gradients are switched off")


def _tail(y: Tensor, taps: Sequence[Tap]) -> Tap | None:
    """The linear call whose result is `y` itself, up to a change of shape."""
    node, place = y.grad_fn, y.output_nr
    while node is not None:
        for tap in taps:
            edge = tap.target.edge
            if edge.node is node and edge.output_nr == place:
                return tap if _plain_linear(tap, y) else None
        if not node.name().startswith(_VIEWS) or len(node.next_functions) != 1:
            return None
        node, place = node.next_functions[0]
    return None


def _plain_linear(tap: Tap, y: Tensor) -> bool:
    """Whether a tap is `(B, I) -> (B, O)` by a weight of its own with the batch in front."""
    names, _ = rules.table().get(tap.site.func, ((), None))
    plain = names == LINEAR and len(tap.args) >= 2 and (0,) not in tap.sources and tap.target.window is None
    plain = plain and not any(t.requires_grad for path, t in walk(tap.args, tap.kwargs) if path != (0,))
    return plain and tap.shape == tuple(y.shape) and tap.site.axis(OUT) == Axis(0) and tap.site.axis((0,)) == Axis(0)


def pull_rows(tape: Tape, rows: range) -> Pulled:
    """The terms of some rows of the Jacobian."""
    y = tape.y
    if tape.tail is None:
        v = basis(rows, y.shape[1], y).unsqueeze(1).expand(-1, *y.shape)
        return _pulled(tape, y, v, tape.taps, _Terms(tape))
    found = _Terms(tape)
    for path, term in _tail_terms(tape.tail, rows).items():
        found.add(tape.tail.sources[path], term)
    # The last product's cotangents are rows of the identity, so what it passes on are rows of its weight.
    x, weight = tape.tail.args[0], tape.tail.args[1].detach()
    v = weight[rows.start : rows.stop].unsqueeze(1).expand(-1, *x.shape)
    return _pulled(tape, x, v, [tap for tap in tape.taps if tap is not tape.tail], found)


def _tail_terms(tap: Tap, rows: range) -> dict[Any, Term]:
    x, count = tap.args[0].detach().unsqueeze(1), len(rows)
    found: dict[Any, Term] = {}
    for path, source in tap.sources.items():
        own = tuple(source.tensor.shape)
        if len(own) == 2:
            found[path] = Outer(own, None, x, None, start=rows.start, count=count)
        else:
            # A bias is a weight of one input that is always 1.
            one, column = torch.ones_like(x[:, :, :1]), (*own, 1)
            found[path] = Outer(column, View(column, (1, 1), 0), one, None, start=rows.start, count=count)
    return found


def pull_cotangents(tape: Tape, cotangents: Tensor) -> Pulled:
    """The terms for cotangents `(K, B, rows)`; a term's rows are the K."""
    return _pulled(tape, tape.y, cotangents.to(tape.y.dtype), tape.taps, _Terms(tape))


def _pulled(tape: Tape, start: Tensor, vs: Tensor, taps: Sequence[Tap], found: _Terms) -> Pulled:
    nodes = nodes_from(start.grad_fn) if taps else set()
    live = [tap for tap in taps if tap.target.edge.node in nodes]
    data = [i for i, leaf in enumerate(tape.problem.leaves) if leaf.side != "param"]
    points = [Point(t.target.edge, t.target.shape, t.target.dtype, t.target.device) for t in live]
    points += [Point.of(tape.entry.leaves[i]) for i in data]
    if start.requires_grad:
        with _Explained():
            gs = pull(start, points, vs, tape.trust)
    else:
        gs = [p.zeros(vs.shape[0]) for p in points]
    for tap, g in zip(live, gs, strict=False):
        for path, term in rules.terms(tap, g).items():
            found.add(tap.sources[path], term)
    grads: list[Tensor | None] = [None] * len(tape.problem.leaves)
    for i, g in zip(data, gs[len(live) :], strict=True):
        grads[i] = g
    return Pulled(grads, found.finished())


class _Terms:
    """Collects terms by parameter; those of derived tensors are pulled back to the parameters they come from."""

    def __init__(self, tape: Tape) -> None:
        self.leaves = tape.entry.leaves
        self.places = {id(t): i for i, t in enumerate(tape.entry.leaves)}
        self.terms: list[list[Term]] = [[] for _ in tape.entry.leaves]
        self.derived: dict[int, tuple[Source, list[Term]]] = {}

    def add(self, source: Source, term: Term) -> None:
        """Enter the term of one use."""
        place = self.places.get(id(source.tensor))
        if place is not None:
            self.terms[place].append(term)
            return
        base = source.tensor._base if source.tensor._is_view() else None
        place = self.places.get(id(base))
        if base is not None and place is not None and _is_window(source.tensor, base):
            self.terms[place].append(_seen(term, source.tensor, base))
            return
        self.derived.setdefault(id(source.tensor), (source, []))[1].append(term)

    def finished(self) -> list[list[Term]]:
        """The terms per leaf, with equal kinds joined."""
        for source, terms in self.derived.values():
            for place, block in self._pulled_back(source, terms):
                self.terms[place].append(Dense(tuple(self.leaves[place].shape), None, block))
        self.derived = {}
        return [join(terms) for terms in self.terms]

    def _pulled_back(self, source: Source, terms: list[Term]) -> Iterator[tuple[int, Tensor]]:
        """The dense block of a derived tensor, pulled back through what derived it."""
        batch, rows = terms[0].size
        tensor = source.tensor
        block = torch.empty(batch, rows, *tensor.shape, dtype=tensor.dtype, device=tensor.device)
        write_terms(join(terms), block)
        variables = [getattr(node, "variable", None) for node in nodes_from(source.edge.node)]
        places = [self.places[id(v)] for v in variables if id(v) in self.places]
        points = [Point.of(self.leaves[place]) for place in places]
        step = max(1, LIMIT // max(1, tensor.numel(), *(math.prod(p.shape) for p in points)))
        parts = [pull(tensor, points, v) for v in block.flatten(0, 1).split(step)]
        for place, pieces in zip(places, zip(*parts, strict=True), strict=True):
            yield place, torch.cat(pieces).unflatten(0, (batch, rows))


def _is_window(t: Tensor, base: Tensor) -> bool:
    """Whether a view shows numbers of its base as they are, each at most once."""
    if t.dtype != base.dtype or not base.is_contiguous():
        return False
    axes = sorted((s, n) for n, s in zip(t.shape, t.stride(), strict=True) if n > 1)
    return all(s > 0 for s, _ in axes) and all(s * (n - 1) < following for (s, n), (following, _) in pairwise(axes))


def _seen(term: Term, tensor: Tensor, base: Tensor) -> Term:
    """A view's term as a term of its base."""
    turned = base.dim() == 2 and tuple(tensor.shape) == tuple(reversed(base.shape))
    if isinstance(term, Outer) and turned and tensor.stride() == (1, base.shape[1]):
        return dataclasses.replace(term, own=tuple(base.shape), flip=not term.flip)
    offset = int(tensor.storage_offset() - base.storage_offset())
    return dataclasses.replace(term, view=View(tuple(tensor.shape), tuple(tensor.stride()), offset))
