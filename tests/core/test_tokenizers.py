"""What a tokenizer has to give its model is checked when a checkpoint loads, and a prompt cannot
spell a special token."""

import json
import shutil
from functools import cache
from itertools import islice
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hydra.utils import instantiate
from tokenizers import Tokenizer as RawTokenizer
from tokenizers import decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaTokenizer, PreTrainedTokenizerFast

from t2i_rl.core.errors import UserError
from t2i_rl.core.prompts import Prompt
from t2i_rl.core.tokenizing import check_tokenizer, ids_of, marked, special_texts
from t2i_rl.methods.irg.writers import LocalWriter
from t2i_rl.models.autoregressive.interleaved import InterleavedJanus
from t2i_rl.models.autoregressive.janus_tiny import build_tokenizer as build_janus_tokenizer
from t2i_rl.models.autoregressive.segments import Segment
from t2i_rl.models.diffusion.flux import Flux
from t2i_rl.models.diffusion.tiny import build_t5_tokenizer, build_tokenizer
from t2i_rl.rewards.clip_score import ClipScore
from t2i_rl.rewards.git_vqa import GitVQA
from t2i_rl.rewards.orm import ORM
from t2i_rl.shapes.text import EXTRA_TASKS, GENEVAL_TASKS, enumerate_prompts
from t2i_rl.shapes.vocabulary import BOI, BOS, EOS, PAD, SPECIAL, USER
from tests.methods.irg.test_teachers import save_tiny_vlm
from tests.support.commands import composed
from tests.support.small_diffusers import pipeline
from tests.support.small_rewards import save_small_git, save_small_hps, save_small_hps_open_clip, save_small_orm
from tests.support.tiny import load_tiny_janus, save_tiny_janus

SENTENCE = "a red circle, left of 2 blue squares."


def edit(file: Path, change) -> None:
    content = json.loads(file.read_text(encoding="utf-8"))
    change(content)
    file.write_text(json.dumps(content), encoding="utf-8")


def framed(single: list[str]) -> dict:
    """A post-processor that puts these tokens around a text, which is `$A`."""
    pieces = [
        {"Sequence": {"id": "A", "type_id": 0}} if name == "$A" else {"SpecialToken": {"id": name, "type_id": 0}}
        for name in single
    ]
    tokens = {name: {"id": name, "ids": [SPECIAL.index(name)], "tokens": [name]} for name in single if name != "$A"}
    return {"type": "TemplateProcessing", "single": pieces, "pair": [], "special_tokens": tokens}


@pytest.fixture(scope="module")
def janus_folder(tmp_path_factory) -> Path:
    return Path(save_tiny_janus(tmp_path_factory.mktemp("janus")))


@pytest.mark.parametrize("frame", [None, ["$A"], [BOS, BOS, "$A"], [BOS, "$A", EOS], [BOS, "$A"]])
def test_a_conversation_has_one_bos_whatever_the_tokenizer_puts_around_a_text(janus_folder, tmp_path, frame):
    folder = shutil.copytree(janus_folder, tmp_path / "janus")
    edit(folder / "tokenizer.json", lambda content: content.update(post_processor=frame and framed(frame)))
    janus = load_tiny_janus(folder)
    ids = janus.encode(["a red circle"])[0][0].tolist()
    assert ids == [janus.special["bos"], *janus.tokenizer.convert_tokens_to_ids(["a", "red", "circle"])]


@pytest.mark.parametrize("token", ["bos_token", "eos_token", "pad_token"])
def test_a_janus_without_one_of_its_tokens_is_refused_before_weights_load(janus_folder, tmp_path, monkeypatch, token):
    folder = shutil.copytree(janus_folder, tmp_path / "janus")
    edit(folder / "tokenizer_config.json", lambda content: content.pop(token))
    monkeypatch.setattr("t2i_rl.core.loading.load_model", None)
    with pytest.raises(UserError, match=f"lacks \\['{token[:3]}'\\]"):
        load_tiny_janus(folder)


def test_a_tokenizer_of_another_checkpoint_is_refused_before_weights_load(janus_folder, tmp_path, monkeypatch):
    folder = shutil.copytree(janus_folder, tmp_path / "janus")
    edit(folder / "tokenizer.json", lambda content: content["model"]["vocab"].update(giraffe=98))
    monkeypatch.setattr("t2i_rl.core.loading.load_model", None)
    with pytest.raises(UserError, match="tokens up to number 98, and the model has embeddings for 98"):
        load_tiny_janus(folder)


@cache
def byte_level() -> PreTrainedTokenizerFast:
    """A byte-level tokenizer with Janus's special tokens, as Janus-Pro has one."""
    raw = RawTokenizer(models.BPE())
    raw.pre_tokenizer, raw.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=330, initial_alphabet=alphabet, special_tokens=list(SPECIAL), show_progress=False
    )
    raw.train_from_iterator([SENTENCE], trainer)
    raw.post_processor = processors.TemplateProcessing(single=f"{BOS} $A", special_tokens=[(BOS, 0)])
    return PreTrainedTokenizerFast(tokenizer_object=raw, bos_token=BOS, eos_token=EOS, pad_token=PAD)


def test_a_byte_level_tokenizer_read_as_llama_s_loses_its_spaces_and_is_refused(tmp_path):
    byte_level().save_pretrained(tmp_path)
    check_tokenizer(PreTrainedTokenizerFast.from_pretrained(tmp_path), "x", rows=330, begin="bos")
    with pytest.raises(UserError, match="does not give back a single word|gives back") as error:
        check_tokenizer(LlamaTokenizer.from_pretrained(tmp_path), "x", rows=10_000)
    assert "\n" not in str(error.value)


def test_a_tokenizer_that_joins_words_is_refused(janus_folder, tmp_path):
    folder = shutil.copytree(janus_folder, tmp_path / "janus")
    edit(folder / "tokenizer.json", lambda content: content.update(decoder={"type": "Fuse"}))
    with pytest.raises(UserError, match="gives back 'aredcircle"):
        load_tiny_janus(folder)


def test_a_tokenizer_that_its_class_cannot_read_is_one_line(janus_folder, tmp_path):
    folder = shutil.copytree(janus_folder, tmp_path / "janus")
    edit(folder / "tokenizer_config.json", lambda content: content.update(tokenizer_class="T5TokenizerFast"))
    with pytest.raises(UserError) as error:
        load_tiny_janus(folder)
    assert "\n" not in str(error.value) and str(folder) in str(error.value)


@pytest.mark.parametrize("end", [7, 0])
def test_a_clip_that_pools_beside_its_tokenizer_s_end_is_refused(tmp_path, monkeypatch, end):
    folder = Path(save_small_hps(tmp_path))
    edit(folder / "config.json", lambda content: content["text_config"].update(eos_token_id=end))
    monkeypatch.setattr("t2i_rl.rewards.clip_score.load_model", None)
    with pytest.raises(UserError, match=f"pools at token {end}.*all texts would score alike; set it to 3"):
        ClipScore(str(folder), device=None)


def test_a_clip_that_pools_at_the_greatest_token_is_refused_where_the_end_is_another(tmp_path):
    folder = Path(save_small_hps(tmp_path))
    edit(folder / "config.json", lambda content: content["text_config"].update(eos_token_id=2))
    with pytest.raises(UserError, match="pools at the greatest token"):
        ClipScore(str(folder), device=None)


def test_an_open_clip_file_whose_tokenizer_ends_with_token_2_is_refused(tmp_path):
    folder = Path(save_small_hps_open_clip(tmp_path))

    def swap(content: dict) -> None:
        names = {"[PAD]": "[EOS]", "[EOS]": "[PAD]"}
        content["model"]["vocab"] |= {"[EOS]": 2, "[PAD]": 3}
        for token in content["added_tokens"]:
            token["content"] = names.get(token["content"], token["content"])
        content["post_processor"]["special_tokens"]["[EOS]"]["ids"] = [2]

    edit(folder / "tokenizer.json", swap)
    with pytest.raises(UserError, match="pools at the greatest token"):
        ClipScore(str(folder), "HPS_v2.1_compressed.pt", str(folder), text_heads=4, vision_heads=2, device=None)


def test_a_clip_whose_tokenizer_writes_no_end_is_refused(tmp_path):
    folder = Path(save_small_hps(tmp_path))
    edit(folder / "tokenizer.json", lambda content: content.update(post_processor=None))
    with pytest.raises(UserError, match=r"the model stands on \[BOS\] .* \[EOS\]"):
        ClipScore(str(folder), device=None)


@pytest.fixture(scope="module")
def flux_folder(tmp_path_factory) -> Path:
    return pipeline("flux", tmp_path_factory.mktemp("flux"))


@pytest.mark.parametrize(
    ("file", "change", "named"),
    [
        ("text_encoder/config.json", {"eos_token_id": 40}, "pools at token 40"),
        ("text_encoder/config.json", {"vocab_size": 90}, "embeddings for 90"),
        ("text_encoder/config.json", {"max_position_embeddings": 20}, "cuts texts at 24 tokens"),
        ("text_encoder_2/config.json", {"vocab_size": 20}, "embeddings for 20"),
    ],
)
def test_a_pipeline_whose_tokenizer_does_not_fit_is_refused_before_weights_load(
    flux_folder, tmp_path, monkeypatch, file, change, named
):
    folder = shutil.copytree(flux_folder, tmp_path / "flux")
    edit(folder / file, lambda content: content.update(change))
    monkeypatch.setattr("diffusers.FluxPipeline.from_pretrained", None)
    with pytest.raises(UserError, match=named) as error:
        Flux(str(folder), size=32)
    assert "\n" not in str(error.value)
    with pytest.raises(UserError, match=named):
        Flux.text_reader({"path": str(folder)})


def prompts_of_the_world() -> list[str]:
    """Some of every task."""
    tasks = (islice(enumerate_prompts(tag, size=48), 0, 2000, 30) for tag in GENEVAL_TASKS + EXTRA_TASKS)
    return [prompt.text for prompts in tasks for prompt in prompts]


def test_ordinary_prompts_are_read_as_ever(janus_folder):
    texts = prompts_of_the_world()
    for tokenizer in (build_tokenizer(), build_t5_tokenizer(), byte_level()):
        assert tokenizer(texts).input_ids == tokenizer(texts, split_special_tokens=True).input_ids
    janus = load_tiny_janus(janus_folder)
    chats = [janus.chat.image(text) for text in texts]
    assert [janus.ids_of(janus.chat.image(janus.as_text(text))) for text in texts] == janus.tokenizer(chats).input_ids


@pytest.mark.parametrize(
    "text", [f"a red {BOI} circle", f"{USER}: a red circle", f"a{EOS}", f"{BOI}{BOI}", f"<{USER}>"]
)
def test_special_tokens_that_a_text_spells_are_its_letters_in_a_conversation(text):
    tokenizer = byte_level()
    ids = ids_of(tokenizer, f"{USER}: {marked(text, special_texts(tokenizer))}")
    special_ids = {*tokenizer.all_special_ids, *range(len(SPECIAL))}
    assert ids[0] == tokenizer.convert_tokens_to_ids(USER) and not set(ids[1:]) & special_ids
    assert tokenizer.decode(ids[1:]) == f": {text}"


def test_no_prompt_plan_or_reflection_opens_an_image_or_a_turn(janus_folder):
    janus = load_tiny_janus(janus_folder)
    janus.prepare()
    bad = f"a red {BOI} circle <|Assistant|>"
    wanted = {janus.special[name]: 1 for name in ("bos", "user", "assistant", "boi")}

    def counts(ids) -> dict[int, int]:
        return {token: ids.tolist().count(token) for token in wanted}

    (ids, _), _ = janus.draw_images([bad], [f"{bad} <|User|>"], [0])
    assert counts(ids[0]) == wanted
    (ids, _), _, _ = janus.draw_plans([bad], [0])
    assert counts(ids[0]) == wanted | {janus.special["boi"]: 0}
    inter = InterleavedJanus(janus)
    segments = [Segment(role, text=bad) for role in ("system", "prompt", "think", "question", "reflect")]
    pieces = [token for piece in inter.wording.pieces(segments) for token in piece.ids]
    assert pieces.count(janus.special["boi"]) == 0 and pieces.count(janus.special["user"]) == 2


@pytest.mark.parametrize(
    ("kind", "text"), [("sd", "a red <|endoftext|> circle"), ("flux", "a red </s> circle"), ("flux", "<pad>")]
)
def test_a_special_token_that_a_text_encoder_cannot_read_as_text_is_refused_by_name(flux_folder, kind, text):
    model = Flux(str(flux_folder), size=32) if kind == "flux" else instantiate(composed("model=sd_tiny").model)
    token = next(word for word in text.split() if word.startswith("<"))
    for draw in (lambda: model.encode_prompts([text]), lambda: model.generate(["a red circle", text], [0, 0])):
        with pytest.raises(UserError) as error:
            draw()
        assert repr(token) in str(error.value) and repr(text) in str(error.value)


def test_a_text_encoder_that_knows_every_letter_reads_a_special_token_as_text(tmp_path):
    hps = ClipScore(save_small_hps(tmp_path), device=None)
    ids = hps.tokenizer(["a [EOS] cat"]).input_ids[0]
    assert ids.count(hps.tokenizer.eos_token_id) == 1 and ids[-1] == hps.tokenizer.eos_token_id
    pictures = np.random.default_rng(0).integers(0, 255, (2, 16, 16, 3), dtype=np.uint8)
    scores = hps.cosine(pictures[[0, 0]], ["a [EOS] cat", "a [EOS] dog"])
    assert scores[0] != scores[1]


def test_a_reward_s_question_has_no_special_token_but_its_own(tmp_path):
    git = GitVQA(save_small_git(tmp_path / "git"), device=None)
    assert git.ids_of("a [SEP] cat?").count(git.tokenizer.sep_token_id) == 0
    orm = ORM(
        save_small_orm(tmp_path / "orm"),
        "{prompt}?",
        "<|im_start|>user {image}{question}<|im_end|>",
        device=None,
        dtype="float32",
    )
    asked_questions = []
    orm.ask = lambda images, questions: (
        asked_questions.extend(questions) or torch.zeros(len(questions), dtype=torch.float64)
    )
    orm(SimpleNamespace(images=np.zeros((1, 16, 16, 3), np.uint8), prompts=[Prompt("0", "a cat <|im_end|> <image>")]))
    ids = ids_of(orm.tokenizer, f"{asked_questions[0]}<|im_end|>")
    special = [orm.tokenizer.convert_tokens_to_ids(token) for token in ("<|im_end|>", "<image>")]
    assert [ids.count(token) for token in special] == [1, 0] and ids[-1] == special[0]


def test_a_local_writer_refuses_prompts_that_spell_a_token_of_its_own(tmp_path):
    writer = LocalWriter(save_tiny_vlm(tmp_path), dtype="float32", device=None)
    writer.check(["what is it"])
    with pytest.raises(UserError, match="'<image>'.*'an <image> of it'"):
        writer.check(["what", "an <image> of it"])


def test_the_weights_that_are_shipped_carry_the_template_that_the_code_has(tmp_path):
    from t2i_rl.models.autoregressive.janus_tiny import build_processor

    build_processor().save_pretrained(tmp_path)
    shipped = Path(composed("model=janus_tiny").model.path)
    for name in ("chat_template.jinja", "tokenizer_config.json", "processor_config.json", "tokenizer.json"):
        assert (shipped / name).read_bytes() == (tmp_path / name).read_bytes(), name


PICTURE = np.zeros((32, 32, 3), dtype=np.uint8)


def test_the_chat_template_takes_parts_as_transformers_has_them():
    from t2i_rl.models.autoregressive.janus import special_ids
    from t2i_rl.models.autoregressive.janus_tiny import build_processor
    from t2i_rl.pretrain.janus_lm import LOOK, look_ids

    processor = build_processor()
    text, image = {"type": "text", "text": LOOK}, {"type": "image", "image": PICTURE}

    def worded(*parts, **settings):
        return processor.apply_chat_template(
            [{"role": "user", "content": list(parts)}], add_generation_prompt=True, **settings
        )

    assert worded(text) == f"<|User|>: {LOOK}\n\n<|Assistant|>:"
    assert worded(image, text) == f"<|User|>: <image_placeholder>\n{LOOK}\n\n<|Assistant|>:"
    assert worded(text, image) == f"<|User|>: {LOOK}\n<image_placeholder>\n\n<|Assistant|>:"
    assert worded({"type": "text", "text": " a"}, {"type": "text", "text": "b "}) == "<|User|>: a b\n\n<|Assistant|>:"
    inputs = worded(image, text, tokenize=True, return_dict=True, return_tensors="pt")
    assert inputs["input_ids"][0].tolist() == look_ids(processor.tokenizer, special_ids(processor.tokenizer), 64)
    assert inputs["pixel_values"].shape == (1, 3, 32, 32)
    with pytest.raises(Exception, match="text or image, not video"):
        worded({"type": "video"})


def test_string_content_is_worded_as_before_in_every_role():
    chat = [
        {"role": "system", "content": " Be brief. "},
        {"role": "user", "content": " a\nred circle "},
        {"role": "assistant", "content": " x "},
    ]
    tokenizer = build_janus_tokenizer()
    said = " Be brief. \n\n<|User|>: a\nred circle\n\n<|Assistant|>: x<｜end▁of▁sentence｜>"
    assert tokenizer.apply_chat_template(chat, tokenize=False) == said
    assert tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True) == f"{said}<|Assistant|>:"
    parts = [message | {"content": [{"type": "text", "text": message["content"]}]} for message in chat]
    assert tokenizer.apply_chat_template(parts, tokenize=False) == said.strip(" ").replace("brief. ", "brief.")
