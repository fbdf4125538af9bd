"""The probe: a few small passes of the model that teach `taps.Recorder` what each call does with the batch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor

from jacray_workers.errors import JacrayError
from jacray_workers.problem import Problem
from jacray_workers.pullback import Trust
from jacray_workers.tap_sites import OUT, Axis, Path, Site, arrangements, defeat
from jacray_workers.taps import Args, Func, Kwargs, Watch, another_path, enter, name_of, outputs, shifted, swap, walk

W = TypeVar("W", bound=Watch)
Kind = Literal["tap", "derive", "plain"]
Key = tuple[Any, ...]


@dataclass(frozen=True, eq=False)
class Note:
    """One call as a small pass saw it: tensors by path, what else it was given, and what it made."""

    func: Callable[..., Any]
    kind: Kind
    others: dict[Path, Tensor]
    plain: tuple[Any, ...]
    made: list[Tensor]


class Shapes(Watch):
    """Writes down the shapes that every call makes."""

    def __init__(self, leaves: Mapping[int, Tensor]) -> None:
        super().__init__(leaves)
        self.shapes: list[tuple[torch.Size, ...]] = []

    def seen(self, func: Callable[..., Any], args: tuple[Any, ...], result: Any) -> None:
        """One entry per call."""
        self.shapes.append(tuple(t.shape for t in outputs(func, args, result)))


class Scout(Watch):
    """Writes down every call that touches a parameter.

    Args:
        leaves: see `Watch`.
        shapes: what every call made with another batch size: a call is a tap where this differs.
        kinds: what each call that touches a parameter was found to be; needed where `shapes` is None.
    """

    def __init__(
        self, leaves: Mapping[int, Tensor], shapes: Sequence[tuple[torch.Size, ...]] | None, kinds: Sequence[Kind] = ()
    ) -> None:
        super().__init__(leaves)
        self.shapes, self.kinds = shapes, kinds
        self.calls = 0
        self.notes: list[Note] = []

    def seen(self, func: Callable[..., Any], args: tuple[Any, ...], result: Any) -> None:
        """Counts the calls."""
        del func, args, result
        self.calls += 1

    def touch(self, func: Func, args: Args, kwargs: Kwargs, touched: dict[Path, Tensor]) -> Any:
        """Run the call as it is and note what it was given and what it made."""
        if not torch.is_grad_enabled():
            return super().touch(func, args, kwargs, touched)
        others = {path: t.detach().clone() for path, t in walk(args, kwargs) if path not in touched}
        plain = tuple(_plain(args)) + tuple(_plain(kwargs))
        args, kwargs = swap(args, kwargs, touched)
        result = func(*args, **kwargs)
        made = outputs(func, args, result)
        kind = self._kind(made)
        if kind == "derive":
            self.follow(made)
        self.notes.append(Note(func, kind, others, plain, [t.detach().clone() for t in made]))
        return result

    def _kind(self, made: list[Tensor]) -> Kind:
        if self.shapes is None:
            if len(self.notes) >= len(self.kinds):
                raise another_path()
            return self.kinds[len(self.notes)]
        if not any(t.requires_grad for t in made):
            return "plain"
        if self.calls >= len(self.shapes):
            raise another_path()
        return "derive" if tuple(t.shape for t in made) == self.shapes[self.calls] else "tap"


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
        found = _survey(problem, three_samples(batch, shift=True), shift=False)
    except JacrayError:
        raise
    except Exception:  # noqa: BLE001  # what shifted inputs made the model raise, the given ones may not
        found = _survey(problem, three_samples(batch, shift=False), shift=False)
    if any(_doubtful(site) for site in found):
        again = _survey(problem, three_samples(batch, shift=True), shift=True)
        if [s.func for s in again] != [s.func for s in found]:
            raise another_path()
        found = tuple(_both(a, b) for a, b in zip(found, again, strict=True))
    for site in found:
        if site.kind == "tap" and len(site.fits[OUT] or ()) > 1:
            raise defeat(f"cannot tell how the batch lies in what {name_of(site.func)} makes")
    return found


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
    """One probe: the shapes with two samples, then notes with three and with two."""
    two = [leaf[:2] for leaf in three]
    shapes = _run(problem, two, shift, Shapes)
    more = _run(problem, three, shift, lambda known: Scout(known, shapes.shapes))
    less = _run(problem, two, shift, lambda known: Scout(known, None, [note.kind for note in more.notes]))
    if [n.func for n in less.notes] != [n.func for n in more.notes]:
        raise defeat("the model calls other functions for two samples than for three")
    return tuple(_site(a, b) for a, b in zip(less.notes, more.notes, strict=True))


def _run(problem: Problem, batch: list[Tensor], shift: bool, make: Callable[[dict[int, Tensor]], W]) -> W:
    """One pass of the model under a watch."""
    # The same shift in every pass: they are compared with each other.
    random = torch.Generator().manual_seed(1) if shift else None
    entry = enter(problem, batch, random)
    watch = make(entry.known)
    with watch:
        problem.forward(entry.values, entry.batch)
    return watch


def _site(two: Note, three: Note) -> Site:
    """What one call does with the batch, from two passes."""
    if three.kind == "plain":
        return Site(three.func, "plain", {}, varies=False)
    if list(two.others) != list(three.others) or len(two.made) != len(three.made):
        raise defeat(f"{name_of(three.func)} takes other arguments for two samples than for three")
    # Also finds a result without a batch axis that depends on the batch, and refuses it.
    made = [arrangements(a, b) for a, b in zip(two.made, three.made, strict=True)]
    if three.kind == "derive":
        return Site(three.func, "derive", {}, varies=False)
    fits = {path: arrangements(two.others[path], t) for path, t in three.others.items()}
    fits[OUT] = made[0] if len(made) == 1 else None
    return Site(three.func, "tap", fits, varies=not _same(two.plain, three.plain))


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
