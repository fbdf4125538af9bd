"""What requests for small work have in common, found out once: everything but their numbers.

Most requests of a script differ from its last one in their numbers alone, so that their headers are the same to the
byte. What such a header says has been read, checked and turned into what a process is told; that is kept for a while.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

T = TypeVar("T")
MOST = 256


@dataclass(frozen=True, slots=True)
class Recipe:
    """One kind of small work by one user.

    Attributes:
        item: what a process is told, the place of a body in a file aside.
        kind: what it can be computed together with; None for nothing.
        samples: how many it holds.
        model: what tells its model from others.
        size: the bytes of its message; 0 where it is JSON.
    """

    item: Mapping[str, Any]
    kind: Hashable | None
    samples: int
    model: str
    size: int


class Kept(OrderedDict[Hashable, T]):
    """The latest that were asked for; the one that nobody asked for longest goes first."""

    def find(self, key: Hashable, make: Callable[[], T]) -> T:
        """What is kept under a key, made where there is none."""
        found = self.get(key)
        if found is None:
            found = self[key] = make()
            if len(self) > MOST:
                self.popitem(last=False)
        else:
            self.move_to_end(key)
        return found
