from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jacray_workers.chain.bracket import Bracket, Chain, gain, merge, pure, solve, useful


@st.composite
def chains(draw, longest=6):
    count = draw(st.integers(1, longest))
    return Chain(
        widths=tuple(draw(st.lists(st.integers(1, 50), min_size=count + 1, max_size=count + 1))),
        costs=tuple(draw(st.lists(st.integers(0, 500).map(float), min_size=count, max_size=count))),
        known=tuple(draw(st.lists(st.booleans(), min_size=count, max_size=count))),
        forward=tuple(draw(st.lists(st.booleans(), min_size=count, max_size=count))),
        write=draw(st.sampled_from([0.0, 16.0])),
        launch=draw(st.sampled_from([0.0, 300.0])),
    )


def every_cost(chain, start, stop):
    """The cost of every bracketing there is, by plain enumeration of trees."""
    if stop == start + 1 and chain.known[start]:
        return [0.0]
    w, write = chain.widths, chain.write * chain.widths[start] * chain.widths[stop]
    through = lambda a, b: sum(chain.costs[a:b])  # noqa: E731
    found = [chain.launch + w[stop] * through(start, stop) + write]
    if all(chain.forward[start:stop]):
        found.append(chain.launch + w[start] * through(start, stop) + write)
    for k in range(start + 1, stop):
        lefts, rights = every_cost(chain, k, stop), every_cost(chain, start, k)
        found += [a + b + 2 * w[stop] * w[k] * w[start] + write for a in lefts for b in rights]
        found += [a + chain.launch + w[stop] * through(start, k) + write for a in lefts]
        if all(chain.forward[k:stop]):
            found += [b + chain.launch + w[start] * through(k, stop) + write for b in rights]
    return found


def cost_of(chain, bracket):
    """What a bracket costs, counted again from its tree alone."""
    if bracket.kind == "known":
        assert bracket.stop == bracket.start + 1
        assert chain.known[bracket.start]
        return 0.0
    w = chain.widths
    total = chain.write * w[bracket.start] * w[bracket.stop] + sum(cost_of(chain, part) for part in bracket.parts)
    if bracket.kind == "product":
        return total + 2 * w[bracket.stop] * w[bracket.at] * w[bracket.start]
    start, stop = bracket.through
    forward = bracket.kind in ("forward", "push")
    assert not forward or all(chain.forward[start:stop])
    vectors = w[bracket.start] if forward else w[bracket.stop]
    return total + chain.launch + vectors * sum(chain.costs[start:stop])


@given(chains(longest=4))
@settings(deadline=None, max_examples=200)
def test_the_programme_finds_the_least_of_all_bracketings(chain):
    best = solve(chain)
    assert math.isclose(best.cost, min(every_cost(chain, 0, len(chain.costs))), abs_tol=1e-6)


@given(chains(longest=9))
@settings(deadline=None, max_examples=200)
def test_the_cost_is_that_of_the_tree_and_the_parts_fit(chain):
    best = solve(chain)
    assert math.isclose(best.cost, cost_of(chain, best), abs_tol=1e-6)
    for part in best.walk():
        if part.left is not None:
            assert (part.left.start, part.left.stop) == (part.at, part.stop)
        if part.right is not None:
            assert (part.right.start, part.right.stop) == (part.start, part.at)
    assert best.cost <= pure(chain) + 1e-6


@given(chains(longest=8))
@settings(deadline=None, max_examples=200)
def test_cuts_left_out_as_useless_cost_nothing(chain):
    without_known = Chain(chain.widths, chain.costs, (False,) * len(chain.costs), (True,) * len(chain.costs))
    thinned = merge(without_known, useful(without_known, 100))
    assert solve(thinned).cost <= solve(without_known).cost + 1e-6


def plain(widths, costs, known=()):
    count = len(costs)
    return Chain(tuple(widths), tuple(costs), tuple(known) or (False,) * count, (True,) * count)


def test_a_bottleneck_goes_back_before_it_and_forward_after_it():
    best = solve(plain([784, 32, 784], [1e6, 1e6]))
    assert best.kind == "product"
    assert best.left is not None
    assert best.right is not None
    assert (best.left.kind, best.right.kind) == ("forward", "reverse")


def test_a_wide_head_is_multiplied_by_its_weight():
    best = solve(plain([1024, 64, 8000], [1e7, 1.1e6], [False, True]))
    assert best == Bracket("product", 0, 2, best.cost, 1, Bracket("known", 1, 2, 0.0), Bracket("reverse", 0, 1, 64e7))


def test_few_outputs_leave_nothing_to_cut():
    chain = plain([784, 512, 512, 10], [8e5, 5e5, 1e4])
    assert solve(chain).kind == "reverse"
    assert gain(chain, solve(chain)) == 1.0


def test_a_segment_that_cannot_go_forward_is_not_sent_forward():
    chain = plain([784, 32, 784], [1e6, 1e6])
    stuck = Chain(chain.widths, chain.costs, chain.known, (True, False))
    assert all(part.kind != "forward" or part.stop == 1 for part in solve(stuck).walk())


@pytest.mark.parametrize("limit", [0, 1, 3])
def test_thinning_keeps_the_ends_and_the_narrowest(limit):
    kept = useful(plain([9, 5, 4, 3, 4, 5, 9], [1.0] * 6), limit)
    assert (kept[0], kept[-1]) == (0, 6)
    assert set(kept[1:-1]) <= {1, 2, 3, 4, 5}
    assert len(kept) == 2 + limit
    assert limit == 0 or 3 in kept
