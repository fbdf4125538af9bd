"""Hidden points of a model: put a value in place of one, or read what passes there."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, nn
from torch.utils import _pytree as pytree

from jacray_workers.errors import ModelError, RequestError
from jacray_workers.request import ModulePoint
from jacray_workers.validation import nearest


def find_module(module: nn.Module, name: str, argument: str) -> nn.Module:
    """The submodule of this name.

    Raises:
        RequestError: there is none; the nearest name is proposed.
    """
    known: dict[str, nn.Module] = dict(module.named_modules())
    if name not in known or not name:
        raise RequestError(argument, "names no submodule of the model", name, nearest(name, filter(None, known)))
    return known[name]


@contextlib.contextmanager
def hidden_points(
    module: nn.Module, replace: Mapping[ModulePoint, Tensor], capture: ModulePoint | None
) -> Iterator[dict[str, Tensor]]:
    """Replace hidden values and capture one, for calls made inside the block.

    The first tensor of a module's input or output is the one meant, in every place where it stands.

    Yields:
        A dict that holds the captured tensor under its point's key after the call.

    Raises:
        ModelError: a point is passed twice in one call, or never.
    """
    captured: dict[str, Tensor] = {}
    seen: dict[str, int] = {}
    handles = []
    for point in {*replace, *([capture] if capture else [])}:
        target = find_module(module, point.module, "wrt" if point in replace else "outputs")
        hook = _hook(point, replace.get(point), captured if point == capture else None, seen)
        if point.side == "output":
            handles.append(target.register_forward_hook(hook, always_call=False, with_kwargs=True))
        else:
            handles.append(target.register_forward_pre_hook(_before(hook), with_kwargs=True))
    try:
        yield captured
    finally:
        for handle in handles:
            handle.remove()
    for point in {*replace, *([capture] if capture else [])}:
        if seen.get(point.key) != 1:
            times = seen.get(point.key, 0)
            raise ModelError(
                f"module {point.module}",
                "must be called exactly once per pass to stand for a point of the model",
                f"{times} calls",
                "name a module that is called once",
            )


def _hook(point: ModulePoint, value: Tensor | None, captured: dict[str, Tensor] | None, seen: dict[str, int]) -> Any:
    def hook(_module: nn.Module, _args: Any, _kwargs: Any, passing: Any) -> Any:
        seen[point.key] = seen.get(point.key, 0) + 1
        leaves, spec = pytree.tree_flatten(passing)
        first = next((leaf for leaf in leaves if isinstance(leaf, Tensor)), None)
        if first is None:
            raise ModelError(
                f"module {point.module}", f"must pass a tensor at its {point.side}", type(passing).__name__
            )
        if captured is not None:
            # The rest of the model may write into what passes here, as an in-place activation does.
            captured[point.key] = (first if value is None else value).clone()
        if value is None:
            return None
        # Wherever it stands: self-attention is given one tensor three times, and tells itself from cross-attention so.
        return pytree.tree_unflatten([value if leaf is first else leaf for leaf in leaves], spec)

    return hook


def _before(hook: Any) -> Any:
    """The same for a pre-hook, which sees the arguments and returns them."""

    def before(module: nn.Module, args: Any, kwargs: Any) -> Any:
        return hook(module, args, kwargs, (args, kwargs))

    return before
