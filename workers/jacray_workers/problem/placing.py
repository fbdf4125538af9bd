"""Where a problem's tensors are: the device, and what must stand in the place of a module's own or be cast."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from jacray_workers.errors import ModelError, Plain, RequestError
from jacray_workers.problem.problem import Problem
from jacray_workers.problem.session import lock_of
from jacray_workers.problem.state import modules_of, scripted


def place(problem: Problem, leaves: Sequence[Tensor]) -> list[Tensor]:
    """The batch on the problem's device, float leaves in the request's precision; nothing is copied needlessly."""
    placed = []
    for leaf in leaves:
        dtype = problem.cast if leaf.is_floating_point() else None
        moved = leaf.detach().to(device=problem.device, dtype=dtype, non_blocking=True)
        # A tensor made under inference_mode cannot be saved for backward.
        placed.append(moved.clone() if moved.is_inference() else moved)
    return placed


def pick_device(device: str, module: nn.Module, leaves: Sequence[Tensor]) -> torch.device:
    """The device named, or for `auto` the one the model or inputs are on, or the first GPU where there is one.

    Raises:
        RequestError: there is no such device here.
    """
    if device == "auto":
        tensors = [*module.parameters(), *module.buffers(), *leaves]
        found = next((t.device for t in tensors if t.device.type not in ("cpu", "meta")), None)
        return found or torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
    try:
        picked = torch.device(device)
    except RuntimeError:
        raise RequestError("device", "must be auto, cpu, cuda or cuda:INDEX", device) from None
    if picked.type == "cuda" and (picked.index or 0) >= torch.cuda.device_count():
        raise RequestError("device", f"this machine has {torch.cuda.device_count()} GPUs", device, "use auto or cpu")
    return torch.device("cuda", picked.index or 0) if picked.type == "cuda" else picked


def moved(module: nn.Module, device: torch.device, cast: torch.dtype | None) -> dict[str, Tensor]:
    """Parameters and buffers that must be used in place of the module's own: moved, cast, or shielded from writes.

    In training mode buffers such as running statistics are written to, so copies take the writes.
    """
    swapped: dict[str, Tensor] = {}
    # What is made under the caller's inference mode, tensors of the module included, cannot take part in derivatives.
    # The lock: in another thread's session the module may hold other tensors in its parameters' places.
    with torch.inference_mode(mode=False), lock_of(module):
        if _as_they_are(module, device, cast):
            return swapped
        for name, tensor in module.named_parameters():
            dtype = cast if tensor.is_floating_point() else None
            if tensor.is_inference() or tensor.device != device or dtype not in (None, tensor.dtype):
                made = tensor.detach().to(device=device, dtype=dtype)
                swapped[name] = made.clone() if made.is_inference() else made
        fixed = scripted(module)
        for name, buffer in module.named_buffers():
            made = buffer.detach().to(device=device, dtype=cast if buffer.is_floating_point() else None)
            alike = made.dtype == buffer.dtype and made.device == buffer.device
            if name not in fixed or not alike or made.is_inference():
                swapped[name] = made.clone() if alike else made
    stuck = sorted(fixed.intersection(swapped))
    if stuck:
        rule = "is scripted, so its tensors cannot be cast or moved by jacray"
        raise ModelError(
            "model", rule, Plain(stuck[0]), "cast or move the module itself first, or pass the unscripted one"
        )
    return swapped


def _as_they_are(module: nn.Module, device: torch.device, cast: torch.dtype | None) -> bool:
    """Whether a module has no buffers, and parameters that need no change: the walk by names is slow."""
    parts = modules_of(module)
    parameters = [p for part in parts for p in part._parameters.values() if p is not None]
    return not any(part._buffers for part in parts) and all(
        p.device == device and not p.is_inference() and (cast in (None, p.dtype) or not p.is_floating_point())
        for p in parameters
    )
