"""torchvision beside a torch that its compiled operators do not load into: declared, so that its models can be had.

torchvision's wheels for Linux are built against a CUDA torch. Beside a CPU torch the library of their operators (boxes
and regions, which detectors use) does not load, and then `import torchvision` fails where it registers how two of them
behave: "operator torchvision::nms does not exist". So does the import of whatever imports it, such as timm and
transformers. Classifiers need none of these operators. Here they get their schemas, and an implementation that says
what is missing.
"""

from __future__ import annotations

import functools
import re
import threading
from collections.abc import Callable
from typing import Any, NoReturn, TypeVar

import torch
from torch import nn

from jacray_workers.errors import ModelError, Plain

_T = TypeVar("_T")
_MISSING = re.compile(r"operator torchvision::(\w+) does not exist")
_ROI = "Tensor input, Tensor rois, float spatial_scale, SymInt pooled_height, SymInt pooled_width"
_SCHEMAS = {  # as torchvision's csrc/ops declares them
    "nms": "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms": "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "box_iou_rotated": "(Tensor boxes1, Tensor boxes2) -> Tensor",
    "roi_align": f"({_ROI}, int sampling_ratio, bool aligned) -> Tensor",
    "qroi_align": "(Tensor input, Tensor rois, float input_scale, int input_zero_point, float rois_scale, "
    "int rois_zero_point, float spatial_scale, SymInt pooled_height, SymInt pooled_width, int sampling_ratio, "
    "bool aligned) -> Tensor",
    "roi_pool": f"({_ROI}) -> (Tensor, Tensor)",
    "ps_roi_align": f"({_ROI}, int sampling_ratio) -> (Tensor, Tensor)",
    "ps_roi_pool": f"({_ROI}) -> (Tensor, Tensor)",
    "deform_conv2d": "(Tensor input, Tensor weight, Tensor offset, Tensor mask, Tensor bias, SymInt stride_h, "
    "SymInt stride_w, SymInt pad_h, SymInt pad_w, SymInt dilation_h, SymInt dilation_w, SymInt groups, "
    "SymInt offset_groups, bool use_mask) -> Tensor",
}
_WAY_OUT = "install the build of torchvision that belongs to this torch"
_NOTE = "torchvision's compiled operators do not load beside this torch: a model that calls one of them is refused"
_lock = threading.Lock()
_declared: list[torch.library.Library] = []  # kept: with its library a declaration goes


def with_operators(act: Callable[[], _T]) -> _T:
    """What `act` returns; where it fails for torchvision's missing operators, they are declared and it acts again.

    Args:
        act: imports something, or unpickles what does. It may be called twice.

    Raises:
        Exception: what `act` raises for any other reason.
    """
    try:
        return act()
    except Exception as error:
        if not _misses(error):
            raise
    _declare()
    return act()


def note(model: Any) -> str:
    """What a model's plan should say of torchvision's operators; empty for a model that has none of its modules."""
    if not _declared or not isinstance(model, nn.Module):
        return ""
    theirs = any(type(module).__module__.partition(".")[0] in ("torchvision", "timm") for module in model.modules())
    return _NOTE if theirs else ""


def _misses(error: BaseException | None) -> bool:
    """Whether an operator that we can declare was missing; transformers tells its causes behind errors of its own."""
    while error is not None:
        missing = _MISSING.search(str(error))
        if missing is not None and missing.group(1) in _SCHEMAS:
            return True
        error = error.__cause__ or error.__context__
    return False


def _declare() -> None:
    """Declare every operator that is not there, once."""
    with _lock:
        if _declared:
            return
        library = torch.library.Library("torchvision", "FRAGMENT")
        for name, schema in _SCHEMAS.items():
            if not hasattr(torch.ops.torchvision, name):
                library.define(name + schema)
                library.impl(name, functools.partial(_refuse, name), "CompositeExplicitAutograd")
        _declared.append(library)


def _refuse(name: str, *_: Any, **__: Any) -> NoReturn:
    rule = "needs one of torchvision's compiled operators, which do not load beside this torch"
    raise ModelError("model", rule, Plain(f"torchvision::{name}"), _WAY_OUT)
