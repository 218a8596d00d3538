"""Teachers outside the world: a server's answers and a local model's, what fails and how it says so, pictures that are
given or drawn."""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
import torch
from PIL import Image

from t2i_rl.core.errors import UserError
from t2i_rl.core.prompts import Prompt
from t2i_rl.methods.irg.make import Maker
from t2i_rl.methods.irg.teachers import DrawnPictures, GivenPictures, Teacher
from t2i_rl.methods.irg.toy_format import read_toy
from t2i_rl.methods.irg.writers import ChatWriter, LocalWriter
from tests.support.tiny import load_tiny_janus, save_tiny_janus

RED, BLUE = (np.full((32, 32, 3), color, np.uint8) for color in ((200, 0, 0), (0, 0, 200)))
PROMPTS = [Prompt("0", "a red circle"), Prompt("1", "a blue square")]


class Server:
    """Answers like OpenAI's; the first `failures` requests fail."""

    def __init__(self, failures: int = 0, reply=None, finish: str = "stop", answer: dict | None = None):
        self.asked, self.failures, self.keys = [], failures, []
        outer, reply = self, reply or (lambda text: "yes" if "yes or no" in text else f"about {text.split()[-1]}")

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                outer.keys.append(self.headers["Authorization"])
                if outer.failures:
                    outer.failures -= 1
                    self.send_error(500)
                    return
                outer.asked.append(body)
                text = reply(body["messages"][0]["content"][-1]["text"])
                choice = {"index": 0, "finish_reason": finish, "message": {"role": "assistant", "content": text}}
                body = json.dumps(
                    answer
                    or {
                        "id": "0",
                        "created": 0,
                        "model": "m",
                        "object": "chat.completion",
                        "system_fingerprint": "",
                        "usage": {"completion_tokens": 1, "prompt_tokens": 1, "total_tokens": 2},
                        "choices": [choice],
                    }
                ).encode()
                self.send_response(200)
                self.send_header("Content-Type", "application/json")
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *args):
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.http.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{self.http.server_port}/v1"


@pytest.fixture
def key(monkeypatch):
    monkeypatch.setenv("T2I_RL_WRITER_KEY", "secret-word")
    monkeypatch.setattr("time.sleep", lambda seconds: None)


def test_a_server_is_asked_with_pictures_and_key_and_answers_in_order(key):
    server = Server(failures=2)
    writer = ChatWriter(server.url, "m", workers=1)
    assert writer.answer([("first", [RED]), ("second", [RED, BLUE])]) == ["about first", "about second"]
    assert set(server.keys) == {"Bearer secret-word"}
    content = server.asked[-1]["messages"][0]["content"]
    assert [part["type"] for part in content] == ["image_url", "image_url", "text"]
    assert content[0]["image_url"]["url"].startswith("data:image/png;base64,")
    assert "secret" not in json.dumps(writer.settings())


def test_a_server_that_fails_for_good_says_so_without_the_key(key):
    server = Server(failures=99)
    with pytest.raises(UserError, match="did not answer in 3 tries .*goes on from there") as error:
        ChatWriter(server.url, "m", retries=2).answer([("first", [RED])])
    assert "secret" not in str(error.value)
    for choices in ([], None):
        with pytest.raises(UserError, match="did not answer in 2 tries"):
            ChatWriter(Server(answer={"choices": choices}).url, "m", retries=1).answer([("first", [RED])])
    assert ChatWriter(Server(finish="length").url, "m").answer([("first", [RED])]) == [None]


def test_no_key_is_one_line(monkeypatch):
    monkeypatch.delenv("T2I_RL_WRITER_KEY", raising=False)
    with pytest.raises(UserError, match="T2I_RL_WRITER_KEY is not set"):
        ChatWriter("http://127.0.0.1:1/v1", "m")


@pytest.fixture
def given(tmp_path):
    rows = []
    for prompt, image in zip(PROMPTS, (RED, BLUE), strict=True):
        Image.fromarray(image).save(tmp_path / f"{prompt.id}.png")
        rows.append({"prompt": prompt.text, "image": f"{prompt.id}.png"})
    (tmp_path / "images.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return GivenPictures(str(tmp_path))


def test_given_pictures_are_found_by_prompt_and_lacking_ones_named(given, tmp_path):
    assert [image[0, 0, 0] for image in given.pictures(PROMPTS, [0, 1])] == [200, 0]
    with pytest.raises(UserError, match="has no picture of 'a dog'"):
        given.check([Prompt("2", "a dog")])
    (tmp_path / "0.png").rename(tmp_path / "away.png")
    with pytest.raises(UserError, match="0.png is named in images.jsonl and does not exist"):
        given.check(PROMPTS)
    (tmp_path / "0.png").write_bytes(b"no picture")
    with pytest.raises(UserError, match="0.png cannot be read as an image"):
        given.pictures(PROMPTS[:1], [0])
    (tmp_path / "images.jsonl").write_text('{"prompt": "a", "image": 5}\n')
    with pytest.raises(UserError, match="images.jsonl:1"):
        GivenPictures(str(tmp_path))
    with pytest.raises(UserError, match="does not exist"):
        GivenPictures(str(tmp_path / "none"))


@pytest.fixture(scope="module")
def janus(tmp_path_factory):
    return load_tiny_janus(save_tiny_janus(tmp_path_factory.mktemp("janus")))


def test_a_model_may_draw_the_good_pictures(janus):
    drawn = DrawnPictures(janus)
    once, again = (drawn.pictures(PROMPTS, [3, 4]) for _ in range(2))
    assert len(once) == 2 and all(np.array_equal(a, b) for a, b in zip(once, again, strict=True))


def test_data_by_a_teacher_has_its_texts_and_leaves_out_what_is_inconsistent(key, given, janus, tmp_path):
    def reply(text):
        if "yes or no" in text:
            return "**No.**" if "blue" in text else "Yes."
        return "a plan of words"

    server = Server(reply=reply)
    teacher = Teacher(given, ChatWriter(server.url, "m", workers=1))
    manifest = Maker(teacher).make(tmp_path / "irgl", janus, PROMPTS)
    assert manifest["counts"]["initial_full_learning"] == manifest["counts"]["improving_full_learning"] == 1
    assert manifest["left_out"]["initial_full_learning: picture and prompt disagree"] == 1
    asked = [body["messages"][0]["content"][-1]["text"] for body in server.asked]
    assert sum("yes or no" in text for text in asked) == 2  # once a picture
    assert "secret" not in (tmp_path / "irgl" / "settings.json").read_text()
    longer = Teacher(given, ChatWriter(server.url, "m", max_tokens=2048))  # changes nothing of what is finished
    assert Maker(longer).make(tmp_path / "irgl", janus, PROMPTS) == manifest
    cut = Teacher(given, ChatWriter(Server(finish="length").url, "m"), consistency=False)
    manifest = Maker(cut).make(tmp_path / "cut", janus, PROMPTS)
    assert (
        sum(manifest["counts"].values()) == 0
        and manifest["left_out"][
            "improving_full_learning: the writer was cut: raise max_tokens and name another folder to have them"
        ]
        == 2
    )


def test_a_picture_that_needs_no_change_is_its_own_better_one(key, given, janus, tmp_path):
    def reply(text):
        return "Yes." if "yes or no" in text else "No change needed." if "better" in text else "a plan of words"

    teacher = Teacher(given, ChatWriter(Server(reply=reply).url, "m", workers=1))
    Maker(teacher, words=(4, 40)).make(tmp_path, janus, PROMPTS)
    rows = [row for mode, row in read_toy(tmp_path) if mode == "improving_full_learning"]
    assert len(rows) == 2
    for row in rows:
        weak, better = row.images
        assert row.segments[-2].text == "No change needed." and np.array_equal(weak, better)


def test_a_writer_that_says_neither_yes_nor_no_costs_its_rows(key, given):
    answers = iter(("Perhaps.", "Notably, yes"))
    teacher = Teacher(given, ChatWriter(Server(reply=lambda text: next(answers)).url, "m", workers=1))
    assert (
        teacher.inconsistent(PROMPTS, [RED, BLUE])
        == ["asked whether it shows its prompt, the writer said neither yes nor no"] * 2
    )


def save_tiny_vlm(folder) -> str:
    """A random Llava of the real classes that has learnt nothing, with a chat template."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import (
        CLIPImageProcessorPil,
        CLIPVisionConfig,
        LlamaConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
        LlavaProcessor,
        PreTrainedTokenizerFast,
    )

    words = ["<pad>", "<s>", "</s>", "<unk>", "<image>", *["a", "b", "c", "d", "e", "f", "g", "what", "is", "it"]]
    raw = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=raw,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        additional_special_tokens=["<image>"],
    )
    template = (
        "{% for message in messages %}{% for part in message['content'] %}"
        "{% if part['type'] == 'image' %}<image> {% else %}{{ part['text'] }} {% endif %}"
        "{% endfor %}{% endfor %}"
    )
    pictures = CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    LlavaProcessor(
        pictures,
        tokenizer,
        patch_size=8,
        vision_feature_select_strategy="default",
        chat_template=template,
        num_additional_image_tokens=1,
    ).save_pretrained(folder)
    torch.manual_seed(1)
    vision = CLIPVisionConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=16, patch_size=8
    )
    text = LlamaConfig(
        vocab_size=len(words),
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    model = LlavaForConditionalGeneration(
        LlavaConfig(vision_config=vision, text_config=text, image_token_index=4, image_token_id=4)
    )
    with torch.no_grad():
        model.lm_head.weight.mul_(8)
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = (
        [2, 5, 7, 9, 11, 13],
        0,
    )  # it has not learnt to end
    model.save_pretrained(folder)
    return str(folder)


def test_a_local_model_answers_alone_as_in_a_batch(tmp_path):
    folder = save_tiny_vlm(tmp_path)
    asked = [("what is it", [RED]), ("what is", [RED, BLUE]), ("a b c", [BLUE])]
    together = LocalWriter(folder, dtype="float32", device=None, max_tokens=64).answer(asked)
    single = LocalWriter(folder, dtype="float32", device=None, max_tokens=64, batch_size=1)
    assert single.answer(asked) == together and len(together) == 3
    assert LocalWriter(folder, dtype="float32", device=None, max_tokens=1).answer(asked) == [
        None if text else "" for text in together
    ]
    assert len(set(together)) > 1


def test_a_local_model_that_is_not_there_is_one_line(tmp_path):
    with pytest.raises(UserError, match="there is no such folder"):
        LocalWriter(str(tmp_path / "none"))
