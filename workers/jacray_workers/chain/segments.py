"""Carry out a bracketing: vectors through segments of a tape, and products of the matrices that come of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.func import jvp, vmap

from jacray_workers.chain.bracket import Bracket
from jacray_workers.chain.cuts import Cut, Cuttings
from jacray_workers.kernels.common import Targets, note_bound, spans, whole
from jacray_workers.kernels.sweep import sweep
from jacray_workers.sharing import math_attention
from jacray_workers.trust.finite import largest

# Bytes that the vectors in flight may take beside the matrices themselves.
WORKSPACE = 256 << 20
# Numbers in one sample's product from which a call per sample is cheaper than a batched one with a shared factor.
LARGE = 1 << 16

Matrices = list[Tensor]


@dataclass(frozen=True)
class Run:
    """One batch on its way through a cut tape.

    Attributes:
        cuttings: the tape and its cuts.
        env: the values for this batch, with the graph that leads to them.
        samples: how many.
        loops: the segments whose backward does not run under `vmap`: one vector at a time there.
        made: Jacobians kept between calls for other rows, by their cuts; None to keep none.
        workspace: bytes that the vectors in flight may take.
    """

    cuttings: Cuttings
    env: list[Tensor]
    samples: int
    loops: frozenset[tuple[int, int]] = frozenset()
    made: dict[tuple[int, int], Matrices] | None = None
    workspace: int = WORKSPACE

    def values(self) -> list[Tensor]:
        """The leaves' values."""
        return [self.env[value] for value in self.cuttings.tape.leaves]

    def at(self, cut: Cut) -> list[Tensor]:
        """The tensors that pass a cut."""
        return [self.env[value] for value in (self.cuttings.tape.leaves if cut.value < 0 else (cut.value,))]

    def chunk(self, start: int, stop: int) -> int:
        """How many vectors to take through a segment at a time."""
        return max(1, self.workspace // max(1, vector_bytes(self.cuttings, start, stop, self.samples)))


def vector_bytes(cuttings: Cuttings, start: int, stop: int, samples: int) -> int:
    """Bytes that one vector needs on its way through a segment: a few of its widest tensors at a time."""
    widest = max(cuttings.widest[start:stop], default=0)
    return 4 * samples * widest * cuttings.itemsize


def make(run: Run, bracket: Bracket, rows: range, into: Matrices | None = None) -> Matrices:
    """The Jacobian that a bracket stands for, `(samples, outputs, inputs)` per leaf or for the one inner cut.

    The first axis has size 1 where all samples share the matrix. `rows` are the outputs wanted if the bracket ends
    at the last cut; `into` are matrices to write to.
    """
    with torch.no_grad(), math_attention():
        return _MAKERS[bracket.kind](run, bracket, rows, into)


def _rows_of(run: Run, stop: int, rows: range) -> range:
    """The outputs of a bracket that are wanted."""
    last = len(run.cuttings.cuts) - 1
    return rows if stop == last else range(run.cuttings.cuts[stop].width)


def _known(run: Run, bracket: Bracket, rows: range, into: Matrices | None) -> Matrices:
    matrix = _weight(run, bracket.start)
    wanted = _rows_of(run, bracket.stop, rows)
    return _deliver([matrix[wanted.start : wanted.stop][None]], into)


def _weight(run: Run, element: int) -> Tensor:
    weight = run.cuttings.weights[element]
    if weight is None:
        raise ValueError(f"element {element} has no weight that is its Jacobian")
    matrix = run.env[weight.value].detach()
    return matrix.T if weight.transposed else matrix


def _reverse(run: Run, bracket: Bracket, rows: range, into: Matrices | None) -> Matrices:
    stop = run.cuttings.cuts[bracket.stop]
    wanted = _rows_of(run, bracket.stop, rows)

    def unit(span: range) -> Tensor:
        return _unit(run, span, stop.width, run.env[stop.value])

    return _pull_all(run, (bracket.start, bracket.stop), wanted, unit, into)


def _pull(run: Run, bracket: Bracket, rows: range, into: Matrices | None) -> Matrices:
    wanted = _rows_of(run, bracket.stop, rows)
    left = _part(run, bracket.left, rows)[0]

    def seeds(span: range) -> Tensor:
        part = left[:, span.start - wanted.start : span.stop - wanted.start]
        return part.transpose(0, 1).expand(-1, run.samples, -1)

    return _pull_all(run, (bracket.start, bracket.at), wanted, seeds, into)


def _pull_all(
    run: Run, through: tuple[int, int], wanted: range, seeds: Callable[[range], Tensor], into: Matrices | None
) -> Matrices:
    """Take cotangents back through a segment, as many at a time as the workspace holds."""
    start, stop = (run.cuttings.cuts[cut] for cut in through)
    parts: list[list[Tensor]] = []
    for span in spans(wanted, run.chunk(*through)):
        found = pull(run, start, stop, stop.layouts[0].spread(seeds(span)), through in run.loops)
        rows = [layout.gather(part).transpose(0, 1) for layout, part in zip(start.layouts, found, strict=True)]
        if into is None:
            parts.append(rows)
            continue
        for target, part in zip(into, rows, strict=True):
            target[:, span.start - wanted.start : span.stop - wanted.start] = part
    return into if into is not None else _joined(parts, dim=1)


def pull(run: Run, start: Cut, stop: Cut, cotangents: Tensor, loop: bool) -> list[Tensor]:
    """`(K, *stop)` as one `(K, *start)` per tensor that passes the first cut."""
    outputs, inputs = run.at(stop), run.at(start)

    def one(v: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(outputs, inputs, (v,), retain_graph=True, allow_unused=True, materialize_grads=True)

    if loop:
        found = [one(v) for v in cotangents]
        return [torch.stack(part) for part in zip(*found, strict=True)]
    made = sweep(outputs[0], inputs, cotangents)
    if made is None:
        return list(vmap(one)(cotangents))
    size = len(cotangents)
    return [t.new_zeros(size, *t.shape) if g is None else g for t, g in zip(inputs, made, strict=True)]


def _forward(run: Run, bracket: Bracket, rows: range, into: Matrices | None) -> Matrices:
    start = run.cuttings.cuts[bracket.start]
    found: Matrices = []
    begin = 0
    for index, layout in enumerate(start.layouts):
        offset = begin

        def unit(span: range, offset: int = offset) -> Tensor:
            shifted = range(span.start + offset, span.stop + offset)
            return _unit(run, shifted, start.width, run.at(start)[0])

        target = None if into is None else into[index]
        found.append(_push_all(run, (bracket.start, bracket.stop), layout.width, unit, rows, target))
        begin += layout.width
    return found


def _push(run: Run, bracket: Bracket, rows: range, into: Matrices | None) -> Matrices:
    rights = _part(run, bracket.right, rows)
    found = []
    for index, right in enumerate(rights):

        def seeds(span: range, right: Tensor = right) -> Tensor:
            return right[:, :, span.start : span.stop].permute(2, 0, 1).expand(-1, run.samples, -1)

        target = None if into is None else into[index]
        found.append(_push_all(run, (bracket.at, bracket.stop), right.shape[2], seeds, rows, target))
    return found


def _push_all(
    run: Run, through: tuple[int, int], count: int, seeds: Callable[[range], Tensor], rows: range, into: Tensor | None
) -> Tensor:
    """Take tangents forward through a segment, as many at a time as the workspace holds."""
    wanted = _rows_of(run, through[1], rows)
    layout = run.cuttings.cuts[through[1]].layouts[0]
    parts: list[list[Tensor]] = []
    for span in spans(range(count), run.chunk(*through)):
        pushed = layout.gather(push(run, through, seeds(span)))[:, :, wanted.start : wanted.stop]
        columns = pushed.permute(1, 2, 0)
        if into is None:
            parts.append([columns])
        else:
            into[:, :, span.start : span.stop] = columns
    return into if into is not None else _joined(parts, dim=2)[0]


def push(run: Run, through: tuple[int, int], tangents: Tensor) -> Tensor:
    """`(K, samples, width of the first cut)` as `(K, *second cut)`."""
    start, stop = (run.cuttings.cuts[cut] for cut in through)
    nodes = run.cuttings.between(*through)
    names = run.cuttings.tape.leaves if start.value < 0 else (start.value,)
    primals = tuple(whole([tensor.detach() for tensor in run.at(start)]))

    def segment(*values: Tensor) -> Tensor:
        env = list(run.env)
        for name, value in zip(names, values, strict=True):
            env[name] = value
        for node in nodes:
            node.run(env)
        return env[stop.value]

    def one(*parts: Tensor) -> Tensor:
        found: Tensor = jvp(segment, primals, parts)[1]
        return found

    split = tangents.split([layout.width for layout in start.layouts], dim=2)
    pushed: Tensor = vmap(one)(*[layout.spread(part) for layout, part in zip(start.layouts, split, strict=True)])
    return pushed


def _product(run: Run, bracket: Bracket, rows: range, into: Matrices | None) -> Matrices:
    left = _part(run, bracket.left, rows)[0]
    rights = _part(run, bracket.right, rows)
    targets = into if into is not None else [None] * len(rights)
    found = [multiply(left, right, target) for right, target in zip(rights, targets, strict=True)]
    if isinstance(into, Targets):
        size = largest(left) * left.shape[2]
        for place, right in enumerate(rights):
            note_bound(into, place, size * largest(right))
    return _deliver(found, into)


def multiply(left: Tensor, right: Tensor, into: Tensor | None) -> Tensor:
    """`(b, m, k)` times `(b, k, n)`; a first axis of size 1 is shared by all samples. Written to `into` if it fits."""
    samples, m, n = max(len(left), len(right)), left.shape[1], right.shape[2]
    if into is None and len(left) < samples:
        # Columns first, all samples' columns are the rows of one large product.
        return torch.nn.functional.linear(right.permute(2, 0, 1), left[0]).permute(1, 2, 0)
    if into is None or len(into) != samples or not into.is_contiguous():
        into = left.new_empty(samples, m, n)
    if len(right) < samples:
        torch.mm(left.reshape(samples * m, -1), right[0], out=into.view(samples * m, n))
    elif len(left) < samples and m * n >= LARGE:
        for sample in range(samples):
            torch.mm(left[0], right[sample], out=into[sample])
    else:
        torch.bmm(left.expand(samples, -1, -1), right, out=into)
    return into


def _part(run: Run, bracket: Bracket | None, rows: range) -> Matrices:
    if bracket is None:
        raise ValueError("a bracket lacks a part")
    ends = bracket.start, bracket.stop
    if run.made is None or bracket.stop == len(run.cuttings.cuts) - 1:
        return _MAKERS[bracket.kind](run, bracket, rows, None)
    if ends not in run.made:
        run.made[ends] = _MAKERS[bracket.kind](run, bracket, rows, None)
    return run.made[ends]


def _unit(run: Run, span: range, width: int, like: Tensor) -> Tensor:
    """Unit vectors, the same for every sample: `(K, samples, width)`."""
    eye = torch.zeros(len(span), width, dtype=like.dtype, device=like.device)
    eye[torch.arange(len(span)), torch.arange(span.start, span.stop)] = 1
    return eye[:, None].expand(-1, run.samples, -1)


def _joined(parts: list[list[Tensor]], dim: int) -> Matrices:
    """The chunks of each matrix put together."""
    return [part[0] if len(part) == 1 else torch.cat(part, dim=dim) for part in zip(*parts, strict=True)]


def _deliver(found: Matrices, into: Matrices | None) -> Matrices:
    if into is None:
        return found
    for matrix, target in zip(found, into, strict=True):
        if matrix is not target:
            target.copy_(matrix.expand_as(target))
    return into


_MAKERS: dict[str, Callable[[Run, Bracket, range, Matrices | None], Matrices]] = {
    "known": _known,
    "reverse": _reverse,
    "forward": _forward,
    "product": _product,
    "pull": _pull,
    "push": _push,
}


@dataclass(frozen=True)
class Pass:
    """Vectors that are taken through a segment.

    Attributes:
        forward: tangents forward, rather than cotangents back.
        through: the cuts between which they go.
        vectors: how many.
    """

    forward: bool
    through: tuple[int, int]
    vectors: int


def passes(cuttings: Cuttings, bracket: Bracket) -> list[Pass]:
    """All that go through segments."""
    found = []
    for part in bracket.walk():
        if part.passes:
            forward = part.kind in ("forward", "push")
            found.append(Pass(forward, part.through, cuttings.chain.widths[part.start if forward else part.stop]))
    return found


def vmap_gap(run: Run, through: tuple[int, int]) -> tuple[float, float]:
    """How far two cotangents taken back at once come out from one after the other, and their size.

    Not every backward has a rule for `vmap`, and the one of `cdist` has a wrong one.
    """
    start, stop = (run.cuttings.cuts[cut] for cut in through)
    seeds = stop.layouts[0].spread(_random(run, 1, stop)[0])
    with torch.no_grad():
        together = pull(run, start, stop, seeds, loop=False)
        alone = pull(run, start, stop, seeds, loop=True)
    gaps = [float((a - b).abs().max()) for a, b in zip(together, alone, strict=True) if a.numel()]
    return max(gaps), max(float(b.abs().max()) for b in alone if b.numel())


def adjoint_gap(run: Run, through: tuple[int, int]) -> tuple[float, float]:
    """|<u, J v> - <J^T u, v>| of a segment for random vectors, and the size of the terms."""
    start, stop = (run.cuttings.cuts[cut] for cut in through)
    u, v = _random(run, 2, stop, start)
    with torch.no_grad():
        pushed = stop.layouts[0].gather(push(run, through, v))
        pulled = pull(run, start, stop, stop.layouts[0].spread(u), loop=True)
    back = torch.cat([layout.gather(part) for layout, part in zip(start.layouts, pulled, strict=True)], dim=2)
    gap = (u * pushed).sum(2) - (back * v).sum(2)
    return float(gap.abs().max()), float((u * pushed).norm() + (back * v).norm())


def _random(run: Run, seed: int, *cuts: Cut) -> list[Tensor]:
    """Two random vectors `(2, samples, width)` for each cut."""
    random = torch.Generator().manual_seed(seed)
    like = run.env[run.cuttings.tape.output]
    return [
        torch.randn(2, run.samples, cut.width, generator=random, dtype=torch.float64).to(like).detach() for cut in cuts
    ]
