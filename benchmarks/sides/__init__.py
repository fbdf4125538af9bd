"""Who does the work: ours and every peer, each in the words of its own documentation."""

from __future__ import annotations

from benchmarks.task import Side


def everybody(only: str | None = None) -> tuple[Side, ...]:
    """All peers, or those whose name contains one of these words, separated by commas; an empty text is none."""
    from benchmarks.sides import packages, torch_func, with_jax

    every = (*torch_func.SIDES, *packages.SIDES, *with_jax.SIDES)
    if only is None:
        return every
    words = [word.strip().lower() for word in only.split(",") if word.strip()]
    return tuple(side for side in every if any(word in side.name.lower() for word in words))
