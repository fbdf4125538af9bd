"""Where a file of a spec lies: a local path or a URL. Found, limited, opened, and told when it changed."""

from __future__ import annotations

import hashlib
import os
import re
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

from jacray_workers.errors import InputError, Plain, UserError, shorten
from jacray_workers.spec_parts import is_url

SCHEMES: tuple[str, ...] = ("file", "memory", "http", "https", "s3", "gs", "gcs", "az", "abfs", "abfss", "hf", "sftp")
"""URLs that only name bytes. fsspec knows others that unpack archives, follow lists of references or run commands."""

_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://")
_MARKS = ("ETag", "etag", "Content-MD5", "md5", "Last-Modified", "LastModified", "last_modified", "mtime", "created")
Stamp = tuple[str, ...]


@dataclass(frozen=True)
class Reach:
    """Which files a spec may name.

    Attributes:
        roots: local files must lie below one of these folders, symbolic links followed; None for anywhere.
        schemes: the URLs that are allowed; `file` stands for local files.
    """

    roots: tuple[Path, ...] | None = None
    schemes: tuple[str, ...] = SCHEMES

    def check_scheme(self, scheme: str, argument: str) -> None:
        """Refuse a scheme that is not allowed.

        Raises:
            InputError: naming those that are.
        """
        if scheme not in self.schemes:
            raise InputError(argument, f"must be one of {', '.join(self.schemes)}", Plain(f"{scheme}://"))

    def check_path(self, path: Path, argument: str) -> None:
        """Refuse a local path that leads beyond the roots, whether or not there is anything.

        Raises:
            InputError: the path is out of reach.
        """
        if self.roots is None:
            return
        real = path.resolve()
        if not any(real.is_relative_to(root.resolve()) for root in self.roots):
            raise InputError(argument, "must lie within the folders that are open to specs", Plain(path.name))

    def check_links(self, folder: Path, argument: str) -> None:
        """Refuse a folder that holds a symbolic link to somewhere beyond the roots.

        Raises:
            InputError: naming the link.
        """
        if self.roots is not None:
            for found in folder.rglob("*"):
                if found.is_symlink():
                    self.check_path(found, argument)


ANYWHERE = Reach()


@dataclass(frozen=True)
class Place:
    """A file or folder that exists.

    Attributes:
        path: absolute where it is local, else the URL.
        scheme: `file` for local ones.
        folder: whether it is a folder.
        argument: what the path is called in errors.
    """

    path: str
    scheme: str
    folder: bool
    argument: str

    @property
    def name(self) -> str:
        """The last part of the path."""
        return self.path.rstrip("/").rpartition("/")[2]

    @property
    def local(self) -> Path | None:
        """The path, where it is local."""
        return Path(self.path) if self.scheme == "file" else None

    def open(self) -> BinaryIO:
        """The file's bytes; the caller closes it. It can seek.

        Raises:
            InputError: it cannot be opened.
        """
        try:
            if self.scheme == "file":
                return Path(self.path).open("rb")
            system, path = filesystem(self.path, self.argument)
            return cast("BinaryIO", system.open(path, "rb"))
        except (OSError, ValueError) as error:
            if isinstance(error, UserError):
                raise
            raise unreadable(self, "file", error) from None

    def size(self) -> int:
        """How many bytes the file has."""
        return int(self.stamp()[0])

    def stamp(self) -> Stamp:
        """What changes when the content does: size, time and number of a file; of a folder, those of all its files."""
        try:
            if self.scheme != "file":
                return _remote_stamp(self)
            return _folder_stamp(Path(self.path)) if self.folder else _local_stamp(Path(self.path).stat())
        except OSError as error:
            raise unreadable(self, "file", error) from None

    def inside(self, name: str, *, folder: bool = False) -> Place:
        """A file or folder within this folder, by its relative name."""
        return Place(f"{self.path.rstrip('/')}/{name}", self.scheme, folder, self.argument)


def locate(path: str, base: Path, argument: str, suffixes: tuple[str, ...] = (), *, reach: Reach = ANYWHERE) -> Place:
    """The file or folder that a spec names.

    Args:
        path: a URL, or a path; relative paths start from `base`.
        base: the folder of the spec's file.
        argument: what the path is called in errors.
        suffixes: the endings that are allowed; none allows all.
        reach: which files may be named.

    Raises:
        InputError: there is none, it is neither file nor folder, its ending is another, or it is out of reach.
    """
    match = _SCHEME.match(path)
    scheme = match[1].lower() if match else "file"
    if match and ("::" in path or scheme not in SCHEMES):
        raise InputError(argument, f"must be a path or a URL of {', '.join(SCHEMES)}", Plain(path))
    if suffixes and not path.lower().endswith(suffixes):
        raise InputError(argument, f"must end in {' or '.join(suffixes)}", Plain(path))
    reach.check_scheme(scheme, argument)
    if scheme != "file":
        return Place(path, scheme, _is_folder(path, argument), argument)
    return _local(path, base, argument, reach)


def filesystem(url: str, argument: str) -> tuple[Any, str]:
    """Fsspec's file system for a URL, and the path in it.

    Raises:
        InputError: the package that serves such URLs is not installed.
    """
    from fsspec.core import url_to_fs

    try:
        found: tuple[Any, str] = url_to_fs(url)
    except (ImportError, ValueError) as error:
        raise InputError(argument, f"needs another package: {error}", Plain(url)) from None
    return found


def listed(folder: Place) -> list[str]:
    """The names in a folder, sorted."""
    if folder.local:
        return sorted(path.name for path in folder.local.iterdir())
    system, path = filesystem(folder.path, folder.argument)
    return sorted(str(entry).rstrip("/").rpartition("/")[2] for entry in system.ls(path, detail=False))


def unreadable(place: Place, what: str, error: BaseException) -> InputError:
    """The error for a file that is not what its kind says."""
    reason = Plain(getattr(error, "strerror", None) or str(error) or type(error).__name__)
    return InputError(place.argument, f"must be a readable {what}: {shorten(reason, 200)}", Plain(place.name))


def changed(place: Place) -> InputError:
    """The error for a file that is no longer what it was when the job was planned."""
    return InputError(place.argument, "has changed since it was opened", Plain(place.name), "run the job again")


def _local(path: str, base: Path, argument: str, reach: Reach) -> Place:
    text = path.removeprefix("file://") if is_url(path) else path
    expanded = Path(text).expanduser() if text.startswith("~") else base / text
    found = Path(os.path.abspath(expanded))  # noqa: PTH100 - `resolve` would follow links, and hide names
    reach.check_path(found, argument)
    try:
        mode = found.stat().st_mode
    except (OSError, ValueError):
        way_out = f"looked for {found}; relative paths start at the spec's folder" if str(found) != path else ""
        raise InputError(argument, "names nothing that exists", Plain(path), way_out) from None
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
        raise InputError(argument, "must be a regular file or a folder", Plain(path))
    if stat.S_ISDIR(mode):
        reach.check_links(found, argument)
    return Place(str(found), "file", stat.S_ISDIR(mode), argument)


def _is_folder(url: str, argument: str) -> bool:
    system, path = filesystem(url, argument)
    try:
        return str(system.info(path)["type"]) == "directory"
    except FileNotFoundError:
        raise InputError(argument, "names nothing that exists", Plain(url)) from None
    except Exception as error:
        if isinstance(error, UserError):
            raise
        raise InputError(argument, f"could not be reached: {error}", Plain(url)) from None


def _local_stamp(found: os.stat_result) -> Stamp:
    return (str(found.st_size), str(found.st_mtime_ns), str(found.st_ino))


def _folder_stamp(path: Path) -> Stamp:
    digest, total = hashlib.sha256(), 0
    for entry in _files(path):
        found = entry.stat()
        total += found.st_size
        digest.update(repr((os.fsencode(entry.path), _local_stamp(found))).encode())
    return (str(total), digest.hexdigest())


def _files(path: Path) -> Iterator[os.DirEntry[str]]:
    """Every file below a folder, in one order."""
    for entry in sorted(os.scandir(path), key=lambda e: os.fsencode(e.name)):
        if entry.is_dir(follow_symlinks=False):  # links may lead round in circles
            yield from _files(Path(entry.path))
        else:
            yield entry


def _remote_stamp(place: Place) -> Stamp:
    system, path = filesystem(place.path, place.argument)
    if place.folder:
        found = sorted((name, *_marks(info)) for name, info in system.find(path, detail=True).items())
        total = sum(int(size) for _, size, *_ in found)
        if any(len(marks) < 3 for marks in found):
            return (str(total),)
        return (str(total), hashlib.sha256(repr(found).encode()).hexdigest())
    info = system.info(path)
    if info.get("size") is None:
        raise InputError(place.argument, "must lie where its size is told and ranges can be read", Plain(place.path))
    return _marks(info)


def _marks(info: dict[str, Any]) -> Stamp:
    """Size, and what a service says that changes with the content; where it says nothing, the size alone."""
    return (str(info.get("size") or 0), *(f"{name}={info[name]}" for name in _MARKS if info.get(name)))
