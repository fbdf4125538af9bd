"""Jacobians known by hand, for every door: the same table is put to the functions, the clients and the files.

The models stand at the top of a module, so that workers find them by name.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

Model = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Case:
    """A function of a batch, where to take its derivatives, and what they are.

    Attributes:
        name: for the test's name.
        model: takes `(B, in)`, returns `(B, out)` or `(B,)`.
        x: the batch.
        expected: result name to its value.
        fields: the fields of the request, without `returns`.
    """

    name: str
    model: Model
    x: tuple[tuple[float, ...], ...]
    expected: dict[str, Any]
    fields: dict[str, Any] = field(default_factory=dict)

    @property
    def inputs(self) -> Tensor:
        """The batch as a tensor."""
        return torch.tensor(self.x, dtype=torch.float32)

    @property
    def request(self) -> dict[str, Any]:
        """All fields of the request."""
        return {**self.fields, "returns": list(self.expected)}

    def check(self, get: Callable[[str], Any]) -> None:
        """Compare each result, as `get` gives it, with what is known."""
        for name, value in self.expected.items():
            torch.testing.assert_close(torch.as_tensor(get(name)), torch.tensor(value))


def mean_of_shifted(a: Tensor) -> Tensor:
    """mean(3 (a + 3))."""
    return (3 * (a + 3)).mean(dim=-1)


def powers(a: Tensor) -> Tensor:
    """2 (a1^2, a2^3)."""
    return 2 * torch.stack([a[:, 0] ** 2, a[:, 1] ** 3], dim=1)


def crossed(a: Tensor) -> Tensor:
    """2 (a1^2 + a2, a2^3 + a1)."""
    return 2 * torch.stack([a[:, 0] ** 2 + a[:, 1], a[:, 1] ** 3 + a[:, 0]], dim=1)


def crossed_twice(a: Tensor) -> Tensor:
    """2 (a1^2 + a2, a2^3 + 2 a1)."""
    return 2 * torch.stack([a[:, 0] ** 2 + a[:, 1], a[:, 1] ** 3 + 2 * a[:, 0]], dim=1)


def summed(a: Tensor) -> Tensor:
    """a w with w = (1, 1)^T."""
    return a @ torch.ones(2, 1)


def classes(a: Tensor) -> Tensor:
    """Three classes from two numbers: rows (1, 2), (3, 4), (5, 6)."""
    return a @ torch.tensor([[1.0, 3.0, 5.0], [2.0, 4.0, 6.0]])


CASES = (
    Case("scalar-needs-no-weights", mean_of_shifted, ((2, 3),), {"weighted_gradient": [[1.5, 1.5]]}),
    Case("scalar-jacobian", mean_of_shifted, ((2, 3),), {"jacobian": [[1.5, 1.5]]}),
    Case("powers", powers, ((2, 4),), {"weighted_gradient": [[8.0, 96.0]]}, {"weights": [1.0, 1.0]}),
    Case("crossed-11", crossed, ((2, 4),), {"weighted_gradient": [[10.0, 98.0]]}, {"weights": [1.0, 1.0]}),
    Case("crossed-12", crossed, ((2, 4),), {"weighted_gradient": [[12.0, 194.0]]}, {"weights": [1.0, 2.0]}),
    Case(
        "rows-one-by-one",
        crossed_twice,
        ((2, 4),),
        {"weighted_gradient": [[[8.0, 2.0]], [[4.0, 96.0]]], "jacobian": [[[8.0, 2.0], [4.0, 96.0]]]},
        {"weights": [[[1.0, 0.0]], [[0.0, 1.0]]]},
    ),
    Case(
        "one-weight-per-sample",
        summed,
        ((2, 3), (1, 2)),
        {"weighted_gradient": [[1.0, 1.0], [1.0, 1.0]]},
        {"weights": [[1.0], [1.0]]},
    ),
    Case(
        "samples-by-classes",
        classes,
        ((2, 3), (1, 2), (0, 1), (5, 5)),
        {"weighted_gradient": [[1.0, 2.0], [3.0, 4.0], [5.0, 6.0], [9.0, 12.0]]},
        {"weights": [[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0], [1.0, 1.0, 1.0]]},
    ),
)
