"""Where a job's results go: a folder or a URL, as plain data that travels to the workers."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jacray_workers.errors import RequestError

RESULTS = "results.zarr"
JOURNAL = "journal.sqlite"
SMALL_BYTES = 1 << 26


@dataclass(frozen=True)
class Target:
    """A run's folder, here or behind a URL. Workers write into its `results.zarr`.

    Attributes:
        url: an absolute path, or a URL that fsspec knows (`s3://BUCKET/RUN`, `gs://...`), without a slash at its end.
        options: what fsspec takes besides, such as `{"endpoint_url": ...}`.
        compression: the name of a codec that chunks go through, or None; Jacobians hardly compress.
        recheck: whether a job that is taken up again reads all that is finished and compares its checksums, or looks
            only whether all of it is there and as large as it must be. None reads what is on this machine's disks: an
            object in a store is whole or not there, and reading all would bring all of it over the net.
        small: up to how many bytes a result's attribute is read whole, as tensors, and not as arrays on disk.
    """

    url: str
    options: Mapping[str, Any] = field(default_factory=dict)
    compression: str | None = None
    recheck: bool | None = None
    small: int = SMALL_BYTES

    @property
    def path(self) -> Path | None:
        """The folder where it is a local one, else None."""
        scheme, colon, rest = self.url.partition("://")
        return Path(rest if colon else self.url) if scheme == "file" or not colon else None

    @property
    def results(self) -> str:
        """Where the numbers are: the zarr group."""
        return f"{self.url}/{RESULTS}"

    def read(self, name: str) -> str | None:
        """The text of a file beside the numbers; None where there is none."""
        found = self.read_bytes(name)
        return None if found is None else found.decode()

    def read_bytes(self, name: str) -> bytes | None:
        """What is in a file beside the numbers; None where there is none."""
        try:
            if self.path is not None:
                return (self.path / name).read_bytes()
            return bytes(self._files().cat_file(f"{self.url}/{name}"))
        except FileNotFoundError:
            return None

    def write(self, name: str, text: str) -> None:
        """Put a text beside the numbers, whole or not at all."""
        self.write_bytes(name, text.encode())

    def write_bytes(self, name: str, data: bytes) -> None:
        """Put a file beside the numbers, whole or not at all."""
        if self.path is None:
            self._put(name, data)
            return
        self.path.mkdir(parents=True, exist_ok=True)
        beside = self.path / f".{name}.{os.getpid()}"
        try:
            beside.write_bytes(data)
            beside.replace(self.path / name)
        except OSError:
            beside.unlink(missing_ok=True)
            raise

    def _put(self, name: str, data: bytes) -> None:
        files, place = self._files(), f"{self.url}/{name}"
        if self.url.startswith("local://"):  # a folder as a store: the only one that shows what is being written
            beside = f"{self.url}/.{name}.{os.getpid()}.{threading.get_ident()}"
            files.makedirs(self.url, exist_ok=True)
            files.pipe_file(beside, data)
            files.mv(beside, place)
        else:
            files.pipe_file(place, data)

    def sizes(self) -> dict[str, int]:
        """The bytes of every file of the numbers, by its path within them; in few requests, whatever their number."""
        import fsspec

        files, root = fsspec.core.url_to_fs(self.results, **self.options)
        files.invalidate_cache()
        return {path[len(root) :].lstrip("/"): info["size"] for path, info in files.find(root, detail=True).items()}

    def names(self) -> list[str]:
        """What lies at the top, by name; empty where there is nothing."""
        if self.path is not None:
            return sorted(path.name for path in self.path.iterdir()) if self.path.is_dir() else []
        files = self._files()
        files.invalidate_cache()
        try:
            found = files.ls(self.url, detail=False)
        except FileNotFoundError:
            return []
        return sorted({str(path).rstrip("/").rpartition("/")[2] for path in found})

    def remove(self, name: str) -> None:
        """Take a file, or a folder with all that is in it, away; nothing happens where there is none."""
        if self.path is not None:
            found = self.path / name
            shutil.rmtree(found) if found.is_dir() else found.unlink(missing_ok=True)
            return
        files = self._files()
        files.invalidate_cache()
        with contextlib.suppress(FileNotFoundError):
            files.rm(f"{self.url}/{name}", recursive=True)

    def begun(self) -> list[Path]:
        """What writers who were killed have left of files that they were writing here."""
        if self.path is None or not self.path.is_dir():
            return []
        return [path for path in self.path.iterdir() if re.fullmatch(r"\.[a-z]+\.[a-z]+\.\d+", path.name)]

    def _files(self) -> Any:
        import fsspec

        return fsspec.core.url_to_fs(self.url, **self.options)[0]


def as_target(to: Any) -> Target:
    """The target that a user means; relative paths start from the folder one stands in.

    Raises:
        RequestError: it is neither a path nor a URL.
    """
    if isinstance(to, Target):
        return to
    given: Any = to
    if not isinstance(given, str | os.PathLike) or not os.fspath(given):
        raise RequestError("to", "must be a folder or a URL such as s3://BUCKET/RUN", to)
    text = os.fspath(to)
    if "://" in text and not text.startswith("file://"):
        return Target(text.rstrip("/"))
    return Target(str(Path(text.removeprefix("file://")).expanduser().absolute()))
