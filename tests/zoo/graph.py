"""Graphs, sets and point clouds: gather, scatter, and reductions over neighbours."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812

from tests.zoo.registry import entry

SOURCE, TARGET = torch.tensor([0, 1, 2, 3, 4, 1, 0, 3]), torch.tensor([1, 2, 0, 4, 3, 0, 2, 1])


class _GCN(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        adjacency = torch.eye(5)
        adjacency[SOURCE, TARGET] = 1.0
        self.adjacency = nn.Buffer(adjacency / adjacency.sum(dim=1, keepdim=True))
        self.first, self.second = nn.Linear(3, 6), nn.Linear(6, 2)

    def forward(self, x):
        return self.second(self.adjacency @ F.relu(self.first(self.adjacency @ x))).sum(dim=1)


@entry("graph")
def graph_convolution():
    """A fixed adjacency matrix in a buffer."""
    return _GCN(), torch.randn(2, 5, 3)


class _MessagePassing(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.source, self.target = nn.Buffer(SOURCE), nn.Buffer(TARGET)
        self.message, self.update = nn.Linear(6, 4), nn.Linear(7, 3)

    def forward(self, x):
        messages = torch.tanh(self.message(torch.cat([x[:, self.source], x[:, self.target]], dim=-1)))
        pooled = torch.zeros(len(x), 5, 4, dtype=x.dtype).index_add(1, self.target, messages)
        return self.update(torch.cat([x, pooled], dim=-1))


@entry("graph")
def message_passing():
    """Gather along edges, scatter-add to nodes."""
    return _MessagePassing(), torch.randn(2, 5, 3)


class _GAT(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.source, self.target = nn.Buffer(SOURCE), nn.Buffer(TARGET)
        self.lift, self.score = nn.Linear(3, 4), nn.Linear(8, 1)

    def forward(self, x):
        h = self.lift(x)
        edges = torch.cat([h[:, self.source], h[:, self.target]], dim=-1)
        weight = torch.exp(F.leaky_relu(self.score(edges), 0.2))
        place = self.target.view(1, -1, 1).expand(len(x), -1, 1)
        total = weight.new_zeros(len(x), 5, 1).scatter_add(1, place, weight)
        share = weight / total.gather(1, place)
        place = place.expand(-1, -1, 4)
        return h.new_zeros(len(x), 5, 4).scatter_add(1, place, share * h[:, self.source])


@entry("graph")
def graph_attention():
    """A softmax over each node's edges by scatter and gather."""
    return _GAT(), torch.randn(2, 5, 3)


class _DeepSets(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.phi, self.rho = nn.Linear(2, 6), nn.Linear(6, 2)

    def forward(self, points, mask):
        h = torch.tanh(self.phi(points)) * mask.unsqueeze(-1)
        return self.rho(h.sum(dim=1) / mask.sum(dim=1, keepdim=True))


@entry("graph")
def deep_sets():
    """A masked mean over a set; the mask is an input of whole numbers."""
    return _DeepSets(), {
        "points": torch.randn(3, 4, 2),
        "mask": torch.tensor([[1, 1, 1, 1], [1, 0, 1, 0], [1, 1, 0, 0]]),
    }


class _PointNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.local = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 6))
        self.head = nn.Linear(6, 3)

    def forward(self, points):
        return self.head(self.local(points).max(dim=1).values)


@entry("graph")
def point_net():
    """The largest over the points."""
    return _PointNet(), torch.randn(2, 5, 3)


class _EdgeConv(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.edge = nn.Linear(6, 4)

    def forward(self, points):
        distance = (points.unsqueeze(1) - points.unsqueeze(2)).square().sum(dim=-1)
        near = distance.topk(2, dim=-1, largest=False).indices
        neighbours = torch.stack([p[n] for p, n in zip(points, near, strict=True)])
        centre = points.unsqueeze(2).expand_as(neighbours)
        return torch.tanh(self.edge(torch.cat([centre, neighbours - centre], dim=-1))).mean(dim=2)


@entry("graph")
def nearest_neighbours():
    """Neighbours found by distance, sample by sample in a Python loop."""
    return _EdgeConv(), torch.randn(2, 5, 3)


class _Pairwise(nn.Module):
    """Energy of a cloud of particles from their distances."""

    def forward(self, positions):
        i, j = torch.triu_indices(positions.shape[1], positions.shape[1], 1)
        r = torch.linalg.vector_norm(positions[:, i] - positions[:, j], dim=-1)
        return (r**-6 - r**-3).sum(dim=-1)


@entry("graph", wrt=("inputs",))
def particles():
    """Forces: a scalar per sample and no parameters."""
    return _Pairwise(), torch.randn(2, 4, 3) * 2


class _Segments(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.into = nn.Linear(2, 3)

    def forward(self, x, segment):
        h = self.into(x)
        index = segment.unsqueeze(-1).expand_as(h)
        top = h.new_full((len(x), 3, 3), -9.0).scatter_reduce(1, index, h, "amax", include_self=False)
        return top.sum(dim=-1)


@entry("graph", defeats=("reverse", "forward"))
def segment_max():
    """The largest of each segment by scatter_reduce; segments differ by sample."""
    segment = torch.tensor([[0, 0, 1, 2, 2], [2, 1, 1, 0, 0]])
    return _Segments(), (torch.randn(2, 5, 2), segment)
