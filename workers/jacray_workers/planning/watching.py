"""The base of modes that look on while torch computes."""

from __future__ import annotations

from torch.utils._python_dispatch import TorchDispatchMode


class Watcher(TorchDispatchMode):
    """A dispatch mode that does not make torch import its compiler, which takes more than a second.

    Operators that take functions (`torch.cond`) come to it as well, without a schema or tags of their own.
    """

    supports_higher_order_operators = True

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False
