"""A run as its YAML file says it: five blocks, checked before anything is built, read or started."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from jacray_workers.errors import Plain, SpecError, UserError
from jacray_workers.models.specs import ModelSpec
from jacray_workers.request import Request
from jacray_workers.sources.specs import InputSpec
from jacray_workers.spec_parts import Spec, SpecPath, is_url
from jacray_workers.validation import explain, nearest
from pydantic import Field, StrictBool, ValidationError, field_validator

from jacray import documents
from jacray.documents import Document
from jacray.overrides import override
from jacray.plans import PINNED, Pin

Count = Annotated[int, Field(strict=True, ge=1, le=100_000)]
WRITABLE = ("file", "local", "memory", "s3", "gs", "gcs", "az", "abfs", "abfss")
"""URLs that results may go to: of the inputs' those that take objects whole, and `local`, a folder as such a store."""
_ADDRESSES = ("inline", "local", "auto")


class Cluster(Spec):
    """Where the job runs."""

    address: str = Field(
        default="local",
        description="inline (this process), local (a Ray for this run), auto or ray://HOST:PORT",
        json_schema_extra={"pattern": "^(inline|local|auto|ray://.+)$"},
    )
    workers: Count = 2
    cpus_per_worker: Annotated[float, Field(strict=True, gt=0, le=4096, allow_inf_nan=False)] = Field(
        default=1, description="rounded down, and at least 1, also each worker's number of torch threads"
    )
    gpus_per_worker: Annotated[float, Field(strict=True, ge=0, le=64, allow_inf_nan=False)] = Field(
        default=0, description="0.5 lets two workers share one"
    )
    resources: dict[str, Annotated[float, Field(strict=True, gt=0, allow_inf_nan=False)]] = Field(
        default={}, description="what else of a Ray cluster each worker takes, by name"
    )
    runtime_env: dict[str, Any] = Field(
        default={}, description="what a running Ray cluster gets sent or installs, in Ray's words: py_modules, pip, ..."
    )
    shard_timeout: Annotated[float, Field(strict=True, gt=0, allow_inf_nan=False)] | None = Field(
        default=None, description="seconds a worker may take over a shard before it is replaced; null for any number"
    )
    shard_size: Annotated[int, Field(strict=True, ge=1)] | None = Field(
        default=None, description="samples per shard; null leaves it to the plan"
    )
    on_error: Literal["fail", "skip"] = Field(
        default="fail", description="skip finishes the job without the samples that always fail, and lists them"
    )

    @field_validator("address")
    @classmethod
    def _is_known(cls, address: str) -> str:
        if address in _ADDRESSES or (address.startswith("ray://") and len(address) > len("ray://")):
            return address
        close = nearest(address, _ADDRESSES)
        way_out = close if close.startswith("did you mean") else ""
        raise SpecError("", "must be inline, local, auto or ray://HOST:PORT", address, way_out)


class Output(Spec):
    """Where the results go."""

    path: SpecPath | None = Field(
        default=None,
        description="the run folder, from the folder one stands in, or a URL (s3://BUCKET/RUN); runs/NAME by default",
    )
    report: StrictBool = True
    overwrite: StrictBool = Field(default=False, description="replace the run of another spec")
    compression: Literal["zstd", "gzip", "blosc"] | None = Field(
        default=None, description="how blocks are compressed; Jacobians hardly are, and it costs time"
    )

    @field_validator("path")
    @classmethod
    def _is_a_place(cls, path: str | None) -> str | None:
        if path is not None and is_url(path):
            check_url(path)
        return path


def check_url(url: str) -> None:
    """Refuse a URL that a run cannot be written to.

    Raises:
        SpecError: its scheme is none that takes results, it is a chain of several, or it holds a password.
    """
    scheme, _, rest = url.partition("://")
    if "::" in url or scheme not in WRITABLE:
        raise SpecError("", f"must be a folder, or a URL of {', '.join(WRITABLE)}", url)
    user, at, _ = rest.partition("/")[0].rpartition("@")
    if at and ":" in user:
        way_out = "give it in the environment, as the store's own tools take it"
        rule = "must hold no password, since a run's spec shows its path"
        raise SpecError("", rule, Plain(f"{scheme}://NAME:...@"), way_out)


class RunSpec(Spec):
    """A whole run."""

    model: ModelSpec
    inputs: InputSpec
    request: Request = Request()
    cluster: Cluster = Cluster()
    output: Output = Output()

    @field_validator("request")
    @classmethod
    def _directions_are_readable(cls, request: Request) -> Request:
        from jacray_workers.sources.weighting import check_directions

        for name in ("weights", "vectors"):
            check_directions(getattr(request, name), name)
        return request


@dataclass(frozen=True)
class Run:
    """A checked spec with where it came from.

    Attributes:
        spec: the blocks, defaults filled in.
        document: the YAML with its overrides.
        base: the folder that relative paths start from.
        folder: the run folder; None for a run behind a URL.
        url: the URL of such a run, without a slash at its end; else empty.
    """

    spec: RunSpec
    document: Document
    base: Path
    folder: Path | None
    url: str = ""

    @property
    def place(self) -> str:
        """The run folder or the URL, as it was given."""
        return self.url or str(self.folder)

    @property
    def title(self) -> str:
        """A name for people."""
        return self.place.rpartition("/")[2]

    @contextlib.contextmanager
    def naming(self) -> Iterator[None]:
        """Errors raised inside name the file, the line and the dotted key as well."""
        try:
            yield
        except UserError as error:
            located = _located(error, self.document)
            for note in getattr(error, "__notes__", ()):
                located.add_note(note)
            raise located from error.__cause__

    def runtime_env(self) -> dict[str, Any]:
        """The cluster's runtime environment, its local folders as whole paths."""
        return _sent(self.spec.cluster.runtime_env, lambda path: str(self.base.absolute() / path))


def read_run(path: str | Path, overrides: Iterable[str] = ()) -> Run:
    """Read a YAML file, apply overrides, and check everything that can be checked without reading data.

    The file may be behind a URL, as the spec of a run there is; relative paths in it start from where one stands.

    Raises:
        SpecError: naming the file and line or the override, the key, the rule, the value and the nearest known name.
    """
    document = override(documents.fetch(str(path)) if is_url(str(path)) else documents.read(Path(path)), overrides)
    spec = check(document)
    base = Path() if is_url(str(path)) else Path(path).parent
    place = spec.output.path or f"runs/{Path(path).stem}"
    if is_url(place) and not place.startswith("file://"):
        return Run(spec, document, base, None, place.rstrip("/"))
    return Run(spec, document, base, Path(place.removeprefix("file://")).expanduser())


def check(document: Document) -> RunSpec:
    """The spec that a document holds.

    Raises:
        SpecError: naming the place, the key, the rule, the value and the nearest known name.
    """
    try:
        return RunSpec.model_validate(document.data)
    except ValidationError as error:
        raise _located(SpecError(*explain(error, RunSpec)), document) from None


def _located(error: UserError, document: Document) -> UserError:
    key = error.argument
    first = key.partition(".")[0]
    if first in Request.model_fields:
        key = f"request.{key}"
    elif key in ("to", "journal"):  # what `submit` calls it
        key = "output.path"
    return type(error)(f"{document.place(key)}: {key}", error.rule, error.value, error.way_out)


def schema() -> dict[str, Any]:
    """The JSON Schema of the YAML, for editors."""
    found = RunSpec.model_json_schema()
    for model in found["$defs"].values():
        # Models have their kind by default; specs must say it.
        if "kind" in model.get("properties", {}):
            model["required"] = list(dict.fromkeys(["kind", *model.get("required", ())]))
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": "jacray run", **found}


def resolved(run: Run, pins: Mapping[Pin, Any] | None = None) -> dict[str, Any]:
    """The run as plain data with every default written out, its relative paths starting from the run folder.

    Of a run behind a URL its local paths are whole ones, of this machine.

    Args:
        run: the run.
        pins: what the plan decided, put in where the spec left it open.
    """
    data: dict[str, Any] = _plain(run.spec.model_dump())
    data["output"] |= {"path": run.place, "overwrite": False}
    for block in ("model", "inputs"):
        data[block] = _moved(data[block], run.base, run.folder)
    for key in ("weights", "vectors"):
        data["request"][key] = _moved(data["request"][key], run.base, run.folder)
    data["request"] |= {key: pin for key, pin in (pins or {}).items() if data["request"][key] == PINNED[key]}
    data["cluster"]["runtime_env"] = _sent(
        data["cluster"]["runtime_env"], lambda path: _rebased(path, run.base, run.folder)
    )
    return data


def _sent(environment: Mapping[str, Any], place: Callable[[str], Any]) -> dict[str, Any]:
    """A runtime environment with each local path that Ray uploads put in its place."""

    def one(path: Any) -> Any:
        return place(path) if isinstance(path, str) and not is_url(path) else path

    found = dict(environment)
    if "working_dir" in found:
        found["working_dir"] = one(found["working_dir"])
    if isinstance(found.get("py_modules"), list):
        found["py_modules"] = [one(path) for path in found["py_modules"]]
    return found


def _plain(value: Any) -> Any:
    """Lists and dicts only, `kind` first, names left out where there is none."""
    if isinstance(value, Mapping):
        first = {"kind": value["kind"]} if "kind" in value else {}
        rest = {str(k): _plain(v) for k, v in value.items() if not (k in ("name", "of") and v is None)}
        return first | rest
    return [_plain(part) for part in value] if isinstance(value, list | tuple) else value


def _moved(value: Any, base: Path, folder: Path | None) -> Any:
    """The same block with paths that start from another folder."""
    if not isinstance(value, Mapping):
        return value
    if "kind" not in value:
        return {name: _moved(part, base, folder) for name, part in value.items()}
    return {
        key: _rebased(part, base, folder)
        if key in ("path", "weights")
        else [_moved(step, base, folder) for step in part]
        if key == "preprocess"
        else part
        for key, part in value.items()
    }


def _rebased(path: Any, base: Path, folder: Path | None) -> Any:
    if not isinstance(path, str) or Path(path).is_absolute() or path.startswith("~") or is_url(path):
        return path
    return os.path.normpath((base / path).absolute()) if folder is None else os.path.relpath(base / path, folder)
