"""What a class or a function takes, with what it hands on to its bases as `**options`."""

import inspect
from collections.abc import Callable


def makers(target: Callable) -> list[Callable]:
    """The functions that take what `target` is called with, the nearest first.

    Of a class they are its constructor and those of its bases that get its `**options`.
    """
    if not inspect.isclass(target):
        return [target]
    functions = []
    for owner in target.__mro__:
        if "__init__" in vars(owner):
            functions.append(vars(owner)["__init__"])
            if all(parameter.kind is not parameter.VAR_KEYWORD for parameter in parameters(functions[-1])):
                break
    return functions


def parameters(function: Callable) -> list[inspect.Parameter]:
    """Its parameters; none of what is written in C and has no signature."""
    try:
        return list(inspect.signature(function).parameters.values())
    except (TypeError, ValueError):
        return []
