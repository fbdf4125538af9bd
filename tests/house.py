"""The tree in the README: a line per file, from the files' own first lines; `python -m tests.house` rewrites it."""

from __future__ import annotations

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
PACKAGES = ("service/jacray", "workers/jacray_workers")
BEGIN, END = "<!-- tree -->\n", "<!-- /tree -->"


def first_line(path: Path) -> str:
    """The first sentence of a module's docstring, as one line."""
    if path.suffix != ".py":
        return {".j2": "the report's template", ".typed": ""}.get(path.suffix, "")
    doc = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    paragraph = " ".join(doc.split("\n\n")[0].split())
    return re.split(r"(?<=[a-z`)])\. ", paragraph)[0].rstrip(".")


def lines(folder: Path, depth: int = 0) -> list[str]:
    """A line per file below a folder, folders before files."""
    found = []
    entries = sorted(folder.iterdir(), key=lambda p: (p.is_file(), p.name))
    for path in entries:
        if path.name in ("__pycache__", "py.typed", "__init__.py") or path.suffix == ".pyc":
            continue
        pad = "  " * depth
        if path.is_dir():
            about = first_line(path / "__init__.py") if (path / "__init__.py").exists() else ""
            found += [f"{pad}{path.name + '/':<{26 - 2 * depth}} {about}".rstrip(), *lines(path, depth + 1)]
        else:
            found.append(f"{pad}{path.name:<{26 - 2 * depth}} {first_line(path)}".rstrip())
    return found


def tree() -> str:
    """The tree as the README shows it."""
    parts = []
    for package in PACKAGES:
        about = first_line(ROOT / package / "__init__.py")
        parts += [f"{package}/", f"  {about}" if about else "", *[f"  {line}" for line in lines(ROOT / package)], ""]
    return "\n".join(part for part in parts[:-1])


def rendered(text: str) -> str:
    """The README with the tree as it is now."""
    before, rest = text.split(BEGIN)
    after = rest.split(END)[1]
    return f"{before}{BEGIN}```\n{tree()}\n```\n{END}{after}"


if __name__ == "__main__":
    README.write_text(rendered(README.read_text(encoding="utf-8")), encoding="utf-8")
