"""Imports run downwards: `core` is the ground floor, and knows nothing of what stands on it."""

import ast
from pathlib import Path

import pytest

import t2i_rl.core

FILES = sorted(Path(t2i_rl.core.__file__).parent.glob("*.py"))


@pytest.mark.parametrize("file", FILES, ids=[file.stem for file in FILES])
def test_core_imports_nothing_of_the_package_but_itself_and_errors(file):
    nodes = list(ast.walk(ast.parse(file.read_text(encoding="utf-8"))))
    names = [node.module or "" for node in nodes if isinstance(node, ast.ImportFrom)]
    names += [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    own = [name for name in names if name.partition(".")[0] == "t2i_rl"]
    assert all(name == "t2i_rl.core.errors" or name.startswith("t2i_rl.core.") for name in own), own
