"""What an encoder does not read of a text is said once a run, with the share of prompts, on every
path; never in silence."""

import json
from dataclasses import replace
from itertools import islice
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hydra.utils import instantiate

from t2i_rl.command import cli
from t2i_rl.core.errors import UserError
from t2i_rl.core.prompts import Prompt
from t2i_rl.core.readers import forget_announcements
from t2i_rl.models.diffusion.flux import Flux
from t2i_rl.models.diffusion.sana import SanaSprint
from t2i_rl.models.diffusion.sd3 import SD3
from t2i_rl.models.diffusion.stable_diffusion import StableDiffusionXL
from t2i_rl.models.diffusion.tiny import build_tokenizer
from t2i_rl.rewards.clip_score import ClipScore
from t2i_rl.rewards.git_vqa import GitVQA
from t2i_rl.rewards.image_reward import ImageReward
from t2i_rl.rewards.orm import ORM
from t2i_rl.rewards.weighted_sum import WeightedSum
from t2i_rl.tasks import examine
from tests.rewards.test_image_reward import HEADS, released_state
from tests.support.commands import composed
from tests.support.small_diffusers import pipeline
from tests.support.small_rewards import BERT, save_small_git, save_small_hps, save_small_orm, tokenizer
from tests.support.tiny import load_tiny_janus, save_tiny_janus

LONG = " ".join(["a red circle left of a blue square"] * 4)  # 32 words, and each is one token of the tiny models
IMAGES = np.zeros((2, 16, 16, 3), dtype=np.uint8)


@pytest.fixture(autouse=True)
def _a_new_run():
    forget_announcements()


def rows(*texts: str):
    prompts = [Prompt(str(number), text, "", {"nouns": [text]}) for number, text in enumerate(texts)]
    return SimpleNamespace(images=IMAGES[: len(texts)], prompts=prompts)


@pytest.mark.parametrize("name", ["sd_tiny", "sd3_tiny", "flux_tiny"])
def test_a_prompt_that_is_cut_is_named_with_the_share_and_once_a_run(name, capsys):
    model = instantiate(composed(f"model={name}", "model.steps=1").model)
    model.generate([f"{LONG} three crosses", "a red circle"], [0, 0])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1
    share = "1 of 2 prompts are longer than the 24 tokens that CLIP reads"
    assert f"{share}, and are cut there: first (36 tokens)" in lines[0]
    assert ("T5 reads" in lines[0]) == (name == "flux_tiny")
    model.encode_prompts([f"{LONG} one triangle", "a red circle"])
    model.generate([f"{LONG} two stars"], [0])
    assert capsys.readouterr().out == ""


def test_the_longest_prompt_that_is_read_whole_is_not_named(capsys):
    model = instantiate(composed("model=sd_tiny", "model.steps=1").model)
    words = ["a", "red", "circle", "left", "of", "a", "blue", "square"]
    model.encode_prompts([" ".join((words * 3)[:22])])  # and two tokens around it
    assert capsys.readouterr().out == ""
    model.encode_prompts([" ".join((words * 3)[:23])])
    assert "first (25 tokens)" in capsys.readouterr().out


def test_what_was_announced_of_all_prompts_is_not_said_again_of_a_batch(capsys):
    cfg = composed("model=sd_tiny", "model.steps=1")
    texts = [f"{LONG} {end}" for end in ("cross", "star")] + ["a red circle"] * 5 + ["a blue square"]
    examine.announce_model(cfg, texts)
    assert "2 of 4 prompts are longer" in capsys.readouterr().out
    instantiate(cfg.model).encode_prompts(texts[:2])
    assert capsys.readouterr().out == ""
    forget_announcements()
    examine.announce_model(cfg, texts)
    assert "2 of 4 prompts are longer" in capsys.readouterr().out


def test_ranks_other_than_the_first_say_nothing(monkeypatch, capsys):
    monkeypatch.setenv("RANK", "1")
    examine.announce_model(composed("model=sd_tiny"), [LONG])
    assert capsys.readouterr().out == ""


def test_sd3_says_what_t5_still_reads_and_sdxl_names_its_two_encoders_in_one_line(tmp_path, capsys):
    sd3 = SD3(str(pipeline("sd3_t5", tmp_path / "sd3")), max_sequence_length=64)
    sd3.encode_prompts([LONG])
    assert capsys.readouterr().out.strip().endswith("(T5 reads them whole)")
    shorter = SD3(str(tmp_path / "sd3"), max_sequence_length=20)
    shorter.encode_prompts([LONG])
    line = capsys.readouterr().out
    assert "20 tokens that T5 reads" in line and "24 tokens that CLIP reads" in line and "whole" not in line
    xl = StableDiffusionXL(str(pipeline("sdxl", tmp_path / "sdxl")))
    xl.encode_prompts([LONG])
    assert capsys.readouterr().out.count("CLIP") == 1


def test_flux_reads_for_t5_as_many_tokens_as_it_is_told(tmp_path, capsys):
    folder = str(pipeline("flux", tmp_path))
    settings = {"path": folder, "revision": None}
    Flux.text_reader(settings | {"max_sequence_length": 20}).announce([LONG])
    assert "1 of 1 prompts are longer than the 20 tokens that T5 reads" in capsys.readouterr().out
    assert [reading.limit for reading in Flux.text_reader(settings).readings] == [24, 256]


def test_sana_s_window_is_what_the_pipeline_leaves_behind_its_instruction(tmp_path, capsys):
    folder = str(pipeline("sana", tmp_path))
    model = SanaSprint(folder, dtype="float32", max_sequence_length=12)
    words = ["a", "red", "circle", "left", "of", "a", "blue", "square"]
    reading, texts = model.reader.readings[0], [" ".join(words[:count]) for count in range(9)]
    fits = next(count for count in range(8, 0, -1) if reading.lengths([texts[count]])[0] <= reading.limit)
    settings = {"device": "cpu", **model.text_settings()}
    embeds = [model.pipe.encode_prompt(texts[count], **settings)[0] for count in (fits, fits + 1, fits + 2)]
    assert not torch.equal(embeds[0], embeds[1])
    model.reader.check([" ".join(words[:fits])])
    assert "longer" not in capsys.readouterr().out
    model.reader.check([" ".join(words + words)])
    assert "tokens that Gemma reads" in capsys.readouterr().out


def test_task_generate_says_it_before_any_weight_loads(tmp_path, monkeypatch, capsys):
    file = tmp_path / "prompts.txt"
    file.write_text(f"{LONG} cross\na red circle\n{LONG} star\n")
    monkeypatch.setattr("t2i_rl.models.diffusion.stable_diffusion.load_pipeline", None)
    arguments = ["task=generate", "model=sd_tiny", f"prompts_file={file}", f"hydra.run.dir={tmp_path}/run"]
    monkeypatch.setattr("sys.argv", ["run.py", *arguments])
    with pytest.raises(SystemExit):
        cli.main()
    assert "StableDiffusion: 2 of 3 prompts are longer than the 24 tokens" in capsys.readouterr().out


def test_check_parts_announces_training_prompts_and_evaluated_ones(monkeypatch, capsys):
    cfg = composed("model=sd_tiny", "method=agsm", "evaluation.stages=[base_direct]")
    benchmark = instantiate(cfg.benchmark)
    prompts = benchmark.prompts()
    prompts[0] = replace(prompts[0], text=f"{LONG} star")
    monkeypatch.setattr(benchmark, "prompts", lambda: prompts)
    examine.check_parts(cfg, benchmark, [Prompt("0", f"{LONG} cross")], {})
    assert f"2 of {len(prompts) + 1} prompts are longer" in capsys.readouterr().out


def test_a_clip_score_says_that_it_cannot_tell_two_long_prompts_apart(tmp_path, capsys):
    reward = ClipScore(save_small_hps(tmp_path), device=None)
    first, second = reward(rows(*(f"{LONG} {end}" for end in ("cat", "dog")))).total.tolist()
    assert first == second
    assert "ClipScore: 2 of 2 prompts are longer than the 24 tokens that CLIP reads" in capsys.readouterr().out
    reward.score_pixels(torch.zeros(1, 3, 16, 16), rows(LONG).prompts)
    assert capsys.readouterr().out == ""


def test_image_reward_says_that_it_reads_35_tokens_and_a_sum_speaks_for_its_parts(tmp_path, capsys):
    words = tokenizer(BERT, post="[CLS] $A [SEP]")
    words.save_pretrained(tmp_path)
    torch.save(released_state(len(words)), tmp_path / "ImageReward.pt")
    reward = ImageReward(str(tmp_path), tokenizer=str(tmp_path), device=None, **HEADS)
    examine.announce_rewards([WeightedSum({"one": reward}, {"one": 1.0})], rows(f"{LONG} {LONG}", "a cat").prompts)
    assert "ImageReward: 1 of 2 prompts are longer than the 35 tokens that BERT reads" in capsys.readouterr().out
    reward(rows(f"{LONG} {LONG}"))
    assert capsys.readouterr().out == ""


def test_git_and_orm_refuse_what_they_have_no_positions_for(tmp_path):
    git = GitVQA(save_small_git(tmp_path / "git"), device=None)
    assert "model reads 32" in git.refuses(rows(LONG).prompts[0]) and git.refuses(rows("a cat").prompts[0]) is None
    orm = ORM(save_small_orm(tmp_path / "orm"), "{prompt}?", "{image}{question}", device=None, dtype="float32")
    with pytest.raises(UserError, match="512 tokens that LLaVA-OneVision has room for"):
        examine.announce_rewards([orm], rows(" ".join([LONG] * 20)).prompts)
    with pytest.raises(UserError, match="positions"):
        orm.ask(IMAGES[:1], [" ".join([LONG] * 16)])


@pytest.fixture(scope="module")
def janus(tmp_path_factory):
    return load_tiny_janus(save_tiny_janus(tmp_path_factory.mktemp("janus")))


def test_words_that_a_model_does_not_know_are_named_once(janus, capsys):
    janus.prepare()
    janus.draw_images(["a red zebra-crossing", "a red circle"], ["", ""], [0, 0])
    line = capsys.readouterr().out
    assert "1 of 2 prompts have words that Janus does not know, and reads as <unk>: 'zebra-crossing'; first in" in line
    janus.draw_images(["a purple zebra"], [""], [0])
    assert capsys.readouterr().out == ""


def test_every_prompt_of_the_world_is_known_and_whole_to_every_tiny_model(capsys):
    from t2i_rl.shapes.text import EXTRA_TASKS, GENEVAL_TASKS, enumerate_prompts

    tasks = (islice(enumerate_prompts(tag, size=48), 0, 2000, 30) for tag in GENEVAL_TASKS + EXTRA_TASKS)
    texts = [prompt.text for prompts in tasks for prompt in prompts]
    for name in ("janus_tiny", "sd_tiny", "flux_tiny"):
        examine.announce_model(composed(f"model={name}"), texts)
    assert capsys.readouterr().out == ""


def test_a_conversation_that_the_model_has_no_positions_for_is_refused(janus):
    text = " ".join([LONG] * 18)
    with pytest.raises(UserError, match="447 tokens that Janus has room for: first"):
        janus.draw_plans([text], [0])
    plan = " ".join([LONG] * 14)
    with pytest.raises(UserError, match="512 positions"):
        janus.draw_images(["a red circle"], [plan], [0])


def test_captions_of_a_folder_are_counted_before_training_and_encoding(tmp_path, monkeypatch, capsys):
    from PIL import Image

    from t2i_rl.tasks import encode

    folder = tmp_path / "pairs"
    folder.mkdir()
    lines = []
    for number in range(4):
        Image.new("RGB", (32, 32)).save(folder / f"{number}.png")
        lines.append(
            {"file_name": f"{number}.png", "text": LONG if number == 3 else f"a red circle {'left ' * number}"}
        )
    (folder / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    cfg = composed(
        "task=encode",
        "model=sd_tiny",
        "method=agsm",
        "data=image_text",
        f"data.path={folder}",
        "data.held_out=0",
        "data.batch_size=2",
        f"task.out={tmp_path}/out",
    )
    monkeypatch.setattr("t2i_rl.models.diffusion.stable_diffusion.load_pipeline", None)
    with pytest.raises(Exception, match="NoneType"):
        encode.run(cfg)
    assert "1 of 4 prompts are longer" in capsys.readouterr().out


def test_the_tiny_clip_says_which_letters_it_does_not_know(capsys):
    reading = build_tokenizer()
    assert reading.unk_token_id == reading.eos_token_id  # so what is unknown would look like the end of the text
    examine.announce_model(composed("model=sd_tiny"), ["5 red circles", "a café"])
    line = capsys.readouterr().out
    assert "2 of 2 prompts have words that CLIP does not know" in line and "'5', 'café'" in line
