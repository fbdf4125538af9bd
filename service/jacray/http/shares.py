"""Whose the open connections are, so that nobody holds all of them.

A connection is its address's until a request on it shows a token, and then that user's.
"""

from __future__ import annotations

from collections import Counter


class Shares:
    """How many connections each user, and each address, has open.

    Args:
        most: how many one may have; None where there are no tokens, so that all are one user.
    """

    def __init__(self, most: int | None) -> None:
        self.most = most
        self._open: Counter[str] = Counter()

    def take(self, whose: str) -> bool:
        """Count one more; returns whether it may be."""
        if self.most is not None and self._open[whose] >= self.most:
            return False
        self._open[whose] += 1
        return True

    def give_back(self, whose: str) -> None:
        """Count one less."""
        self._open[whose] -= 1
        if self._open[whose] <= 0:
            del self._open[whose]


class Share:
    """One connection's place among them.

    Args:
        shares: of all connections.
        address: where it comes from.
    """

    def __init__(self, shares: Shares, address: str) -> None:
        self._shares, self._whose = shares, f"address {address}"
        self.granted = shares.take(self._whose)

    def belongs(self, user: str) -> bool:
        """A request on it is this user's; returns whether one more connection may be."""
        whose = f"user {user}"
        if whose == self._whose or self._shares.most is None:
            return True
        if not self._shares.take(whose):
            return False
        self._shares.give_back(self._whose)
        self._whose = whose
        return True

    def end(self) -> None:
        """The connection has ended."""
        if self.granted:
            self._shares.give_back(self._whose)
            self.granted = False
