"""What every test may ask for: one Ray for the whole session, and a client for each way to compute."""

from __future__ import annotations

import os
from collections.abc import Iterator

import jacray
import pytest

# The suite's models are tiny, and OpenMP's threads spin while they wait for each other: one thread is several times
# faster where cores are shared. torch reads this when it is first imported, which is after this file.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


@pytest.fixture(scope="session")
def local_client() -> Iterator[jacray.Client]:
    """A client on the session's one local Ray. While it lives, every other client in this process joins that Ray."""
    with jacray.Client("local", workers=2) as client:
        yield client


@pytest.fixture(scope="session")
def inline_client() -> Iterator[jacray.Client]:
    """A client that computes in this process."""
    with jacray.Client("inline", workers=2) as client:
        yield client


@pytest.fixture(params=["inline", pytest.param("local", marks=pytest.mark.ray)])
def client(request: pytest.FixtureRequest) -> jacray.Client:
    """Each client in turn, for what must hold on both."""
    found: jacray.Client = request.getfixturevalue(f"{request.param}_client")
    return found
