"""The journal of a job whose results go to a URL: kept on this machine while the job runs, and copied there.

SQLite needs a file system that locks and writes in place, which object stores are not. So the journal lies in the
user's cache folder; a copy, whole or not at all, goes beside
the results when the job begins, every now and then, and when it ends. A coordinator that is killed goes on from its own
file where it is started again on the same machine, and elsewhere from the copy: what that lacks is computed again.
Beside the copy lies a lease, so that no two coordinators anywhere compute into one place (`url_lease`).
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from jacray_workers.errors import UserError

from jacray.journal import Journal
from jacray.store.faults import writing
from jacray.target import JOURNAL, Target
from jacray.url_lease import UrlLease

# How long what has happened may be known here only; copying takes no more than a part of a job's time.
PERIOD = 2.0
PART = 0.05


class Mirror:
    """A journal here and its copy behind a URL.

    Args:
        target: where the results go.

    Attributes:
        journal: the one to write to.
        lease: what keeps others away.

    Raises:
        JobError: another job computes into that place, here or elsewhere.
        StorageError: the journal cannot be made here, or the copy not be read.
    """

    def __init__(self, target: Target) -> None:
        self.target = target
        self._folder = _home(target)
        self.lease = UrlLease(target)
        try:
            self.journal = Journal(self._folder / JOURNAL)
        except BaseException:
            self.lease.close()
            raise
        try:
            self._ahead = self._take_over()
        except BaseException:
            self.journal.close()
            self.lease.close()
            raise
        self._over = threading.Event()
        self._thread: threading.Thread | None = None
        self._copied = -1

    def begin(self) -> None:
        """Copy what there is, and from now on what comes.

        Raises:
            StorageError: it cannot be written there.
        """
        self.copy()
        self._thread = threading.Thread(target=self._follow, name="jacray-mirror", daemon=True)
        self._thread.start()

    def copy(self) -> None:
        """Bring the copy up to date.

        Raises:
            StorageError: it cannot be written there.
        """
        changes = self.journal.changes
        if changes == self._copied or self.lease.lost:  # what is there now is another's
            return
        with tempfile.TemporaryDirectory(prefix="jacray-") as folder, writing(self.target):
            self.target.write_bytes(JOURNAL, self.journal.copied(Path(folder) / JOURNAL))
        self._copied = changes

    def close(self) -> None:
        """Copy the rest, and leave nothing here; of a job that was refused what was here stays.

        Raises:
            StorageError: it cannot be written there; the journal here stays.
        """
        self._over.set()
        try:
            if self._thread is not None:
                self._thread.join()
                self.copy()
                self._ahead = self.lease.lost
        finally:
            self.journal.close()
            self.lease.close()
        if not self._ahead:
            shutil.rmtree(self._folder, ignore_errors=True)

    def _take_over(self) -> bool:
        """Go on from the copy, unless the journal here is of the same job and knows more; returns whether it is."""
        with tempfile.TemporaryDirectory(prefix="jacray-") as folder:
            path = _fetched(self.target, Path(folder))
            if path is None:  # no job there, so what is known of one here is of results that were taken away
                for job in self.journal.jobs():
                    self.journal.forget(job.id)
                return False
            with Journal(path) as there:
                if _known(self.journal) > _known(there) and _ids(self.journal) == _ids(there):
                    return True
                self.journal.replace(there)
        return False

    def _follow(self) -> None:
        pause = PERIOD
        while not self._over.wait(pause):
            began = time.monotonic()
            # A place that takes no more is noticed by the workers; the last copy tells of it.
            with contextlib.suppress(UserError):
                self.copy()
            pause = max(PERIOD, (time.monotonic() - began) / PART)


@contextlib.contextmanager
def reading(target: Target) -> Iterator[Journal | None]:
    """The journal of a run to look at, or a copy of it; None where there is none."""
    if target.path is not None:
        if not (target.path / JOURNAL).is_file():
            yield None
            return
        with Journal(target.path / JOURNAL, read_only=True) as journal:
            yield journal
        return
    with tempfile.TemporaryDirectory(prefix="jacray-") as folder:
        path = _fetched(target, Path(folder))
        if path is None:
            yield None
            return
        with Journal(path) as journal:
            yield journal


def _fetched(target: Target, folder: Path) -> Path | None:
    with writing(target):
        data = target.read_bytes(JOURNAL)
    if data is None:
        return None
    (folder / JOURNAL).write_bytes(data)
    return folder / JOURNAL


def _home(target: Target) -> Path:
    """The folder here of the journal for that place."""
    above = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    if not os.access(next(p for p in (above, *above.absolute().parents) if p.exists()), os.W_OK):
        above = Path(tempfile.gettempdir()) / f"jacray-{os.getuid()}"
    return above / "jacray" / "journals" / hashlib.sha256(target.url.encode()).hexdigest()[:32]


def _ids(journal: Journal) -> list[str]:
    return [job.id for job in journal.jobs()]


def _known(journal: Journal) -> int:
    return sum(journal.counts(job.id).done for job in journal.jobs())
