"""A job's folder: what was asked, and what came of it."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from jacray.target import Target

if TYPE_CHECKING:
    from jacray.result import Result


@dataclass(frozen=True)
class JobFolder:
    """The paths of a job."""

    path: Path

    @property
    def body(self) -> Path:
        """The body of the request that submitted it."""
        return self.path / "body"

    @property
    def results(self) -> Path:
        """The numbers, a zarr group."""
        return self.path / "results.zarr"

    @property
    def receipt(self) -> Path:
        """How they came about."""
        return self.path / "receipt.json"

    def write(self, result: Result) -> None:
        """Write what a job gave; the receipt comes last, so that what has one is whole."""
        from jacray.http.messages import keyed
        from jacray.store import create, finish, write_whole

        shutil.rmtree(self.results, ignore_errors=True)
        structure, arrays = keyed(result, result.plan)
        made = create(Target(str(self.path.absolute())), result.plan, structure)
        for array in result.plan.arrays:
            write_whole(made, array, arrays[array.key])
        finish(made)
        beside = self.receipt.with_suffix(".new")
        beside.write_text(json.dumps(result.receipt, default=str), encoding="utf-8")
        beside.replace(self.receipt)
