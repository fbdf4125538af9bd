"""Every model of the zoo by every method, against the brute-force reference: `make zoo` prints the table.

    python -m tests.zoo.table [--quick] [--methods reverse,forward] [NAME_GLOB ...]

A cell is the relative error, or the reason why the planner refused. The exit code is 1 where a cell is wrong.
"""

from __future__ import annotations

import argparse
import fnmatch
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jacray_workers.errors import JacrayError, UserError
from jacray_workers.kernels import NAMES
from jacray_workers.planning import race
from torch.utils import _pytree as pytree

from tests import reference
from tests.door import Answer, compute
from tests.zoo import ENTRIES, TOLERANCE, Entry

SEED = 7
# What `auto` chose, beside its error.
SHORT = {"layerwise": "lw", "chain": "ch", "reverse": "rev", "forward": "fwd", "backward_loop": "loop"}
# Seconds per method for its trial: the table asks whether methods are right, and little about how fast they are.
TRIAL_SECONDS = 0.01


@dataclass(frozen=True)
class Cell:
    """One model by one method.

    Attributes:
        method: as asked for.
        chosen: the method that the plan used; empty where it was refused.
        error: against the reference, NaN where refused.
        refused: the reason, or empty.
        wrong: why the cell must not stand, or empty.
    """

    method: str
    chosen: str = ""
    error: float = float("nan")
    refused: str = ""
    wrong: str = ""


def columns() -> tuple[str, ...]:
    """`auto` and every method there is."""
    return ("auto", *NAMES)


def label(wrt: Any) -> str:
    """The target in a few letters."""
    if isinstance(wrt, dict):
        return f"{wrt['module']}:{wrt.get('side', 'output')}"
    return "+".join(map(label, wrt)) if isinstance(wrt, list | tuple) else str(wrt)


def tolerance(entry: Entry, model: Any, inputs: Any) -> float:
    """The relative error allowed: the entry's own, or that of the coarsest precision in the model and the inputs."""
    if entry.tolerance is not None:
        return entry.tolerance
    tensors = [*(model.parameters() if isinstance(model, torch.nn.Module) else ()), *pytree.tree_leaves(inputs)]
    return max(TOLERANCE[t.dtype] for t in tensors if t.is_floating_point())


@dataclass
class Bench:
    """One row of the table: the model, what to differentiate by, and the right answer."""

    entry: Entry
    wrt: Any
    model: Any
    inputs: Any
    expected: Any
    allowed: float

    @classmethod
    def of(cls, entry: Entry, wrt: Any) -> Bench:
        """Build the model and its reference."""
        model, inputs = entry.make()
        plain = getattr(model, "_orig_mod", model)
        seed = SEED if entry.training else None
        if entry.couples:
            return cls(entry, wrt, model, inputs, None, 0.0)
        with entry.quiet():
            expected = reference.jacobian(plain, inputs, wrt, spread=entry.spread, training=entry.training, seed=seed)
        return cls(entry, wrt, model, inputs, expected, tolerance(entry, model, inputs))

    def ask(self, method: str, **fields: Any) -> Answer:
        """The Jacobian by one method, through the engine."""
        fields = {"returns": "jacobian", "training": self.entry.training, "seed": SEED, **fields}
        with self.entry.quiet():
            return compute(self.model, self.inputs, wrt=self.wrt, method=method, **fields)

    def cell(self, method: str, **fields: Any) -> Cell:
        """Compute and compare; a refusal is a cell, anything else that raises is wrong."""
        try:
            answer = self.ask(method, **fields)
        except UserError as error:
            return Cell(method, refused=str(error), wrong=self._unfounded(method, error))
        except JacrayError as error:
            return Cell(method, refused=str(error), wrong=f"{type(error).__name__}: {error}")
        except Exception as error:  # noqa: BLE001 - whatever escapes the engine is what the table is for
            return Cell(method, refused=str(error), wrong=f"escaped: {type(error).__name__}: {error}")
        if self.entry.couples:
            return Cell(method, answer.plan.method, wrong="samples are coupled, and an answer came back")
        error = reference.worst(answer.jacobian, self.expected)
        wrong = "" if error < self.allowed else f"off by {error:.1e}, allowed {self.allowed:.0e}"
        return Cell(method, answer.plan.method, error, wrong=wrong)

    def _unfounded(self, method: str, error: UserError) -> str:
        """Why a refusal is wrong: the model does not defeat this method, or the error is no refusal of a method."""
        kind = type(error).__name__
        if self.entry.couples:
            return "" if kind == "CoupledSamplesError" else f"must be refused as coupled, not by {kind}: {error}"
        may = bool(self.entry.defeats.intersection((method, f"{method}:{label(self.wrt)}")))
        may = may or (method == "chain" and not (self.entry.chain and self.wrt == "inputs"))
        if may and kind == "MethodError" and error.rule:
            return ""
        return f"refused: {kind}: {error}"


def benches(entries: Sequence[Entry]) -> Iterator[Bench]:
    """Every row of the table."""
    for entry in entries:
        for wrt in entry.wrt:
            yield Bench.of(entry, wrt)


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table; 1 where a cell is wrong."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", default=["*"], help="globs over the models' names or families")
    parser.add_argument("--quick", action="store_true", help="leave the slow models out")
    parser.add_argument("--methods", default=",".join(columns()))
    options = parser.parse_args(arguments)
    chosen = [e for e in ENTRIES.values() if _asked(e, options.names) and not (options.quick and e.slow)]
    methods = tuple(options.methods.split(","))
    race.TRIAL_SECONDS = TRIAL_SECONDS
    _say(f"{'model':<26}{'wrt':<30}" + "".join(f"{m:>15}" for m in methods))
    cells: list[tuple[Bench, Cell]] = []
    began = time.monotonic()
    for bench in benches(chosen):
        line = [bench.cell(method) for method in methods]
        cells += [(bench, cell) for cell in line]
        _say(f"{bench.entry.name:<26}{label(bench.wrt)[:28]:<30}" + "".join(f"{_show(c):>15}" for c in line))
    return _summary(chosen, cells, time.monotonic() - began)


def _asked(entry: Entry, globs: Sequence[str]) -> bool:
    return any(fnmatch.fnmatchcase(entry.name, g) or entry.family == g for g in globs)


def _show(cell: Cell) -> str:
    if cell.wrong:
        return "WRONG"
    if cell.refused:
        return "refused"
    return f"{cell.error:.0e}" if cell.method != "auto" else f"{cell.error:.0e} {SHORT[cell.chosen]}"


def _summary(chosen: Sequence[Entry], cells: Sequence[tuple[Bench, Cell]], seconds: float) -> int:
    right = [c for _, c in cells if not c.wrong and not c.refused]
    refused = [(b, c) for b, c in cells if not c.wrong and c.refused]
    wrong = [(b, c) for b, c in cells if c.wrong]
    _say(
        f"\n{len(chosen)} models, {len(cells)} cells in {seconds:.0f} s: {len(right)} right, "
        f"{len(refused)} refused, {len(wrong)} wrong"
    )
    for title, found in (("refused", refused), ("WRONG", wrong)):
        for bench, cell in found:
            reason = " ".join((cell.wrong or cell.refused).split())
            _say(f"  {title} {bench.entry.name} wrt {label(bench.wrt)} by {cell.method}: {reason[:230]}")
    return 1 if wrong else 0


def _say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
