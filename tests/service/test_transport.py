import torch
from jacray.transport import Packed, fingerprint, pack, parameters_only, unpack
from torch import nn


class Awkward(nn.Module):
    """Ties, views, odd dtypes and layouts."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(4, 4)
        self.b = nn.Linear(4, 4)
        self.b.weight = self.a.weight
        self.norm = nn.BatchNorm1d(4)
        self.register_buffer("view", self.norm.running_mean[1:3])
        self.turned = nn.Parameter(torch.randn(3, 4).t().to(torch.bfloat16), requires_grad=False)
        self.conv = nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)
        self.plain = torch.arange(6.0)[::2]
        self.sparse = torch.eye(3).to_sparse()
        self.empty = torch.empty(0)
        self.offset = lambda x: x + self.plain.sum()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.offset(self.norm(self.b(self.a(x))))


def travelled(model: nn.Module, **options: bool) -> tuple[nn.Module, Packed]:
    packed = pack(model, read_only=parameters_only(model), **options)
    return unpack(packed), packed


def test_a_model_arrives_as_it_was() -> None:
    model = Awkward().eval()
    there, _ = travelled(model)
    assert there.a.weight is there.b.weight
    assert type(there.a.weight) is nn.Parameter
    assert [p.requires_grad for p in there.parameters()] == [p.requires_grad for p in model.parameters()]
    assert [p.stride() for p in there.parameters()] == [p.stride() for p in model.parameters()]
    for mine, theirs in zip(model.state_dict().values(), there.state_dict().values(), strict=True):
        assert torch.equal(mine, theirs)
        assert mine.dtype == theirs.dtype
    assert torch.equal(there.plain, model.plain)
    assert torch.equal(there.sparse.to_dense(), torch.eye(3))
    x = torch.randn(5, 4)
    assert torch.equal(there(x), model(x))


def test_views_of_one_buffer_stay_views() -> None:
    there, _ = travelled(Awkward())
    there.norm.running_mean.fill_(7)
    assert there.view.tolist() == [7, 7]


def test_parameters_are_used_in_place_and_the_rest_is_copied() -> None:
    model = Awkward()
    there, _ = travelled(model)
    for mine, theirs in zip(model.parameters(), there.parameters(), strict=True):
        assert mine.data_ptr() == theirs.data_ptr()
    for mine, theirs in zip(model.buffers(), there.buffers(), strict=True):
        assert mine.data_ptr() != theirs.data_ptr()
    assert there.plain.data_ptr() != model.plain.data_ptr()


def test_a_parameter_that_shares_memory_with_a_buffer_is_copied() -> None:
    model = nn.Linear(2, 2)
    model.register_buffer("alias", model.weight.detach()[0])
    there, _ = travelled(model)
    assert there.weight.data_ptr() != model.weight.data_ptr()
    assert there.bias.data_ptr() == model.bias.data_ptr()


def test_a_copy_is_a_snapshot_and_no_copy_is_none() -> None:
    model = nn.Linear(2, 2)
    before = model.weight.detach().clone()
    snapshot, view = pack(model, copy=True), pack(model)
    with torch.no_grad():
        model.weight.zero_()
    assert torch.equal(unpack(snapshot).weight, before)
    assert unpack(view).weight.abs().sum() == 0


def test_tensors_travel_outside_the_pickle() -> None:
    _, packed = travelled(nn.Linear(1000, 1000))
    assert packed.nbytes > 4_000_000
    assert len(packed.pickled) < 5_000


def test_gradients_stay_at_home() -> None:
    model = nn.Linear(2, 2)
    model(torch.ones(1, 2)).sum().backward()
    there, packed = travelled(model)
    assert there.weight.grad is None
    assert len(packed.storages) == 2


def test_a_small_view_of_a_large_tensor_travels_alone() -> None:
    large = torch.arange(100_000.0)
    packed = pack({"x": large[10:20]}, compact=True)
    assert packed.nbytes < 1_000
    assert torch.equal(unpack(packed)["x"], large[10:20])


def test_a_fingerprint_sees_a_write_to_what_is_shared_and_only_that() -> None:
    model = Awkward()
    packed = pack(model, read_only=parameters_only(model))
    mark = fingerprint(packed)
    model.norm.running_mean.add_(1)
    assert fingerprint(packed) == mark
    model.conv.weight.data[0, 0, 0, 0] += 1
    assert fingerprint(packed) != mark
