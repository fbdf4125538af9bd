"""A run's folder: all its paths in one place, and the one way to put a new run where an old one may be."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jacray_workers.errors import Plain, SpecError, UserError

from jacray import documents, url_runs
from jacray.documents import Document
from jacray.lock import hold
from jacray.plans import PINNED
from jacray.spec import Run, resolved
from jacray.target import JOURNAL, Target

SPEC, RESULTS, RECEIPT, REPORT = "spec.yaml", "results.zarr", "receipt.json", "report.html"
JOURNALS = (JOURNAL, f"{JOURNAL}-wal", f"{JOURNAL}-shm")
OURS = (SPEC, RESULTS, RECEIPT, REPORT, *JOURNALS)
# What may differ between two runs of the same spec: where they ran, and what is done with the results.
_ASIDE = ("cluster", "output")
KEY = "output.path"


@dataclass(frozen=True)
class RunFolder:
    """The paths of a run."""

    path: Path

    @property
    def spec(self) -> Path:
        """The resolved spec."""
        return self.path / SPEC

    @property
    def results(self) -> Path:
        """The zarr group."""
        return self.path / RESULTS

    @property
    def receipt(self) -> Path:
        """How the results came about."""
        return self.path / RECEIPT

    @property
    def report(self) -> Path:
        """The page for people."""
        return self.path / REPORT

    @property
    def journal(self) -> Path:
        """What became of each shard."""
        return self.path / JOURNAL

    @property
    def is_run(self) -> bool:
        """Whether a run was written here, or begun."""
        return self.spec.is_file() or self.journal.is_file()


def check_free(run: Run) -> bool:
    """Refuse to write where something else is, before anything is computed.

    Returns:
        Whether a run of the same spec was begun there before, so that this one goes on from what is finished.

    Raises:
        SpecError: the folder cannot be written to, holds what no run wrote, or holds the run of another spec; the
            error says what differs and how to go on.
    """
    with run.naming():
        if run.folder is None:
            return url_runs.check_free(run)
        folder = RunFolder(run.folder)
        _check_writable(run.folder)
        if not run.folder.exists():
            return False
        if not folder.is_run and any(run.folder.iterdir()):
            rule = "must be a new folder, an empty one, or one that a run wrote"
            raise SpecError(KEY, rule, Plain(str(run.folder)), "choose another output.path")
        if run.spec.output.overwrite:
            check_idle(run.folder)
            return False
        if folder.spec.is_file():
            refuse_another(documents.read(folder.spec), run)
        return folder.journal.is_file()


def _check_writable(folder: Path) -> None:
    if folder.exists() and not folder.is_dir():
        raise SpecError(KEY, "must be a folder", Plain(str(folder)))
    if Path.cwd().is_relative_to(folder.resolve()):
        raise SpecError(KEY, "must not be the folder one stands in, which is replaced whole", Plain(str(folder)))
    above = next(p for p in (folder, *folder.absolute().parents) if p.exists())
    if not above.is_dir() or not os.access(above, os.W_OK):
        raise SpecError(KEY, f"must lie where one may write, which {above} is not", Plain(str(folder)))


def check_idle(folder: Path) -> None:
    """Refuse to replace the run of a process that still computes.

    Raises:
        JobError: it does.
    """
    os.close(hold(folder / JOURNAL))


def refuse_another(there: Document, run: Run) -> None:
    """Refuse to mix two runs.

    Raises:
        SpecError: the spec that a place holds is another; says what differs and how to go on.
    """
    changed = differences(there.data, _open(run))
    if changed:
        rule = f"holds the run of another spec ({'; '.join(changed)})"
        way_out = "choose another output.path, or set output.overwrite=true"
        raise SpecError(KEY, rule, Plain(run.place), way_out)


def _open(run: Run) -> dict[str, Any]:
    """The resolved run without what it leaves to the plan."""
    data = resolved(run)
    data["request"] = {k: v for k, v in data["request"].items() if k not in PINNED or v != PINNED[k]}
    return data


def differences(old: Mapping[str, Any], new: Mapping[str, Any], most: int = 3) -> list[str]:
    """What differs between two resolved specs, as `KEY was OLD and is NEW`; at most so many, then a count.

    What the new one leaves to the plan counts as equal.
    """
    before, after = ({k: v for k, v in _leaves(data, "") if k.partition(".")[0] not in _ASIDE} for data in (old, new))
    left = {f"request.{name}" for name in PINNED} - set(after)
    keys = [key for key in dict.fromkeys([*before, *after]) if key not in left and before.get(key) != after.get(key)]
    told = [f"{key} was {_short(before.get(key))} and is {_short(after.get(key))}" for key in keys[:most]]
    return [*told, f"and {len(keys) - most} more"] if len(keys) > most else told


def _leaves(value: Any, path: str) -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping) and value:
        for key, part in value.items():
            yield from _leaves(part, f"{path}.{key}" if path else str(key))
    elif isinstance(value, list) and any(isinstance(part, Mapping) for part in value):
        for i, part in enumerate(value):
            yield from _leaves(part, f"{path}.{i}")
    else:
        yield path, value


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 40 else f"{text[:39]}…"


@contextlib.contextmanager
def room(path: Path, *, goes_on: bool = False) -> Iterator[None]:
    """Room for a run in a folder: what an earlier run left there goes when the block ends well.

    When it does not, the new run goes and the earlier one is as it was; where there was none, finished shards of the
    new one stay, for the next attempt. Files that no run wrote stay in any case.

    Args:
        path: the folder.
        goes_on: the run is an earlier one of the same spec that goes on: nothing is moved or removed.
    """
    if goes_on:
        yield
        return
    path = path.resolve()
    fresh = not path.exists()
    path.mkdir(parents=True, exist_ok=True)
    aside = path / f".old-{os.getpid()}-{secrets.token_hex(4)}"
    try:
        _move_ours(path, aside)
        yield
    except BaseException:
        if not aside.exists() and finished(Target(str(path))):
            raise
        _remove_ours(path)
        _move_ours(aside, path)
        if fresh:
            with contextlib.suppress(OSError):  # somebody else put a file there meanwhile
                path.rmdir()
        raise
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def finished(target: Target) -> tuple[int, int] | None:
    """How many shards of the run in a folder or behind a URL are finished, of how many; None where none is."""
    from jacray.mirror import reading

    try:
        with reading(target) as journal:
            jobs = [] if journal is None else journal.jobs()
            done = journal.counts(jobs[0].id).done if journal is not None and jobs else 0
            return (done, jobs[0].shards) if done else None
    except UserError:  # a journal that cannot be read is of no use to anybody
        return None


def _move_ours(here: Path, there: Path) -> None:
    for name in OURS:
        if (here / name).exists():
            there.mkdir(exist_ok=True)
            (here / name).rename(there / name)


def _remove_ours(path: Path) -> None:
    for name in OURS:
        if (path / name).is_dir():
            shutil.rmtree(path / name, ignore_errors=True)
        else:
            (path / name).unlink(missing_ok=True)
