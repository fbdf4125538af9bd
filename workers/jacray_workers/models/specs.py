"""Model specs: what a YAML file, a Python caller or a request says about a model. Nothing is built here.

Every spec is frozen, forbids unknown keys and is told apart by its `kind`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Annotated, Any, ClassVar, Literal

from pydantic import ConfigDict, Field, GetJsonSchemaHandler, StrictBool, field_validator, model_validator
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema

from jacray_workers.errors import SpecError
from jacray_workers.models.formula import FunctionModel
from jacray_workers.spec_parts import Seed, Spec, SpecPath, Whole
from jacray_workers.validation import ByKind

LAYERS: tuple[str, ...] = tuple(  # one text: a hundred quoted names hide what they say
    """
    Linear Identity Flatten Unflatten Embedding Conv1d Conv2d Conv3d ConvTranspose1d ConvTranspose2d ConvTranspose3d
    MaxPool1d MaxPool2d MaxPool3d AvgPool1d AvgPool2d AvgPool3d LPPool1d LPPool2d LPPool3d
    AdaptiveAvgPool1d AdaptiveAvgPool2d AdaptiveAvgPool3d AdaptiveMaxPool1d AdaptiveMaxPool2d AdaptiveMaxPool3d
    BatchNorm1d BatchNorm2d BatchNorm3d InstanceNorm1d InstanceNorm2d InstanceNorm3d GroupNorm LayerNorm RMSNorm
    LocalResponseNorm Dropout Dropout1d Dropout2d Dropout3d AlphaDropout FeatureAlphaDropout
    CELU ELU GELU GLU Hardshrink Hardsigmoid Hardswish Hardtanh LeakyReLU LogSigmoid LogSoftmax Mish PReLU ReLU ReLU6
    SELU SiLU Sigmoid Softmax Softmax2d Softmin Softplus Softshrink Softsign Tanh Tanhshrink Threshold
    CircularPad1d CircularPad2d CircularPad3d ConstantPad1d ConstantPad2d ConstantPad3d ReflectionPad1d
    ReflectionPad2d ReflectionPad3d ReplicationPad1d ReplicationPad2d ReplicationPad3d ZeroPad1d ZeroPad2d ZeroPad3d
    PixelShuffle PixelUnshuffle ChannelShuffle Upsample UpsamplingNearest2d UpsamplingBilinear2d Fold Unfold
    TransformerEncoderLayer
    """.split()  # noqa: SIM905
)
"""The torch.nn layers that a spec may name: one tensor in, one tensor out, the batch first."""

_NAME = re.compile(r"^[A-Za-z_][A-Za-z0-9_]*$")
_TARGET = re.compile(r"^[A-Za-z_][\w]*(\.[A-Za-z_][\w]*)*:[A-Za-z_][\w]*(\.[A-Za-z_][\w]*)*$")
Weights = Annotated[
    SpecPath | None,
    Field(description="every parameter and buffer: a safetensors file, or a state dict of torch.save"),
]


class _Named(Spec):
    name: str | None = Field(default=None, description="the submodule's name; by default its place in the list")

    @field_validator("name")
    @classmethod
    def _usable(cls, name: str | None) -> str | None:
        if name is not None and (not _NAME.match(name) or len(name) > 200):
            raise SpecError("", "must be letters, digits and underscores", name)
        return name


class Layer(_Named):
    """One torch.nn layer with its constructor's arguments beside `kind`."""

    model_config = ConfigDict(extra="allow", frozen=True)
    KINDS: ClassVar[tuple[str, ...]] = LAYERS

    kind: str

    @model_validator(mode="after")
    def _fits_the_constructor(self) -> Layer:
        from jacray_workers.models.layers import check_layer

        check_layer(self.kind, self.arguments)
        return self

    @property
    def arguments(self) -> dict[str, Any]:
        """The constructor's arguments as they were written."""
        return dict(self.model_extra or {})

    @classmethod
    def __get_pydantic_json_schema__(cls, core: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        """One branch per layer, so that an editor can complete its arguments."""
        from jacray_workers.models.layers import layer_schema

        schema = handler(core)
        branches = [layer_schema(kind) for kind in LAYERS]
        return {"title": "Layer", "description": schema.get("description", ""), "oneOf": branches}


class Sequential(_Named):
    """Layers one after another, as one block."""

    kind: Literal["sequential"] = "sequential"
    layers: LayerList


class Residual(_Named):
    """`shortcut(x) + layers(x)`; without a shortcut, `x + layers(x)`."""

    kind: Literal["residual"] = "residual"
    layers: LayerList
    shortcut: LayerList = ()


class Parallel(_Named):
    """Several branches of the same input, combined into one tensor."""

    kind: Literal["parallel"] = "parallel"
    branches: tuple[LayerList, ...] = Field(min_length=1)
    combine: Literal["cat", "sum", "mean"] = "cat"
    dim: Whole = Field(default=1, description="the axis that `cat` joins along; 0 is the batch")

    @field_validator("dim")
    @classmethod
    def _not_the_batch(cls, dim: int) -> int:
        if dim == 0:
            raise SpecError("", "must not be the batch axis", dim, "use 1 for features or channels")
        return dim


LayerSpec = Annotated[Layer | Sequential | Residual | Parallel, ByKind()]
LayerList = tuple[LayerSpec, ...]


class LayersModel(Spec):
    """A net written down layer by layer."""

    kind: Literal["layers"] = "layers"
    layers: LayerList = Field(min_length=1)
    weights: Weights = None
    seed: Seed = Field(default=0, description="initialises the layers; the caller's random state is left alone")

    @model_validator(mode="after")
    def _names_are_distinct(self) -> LayersModel:
        from jacray_workers.models.layers import is_taken

        for path, layers in blocks(self.layers):
            names = [layer.name or str(i) for i, layer in enumerate(layers)]
            taken = next((i for i, name in enumerate(names) if is_taken(name)), None)
            if taken is not None:
                raise SpecError(f"{path}.{taken}.name", "is a name that torch.nn.Sequential has taken", names[taken])
            twice = next((i for i, name in enumerate(names) if name in names[:i]), None)
            if twice is not None:
                raise SpecError(f"{path}.{twice}.name", "must be used once in its list", names[twice])
        return self


class ImportModel(Spec):
    """A model made by a function or class of an installed package, or of a file beside the spec."""

    kind: Literal["import"] = "import"
    target: str = Field(description="package.module:factory")
    args: dict[str, Any] = Field(default_factory=dict)
    path: SpecPath = Field(default=".", description="a folder whose files can be imported besides what is installed")
    weights: Weights = None
    seed: Seed = Field(default=0, description="set while the factory runs; the caller's random state is left alone")

    @field_validator("target")
    @classmethod
    def _is_a_dotted_name(cls, target: str) -> str:
        if not _TARGET.match(target):
            raise SpecError("", "must be package.module:factory", target)
        return target


class GraphModel(Spec):
    """A model file that `jacray.export` or `jacray export` wrote; reading it runs no code."""

    kind: Literal["graph"] = "graph"
    path: SpecPath = Field(description="a graph file, which is a safetensors file")
    weights: Weights = None


class HuggingfaceModel(Spec):
    """A model of transformers from a local folder; needs `jacray[huggingface]`. Code in the folder is never run."""

    kind: Literal["huggingface"] = "huggingface"
    path: SpecPath = Field(description="a folder with config.json and *.safetensors, as save_pretrained writes it")
    task: Literal[
        "base", "sequence-classification", "token-classification", "question-answering", "masked-lm", "causal-lm",
        "image-classification",
    ] = "base"  # fmt: skip
    pooling: Literal["mean", "cls", "max", "last"] | None = Field(
        default=None, description="return one vector per sample, made of the last hidden states of its real tokens"
    )
    normalize: StrictBool = Field(default=False, description="scale the pooled vector to length one")
    ignore_extra: StrictBool = Field(default=False, description="leave out tensors that the task has no use for")

    @model_validator(mode="after")
    def _pools_what_is_there(self) -> HuggingfaceModel:
        if self.pooling is not None and self.task != "base":
            raise SpecError("pooling", "is for the task base, which returns hidden states", self.task)
        if self.normalize and self.pooling is None:
            raise SpecError("normalize", "needs a pooling", True)
        return self


class _Architecture(Spec):
    name: str = Field(pattern=r"^[A-Za-z0-9_.]{1,200}$", description="as the library lists it")
    args: dict[str, Any] = Field(default_factory=dict)
    weights: Weights = None
    seed: Seed = Field(default=0, description="initialises what no weights are given for")


class TimmModel(_Architecture):
    """An architecture of timm with local weights; needs `jacray[timm]`."""

    kind: Literal["timm"] = "timm"


class TorchvisionModel(_Architecture):
    """An architecture of torchvision with local weights; needs `jacray[torchvision]`."""

    kind: Literal["torchvision"] = "torchvision"


def blocks(layers: LayerList, path: str = "layers") -> Iterator[tuple[str, LayerList]]:
    """Every list of layers in a spec with its dotted path, outer lists first."""
    yield path, layers
    for i, layer in enumerate(layers):
        here = f"{path}.{i}"
        if isinstance(layer, Sequential | Residual):
            yield from blocks(layer.layers, f"{here}.layers")
        if isinstance(layer, Residual):
            yield from blocks(layer.shortcut, f"{here}.shortcut")
        if isinstance(layer, Parallel):
            for j, branch in enumerate(layer.branches):
                yield from blocks(branch, f"{here}.branches.{j}")


ModelSpec = Annotated[
    LayersModel | ImportModel | FunctionModel | GraphModel | HuggingfaceModel | TimmModel | TorchvisionModel, ByKind()
]
for _model in (Sequential, Residual, Parallel, LayersModel):
    _model.model_rebuild()
