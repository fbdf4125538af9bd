"""What an entry of the zoo is, and the list of them."""

from __future__ import annotations

import contextlib
import warnings
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

Build = Callable[[], tuple[Any, Any]]

# Relative error allowed against the float64 reference, by the precision that the model computes in.
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4, torch.bfloat16: 6e-2}


@dataclass(frozen=True)
class Entry:
    """A model of the zoo.

    Attributes:
        name: the builder's name.
        family: the file it stands in.
        build: makes the model and a batch of inputs, from the random state it finds.
        wrt: what to differentiate with respect to, one after the other.
        defeats: methods that this model is known to defeat, as `METHOD`, or `METHOD:TARGET` where so for one target
            only; these need not serve it, and every other method has to. `jvp` where nothing can push forward.
        chain: the chain must be found for the inputs; elsewhere its refusal is as good as its answer.
        couples: samples depend on each other, so that every method must refuse.
        training: the mode to run in.
        spread: the call spreads a tuple or a dict of inputs over the model's arguments.
        tolerance: relative error allowed, where not the one of the model's precision.
        warns: the model itself warns when it is called or copied, with a message like this.
        slow: left out of the quick tests.
    """

    name: str
    family: str
    build: Build
    wrt: tuple[Any, ...]
    defeats: frozenset[str]
    couples: bool
    training: bool
    spread: bool
    tolerance: float | None
    chain: bool
    warns: str
    slow: bool

    def make(self) -> tuple[Any, Any]:
        """The model and its inputs, the same every time."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(zlib.crc32(self.name.encode()))
            return self.build()

    @contextlib.contextmanager
    def quiet(self) -> Iterator[None]:
        """Bears the warning that the model itself gives when it is called."""
        with warnings.catch_warnings():
            if self.warns:
                warnings.filterwarnings("ignore", message=self.warns)
            yield

    @property
    def about(self) -> str:
        """One line about the model."""
        return (self.build.__doc__ or "").strip().splitlines()[0]


ENTRIES: dict[str, Entry] = {}


def entry(
    family: str,
    *,
    wrt: tuple[Any, ...] = ("inputs", "params"),
    defeats: tuple[str, ...] = (),
    couples: bool = False,
    training: bool = False,
    spread: bool = True,
    tolerance: float | None = None,
    chain: bool = False,
    warns: str = "",
    slow: bool = False,
) -> Callable[[Build], Build]:
    """Put a builder into the zoo."""

    def register(build: Build) -> Build:
        name = build.__name__
        assert name not in ENTRIES, name
        assert build.__doc__, name
        ENTRIES[name] = Entry(
            name, family, build, wrt, frozenset(defeats), couples, training, spread, tolerance, chain, warns, slow
        )
        return build

    return register
