"""The probe: a few small passes of the model that teach `taps.Recorder` what each call does with the batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from jacray_workers.errors import JacrayError
from jacray_workers.kernels.pullback import Trust
from jacray_workers.problem.problem import Problem
from jacray_workers.taps.follow import (
    AnotherPath,
    Args,
    Func,
    Kwargs,
    Watch,
    another_path,
    enter,
    name_of,
    outputs,
    shifted,
    swap,
    walk,
)
from jacray_workers.taps.sites import OUT, Axis, Path, Site, arrangements, defeat

Kind = Literal["tap", "derive", "plain"]
Key = tuple[Any, ...]


@dataclass(frozen=True, eq=False)
class Note:
    """One call as a small pass saw it: tensors by path, what else it was given, and what it made."""

    name: int
    func: Func
    others: dict[Path, Tensor]
    plain: tuple[Any, ...]
    made: list[Tensor]
    grads: bool


class Names:
    """Small numbers for whatever is hashable, the same in every pass of one survey."""

    def __init__(self) -> None:
        self.numbers: dict[Any, int] = {}

    def __call__(self, *parts: Any) -> int:
        """The number of what these parts make up."""
        return self.numbers.setdefault(parts, len(self.numbers))


class Scout(Watch):
    """Writes down every call that touches a parameter.

    A call's name says which function meets which parameters for the how-manieth time, so the same call has the same
    name in every pass, whatever else the model calls in between.

    Args:
        leaves: see `Watch`.
        names: makes the names.
        derived: the names of calls whose results are to be followed.
    """

    def __init__(self, leaves: Mapping[int, Tensor], names: Names, derived: set[int]) -> None:
        super().__init__(leaves)
        self.make_name, self.derived = names, derived
        distinct = {id(t): t for t in leaves.values()}
        self.names = {key: names("leaf", place) for place, key in enumerate(distinct)}
        self.times: dict[int, int] = {}
        self.notes: list[Note] = []

    def touch(self, func: Func, args: Args, kwargs: Kwargs, touched: dict[Path, Tensor]) -> Any:
        """Run the call as it is and note what it was given and what it made."""
        if not torch.is_grad_enabled():
            return super().touch(func, args, kwargs, touched)
        meeting = self.make_name(func, tuple((path, self.names[id(t)]) for path, t in touched.items()))
        name = self.make_name("call", meeting, self.times.setdefault(meeting, 0))
        self.times[meeting] += 1
        others = {path: t.detach().clone() for path, t in walk(args, kwargs) if path not in touched}
        plain = tuple(_plain(args)) + tuple(_plain(kwargs))
        args, kwargs = swap(args, kwargs, touched)
        result = func(*args, **kwargs)
        made = outputs(func, args, result)
        if name in self.derived:
            self.follow(made)
            self.names.update({id(t): self.make_name("made", name, place) for place, t in enumerate(made)})
        grads = any(t.requires_grad for t in made)
        self.notes.append(Note(name, func, others, plain, [t.detach().clone() for t in made], grads))
        return result


def _plain(value: Any) -> list[Any]:
    """What of the arguments is no tensor."""
    if isinstance(value, Tensor):
        return []
    if isinstance(value, list | tuple):
        return [leaf for item in value for leaf in _plain(item)]
    if isinstance(value, dict):
        return [leaf for item in value.values() for leaf in _plain(item)]
    return [value]


def sites(problem: Problem, batch: Sequence[Tensor]) -> tuple[Site, ...]:
    """What every call that touches a parameter does with the batch; found once per problem and shape of a sample.

    Raises:
        MethodError: the samples cannot be followed through the model.
    """
    key = ("sites", *_key(problem, batch))
    if key not in problem.memo:
        problem.memo[key] = _probe(problem, batch)
    found: tuple[Site, ...] = problem.memo[key]
    return found


def trust(problem: Problem, batch: Sequence[Tensor]) -> Trust:
    """What is known about pulling many cotangents at once through this problem's graph."""
    found: Trust = problem.memo.setdefault(("trust", *_key(problem, batch)), {})
    return found


def _key(problem: Problem, batch: Sequence[Tensor]) -> Key:
    """What decides the calls that the model makes, but for values of its data; problems made of one share a memo."""
    shapes = tuple((tuple(leaf.shape[1:]), leaf.dtype) for leaf in batch)
    return problem.leaves, problem.outs, problem.point, shapes


def _probe(problem: Problem, batch: Sequence[Tensor]) -> tuple[Site, ...]:
    """Probe with inputs a little off the given ones; where that is not enough, with parameters a little off too."""
    try:
        found = _settled(problem, three_samples(batch, shift=True))
    except JacrayError:
        raise
    except Exception:  # noqa: BLE001  # what shifted inputs made the model raise, the given ones may not
        found = _settled(problem, three_samples(batch, shift=False))
    if any(_doubtful(site) for site in found):
        again = _survey(problem, three_samples(batch, shift=True), shift=True)
        if [s.func for s in again] != [s.func for s in found]:
            raise another_path()
        found = tuple(_both(a, b) for a, b in zip(found, again, strict=True))
    for site in found:
        if site.kind == "tap" and len(site.fits[OUT] or ()) > 1:
            raise defeat(f"cannot tell how the batch lies in what {name_of(site.func)} makes")
    return found


def _settled(problem: Problem, three: list[Tensor]) -> tuple[Site, ...]:
    """A survey; a second one where the model made something in its first pass and kept it."""
    try:
        return _survey(problem, three, shift=False)
    except AnotherPath:
        return _survey(problem, three, shift=False)


def _doubtful(site: Site) -> bool:
    return any(fits is not None and len(fits) > 1 for fits in site.fits.values())


def _both(a: Site, b: Site) -> Site:
    """What fits in both surveys."""
    fits: dict[Path, tuple[Axis, ...] | None] = {}
    for path, first in a.fits.items():
        second = b.fits.get(path)
        fits[path] = None if first is None or second is None else tuple(x for x in first if x in second)
        if fits[path] == ():
            raise defeat(f"the batch moves about in what {name_of(a.func)} is given")
    return replace(a, fits=fits)


def _survey(problem: Problem, three: list[Tensor], *, shift: bool) -> tuple[Site, ...]:
    """Pairs of passes with two and with three samples, until no more derived tensors turn up."""
    names, derived = Names(), set[int]()
    while True:
        less = _run(problem, [leaf[:2] for leaf in three], names, derived, shift=shift)
        more = _run(problem, three, names, derived, shift=shift)
        if [note.name for note in less] != [note.name for note in more]:
            raise another_path()
        pairs = list(zip(less, more, strict=True))
        new = {b.name for a, b in pairs if _kind(a, b) == "derive"} - derived
        if not new:
            return tuple(_site(a, b) for a, b in pairs)
        derived |= new


def _run(problem: Problem, batch: list[Tensor], names: Names, derived: set[int], *, shift: bool) -> list[Note]:
    """One pass of the model."""
    # The same shift in every pass: they are compared with each other.
    entry = enter(problem, batch, torch.Generator().manual_seed(1) if shift else None)
    scout = Scout(entry.known, names, derived)
    with scout:
        problem.forward(entry.values, entry.batch)
    return scout.notes


def _kind(two: Note, three: Note) -> Kind:
    """What a call is: its result holds the batch where its shape changes with the batch size."""
    if not three.grads:
        return "plain"
    return "derive" if [t.shape for t in two.made] == [t.shape for t in three.made] else "tap"


def _site(two: Note, three: Note) -> Site:
    """What one call does with the batch, from two passes."""
    kind = _kind(two, three)
    if kind == "plain":
        return Site(three.func, kind, {}, varies=False)
    if list(two.others) != list(three.others) or len(two.made) != len(three.made):
        raise defeat(f"{name_of(three.func)} takes other arguments for two samples than for three")
    # Also finds a result without a batch axis that depends on the batch, and refuses it.
    made = [arrangements(a, b) for a, b in zip(two.made, three.made, strict=True)]
    if kind == "derive":
        return Site(three.func, kind, {}, varies=False)
    fits = {path: arrangements(two.others[path], t) for path, t in three.others.items()}
    fits[OUT] = made[0] if len(made) == 1 else None
    return Site(three.func, kind, fits, varies=not _same(two.plain, three.plain))


def _same(a: tuple[Any, ...], b: tuple[Any, ...]) -> bool:
    """Whether plain arguments are equal; objects are compared as they print."""
    if len(a) != len(b):
        return False
    simple = (int, float, complex, str, bool, type(None), torch.dtype, torch.device)
    pairs = list(zip(a, b, strict=True))
    return all(x == y if isinstance(x, simple) and isinstance(y, simple) else str(x) == str(y) for x, y in pairs)


def three_samples(batch: Sequence[Tensor], *, shift: bool) -> list[Tensor]:
    """Three different samples: of the batch where it has them, else turned or shifted copies.

    Args:
        batch: the input leaves.
        shift: move floating-point numbers a little.
    """
    size = batch[0].shape[0]
    chosen = [0, size // 2, size - 1]
    random = torch.Generator().manual_seed(0)
    found = []
    for leaf in batch:
        part = leaf[chosen].detach().clone()
        if leaf.is_floating_point():
            found.append(torch.stack([shifted(row, random) for row in part]) if shift else part)
        else:
            found.append(_distinct(part) if shift else part)
    return found


def _distinct(rows: Tensor) -> Tensor:
    """Rows of numbers; one that repeats an earlier row is turned along its last axis: every number stays valid."""
    for i in range(1, rows.shape[0]):
        if rows.dim() > 1 and any(torch.equal(rows[i], rows[j]) for j in range(i)):
            rows[i] = rows[i].roll(i, dims=-1)
    return rows
