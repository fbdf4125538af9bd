"""The zoo through the engine: `auto` on every model, every method on every model; all against brute force."""

from __future__ import annotations

from typing import Any

import pytest

from tests.zoo import ENTRIES, Entry
from tests.zoo.table import Bench, columns, label

ROWS = [(entry, wrt) for entry in ENTRIES.values() for wrt in entry.wrt]


def params(*, slow: bool) -> list[Any]:
    marks = [pytest.mark.slow]
    return [
        pytest.param(entry, wrt, id=f"{entry.name}-{label(wrt)}", marks=marks if slow or entry.slow else [])
        for entry, wrt in ROWS
    ]


def test_the_zoo_is_large() -> None:
    assert len(ENTRIES) >= 60


@pytest.mark.parametrize(("entry", "wrt"), params(slow=False))
def test_auto(entry: Entry, wrt: Any) -> None:
    cell = Bench.of(entry, wrt).cell("auto")
    assert not cell.wrong, cell.wrong


@pytest.mark.parametrize(("entry", "wrt"), params(slow=True))
def test_every_method(entry: Entry, wrt: Any) -> None:
    bench = Bench.of(entry, wrt)
    wrong = {cell.method: cell.wrong for cell in map(bench.cell, columns()) if cell.wrong}
    assert not wrong
