"""Several threads of one process differentiate at a time: torch's process-wide state is nobody's undoing."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import jacray
import pytest
import torch
from jacray_workers.models import as_model
from jacray_workers.sharing import forward_mode, in_forward_mode, math_attention
from torch import Tensor, nn


class Waves(nn.Module):
    """A net that no short way knows."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.net = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 4))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(torch.sin(x) * 2)


@pytest.mark.parametrize(
    "fields", [{"method": "forward", "chunk_size": 5}, {"returns": ["jvp"], "vectors": torch.ones(6)}]
)
def test_forward_mode_in_several_threads(fields: dict[str, object]) -> None:
    nets, x = [Waves(i) for i in range(4)], torch.randn(20, 6)
    known = [jacray.jacobian(net, x, method="reverse") for net in nets]

    def work(i: int) -> bool:
        found = [jacray.compute(nets[i], x, **fields) for _ in range(25)]
        if fields.get("returns"):
            return all(torch.allclose(one.jvp, known[i].sum(-1), atol=1e-5) for one in found)
        return all(torch.allclose(one.jacobian, known[i], atol=1e-5) for one in found)

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(work, range(4)))


def test_another_threads_forward_mode_is_not_ones_own() -> None:
    entered, leave = threading.Event(), threading.Event()

    def other() -> None:
        with forward_mode(), torch.autograd.forward_ad.dual_level():
            assert in_forward_mode()
            entered.set()
            leave.wait(10)

    thread = threading.Thread(target=other)
    thread.start()
    entered.wait(10)
    assert not in_forward_mode()
    leave.set()
    thread.join()


def test_the_kernel_of_attention_is_given_back_by_the_last_who_leaves() -> None:
    def flags() -> tuple[bool, bool, bool]:
        cuda = torch.backends.cuda
        return cuda.flash_sdp_enabled(), cuda.mem_efficient_sdp_enabled(), cuda.math_sdp_enabled()

    before = flags()
    first, second = math_attention(), math_attention()
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert flags() == (False, False, True)
    second.__exit__(None, None, None)
    assert flags() == before


def test_models_with_a_seed_are_built_alike_in_several_threads() -> None:
    """Another thread's draws between a seed and the weights would give another model, and nobody would notice."""
    specs = [
        {"kind": "layers", "seed": i, "layers": [{"kind": "Linear", "in_features": 40, "out_features": 40}] * 12}
        for i in range(4)
    ]

    def weights(spec: dict[str, object]) -> Tensor:
        return torch.cat([p.flatten() for p in as_model(spec).parameters()])

    known = [weights(spec) for spec in specs]
    noisy, x = nn.Sequential(nn.Linear(4, 8), nn.Dropout(), nn.Linear(8, 2)), torch.randn(6, 4)
    masks = jacray.jacobian(noisy, x, training=True, seed=5)

    def work(i: int) -> bool:
        if i == 4:
            return all(torch.equal(jacray.jacobian(noisy, x, training=True, seed=5), masks) for _ in range(10))
        return all(torch.equal(weights(specs[i]), known[i]) for _ in range(60))

    with ThreadPoolExecutor(5) as pool:
        assert all(pool.map(work, range(5)))
