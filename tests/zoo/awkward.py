"""Code that defeats methods: custom functions, checkpoints, in-place writes, branches on data, randomness."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn
from torch.autograd import Function
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from tests.zoo.registry import entry

VMAP = ("reverse", "forward")
# Methods that run whole batches, which a model that looks at its data or draws random numbers does not stand.
BATCHED = ("layerwise",)


class CubeOld(Function):
    """A custom function in the old style, without `setup_context`."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        return 3 * x**2 * grad


class CubeNew(Function):
    """The same in the new style, without a rule for vmap or forward mode."""

    @staticmethod
    def forward(x):
        return x**3

    @staticmethod
    def setup_context(ctx, inputs, output):  # noqa: ARG004
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        return 3 * x**2 * grad


class CubeVmap(CubeNew):
    """The same with a generated rule for vmap and one for forward mode."""

    generate_vmap_rule = True

    @staticmethod
    def setup_context(ctx, inputs, output):  # noqa: ARG004
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def jvp(ctx, tangent):
        (x,) = ctx.saved_tensors
        return 3 * x**2 * tangent


class NumpySine(Function):
    """Leaves torch on the way."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return torch.from_numpy(np.sin(x.detach().numpy()))

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        return grad * torch.cos(x)


class Straight(Function):
    """Rounds, and passes the gradient straight through: the derivative is what backward says it is."""

    @staticmethod
    def forward(ctx, x):  # noqa: ARG004
        return x.round()

    @staticmethod
    def backward(ctx, grad):  # noqa: ARG004
        return grad


class Custom(nn.Module):
    """A layer, a custom function, a layer."""

    def __init__(self, function: type[Function]) -> None:
        super().__init__()
        self.function, self.first, self.last = function, nn.Linear(4, 5), nn.Linear(5, 3)

    def forward(self, x):
        return self.last(self.function.apply(self.first(x)))


@entry("awkward", defeats=VMAP)
def custom_function_old():
    """A custom function without setup_context."""
    return Custom(CubeOld), torch.randn(3, 4)


@entry("awkward", defeats=VMAP)
def custom_function_new():
    """A custom function with setup_context, without a rule for vmap."""
    return Custom(CubeNew), torch.randn(3, 4)


@entry("awkward")
def custom_function_vmap():
    """A custom function with rules for vmap and forward mode."""
    return Custom(CubeVmap), torch.randn(3, 4)


@entry("awkward", defeats=(*VMAP, *BATCHED))
def numpy_inside():
    """A custom function that calls numpy."""
    return Custom(NumpySine), torch.randn(3, 4)


@entry("awkward", defeats=VMAP)
def straight_through():
    """A custom function whose backward is not the derivative of its forward."""
    return Custom(Straight), torch.randn(3, 4)


class Checkpointed(nn.Module):
    """Activations computed again in backward."""

    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.first, self.last, self.reentrant = nn.Linear(4, 5), nn.Linear(5, 3), reentrant

    def forward(self, x):
        return self.last(checkpoint(self._part, x, use_reentrant=self.reentrant))

    def _part(self, x):
        return torch.tanh(self.first(x))


@entry("awkward", defeats=(*VMAP, "layerwise", "jvp"), warns="None of the inputs have requires_grad=True")
def checkpoint_reentrant():
    """Checkpointing in the old way, which only `backward` can go through."""
    return Checkpointed(reentrant=True), torch.randn(3, 4)


@entry("awkward", defeats=("reverse", "layerwise:params"))
def checkpoint_plain():
    """Checkpointing in the new way."""
    return Checkpointed(reentrant=False), torch.randn(3, 4)


class Packed(nn.Module):
    """Saved tensors are packed away and unpacked."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 5), nn.Linear(5, 3)

    def forward(self, x):
        with saved_tensors_hooks(lambda t: t.detach().clone().numpy(), torch.from_numpy):
            return self.last(torch.tanh(self.first(x)))


@entry("awkward", defeats=("reverse",))
def saved_tensor_hooks():
    """Hooks on saved tensors."""
    return Packed(), torch.randn(3, 4)


class InPlace(nn.Module):
    """Writes into what it was given and into what it made."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x):
        x = self.layer(x)
        x[:, 0] = x[:, 1].clone().sin()
        x += 1.0
        x[:, 2:].mul_(2.0)
        return torch.relu_(x)


@entry("awkward")
def in_place():
    """Indexed assignment and in-place arithmetic on activations."""
    return InPlace(), torch.randn(3, 4)


class WritesInput(nn.Module):
    """Changes its own input."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 2)

    def forward(self, x):
        x.mul_(2.0)
        x[:, 0] = 0.5
        return self.layer(x.tanh())


@entry("awkward", defeats=("forward:inputs",))
def writes_into_input():
    """The caller's inputs must come out unharmed."""
    return WritesInput(), torch.randn(3, 4)


class Overwritten(nn.Module):
    """What a layer returns is overwritten by what comes after it."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.act, self.last = nn.Linear(4, 5), nn.ReLU(inplace=True), nn.Linear(5, 2)

    def forward(self, x):
        return self.last(self.act(self.first(x).mul_(2.0).sub_(0.3)))


@entry(
    "awkward",
    wrt=({"module": "first", "side": "output"}, {"module": "act", "side": "input"}, "params"),
    defeats=("forward:first:output", "forward:act:input"),
)
def overwritten_points():
    """Hidden values that later code writes into."""
    return Overwritten(), torch.randn(3, 4)


class Unbatched(nn.Module):
    """Writes a batched value into a tensor made without the batch, which vmap cannot do."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, x):
        out = torch.zeros(x.shape[0], 3, dtype=x.dtype)
        for i in range(3):
            out[:, i] = self.layer(x)[:, i] * (i + 1)
        return out


@entry("awkward", defeats=VMAP)
def writes_into_unbatched():
    """A buffer made by torch.zeros, filled column by column."""
    return Unbatched(), torch.randn(3, 4)


class Item(nn.Module):
    """Scales by a number taken out of the tensor, sample by sample."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, x):
        return torch.stack([self.layer(row) * float(row.detach().abs().max().item()) for row in x])


@entry("awkward", defeats=(*VMAP, *BATCHED))
def item_call():
    """.item() in a loop over the batch."""
    return Item(), torch.randn(3, 4)


class Branch(nn.Module):
    """Goes one way or the other by each sample's sum."""

    def __init__(self) -> None:
        super().__init__()
        self.yes, self.no = nn.Linear(4, 3), nn.Linear(4, 3)

    def forward(self, x):
        return torch.stack([torch.tanh(self.yes(row)) if row.sum() > 0 else self.no(row) ** 2 for row in x])


@entry("awkward", defeats=(*VMAP, *BATCHED))
def branch_per_sample():
    """A branch on each sample's data."""
    return Branch(), torch.randn(4, 4)


class BranchBatch(nn.Module):
    """Written for a batch of one: branches on the whole batch's sum."""

    def __init__(self) -> None:
        super().__init__()
        self.yes, self.no = nn.Linear(4, 3), nn.Linear(4, 3)

    def forward(self, x):
        return torch.tanh(self.yes(x)) if x.sum() > 0 else self.no(x) ** 2


@entry("awkward", defeats=(*VMAP, *BATCHED))
def branch_on_batch():
    """A branch on the batch as a whole: only one sample at a time is right."""
    return BranchBatch(), torch.tensor([[1.0, 2.0, 3.0, 4.0], [-1.0, -2.0, -3.0, -4.0], [2.0, -1.0, 0.5, 0.5]])


class OneOnly(nn.Module):
    """Written for one sample, with the batch axis taken off and put on again."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, x):
        (row,) = x
        return torch.tanh(self.layer(row)).unsqueeze(0)


@entry("awkward", defeats=BATCHED)
def one_sample_only():
    """A model that takes batches of one and no other."""
    return OneOnly(), torch.randn(3, 4)


class Nonzero(nn.Module):
    """Shapes that depend on the data."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 2)

    def forward(self, x):
        return torch.stack([self.layer(row)[:, None].mul(row[row > 0]).sum(dim=1) for row in x])


@entry("awkward", defeats=(*VMAP, *BATCHED))
def shape_from_data():
    """Boolean indexing: intermediate shapes depend on the data."""
    return Nonzero(), torch.randn(3, 4)


@entry("awkward", training=True, defeats=BATCHED)
def dropout_training():
    """Dropout in training mode: the same mask for every pass and sample."""
    return nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Dropout(0.4), nn.Linear(16, 3)), torch.randn(3, 4)


@entry("awkward", training=True, couples=True, wrt=("inputs",))
def batchnorm_training():
    """Batch norm in training mode: samples depend on each other."""
    return nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Linear(5, 2)), torch.randn(4, 4)


class BatchSoftmax(nn.Module):
    """A softmax over the batch."""

    def forward(self, x):
        return torch.softmax(x, dim=0)


class Compiled(nn.Module):
    """What `torch.compile` wraps."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))

    def forward(self, x):
        return self.body(x)


def never(graph, example_inputs):
    """A compiler that must not be reached."""
    raise AssertionError("the module was compiled")


@entry("awkward")
def compiled():
    """A compiled module, unwrapped instead of compiled."""
    return torch.compile(Compiled(), backend=never), torch.randn(3, 4)


class Counter(nn.Module):
    """Counts its calls in a buffer and in an attribute, and caches its last activation."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)
        self.calls, self.seen, self.last = nn.Buffer(torch.tensor(0)), 0, None

    def forward(self, x):
        self.calls += 1
        self.seen += 1
        self.last = self.layer(x)
        return self.last.tanh()


@entry("awkward")
def counts_calls():
    """A model with a memory."""
    return Counter(), torch.randn(3, 4)


class Autocast(nn.Module):
    """Turns autocast off for its norm, as careful code does."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(4, 6), nn.LayerNorm(6), nn.Linear(6, 3)

    def forward(self, x):
        h = self.first(x)
        with torch.autocast("cpu", enabled=False):
            h = self.norm(h)
        return self.last(h)


@entry("awkward")
def autocast_inside():
    """An autocast context within the model."""
    return Autocast(), torch.randn(3, 4)


class Hooked(nn.Module):
    """Hooks that change what passes."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 5), nn.Linear(5, 3)
        self.first.register_forward_hook(lambda _m, _a, y: torch.sin(y))
        self.last.register_forward_pre_hook(lambda _m, args: (args[0] * 2.0,))

    def forward(self, x):
        return self.last(self.first(x))


@entry("awkward")
def forward_hooks():
    """The caller's own hooks are part of the function."""
    return Hooked(), torch.randn(3, 4)


@entry("awkward")
def fx_graph_module():
    """A symbolic trace of a model."""
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
    return torch.fx.symbolic_trace(model), torch.randn(3, 4)


# The warning is torch's own, from copying what it exported.
@entry("awkward", warns=".*LeafSpec.* is deprecated")
def exported_program():
    """An exported graph with a dynamic batch."""
    model = nn.Sequential(nn.Linear(4, 5), nn.LayerNorm(5), nn.Tanh(), nn.Linear(5, 3)).eval()
    batch = torch.export.Dim("batch", min=1, max=1024)
    return torch.export.export(model, (torch.randn(3, 4),), dynamic_shapes=({0: batch},)).module(), torch.randn(3, 4)
