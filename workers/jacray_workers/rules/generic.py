"""The rule for every operator without one: differentiate that single call again, sample by sample."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from jacray_workers.errors import MethodError
from jacray_workers.kernels.pullback import Point, combination, near, pull
from jacray_workers.planning.memory import out_of_memory
from jacray_workers.rules.common import Terms, Unfit, Use, by_sample
from jacray_workers.taps.follow import Tap, name_of, outputs, swap, walk, writes
from jacray_workers.taps.sites import Axis, Path, defeat


def generic(use: Use) -> Terms:
    """The dense terms of one call.

    Where the call can be made with a batch of one, it is: under `vmap`, or in a loop over samples. Else the whole call
    is pulled back with the cotangents of one sample at a time.

    Raises:
        MethodError: the call cannot be differentiated again.
    """
    reason: Exception | None = None
    for way in (_together, _one_by_one, _masked):
        try:
            return {path: use.dense(path, block) for path, block in way(use).items()}
        except (Unfit, RuntimeError, NotImplementedError, TypeError, ValueError) as error:
            if isinstance(error, MethodError) or out_of_memory(error):
                raise
            reason = error
    raise defeat(f"no rule for {name_of(use.tap.site.func)}: {reason}") from reason


def _call(tap: Tap, by: dict[Path, Any]) -> Tensor:
    """The call with some arguments replaced, as a function that writes to nothing."""
    args, kwargs = swap(tap.args, tap.kwargs, by)
    if writes(tap.site.func):
        args = (args[0].clone(), *args[1:])
    return outputs(tap.site.func, args, tap.site.func(*args, **kwargs))[0]


def _pieces(tap: Tap) -> dict[Path, Tensor]:
    """Every argument that holds the batch, by sample."""
    if tap.site.varies:
        raise Unfit("a size depends on the batch")
    found = {}
    for path, _ in walk(tap.args, tap.kwargs):
        if path not in tap.sources and tap.site.fits[path] is not None:
            found[path] = by_sample(tap, path)
    return found


def _together(use: Use) -> dict[Path, Tensor]:
    tap = use.tap
    pieces, paths = _pieces(tap), list(tap.sources)
    params = [tap.sources[path].tensor.detach() for path in paths]

    def one(piece: Sequence[Tensor], cots: Tensor) -> tuple[Tensor, ...]:
        def run(*ps: Tensor) -> Tensor:
            made = _call(tap, {**dict(zip(pieces, piece, strict=True)), **dict(zip(paths, ps, strict=True))})
            if made.shape != cots.shape[1:]:
                raise Unfit("shape")
            return made

        back = torch.func.vjp(run, *params)[1]
        found: tuple[Tensor, ...] = torch.func.vmap(back)(cots)
        return found

    if not pieces:
        raise Unfit("no data")
    made = torch.func.vmap(one)(list(pieces.values()), use.cots)
    found = dict(zip(paths, made, strict=True))
    if not _agrees(use, found):
        raise Unfit("a batching rule is wrong")
    return found


def _agrees(use: Use, found: dict[Path, Tensor]) -> bool:
    """Whether one plain backward of the whole call gives a combination of the blocks: nested `vmap` has been wrong."""
    leaves = {path: source.tensor.detach().requires_grad_() for path, source in use.tap.sources.items()}
    made = _call(use.tap, dict(leaves))
    rows = use.g.shape[0]
    k = torch.rand(rows, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + 0.5
    k = k.to(use.g.device, use.g.real.dtype)
    if made.shape != use.tap.shape or any(t.shape[:2] != (use.tap.size, rows) for t in found.values()):
        return False
    plain = _pulled(made, leaves, combination(k, use.g).unsqueeze(0))
    return all(
        p[0].shape == t.shape[2:] and near(combination(k, t.sum(dim=0)), p[0], t)
        for t, p in zip(found.values(), plain, strict=True)
    )


def _one_by_one(use: Use) -> dict[Path, Tensor]:
    tap, pieces = use.tap, _pieces(use.tap)
    found: list[list[Tensor]] = []
    for i in range(tap.size):
        leaves = {path: source.tensor.detach().requires_grad_() for path, source in tap.sources.items()}
        made = _call(tap, {**{path: t[i] for path, t in pieces.items()}, **leaves})
        if made.shape != use.cots.shape[2:]:
            raise Unfit("shape")
        found.append(_pulled(made, leaves, use.cots[i]))
    return {path: torch.stack(parts) for path, parts in zip(tap.sources, zip(*found, strict=True), strict=True)}


def _pulled(made: Tensor, leaves: dict[Path, Tensor], cots: Tensor) -> list[Tensor]:
    if not made.requires_grad:
        return [t.new_zeros(cots.shape[0], *t.shape) for t in leaves.values()]
    return pull(made, [Point.of(t) for t in leaves.values()], cots)


def _masked(use: Use) -> dict[Path, Tensor]:
    """The derivative is linear in the cotangents: those of one sample alone give that sample's block."""
    tap = use.tap
    leaves = {path: source.tensor.detach().requires_grad_() for path, source in tap.sources.items()}
    made = _call(tap, dict(leaves))
    if made.shape != tap.shape:
        raise Unfit("shape")
    owner = _owners(use.out_axis, tap.size, len(tap.shape)).to(use.g.device)
    found = [_pulled(made, leaves, use.g * (owner == i)) for i in range(tap.size)]
    return {path: torch.stack(parts) for path, parts in zip(leaves, zip(*found, strict=True), strict=True)}


def _owners(axis: Axis, size: int, dims: int) -> Tensor:
    """Which sample every entry of the batch's axis belongs to, with one axis per axis of the result."""
    numbers = torch.arange(size)[None, :, None].expand(axis.before, size, axis.after).flatten()
    return numbers.view([-1 if d == axis.dim else 1 for d in range(dims)])
