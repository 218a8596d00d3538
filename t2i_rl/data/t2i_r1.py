"""T2I-R1's training prompts, with what its scorers need to know (arXiv 2505.00703 section 4.1)."""

from pathlib import Path

from t2i_rl.core.errors import UserError
from t2i_rl.core.files import read_json_lines
from t2i_rl.core.numbers import Count, Seed, check_arguments
from t2i_rl.core.prompts import Prompt, fault_of_clauses, read_prompts, row_id, with_distinct_ids
from t2i_rl.core.ranks import is_main_process
from t2i_rl.core.texts import fault_of_text, is_text
from t2i_rl.data.prompts import PromptData

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
    """The prompts of T2I-R1's own file, or of one that `task=make_prompts` wrote.

    A prompt's tag is its `task_type`.

    Args:
        path: the JSON-lines file.
        batch_size: prompts per rollout over all ranks together.
        task_types: only these; None takes all.
        exclude: a prompt file (a benchmark's) whose prompts are left out, whatever their case and
            full stops.

    Raises:
        UserError: a broken row, by file and line; an unknown task type; too few prompts.
    """

    def __init__(
        self,
        path: str,
        batch_size: Count = 8,
        task_types: tuple[str, ...] | None = None,
        exclude: str | None = None,
        seed: Seed = 0,
    ):
        check_arguments(T2IR1Data, locals(), "data")
        unknown = [kind for kind in task_types or () if kind not in NEEDED]
        if unknown:
            raise UserError(f"data.task_types holds {unknown[0]!r}; choose from {', '.join(NEEDED)}")
        prompts = [prompt for prompt in read_t2i_r1(path) if prompt.tag in (task_types or NEEDED)]
        barred_texts = {plain(prompt.text) for prompt in read_prompts(exclude)} if exclude else set()
        training_prompts = [prompt for prompt in prompts if plain(prompt.text) not in barred_texts]
        self.left_out = len(prompts) - len(training_prompts)
        if exclude and is_main_process():
            count = f"{len(training_prompts)} training prompts; {self.left_out} left out"
            print(f"{count} because {exclude} holds them", flush=True)
        super().__init__(prompts=training_prompts, batch_size=batch_size, seed=seed)


def plain(text: str) -> str:
    """A prompt without what does not tell two prompts apart."""
    return text.strip().rstrip(".").lower()


def read_t2i_r1(path: str) -> list[Prompt]:
    """The checked rows of a file; `meta` is the whole row but its prompt.

    Raises:
        UserError: a row is no JSON, lacks what its task type needs, or repeats a prompt or an id;
            its place is named.
    """
    placed: list[tuple[str, Prompt]] = []
    texts: set[str] = set()
    for number, place, row in read_json_lines(path):
        fault = fault_of(row)
        if fault or row["prompt"] in texts:
            raise UserError(f"{place}: the row {fault or 'has the prompt of an earlier one'}")
        texts.add(row["prompt"])
        name = row_id(row.get("id", f"{Path(path).stem}/{number:05d}"), place)
        meta = {key: value for key, value in row.items() if key not in ("id", "prompt")}
        placed.append((place, Prompt(name, row["prompt"], row["task_type"], meta)))
    if not placed:
        raise UserError(f"{path} holds no prompt")
    return with_distinct_ids(placed)


def fault_of(row: dict) -> str | None:
    """What is wrong with a row, or None. An annotation is checked wherever it stands."""
    kind = row.get("task_type")
    if not isinstance(kind, str) or kind not in NEEDED:
        return f"has task_type {kind!r}, not one of {', '.join(NEEDED)}"
    for key in ("prompt", "nouns", NEEDED[kind]):
        if not row.get(key):
            return f"has task_type {kind!r} but no {key!r}"
    if fault := fault_of_text(row["prompt"]):
        return f"has a prompt that {fault}"
    for key in ("nouns", "attr_nouns"):
        words = row.get(key, [])
        if not isinstance(words, list) or not all(map(is_text, words)):
            return f"has {key} that are not words: {words!r}"
    relation = row.get("spatial_info", {})
    if "spatial_info" in row and not _is_relation(relation):
        return f"has a spatial_info without obj1, obj2 and locality: {relation!r}"
    counts = row.get("numeracy_info", [])
    if not isinstance(counts, list):
        return f"has a numeracy_info that is no list: {counts!r}"
    for item in counts:
        has_name = isinstance(item, dict) and is_text(item.get("obj_name"))
        if not has_name or type(item.get("num")) is not int or item["num"] < 1:
            return f"has a numeracy_info without obj_name and a num of 1 or more: {item!r}"
    names = [relation[key] for key in ("obj1", "obj2") if relation] + [item["obj_name"] for item in counts]
    strange = [name for name in names if name not in row["nouns"]]
    if strange:
        return f"names {strange[0]!r}, which is not among its nouns"
    fault = fault_of_clauses(row)
    return f"is not to be judged: {fault}" if fault else None


def _is_relation(value: object) -> bool:
    return isinstance(value, dict) and all(is_text(value.get(key)) for key in ("obj1", "obj2", "locality"))
