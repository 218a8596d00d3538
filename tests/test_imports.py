"""Imports run downwards: every import of the package is read and held to the order of its rooms."""

import ast
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import t2i_rl

PACKAGE = Path(t2i_rl.__file__).parent
FLOORS = (
    ("",),  # the package itself: its names are found at their first use, so that it imports nothing
    ("core",),
    ("shapes", "gaussianity"),
    ("models",),
    ("rewards", "benchmarks"),
    ("evaluation", "data"),
    ("methods", "callbacks", "pretrain"),
    ("tasks", "study"),
    ("command",),
)
FLOOR_OF = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}
BESIDE = {("pretrain", "callbacks")}  # rooms of one floor that may be imported all the same


def modules() -> dict[str, Path]:
    """Every module of the package by its dotted name without `t2i_rl.`."""
    names = {}
    for file in sorted(PACKAGE.rglob("*.py")):
        parts = file.relative_to(PACKAGE).with_suffix("").parts
        names[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = file
    return names


MODULES = modules()


@dataclass(frozen=True)
class Import:
    """One module that another imports: both without `t2i_rl.`, the line, and where the statement stands."""

    module: str
    target: str
    line: int
    in_function: bool
    for_types_alone: bool

    def __str__(self) -> str:
        file = MODULES[self.module].relative_to(PACKAGE.parent) if self.module in MODULES else self.module
        return f"{file}:{self.line} imports t2i_rl.{self.target}"


def imports_of(module: str, source: str) -> Iterator[Import]:
    """What a module's source imports of the package, wherever the statement stands."""
    nodes: list[tuple[ast.AST, bool, bool]] = [(ast.parse(source), False, False)]
    while nodes:
        node, in_function, for_types = nodes.pop()
        in_function = in_function or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        for_types = for_types or (isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test))
        nodes += [(child, in_function, for_types) for child in ast.iter_child_nodes(node)]
        for name in _imported_names(node):
            if name.startswith("t2i_rl."):
                yield Import(module, name.removeprefix("t2i_rl."), node.lineno, in_function, for_types)


def _imported_names(node: ast.AST) -> list[str]:
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if not isinstance(node, ast.ImportFrom):
        return []
    assert not node.level, f"line {node.lineno}: imports are written with t2i_rl in front"
    if node.module == "t2i_rl":
        users_own = {alias.name for alias in node.names} & set(t2i_rl.__all__)
        assert not users_own, f"line {node.lineno}: import {users_own} from the module that defines it"
    names = [f"{node.module}.{alias.name}" for alias in node.names]
    return [name if name.removeprefix("t2i_rl.") in MODULES else node.module or "" for name in names]


@pytest.fixture(scope="module")
def imports() -> list[Import]:
    sources = {module: file.read_text(encoding="utf-8") for module, file in MODULES.items()}
    lines = {line for module, source in sources.items() for line in imports_of(module, source)}
    return sorted(lines, key=lambda line: (line.module, line.line, line.target))


def against(imports: list[Import], rule: Callable[[Import], bool]) -> str:
    """The imports that a rule is broken by, a line each."""
    return "\n".join(str(line) for line in imports if rule(line))


def room_of(module: str) -> str:
    return module.partition(".")[0]


def _goes_up(line: Import) -> bool:
    above, below = room_of(line.module), room_of(line.target)
    allowed = above == below or (above, below) in BESIDE
    return not allowed and FLOOR_OF[below] >= FLOOR_OF[above]


def _between(first: str, second: str) -> Callable[[Import], bool]:
    ends = (f"{first}.", f"{second}.")
    return lambda line: any(
        f"{line.module}.".startswith(here) and f"{line.target}.".startswith(there) for here, there in (ends, ends[::-1])
    )


def _between_methods(line: Import) -> bool:
    """From one method's folder into another's; `methods/base` and its neighbours belong to no method."""
    both = [module.split(".") for module in (line.module, line.target)]
    if any(parts[0] != "methods" or len(parts) < 3 for parts in both) or line.target == "methods.policy.base":
        return False
    return both[0][1] != both[1][1]


def _gives_pictures_a_model(line: Import) -> bool:
    if room_of(line.module) != "rewards" or not line.target.startswith("models.autoregressive"):
        return False
    return "needs_images = False" not in MODULES[line.module].read_text(encoding="utf-8")


def test_every_room_stands_on_a_floor():
    assert {room_of(module) for module in MODULES} <= set(FLOOR_OF)


def test_a_room_imports_lower_rooms_and_itself_alone(imports):
    assert not (lines := against(imports, _goes_up)), lines


def test_models_that_write_tokens_and_models_that_denoise_know_nothing_of_each_other(imports):
    rule = _between("models.autoregressive", "models.diffusion")
    assert not (lines := against(imports, rule)), lines


def test_a_reward_that_reads_pictures_knows_no_autoregressive_model(imports):
    assert not (lines := against(imports, _gives_pictures_a_model)), lines


def test_a_methods_folder_imports_no_other_methods(imports):
    assert not (lines := against(imports, _between_methods)), lines


def test_no_function_imports_anything_of_the_package(imports):
    assert not (lines := against(imports, lambda line: line.in_function)), lines


def test_modules_import_each_other_in_no_circle(imports):
    graph: dict[str, set[str]] = {module: set() for module in MODULES}
    for line in imports:
        if not line.for_types_alone:
            graph[line.module].add(line.target)
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(" imports ".join(reversed(error.args[1])))


def test_an_import_is_read_wherever_it_stands():
    source = """
import t2i_rl.core.errors
from t2i_rl.core import files, errors
from t2i_rl.core.prompts import Prompt
import torch
if TYPE_CHECKING:
    from t2i_rl.models.diffusion.base import LatentDiffusion
class Part:
    def build(self):
        from t2i_rl.rewards.gdino import GDino
"""
    read = {(line.target, line.in_function, line.for_types_alone) for line in imports_of("shapes.made_up", source)}
    assert read == {
        ("core.errors", False, False),
        ("core.files", False, False),
        ("core.prompts", False, False),
        ("models.diffusion.base", False, True),
        ("rewards.gdino", True, False),
    }


@pytest.mark.parametrize(
    ("module", "target", "rule"),
    [
        ("core.files", "shapes.scene", _goes_up),
        ("shapes.scene", "gaussianity.moments", _goes_up),
        ("callbacks.progress", "pretrain.fit", _goes_up),
        ("models.diffusion.base", "models.autoregressive.codes", _between("models.autoregressive", "models.diffusion")),
        ("models.autoregressive.codes", "models.diffusion.base", _between("models.autoregressive", "models.diffusion")),
        ("methods.irg.policy", "methods.policy.loss", _between_methods),
        ("rewards.oracle", "models.autoregressive.rollout", _gives_pictures_a_model),
    ],
)
def test_a_broken_rule_is_told_with_file_and_line(module, target, rule):
    line = Import(module, target, 7, in_function=False, for_types_alone=False)
    assert rule(line)
    assert str(line) == f"t2i_rl/{module.replace('.', '/')}.py:7 imports t2i_rl.{target}"


@pytest.mark.parametrize(
    ("module", "target"),
    [
        ("pretrain.fit", "callbacks.progress"),
        ("methods.irg.policy", "methods.policy.base"),
        ("methods.irg.policy", "methods.base"),
        ("tasks.train", "core.errors"),
    ],
)
def test_what_the_rules_allow_is_no_violation(module, target):
    line = Import(module, target, 7, in_function=False, for_types_alone=False)
    assert not _goes_up(line) and not _between_methods(line)
