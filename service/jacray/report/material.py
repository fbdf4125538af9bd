"""What there is to draw from: the views of a result side by side with its inputs, labels and names."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch.utils import _pytree as pytree

from jacray.report.views import READ, Array, View, to_numpy, views

DECOMPOSED = 256  # singular values a sample, at most, where the report itself finds them
SMALLEST_IMAGE = 4  # pixels a side; anything smaller says more as a matrix


@dataclass(frozen=True)
class Material:
    """Everything that pictures are made of.

    Attributes:
        jacobians, gradients, outputs: views of these results; empty where they were not asked for.
        singular, norms: likewise, one view or None.
        inputs: the model's inputs by name, samples first.
        target: a whole number per sample, its class, or None.
        samples: how many samples the job has.
    """

    jacobians: tuple[View, ...]
    gradients: tuple[View, ...]
    outputs: tuple[View, ...]
    singular: View | None
    norms: View | None
    inputs: Mapping[str, Any] = field(repr=False)
    target: Array | None = field(repr=False)
    samples: int

    def gradient_of(self, view: View) -> View | None:
        """The weighted gradient by the leaf that a Jacobian is of."""
        same = [g for g in self.gradients if g.index == view.index and g.shape == view.shape and g.samples]
        return same[0] if same else None

    def outputs_of(self, view: View) -> View | None:
        """The model's outputs whose derivatives a Jacobian holds."""
        same = [y for y in self.outputs if y.out == view.out and y.rows == view.rows]
        return same[0] if same else None

    def input_of(self, view: View) -> Any:
        """The input that a view is by, samples first, or None."""
        wanted = (self.samples, *view.shape)
        fitting = {name: x for name, x in self.inputs.items() if tuple(x.shape) == wanted}
        if view.side != "input" or not fitting or view.leaf.endswith((":input", ":output")):
            return None
        return fitting.get(view.leaf) if view.leaf in fitting else next(iter(fitting.values()))

    def output_word(self, view: View) -> str:
        """What to call an output: a logit where there is one for each class."""
        classes = 0 if self.target is None else int(self.target.max(initial=-1)) + 1
        return "logit" if 1 < classes <= view.rows else "output"


def gather(result: Any, inputs: Any, fields: Mapping[str, Any] | None) -> Material:
    """Collect what a result offers; whatever is missing is left empty."""
    jacobians = tuple(views(result, "jacobian"))
    gradients, outputs = tuple(views(result, "weighted_gradient")), tuple(views(result, "outputs"))
    singular, norms = (next(iter(views(result, name)), None) for name in ("singular_values", "norms"))
    counts = [view.samples for view in (*jacobians, *gradients, *outputs, singular, norms) if view is not None]
    samples = getattr(getattr(result, "plan", None), "samples", max(counts, default=0))
    return Material(
        jacobians, gradients, outputs, singular, norms, _inputs(inputs, samples), _target(fields, samples), samples
    )


def _inputs(inputs: Any, samples: int) -> dict[str, Any]:
    found = pytree.tree_flatten_with_path(inputs)[0] if inputs is not None else []
    named = {".".join(str(getattr(k, "key", getattr(k, "idx", k))) for k in path): leaf for path, leaf in found}
    return {name: leaf for name, leaf in named.items() if tuple(getattr(leaf, "shape", ()))[:1] == (samples,)}


def _target(fields: Mapping[str, Any] | None, samples: int) -> Array | None:
    """The classes, if there is one whole number a sample."""
    found = (fields or {}).get("target")
    if found is None or samples == 0:
        return None
    target = to_numpy(torch.as_tensor(found))
    whole = target.ndim == 1 and len(target) == samples and np.issubdtype(target.dtype, np.integer)
    return target if whole and target.min(initial=0) >= 0 else None


def is_image(view: View) -> bool:
    """Whether one sample of the leaf is a picture: (H, W), (1, H, W) or (3, H, W)."""
    shape = view.shape
    flat = len(shape) == 2 or (len(shape) == 3 and shape[0] in (1, 3))
    return view.side == "input" and flat and min(shape[-2:]) >= SMALLEST_IMAGE


def unit(view: View) -> str:
    """In what a step of the leaf is measured."""
    return "pixel value" if place_word(view) == "pixel" else place_word(view)


def place_word(view: View) -> str:
    """What to call one number of the leaf."""
    if view.side == "param":
        return "parameter"
    return "pixel" if len(view.shape) == 3 and is_image(view) else "input"


def singular_values(material: Material, view: View, samples: Array) -> Array | None:
    """The singular values of these samples, as the job gave them or else from the Jacobian; None where too large."""
    if material.singular is not None:
        return material.singular.read(samples).reshape(len(samples), -1)
    alone = len(material.jacobians) == 1
    if not alone or not 2 <= min(view.rows, view.columns) <= DECOMPOSED or view.size > READ >> 6 or not len(samples):
        return None
    values = view.read(samples)
    j = torch.from_numpy(np.where(np.isfinite(values), values, 0)).double()
    # From the smaller Gram matrix: quick, and in float64 right to 1e-8 of the largest, which a picture cannot show.
    gram = j @ j.mT if view.rows <= view.columns else j.mT @ j
    found: Array = torch.linalg.eigvalsh(gram).clamp(min=0).sqrt().flip(-1).numpy()
    found[~np.isfinite(values).all(axis=(1, 2))] = np.nan
    return found
