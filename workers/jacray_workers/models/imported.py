"""A model made by a factory that a spec names. This runs the named package's code: it is for specs one trusts."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import inspect
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from jacray_workers.errors import ModelError, Plain
from jacray_workers.models.torchvision_operators import with_operators
from jacray_workers.validation import nearest


def build_imported(target: str, arguments: Mapping[str, Any], base: Path, prefixes: Sequence[str] | None = None) -> Any:
    """What the factory returns for these arguments.

    Args:
        target: `package.module:factory`.
        arguments: keyword arguments of the factory.
        base: a folder whose files can be imported besides what is installed.
        prefixes: packages that may be imported; None allows all.

    Raises:
        ModelError: the target is not allowed, not there, or raises.
    """
    module_name, _, path = target.partition(":")
    if prefixes is not None and not any(module_name == p or module_name.startswith(f"{p}.") for p in prefixes):
        allowed = f"allowed packages: {', '.join(prefixes)}" if prefixes else "importing is off here"
        raise ModelError("model.target", "names a package that may not be imported here", target, allowed)
    if module_name.partition(".")[0] in sys.stdlib_module_names:
        rule = "names a module of Python's standard library, which makes no models"
        raise ModelError("model.target", rule, target)
    with _importable(base):
        factory = _find(_import(module_name, target, base), path, target)
        return _call(factory, target, arguments)


def _find(module: ModuleType, path: str, target: str) -> Any:
    factory: Any = module
    for part in path.split("."):
        if not hasattr(factory, part):
            public = [n for n in dir(factory) if not n.startswith("_")]
            raise ModelError("model.target", f"names nothing in {module.__name__}", target, nearest(part, public[:50]))
        factory = getattr(factory, part)
    if not callable(factory):
        raise ModelError("model.target", "must name a function or class", target)
    return factory


def _import(name: str, target: str, base: Path) -> ModuleType:
    try:
        module = with_operators(lambda: importlib.import_module(name))
    except ModuleNotFoundError as error:
        if error.name and (name == error.name or name.startswith(f"{error.name}.")):
            way_out = f"install it, or put it beside the spec in {base}"
            raise ModelError("model.target", f"there is no module {error.name}", target, way_out) from None
        raise _raised("could not be imported", target, error) from error
    except Exception as error:
        raise _raised("could not be imported", target, error) from error
    _send_by_value(module, base)
    return module


def _raised(what: str, target: str, error: Exception) -> ModelError:
    return ModelError("model.target", f"{what}: {type(error).__name__}: {error}", Plain(target))


@contextlib.contextmanager
def _importable(base: Path) -> Iterator[None]:
    """Let modules in this folder be found, after everything that is installed."""
    folder = str(base.resolve())
    sys.path.append(folder)
    importlib.invalidate_caches()
    try:
        yield
    finally:
        sys.path.remove(folder)


def _send_by_value(module: ModuleType, base: Path) -> None:
    """A file beside the spec is not installed where workers run, so its classes travel with the model."""
    file = getattr(module, "__file__", None)
    if file and Path(file).resolve().is_relative_to(base.resolve()) and "site-packages" not in file:
        import cloudpickle

        cloudpickle.register_pickle_by_value(module)


def _call(factory: Any, target: str, arguments: Mapping[str, Any]) -> Any:
    with contextlib.suppress(ValueError, TypeError):
        _check_arguments(inspect.signature(factory), target, arguments)
    try:
        return with_operators(lambda: factory(**arguments))
    except Exception as error:
        given = Plain(f"{target} with {dict(arguments)}")
        raise ModelError("model.target", f"the factory raised {type(error).__name__}: {error}", given) from error


def _check_arguments(signature: inspect.Signature, target: str, arguments: Mapping[str, Any]) -> None:
    kinds = {p.kind for p in signature.parameters.values()}
    if inspect.Parameter.VAR_KEYWORD in kinds:
        return
    for name in arguments:
        if name not in signature.parameters:
            known = list(signature.parameters)
            way_out = nearest(name, known) if known else "it takes no arguments"
            raise ModelError(f"model.args.{name}", f"is not a known argument of {target}", None, way_out)
