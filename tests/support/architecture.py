"""docs/architecture.md, made from its hand-written head and the first line of every module.

python -m tests.support.architecture        # prints the page; `make docs` writes it
"""

import ast
import textwrap
from pathlib import Path

ROOT = Path(__file__).parents[2]
HEAD = ROOT / "docs" / "architecture.head.md"
PAGE = ROOT / "docs" / "architecture.md"
PACKAGE = ROOT / "t2i_rl"
NOTE = "<!-- Made by `make docs` from architecture.head.md and the modules' first lines: edit those. -->"


def first_line(module: Path) -> str:
    """The first line of a module's docstring; empty where it has none."""
    docstring = ast.get_docstring(ast.parse(module.read_text(encoding="utf-8")))
    return (docstring or "").partition("\n")[0]


def modules_of(folder: Path) -> list[Path]:
    """The modules that lie in a folder itself, its `__init__.py` left out."""
    return sorted(path for path in folder.glob("*.py") if path.name != "__init__.py")


def packages() -> list[Path]:
    """The package and every folder below it that is one, in the order of their names."""
    return sorted(path.parent for path in PACKAGE.rglob("__init__.py"))


def section(folder: Path) -> str:
    """A folder's heading, what it is, and a line a module."""
    name = folder.relative_to(ROOT).as_posix()
    lines = [wrapped(f"- `{path.name}`: {first_line(path)}") for path in modules_of(folder)]
    return "\n".join([f"### {name}/", "", wrapped(first_line(folder / "__init__.py")), "", *lines]).rstrip() + "\n"


def wrapped(text: str) -> str:
    """A paragraph or a list item in lines of at most 100 characters, as everywhere in docs/."""
    return textwrap.fill(text, 100, subsequent_indent="  " * text.startswith("- "), break_on_hyphens=False)


def page() -> str:
    """The whole of docs/architecture.md."""
    return "\n".join([NOTE, "", HEAD.read_text(encoding="utf-8"), *map(section, packages())])


if __name__ == "__main__":
    print(page(), end="")
