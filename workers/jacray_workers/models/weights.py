"""Weights from a file: every key accounted for, every shape equal, no code run."""

from __future__ import annotations

import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from jacray_workers.errors import ModelError, Plain, shorten

SUFFIXES = (".safetensors", ".pt", ".pth", ".bin", ".ckpt")
_SHOWN = 8


def load_weights(module: nn.Module, path: Path, argument: str = "model.weights") -> None:
    """Copy a file's tensors into the module's parameters and buffers.

    A file that torch wrote is read with `weights_only=True`. Its state dict may stand inside a mapping with other
    things, as training scripts write it, where it is the only mapping of names to tensors.

    Raises:
        ModelError: the file cannot be read without running code, or its keys or shapes differ from the module's; all
            that differ are listed.
    """
    given = _read(path, argument) if path.suffix.lower() == ".safetensors" else _read_torch(path, argument)
    own: dict[str, Tensor] = module.state_dict()
    present = {_place(tensor) for key, tensor in own.items() if key in given}
    # A tied tensor may be stored under any one of its names.
    missing = [key for key, tensor in own.items() if key not in given and _place(tensor) not in present]
    extra = [key for key in given if key not in own]
    misshapen = [
        f"{key} is {list(given[key].shape)} and should be {list(tensor.shape)}"
        for key, tensor in own.items()
        if key in given and given[key].shape != tensor.shape
    ]
    refuse_differences(missing, extra, misshapen, argument, path)
    module.load_state_dict(given, strict=False)


def refuse_differences(missing: list[str], extra: list[str], misshapen: list[str], argument: str, path: Path) -> None:
    """Refuse weights that are not exactly the model's.

    Raises:
        ModelError: one of the lists holds something.
    """
    problems = [
        *([f"missing: {_list(missing)}"] if missing else []),
        *([f"extra: {_list(extra)}"] if extra else []),
        *([f"of another shape: {_list(misshapen)}"] if misshapen else []),
    ]
    if problems:
        raise ModelError(argument, f"must hold exactly the model's tensors; {'; '.join(problems)}", Plain(path.name))


def _read(path: Path, argument: str) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        tensors: dict[str, Tensor] = load_file(path)
    except (SafetensorError, OSError, ValueError, KeyError) as error:
        raise ModelError(argument, f"must be a readable safetensors file: {error}", Plain(path.name)) from None
    return tensors


def _read_torch(path: Path, argument: str) -> dict[str, Tensor]:
    """A state dict that `torch.save` wrote, without unpickling anything but tensors and plain values."""
    _check_archive(path, argument)
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        rule = "must hold tensors only, but reading it would run code"
        raise ModelError(argument, rule, Plain(path.name), "save model.state_dict(), best as safetensors") from None
    except Exception as error:  # noqa: BLE001 - torch raises whatever a damaged archive makes it raise
        rule = f"must be a readable file of torch.save: {shorten(Plain(str(error)))}"
        raise ModelError(argument, rule, Plain(path.name)) from None
    return _state_dict(found, path, argument)


def _check_archive(path: Path, argument: str) -> None:
    """torch.save writes an uncompressed zip; a compressed one could unfold to any size."""
    try:
        with zipfile.ZipFile(path) as archive:
            bombs = [entry for entry in archive.infolist() if entry.compress_type != zipfile.ZIP_STORED]
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError):
        rule = "must be a zip archive as torch.save writes it"
        raise ModelError(
            argument, rule, Plain(path.name), "write it with torch.save(model.state_dict(), ...)"
        ) from None
    if bombs:
        raise ModelError(argument, "must not be compressed inside", Plain(path.name), "write it with torch.save")


def _state_dict(found: Any, path: Path, argument: str) -> dict[str, Tensor]:
    candidates = [found] if _is_flat(found) else []
    if not candidates and isinstance(found, Mapping):
        candidates = [value for value in found.values() if _is_flat(value)]
    if len(candidates) != 1:
        held = ", ".join(map(str, list(found)[:_SHOWN])) if isinstance(found, Mapping) else type(found).__name__
        rule = f"must hold one mapping from names to tensors, and holds {held}"
        raise ModelError(argument, rule, Plain(path.name), "write it with torch.save(model.state_dict(), ...)")
    return {str(name): tensor for name, tensor in candidates[0].items()}


def _is_flat(value: Any) -> bool:
    return isinstance(value, Mapping) and bool(value) and all(isinstance(t, Tensor) for t in value.values())


def _place(tensor: Tensor) -> Any:
    return (tensor.data_ptr(), tuple(tensor.shape), tensor.stride()) if tensor.numel() else id(tensor)


def _list(names: list[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more
