"""The table as data: what is measured, against whom, and what we promise."""

from __future__ import annotations

from dataclasses import dataclass

from benchmarks import limits, nets
from benchmarks.nets import Case

BEST = "best peer"
REGRET = 1.25
# Own methods priced at this many times the best price are not run for the regret: a call may take minutes.
PRICED_OUT = 40.0


@dataclass(frozen=True)
class Target:
    """What we promise for a piece of work; None where nothing is promised.

    Attributes:
        against: a side's name, or the best of all peers.
        speed: how many times faster than it.
        limit: within how many times the physical limit.
        bytes: how many times fewer bytes than the dense Jacobian.
        seconds: in no more than these.
    """

    against: str = BEST
    speed: float | None = None
    limit: float | None = None
    bytes: float | None = None
    seconds: float | None = None


@dataclass(frozen=True)
class Work:
    """A row of the table.

    Attributes:
        case: what is computed.
        target: what we promise.
        least: the operations and the written bytes that it needs, counted by hand.
        key: its short name; the case's unless given.
        title: as the table shows it; the case's unless given.
        peers: the only ones that are asked, where all would take minutes; None for all.
        bare: measured in a process whose environment sets nothing that torch, the C library or OpenMP reads.
    """

    case: Case
    target: Target
    least: tuple[float, float]
    key: str = ""
    title: str = ""
    bare: bool = False
    peers: tuple[str, ...] | None = None

    @property
    def name(self) -> str:
        """The short name, as `--only` takes it."""
        return self.key or self.case.key

    @property
    def shown(self) -> str:
        """The name in the table."""
        return self.title or self.case.name


MLP = (784, 512, 512, 10)
WORKS = (
    Work(nets.MLP_PARAMS, Target("vmap(jacrev)", speed=2.5, limit=1.3), limits.mlp_parameters(32, MLP)),
    Work(
        nets.MLP_PARAMS,
        Target("vmap(jacrev)", speed=12),
        limits.mlp_parameters(32, MLP),
        key="mlp-bare",
        title="the same as a user gets it, no environment variables set",
        bare=True,
    ),
    Work(nets.MLP_FACTORS, Target("vmap(jacrev)", speed=50, bytes=100), limits.mlp_factors(32, MLP)),
    Work(nets.CNN_COLOUR, Target(speed=1.7, limit=1.5), limits.cnn_parameters(16, (3, 64, 128, 128), 32, 2, 10)),
    Work(nets.CNN_GREY, Target(speed=1.7, limit=1.5), limits.cnn_parameters(32, (1, 16, 32, 32), 28, 2, 10)),
    Work(nets.BLOCK, Target(speed=1.5), limits.block_parameters(8, 64, 256, 8)),
    Work(nets.ONE_OUTPUT, Target(), limits.mlp_parameters(64, (784, 512, 512, 1))),
    Work(nets.AUTOENCODER, Target(speed=8), limits.bottleneck(32, (784, 512, 32), (32, 512, 784))),
    Work(nets.LANGUAGE, Target(speed=60), limits.language_model(2, 8000, 64, 16)),
    Work(nets.MLP_INPUTS, Target(speed=1.15, limit=1.3), limits.mlp_inputs(64, MLP)),
    Work(nets.TINY, Target("vmap(jacrev)", speed=4), limits.mlp_inputs(128, (3, 64, 5))),
    Work(nets.TINY_OWN, Target("vmap(jacrev)", speed=4), limits.mlp_inputs(128, (3, 64, 5))),
    Work(nets.CNN_INPUTS, Target(), (0.0, 4.0 * 32 * 10 * 784)),
    Work(nets.MINILM, Target(speed=1.3), limits.encoder_inputs(2, 6, 32, 384, 1536, 384)),
    Work(nets.NTK, Target("vmap(jacrev)", speed=80), limits.tangent_kernel(16, (784, 1024, 1024, 1024, 8))),
    Work(nets.ROW_SUMS, Target("analytic 2x", speed=1 / 3), limits.row_sums(3000, 3000)),
    Work(
        nets.LAST_LAYER,
        Target("vmap(jacrev)", bytes=1000, seconds=0.01),
        limits.last_layer(64, 128, 3100),
        peers=("vmap(jacrev)", "Laplace (default)"),
    ),
)


def find(name: str) -> Work:
    """The work of this short name.

    Raises:
        KeyError: there is none.
    """
    return {work.name: work for work in WORKS}[name]
