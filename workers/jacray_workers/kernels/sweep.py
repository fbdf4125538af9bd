"""Pull many cotangents back through an autograd graph node by node, all of them at once at each node.

Under `vmap` autograd's own engine does the same through batching rules, which copy, expand and loop where one product
of the right shape would do. Here the walk is ours: a node that `sweep_rules` knows takes all cotangents in one call,
any other node is called as the engine would call it, under `vmap` or one cotangent after another, whichever is cheaper.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch._functorch.predispatch import lazy_load_decompositions
from torch._functorch.vmap import vmap_increment_nesting
from torch.autograd.function import BackwardCFunction
from torch.autograd.graph import Node, get_gradient_edge

from jacray_workers import pages
from jacray_workers.kernels.arrivals import Arrived, Place, shaped
from jacray_workers.kernels.sweep_rules import LARGE, OVERWRITING, RULES
from jacray_workers.kernels.sweep_views import PARTS, WINDOWS, sum_to
from jacray_workers.unwanted import look

# The two steps that torch.func.vmap is made of; not among torch's public names, the same since 2.0.
functorch: Any = torch._C._functorch

# So few cotangents go one after another.
FEW = 3


def sweep(start: Tensor, places: Sequence[Any], vs: Tensor) -> list[Tensor | None] | None:
    """The cotangents `(n, *place)` that `vs`, `(n, *start)`, bring to each place; None where none arrives.

    Args:
        start: where the cotangents begin.
        places: tensors or gradient edges.
        vs: the cotangents; may be an expanded view.

    Returns:
        None in place of the list where the graph holds what only autograd's engine can run.
    """
    if start.is_complex() or vs.shape[0] == 0:
        return None
    root = get_gradient_edge(start)
    edges = [get_gradient_edge(p) if isinstance(p, Tensor) else p for p in places]
    wanted = [(edge.node, edge.output_nr) for edge in edges]
    order = ordered(root.node, {node for node, _ in wanted})
    if any(isinstance(node, BackwardCFunction) for node in order):
        return None
    with torch.no_grad():
        # Stacks of matrices, one per sample and head, want one cotangent after another.
        stacks = any(node.name() == "BmmBackward0" for node in order)
        return _walk(order, (root.node, root.output_nr), wanted, vs if stacks else _by_sample(vs))


def _by_sample(vs: Tensor) -> Tensor:
    """The cotangents laid out in memory sample by sample, so that what is made of them lies as results do."""
    return vs.transpose(0, 1).contiguous().transpose(0, 1) if vs.dim() > 1 and 0 in vs.stride()[:2] else vs


def ordered(root: Node, targets: set[Node]) -> list[Node]:
    """The nodes on the ways from the root to the targets, each behind all that lead to it."""
    leads: dict[Node, bool] = {}
    found: list[Node] = []
    stack: list[tuple[Node, bool]] = [(root, False)]
    while stack:
        node, seen = stack.pop()
        if seen:
            leads[node] = node in targets or any(leads.get(n, False) for n, _ in node.next_functions if n is not None)
            if leads[node]:
                found.append(node)
        elif node not in leads:
            leads[node] = False
            stack.append((node, True))
            stack.extend((n, False) for n, _ in node.next_functions if n is not None and n not in leads)
    return found[::-1]


def _walk(order: list[Node], root: Place, wanted: Sequence[Place], vs: Tensor) -> list[Tensor | None]:
    kept = set(wanted)
    on_way = set(order)
    arrived = Arrived()
    arrived.add_all([root], [vs])
    found: dict[Place, Tensor] = {}
    for node in order:
        look()
        gs = [arrived.take((node, nr)) for nr in range(len(node._input_metadata))]
        for nr, g in enumerate(gs):
            if g is not None and (node, nr) in kept:
                found[node, nr] = arrived.given(shaped(node, nr, g))
        needs = tuple(following in on_way for following, _ in node.next_functions)
        if not any(needs) or all(g is None for g in gs):
            continue
        if node.name() in WINDOWS and gs[0] is not None:
            arrived.add_part(node.next_functions[0], WINDOWS[node.name()](node), shaped(node, 0, gs[0]))
            continue
        made = _through(node, gs, needs, arrived)
        arrived.add_all(node.next_functions, [g if need else None for g, need in zip(made, needs, strict=True)])
    return [found.get(place) for place in wanted]


def _through(node: Node, gs: list[Tensor | None], needs: tuple[bool, ...], arrived: Arrived) -> Sequence[Tensor | None]:
    """What arrives at each of a node's inputs."""
    name, g = node.name(), gs[0]
    if name in RULES and g is not None and not g.is_complex() and all(other is None for other in gs[1:]):
        over = {"over": True} if name in OVERWRITING and arrived.spare(g) else {}
        made = RULES[name](node, g, needs, **over)
        if made is not None:
            arrived.note(made, g)
            return made
    whole = [None if g is None else shaped(node, nr, g) for nr, g in enumerate(gs)]
    if name in PARTS and all(g is not None for g in whole):
        return [PARTS[name](node, [g for g in whole if g is not None])]
    return _called(node, whole, arrived)


def _called(node: Node, gs: list[Tensor | None], arrived: Arrived) -> Sequence[Tensor | None]:
    """The node's own backward, and what the engine does behind it: sums over axes that broadcasting spread."""
    made = _by_itself(node, gs, arrived)
    shapes = [None if n is None else n._input_metadata[nr].shape for n, nr in node.next_functions]
    return [None if g is None or shape is None else sum_to(g, shape) for g, shape in zip(made, shapes, strict=True)]


def _by_itself(node: Node, gs: list[Tensor | None], arrived: Arrived) -> Sequence[Tensor | None]:
    """Under `vmap`, or one cotangent after another where a call is no small thing."""
    given = [g for g in gs if g is not None]
    count = given[0].shape[0]
    if count <= FEW or given[0][0].numel() >= LARGE:
        made = _one_by_one(node, gs, count)
        arrived.note(made, given[0])
        return made
    lazy_load_decompositions()
    with vmap_increment_nesting(count, "error") as level:
        batched = [None if g is None else functorch._add_batch_dim(g, 0, level) for g in gs]
        return [
            None if made is None else functorch._remove_batch_dim(made, level, count, 0)
            for made in _listed(node(*batched))  # type: ignore[operator]
        ]


def _one_by_one(node: Node, gs: list[Tensor | None], count: int) -> list[Tensor | None]:
    found: list[Tensor | None] = []
    for i in range(count):
        look()
        made = _listed(node(*[None if g is None else g[i] for g in gs]))  # type: ignore[operator]
        if not found:
            found = [None if part is None else pages.like(part, (count, *part.shape)) for part in made]
        for whole, part in zip(found, made, strict=True):
            if whole is not None and part is not None:
                whole[i] = part
    return found


def _listed(made: Any) -> Sequence[Tensor | None]:
    return made if isinstance(made, tuple) else (made,)
