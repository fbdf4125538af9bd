"""A job's folder: what was asked, and what came of it."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

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
    def spec(self) -> Path:
        """The file that it was submitted from, as JSON, where it was one."""
        return self.path / "spec.json"

    @property
    def results(self) -> Path:
        """The numbers, a zarr group."""
        return self.path / "results.zarr"

    @property
    def receipt(self) -> Path:
        """How they came about."""
        return self.path / "receipt.json"

    def clear(self) -> None:
        """Take away what an earlier attempt left."""
        for left in (self.receipt, *self.path.glob("journal.sqlite*")):
            left.unlink(missing_ok=True)
        shutil.rmtree(self.results, ignore_errors=True)

    def finish(self, result: Result) -> None:
        """Write the receipt of a job whose workers have written its numbers; what has a receipt is whole."""
        beside = self.receipt.with_suffix(".new")
        beside.write_text(json.dumps(result.receipt, default=str), encoding="utf-8")
        beside.replace(self.receipt)
