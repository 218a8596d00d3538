"""T2I-R1's training prompts: JSON lines with what its scorers need to know, every row checked (arXiv 2505.00703 section 4.1)."""

from collections import Counter

from t2i_rl.data.prompt_stream import PromptData
from t2i_rl.errors import UserError
from t2i_rl.prompts import Prompt, read_prompts

NEEDED = {  # task_type -> the annotation that its scorers read
    "spatial": "spatial_info",
    "numeracy": "numeracy_info",
    "color": "attr_nouns",
    "texture": "attr_nouns",
    "shape": "attr_nouns",
    "object": "nouns",
    "non": "nouns",
    "complex": "nouns",
}


class T2IR1Data(PromptData):
    """The prompts of T2I-R1's own file, or of one that `task=make_prompts` wrote; a prompt's tag is its `task_type`.

    Args:
        path: the JSON-lines file.
        batch_size: prompts per rollout over all ranks together.
        task_types: only these; None takes all.
        exclude: a prompt file (a benchmark's) whose prompts are left out, whatever their case and full stops.

    Raises:
        UserError: a broken row, by file and prompt; an unknown task type; too few prompts.
    """

    def __init__(
        self,
        path: str,
        batch_size: int = 8,
        task_types: tuple[str, ...] | None = None,
        exclude: str | None = None,
        seed: int = 0,
    ):
        unknown = [kind for kind in task_types or () if kind not in NEEDED]
        if unknown:
            raise UserError(f"data.task_types holds {unknown[0]!r}; choose from {', '.join(NEEDED)}")
        every = read_t2i_r1(path)
        barred = {plain(prompt.text) for prompt in read_prompts(exclude)} if exclude else set()
        kept = [prompt for prompt in every if prompt.tag in (task_types or NEEDED) and plain(prompt.text) not in barred]
        self.left_out = len(every) - len(kept)
        super().__init__(prompts=kept, batch_size=batch_size, seed=seed)


def plain(text: str) -> str:
    """A prompt without what does not tell two prompts apart."""
    return text.strip().rstrip(".").lower()


def read_t2i_r1(path: str) -> list[Prompt]:
    """The checked rows of a file; `meta` is the whole row but its prompt.

    Raises:
        UserError: a row lacks what its task type needs, or the file holds a prompt twice.
    """
    prompts = read_prompts(path)
    for prompt in prompts:
        fault = fault_of(prompt.meta)
        if fault:
            raise UserError(f"{path}: the row of {prompt.text!r} {fault}")
    repeated = [text for text, count in Counter(prompt.text for prompt in prompts).items() if count > 1]
    if repeated:
        raise UserError(f"{path} holds {repeated[0]!r} more than once")
    return [Prompt(prompt.id, prompt.text, prompt.meta["task_type"], prompt.meta) for prompt in prompts]


def fault_of(meta: dict) -> str | None:
    """What is wrong with a row's annotations; None if nothing is."""
    kind = meta.get("task_type")
    if kind not in NEEDED:
        return f"has task_type {kind!r}, not one of {', '.join(NEEDED)}"
    for key in ("nouns", NEEDED[kind]):
        if key not in meta:
            return f"has task_type {kind!r} but no {key!r}"
    for key in ("nouns", "attr_nouns"):
        if not all(isinstance(word, str) and word for word in meta.get(key) or ["ok"]) or isinstance(
            meta.get(key), str
        ):
            return f"has {key} that are not words: {meta[key]!r}"
    relation = meta.get("spatial_info")
    if relation is not None and not (isinstance(relation, dict) and {"obj1", "obj2", "locality"} <= set(relation)):
        return f"has a spatial_info without obj1, obj2 and locality: {relation!r}"
    for item in meta.get("numeracy_info") or []:
        if not isinstance(item, dict) or not isinstance(item.get("obj_name"), str) or type(item.get("num")) is not int:
            return f"has a numeracy_info without obj_name and a whole num: {item!r}"
    return None
