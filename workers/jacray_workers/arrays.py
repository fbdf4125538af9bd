"""Which arrays a request's result holds: names, shapes, dimensions, and how shards of them come together."""

from __future__ import annotations

import torch
from torch.utils import _pytree as pytree

from jacray_workers.plan import ArrayPlan
from jacray_workers.problem.problem import Leaf, Out, Problem
from jacray_workers.request import Request


def numpy_dtype(dtype: torch.dtype) -> str:
    """Numpy's name of a dtype; bfloat16, which numpy lacks, is kept as float32."""
    return {torch.bfloat16: "float32"}.get(dtype, str(dtype).removeprefix("torch."))


class ArrayPlanner:
    """Lists the arrays of one request. `samples` is the job's batch size; K counts weights and vectors, 0 for one."""

    def __init__(self, problem: Problem, request: Request, samples: int, weights: int = 0, vectors: int = 0) -> None:
        self.problem, self.request, self.samples = problem, request, samples
        self.weights, self.vectors = weights, vectors
        self.dtype = numpy_dtype(problem.dtype)
        self.one_leaf = not isinstance(problem.wrt_tree, dict | list | tuple)
        self.one_out = not isinstance(problem.out_tree, dict | list | tuple)

    def all(self) -> tuple[ArrayPlan, ...]:
        """Every array, in the order in which the results were asked for."""
        return tuple(array for name in self.request.returns for array in getattr(self, f"_{name}")())

    def _outputs(self) -> list[ArrayPlan]:
        return [
            self._array("outputs", o, -1, self._per_sample(out.shape), ("sample", *self.out_dims(out)), 0)
            for o, out in enumerate(self.problem.outs)
        ]

    def _jacobian(self) -> list[ArrayPlan]:
        return [
            self._array(
                "jacobian",
                o,
                i,
                self._per_sample(out.shape + leaf.shape),
                ("sample", *self.out_dims(out), *self.leaf_dims(leaf)),
                0,
            )
            for o, out in enumerate(self.problem.outs)
            for i, leaf in enumerate(self.problem.leaves)
        ]

    def _mean_jacobian(self) -> list[ArrayPlan]:
        return [
            self._array("mean_jacobian", o, i, out.shape + leaf.shape, (*self.out_dims(out), *self.leaf_dims(leaf)), -1)
            for o, out in enumerate(self.problem.outs)
            for i, leaf in enumerate(self.problem.leaves)
        ]

    def _weighted_gradient(self) -> list[ArrayPlan]:
        lead, dims = ((self.weights,), ("cotangent",)) if self.weights else ((), ())
        found = []
        for i, leaf in enumerate(self.problem.leaves):
            if leaf.side == "param" and self.request.reduction == "sum":
                shape, names, axis = lead + leaf.shape, (*dims, *self.leaf_dims(leaf)), -1
            else:
                shape = lead + self._per_sample(leaf.shape)
                names, axis = (*dims, "sample", *self.leaf_dims(leaf)), len(lead)
            found.append(self._array("weighted_gradient", -1, i, shape, names, axis))
        return found

    def _jvp(self) -> list[ArrayPlan]:
        lead, dims = ((self.vectors,), ("tangent",)) if self.vectors else ((), ())
        return [
            self._array(
                "jvp", o, -1, lead + self._per_sample(out.shape), (*dims, "sample", *self.out_dims(out)), len(lead)
            )
            for o, out in enumerate(self.problem.outs)
        ]

    def _norms(self) -> list[ArrayPlan]:
        return [self._array("norms", -1, -1, (self.samples,), ("sample",), 0)]

    def _singular_values(self) -> list[ArrayPlan]:
        rank = min(self.problem.rows, sum(leaf.size for leaf in self.problem.leaves))
        rank = min(rank, self.request.top_k) if self.request.top_k else rank
        return [self._array("singular_values", -1, -1, (self.samples, rank), ("sample", "rank"), 0)]

    def _logabsdet(self) -> list[ArrayPlan]:
        return [self._array("logabsdet", -1, -1, (self.samples,), ("sample",), 0)]

    def _ntk(self) -> list[ArrayPlan]:
        n, r = self.samples, self.problem.rows
        if self.request.ntk == "trace":
            return [self._array("ntk", -1, -1, (n, n), ("sample", "sample_other"), 0)]
        return [self._array("ntk", -1, -1, (n, n, r, r), ("sample", "sample_other", "row", "row_other"), 0)]

    def _gram(self) -> list[ArrayPlan]:
        return self._pairs("gram")

    def _ggn(self) -> list[ArrayPlan]:
        return self._pairs("ggn")

    def _fisher(self) -> list[ArrayPlan]:
        return self._pairs("fisher")

    def _pairs(self, name: str) -> list[ArrayPlan]:
        """Matrices over pairs of leaves, or their products with the vectors where some were given."""
        leaves = self.problem.leaves
        if self.request.vectors is not None:
            lead, dims = ((self.vectors,), ("tangent",)) if self.vectors else ((), ())
            return [
                self._array(name, -1, i, lead + leaf.shape, (*dims, *self.leaf_dims(leaf)), -1)
                for i, leaf in enumerate(leaves)
            ]
        # `out` holds the first leaf of the pair: these arrays belong to no output.
        return [
            self._array(
                name,
                i,
                j,
                a.shape + b.shape,
                (*self.leaf_dims(a), *(f"{d}_other" for d in self.leaf_dims(b))),
                -1,
                pair=True,
            )
            for i, a in enumerate(leaves)
            for j, b in enumerate(leaves)
        ]

    def out_dims(self, out: Out) -> tuple[str, ...]:
        """A dimension name per axis of one sample's output."""
        stem = f"output.{out.key}" if out.key and not self.one_out else "output"
        return tuple(f"{stem}_{axis}" for axis in range(len(out.shape)))

    def leaf_dims(self, leaf: Leaf) -> tuple[str, ...]:
        """A dimension name per axis of one sample's leaf, or of the parameter."""
        stem = (
            "input" if leaf.key == "inputs" else leaf.key.removeprefix("inputs.") if leaf.side == "input" else leaf.key
        )
        return tuple(f"{stem}_{axis}" for axis in range(len(leaf.shape)))

    def _per_sample(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        return (self.samples, *shape)

    def _array(
        self,
        name: str,
        out: int,
        leaf: int,
        shape: tuple[int, ...],
        dims: tuple[str, ...],
        axis: int,
        pair: bool = False,
    ) -> ArrayPlan:
        parts = [name]
        if pair:
            if not self.one_leaf:
                parts += [self.problem.leaves[out].key, self.problem.leaves[leaf].key]
        else:
            if out >= 0 and not self.one_out:
                parts.append(self.problem.outs[out].key)
            if leaf >= 0 and not self.one_leaf:
                parts.append(self.problem.leaves[leaf].key)
        outs = len(self.problem.outs[out].shape) if name in ("jacobian", "outputs") else 0
        return ArrayPlan(name, ".".join(parts), out, leaf, shape, self.dtype, dims, axis, out_axes=outs)


def structure(problem: Problem, request: Request, name: str, by_place: dict[tuple[int, int], object]) -> object:
    """One result in the structure that its user expects, from its arrays by (out, leaf)."""
    outs, leaves = problem.out_tree, problem.wrt_tree

    def over(tree: object, pick: object) -> object:
        if type(tree) is int:
            return pick(tree)  # type: ignore[operator]
        return pytree.tree_map(lambda i: None if i is None else pick(i), tree)  # type: ignore[operator]

    if name in ("norms", "singular_values", "logabsdet", "ntk"):
        return by_place[-1, -1]
    if name in ("outputs", "jvp"):
        return over(outs, lambda o: by_place[o, -1])
    if name == "weighted_gradient" or (name in ("gram", "ggn", "fisher") and request.vectors is not None):
        return over(leaves, lambda i: by_place[-1, i])
    if name in ("gram", "ggn", "fisher"):
        return over(leaves, lambda i: over(leaves, lambda j: by_place[i, j]))
    return over(outs, lambda o: over(leaves, lambda i: by_place[o, i]))
