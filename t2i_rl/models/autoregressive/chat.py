"""The wording around a prompt in a conversation with a Janus."""

from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields

from t2i_rl.core.errors import UserError
from t2i_rl.core.numbers import check_arguments


@dataclass(frozen=True)
class Chat:
    """The wording around a prompt (T2I-R1 section 3.2).

    instruction: `{prompt}` in it is where the raw prompt goes. reflect, redraw: asked, where they
    are not empty, after an image and after a reflection on it (`interleaved`). stop: the reflection
    that finds nothing wrong. final_stop: what becomes of the full stop of a prompt that a plan
    follows. `strip` takes it away; `keep` leaves it, and "a cat." with its plan reads "a cat.. a
    grey cat", as in the released code of T2I-R1 and IRIS.
    """

    system: str
    instruction: str
    reflect: str = ""
    redraw: str = ""
    stop: str | None = None
    final_stop: str = "strip"

    def __post_init__(self):
        if self.final_stop not in ("strip", "keep"):
            raise UserError(f"model.chat.final_stop must be strip or keep, not {self.final_stop!r}")
        try:
            self.instruction.format(prompt="")
        except (LookupError, ValueError, AttributeError) as error:
            limits = "may hold {prompt} and no other braces"
            raise UserError(f"model.chat.instruction {limits}, not {self.instruction!r}") from error

    @classmethod
    def of(cls, settings: Mapping) -> "Chat":
        """The wording that a config gives.

        Raises:
            UserError: a setting is unknown, missing or no text.
        """
        is_needed = {field.name: field.default is MISSING for field in fields(cls)}
        for name in settings:
            if name not in is_needed:
                raise UserError(f"model.chat has no {name}; it has {', '.join(is_needed)}")
        lacking = [name for name, needed in is_needed.items() if needed and name not in settings]
        if lacking:
            raise UserError(f"model.chat.{lacking[0]} must be given")
        check_arguments(cls, settings, "model.chat")
        return cls(**settings)

    def plan(self, prompt: str) -> str:
        """Phase 1: ask for a semantic plan."""
        system = f"{self.system.strip()}\n\n" if self.system else ""
        return f"{system}<|User|>: {self.instruction.format(prompt=prompt.strip()).strip()}\n\n<|Assistant|>:"

    def image(self, prompt: str, plan: str = "") -> str:
        """Phase 2, a fresh conversation: the raw prompt, then its plan if there is one."""
        content = prompt.strip()
        if plan:
            start = content.rstrip(".") if self.final_stop == "strip" else content
            content = f"{start}. {plan}".strip()
        return f"<|User|>: {content}\n\n<|Assistant|>:"
