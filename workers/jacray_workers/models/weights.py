"""Weights from a safetensors file: every key accounted for, every shape equal, no code run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor, nn

from jacray_workers.errors import ModelError, Plain

_SHOWN = 8


def load_weights(module: nn.Module, path: Path, argument: str = "model.weights") -> None:
    """Copy a file's tensors into the module's parameters and buffers.

    Raises:
        ModelError: the file is no safetensors file, or its keys or shapes differ from the module's; all that differ
            are listed.
    """
    given = _read(path, argument)
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
    problems = [
        *([f"missing: {_list(missing)}"] if missing else []),
        *([f"extra: {_list(extra)}"] if extra else []),
        *([f"of another shape: {_list(misshapen)}"] if misshapen else []),
    ]
    if problems:
        raise ModelError(argument, f"must hold exactly the model's tensors; {'; '.join(problems)}", Plain(path.name))
    module.load_state_dict(given, strict=False)


def _read(path: Path, argument: str) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        tensors: dict[str, Tensor] = load_file(path)
    except (SafetensorError, OSError, ValueError, KeyError) as error:
        raise ModelError(argument, f"must be a readable safetensors file: {error}", Plain(path.name)) from None
    return tensors


def _place(tensor: Tensor) -> Any:
    return (tensor.data_ptr(), tuple(tensor.shape), tensor.stride()) if tensor.numel() else id(tensor)


def _list(names: list[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more
