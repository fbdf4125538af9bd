"""The README's tree is the tree."""

from __future__ import annotations

from tests.house import README, rendered


def test_the_tree_in_the_readme_is_true() -> None:
    text = README.read_text(encoding="utf-8")
    assert rendered(text) == text, "run `python -m tests.house`"
