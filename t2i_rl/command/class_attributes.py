"""Constants of classes, read from their source: importing every model for the sake of a name would take seconds."""

import ast
from collections.abc import Iterator
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import yaml

BARE = ("abc", "builtins", "lightning", "torch")  # packages whose classes declare nothing of ours


def class_attribute(target: str, name: str):
    """The constant `name` of the class at the dotted path `target`, its own or inherited; the class is imported only
    where its source does not tell.

    Raises:
        ImportError: there is no such module.
        AttributeError: the module has no such class, or the class no such constant.
    """
    try:
        value = _read(target, name)
    except ValueError:  # an expression, or a base that is one
        from hydra.utils import get_class

        return getattr(get_class(target), name)
    if value is None:
        raise AttributeError(f"{target} has no {name}")
    return ast.literal_eval(value)


def load_yaml(path: Path) -> dict:
    """A config as it stands in its file, read by the fastest reader that there is."""
    return yaml.load(path.read_text(encoding="utf-8"), getattr(yaml, "CSafeLoader", yaml.SafeLoader)) or {}


def models_of(families: frozenset[str], conf: Path) -> list[str]:
    """Names of the model configs whose class is of one of these families."""
    targets = {path.stem: load_yaml(path).get("_target_") for path in sorted((conf / "model").glob("*.yaml"))}
    return [name for name, target in targets.items() if target and class_attribute(target, "family") in families]


def _read(target: str, name: str) -> ast.expr | None:
    """The literal that `name` is set to; None where neither the class nor a base sets it."""
    module, _, class_name = target.rpartition(".")
    if module.split(".")[0] in BARE:
        return None
    tree = _tree(module)
    definition = next((node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == class_name), None)
    if definition is None:
        if class_name not in (imported := _imports(tree)):
            raise AttributeError(f"{module} has no class {class_name}")
        return _read(imported[class_name], name)
    for node in definition.body:
        if isinstance(node, ast.Assign | ast.AnnAssign) and node.value and name in _assigned(node):
            value = node.value.args[0] if isinstance(node.value, ast.Call) else node.value  # frozenset({...})
            ast.literal_eval(value)
            return value
    return next((value for base in _bases(definition, tree, module) if (value := _read(base, name))), None)


def _assigned(node: ast.Assign | ast.AnnAssign) -> list[str]:
    targets = node.targets if isinstance(node, ast.Assign) else [node.target]
    return [target.id for target in targets if isinstance(target, ast.Name)]


def _bases(definition: ast.ClassDef, tree: ast.Module, module: str) -> Iterator[str]:
    """Dotted paths of the bases of a class."""
    here = {node.name: f"{module}.{node.name}" for node in tree.body if isinstance(node, ast.ClassDef)}
    names = {"object": "builtins.object", **_imports(tree), **here}
    for base in definition.bases:
        first, *rest = ast.unparse(base).split(".")
        if first not in names or not all(part.isidentifier() for part in rest):
            raise ValueError(f"{module}.{definition.name} has a base that its source does not name")
        yield ".".join([names[first], *rest])


def _imports(tree: ast.Module) -> dict[str, str]:
    """What the names that a module imports stand for."""
    names = {}
    for node in tree.body:
        for alias in node.names if isinstance(node, ast.Import | ast.ImportFrom) else ():
            parent = f"{node.module}." if isinstance(node, ast.ImportFrom) else ""
            names[alias.asname or alias.name] = parent + alias.name
    return names


@cache
def _tree(module: str) -> ast.Module:
    spec = find_spec(module)
    if spec is None or not str(spec.origin).endswith(".py"):
        raise ImportError(f"there is no module {module}")
    return ast.parse(Path(spec.origin).read_text(encoding="utf-8"))
