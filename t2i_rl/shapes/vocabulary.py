"""Every token of the world, for the tokenizers of the tiny models."""

from tokenizers import Regex, pre_tokenizers

from t2i_rl.shapes.scene import SIZES, TEXTURES
from t2i_rl.shapes.text import EXTRA_TASKS, GENEVAL_TASKS, enumerate_prompts

BOS, EOS, PAD = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜▁pad▁｜>"
USER, ASSISTANT = "<|User|>", "<|Assistant|>"
BOI, EOI, IMAGE = "<begin_of_image>", "<end_of_image>", "<image_placeholder>"
SPECIAL = (BOS, EOS, PAD, USER, ASSISTANT, BOI, EOI, IMAGE)
WORDS = Regex(r"\n\n|\w+|[^\w\s]")


def vocabulary() -> list[str]:
    """Every token of the world, special tokens first, then what prompts, plans and chats hold."""
    words = {"\n\n", *'.:,"?', *TEXTURES, *SIZES}
    words |= {"the", "at", "one", "object", "objects", "describe", "picture"}
    words |= {"top", "middle", "bottom", "left", "center", "right"}
    splitter = pre_tokenizers.Split(WORDS, behavior="removed", invert=True)
    for tag in GENEVAL_TASKS + EXTRA_TASKS:
        for prompt in enumerate_prompts(tag, size=48):
            words |= set(prompt.text.split())
    return [*SPECIAL, "<unk>", *sorted(word for text in words for word, _ in splitter.pre_tokenize_str(text))]
