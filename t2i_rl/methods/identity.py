"""What a checkpoint says of itself: its method, its model, its settings."""

from collections.abc import Mapping
from typing import Any

from t2i_rl import __version__
from t2i_rl.core.errors import UserError

ABOUT, FORMAT = "t2i_rl", 1
METHODS = {"grpo": "iris", "pairs": "softrepa, or agsm", "irg": "irg, or irg_grpo"}  # by what they keep in a checkpoint


def about(checkpoint: Mapping) -> dict[str, Any]:
    """What a checkpoint says of itself; nothing, where it is older than that.

    Raises:
        UserError: another program wrote it, or a newer version.
    """
    facts = checkpoint.get(ABOUT, {})
    if not isinstance(facts, dict) or not isinstance(facts.get("format", FORMAT), int):
        raise UserError("this checkpoint was written by another program")
    if facts.get("format", FORMAT) > FORMAT:
        raise UserError(f"this checkpoint was written by t2i_rl {facts.get('version')}, newer than {__version__} here")
    return facts


def own_part(checkpoint: Mapping, kind: str, method: type | None = None) -> dict:
    """What methods of this kind keep in a checkpoint.

    Raises:
        UserError: it is another kind's, or another class's of the same kind.
    """
    facts = about(checkpoint)
    its_class = facts.get("class", "").rpartition(".")[2]
    if isinstance(checkpoint.get(kind), dict) and (method is None or its_class in ("", method.__name__)):
        return checkpoint[kind]
    name = facts.get("method") or next((name for other, name in METHODS.items() if other in checkpoint), None)
    fix = f"take method={name}" if name else "give one of this method's"
    ours = method.__name__ if method else f"method={METHODS[kind]}"
    raise UserError(f"this checkpoint was trained by {its_class or 'another method'}, not by {ours}: {fix}")
