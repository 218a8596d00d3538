"""What a class says of itself and a config may repeat: reading a config costs nothing, importing a class seconds."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

from t2i_rl.core.errors import UserError

STATED = {"model": ("family", "kind"), "method": ("trains", "mode", "stages", "steps")}  # by group of configs


class Stated:
    """A class whose config may repeat some of its class attributes, for `--help` and for refusals that come at once.

    stated: names of those attributes. Constructors do not see what is repeated, so `hydra.utils.instantiate` takes a
        config with them as it takes one without.
    fixed: those of them that no config may change.
    """

    stated: tuple[str, ...] = ()
    fixed: tuple[str, ...] = ()

    def __init_subclass__(cls, **options: Any):
        super().__init_subclass__(**options)
        if "__init__" in vars(cls):
            cls.__init__ = _blind_to(cls.stated, cls.__init__)  # type: ignore[method-assign]

    @classmethod
    def check_stated(cls, settings: Mapping[str, Any], group: str) -> None:
        """Whether a config repeats what the class says, where it may say nothing else.

        Raises:
            UserError: it does not.
        """
        for name in cls.fixed:
            own = getattr(cls, name)
            if name in settings and _comparable(settings[name]) != _comparable(own):
                said = own if isinstance(own, str) else f"[{', '.join(sorted(own))}]"
                raise UserError(f"{group}.{name} must be what {cls.__name__} says of itself, {said}")


def _blind_to(names: tuple[str, ...], construct: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(construct)
    def constructor(self: Any, *arguments: Any, **settings: Any) -> None:
        construct(self, *arguments, **{name: value for name, value in settings.items() if name not in names})

    return constructor


def _comparable(value: Any) -> Any:
    return value if isinstance(value, str) else sorted(value)
