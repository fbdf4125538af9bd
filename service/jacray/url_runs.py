"""Runs behind URLs: the same files as in a folder, and the same rules about what may be there already.

Nothing can be moved aside there, so a run that replaces another (`output.overwrite`) takes it away when it begins.
"""

from __future__ import annotations

from jacray_workers.errors import Plain, SpecError

from jacray.spec import Run
from jacray.target import JOURNAL, RESULTS, Target

SPEC, RECEIPT, REPORT = "spec.yaml", "receipt.json", "report.html"


def target(run: Run) -> Target:
    """Where the run's workers write."""
    return Target(run.url, compression=run.spec.output.compression)


def check_free(run: Run) -> bool:
    """Refuse to write where something else is; see `folders.check_free`.

    Raises:
        SpecError: the place holds what no run wrote, or the run of another spec, or workers could not reach it.
        StorageError: it cannot be reached from here.
    """
    from jacray.folders import KEY, refuse_another
    from jacray.store.faults import writing

    if run.url.startswith("memory://") and run.spec.cluster.address != "inline":
        way_out = "set cluster.address=inline, or choose another place"
        raise SpecError(
            KEY, "must be where every worker reaches it, which one process's memory is not", run.url, way_out
        )
    there = target(run)
    with writing(there):
        names = _names(there)
        if names and not names & {SPEC, JOURNAL}:
            rule = "must be a place where nothing is yet, or one that a run wrote"
            raise SpecError(KEY, rule, Plain(run.url), "choose another output.path")
        if run.spec.output.overwrite:
            return False
        if SPEC in names:
            from jacray import documents

            refuse_another(documents.fetch(f"{run.url}/{SPEC}"), run)
    return JOURNAL in names


def clear(there: Target) -> None:
    """Take an earlier run away, unless somebody computes into it.

    Raises:
        JobError: somebody does; names who.
        StorageError: it cannot be taken away.
    """
    from jacray.store.faults import writing
    from jacray.url_lease import UrlLease

    lease = UrlLease(there)
    try:
        with writing(there):
            for name in (JOURNAL, RECEIPT, REPORT, RESULTS, SPEC):
                there.remove(name)
    finally:
        lease.close()


def _names(there: Target) -> set[str]:
    from jacray.url_lease import is_lease

    return {name for name in there.names() if not is_lease(name)}
