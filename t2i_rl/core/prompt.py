"""A prompt, as every part knows it; `t2i_rl.prompts` reads and writes files of them."""

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Prompt:
    """One prompt. `meta` holds GenEval's `include`/`exclude` clauses and whatever else its benchmark's judge reads."""

    id: str
    text: str
    tag: str = ""
    meta: dict = field(default_factory=dict)
