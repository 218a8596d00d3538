"""A checkpoint says what wrote it: commands take method and model from it, and whatever does not fit exactly is
refused, not half loaded."""

import json
from functools import partial
from pathlib import Path

import lightning as L
import pytest
import torch
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.utils import instantiate
from omegaconf import OmegaConf, open_dict
from safetensors.torch import load_file

from t2i_rl.command.checkpoint_choice import check_checkpoint, in_words_of_hydra, with_choices_of_checkpoint
from t2i_rl.core.checkpoints import read_checkpoint, write_checkpoint
from t2i_rl.core.errors import UserError
from t2i_rl.core.places import CONF
from t2i_rl.core.used_settings import recipe_of, settings_used
from t2i_rl.methods.identity import ABOUT
from t2i_rl.methods.policy.tokens import GRPO
from t2i_rl.rewards.random import Random
from t2i_rl.tasks.train import build_method
from tests.support.commands import call, composed
from tests.support.tiny import load_tiny_janus, save_tiny_janus

LORA8 = ["method=iris_lora", "method.lora.r=8"]
RUNS = {
    "iris": ["method=iris"],
    "lora8": LORA8,
    "irg": ["method=irg"],
    "irg_grpo": ["method=irg_grpo"],
    "softrepa": ["method=softrepa", "model=sd_tiny"],
    "agsm": ["method=agsm", "model=sd3_tiny", "variant=paper"],
    "adapters": ["method=denoising", "model=sd_tiny", "method.tokens=0", "method.lora={r: 4, target_modules: [to_q]}"],
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny_janus(tmp_path_factory.mktemp("janus"))


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, Path]:
    """A checkpoint of each run as far as it says what it is: no weights have to load to read that."""
    place = tmp_path_factory.mktemp("it's here, run=1")
    for name, overrides in RUNS.items():
        cfg = composed(*overrides)
        method = instantiate({"_target_": "hydra.utils.get_class", "path": cfg.method._target_})
        recipe = recipe_of(cfg, method.decide_what_learns)
        chosen = {item.partition("=")[0]: item.partition("=")[2] for item in overrides}
        recipe |= {"method": chosen["method"], "model": recipe["model"] | {"name": chosen.get("model", "janus_tiny")}}
        said = {"format": 1, "class": cfg.method._target_, **recipe}
        held = {"state_dict": {}, "global_step": 3, "optimizer_states": [], "t2i_rl": said, method.keeps_as: {}}
        write_checkpoint(held, place / f"{name}.ckpt")
    return {name: place / f"{name}.ckpt" for name in RUNS}


@pytest.mark.parametrize("name", RUNS)
def test_a_command_takes_method_model_and_what_learns_from_the_checkpoint(files, name):
    command = ["task=generate", "prompt=a red circle", f"ckpt_path={in_words_of_hydra(str(files[name]))}"]
    cfg, trained = composed(*with_choices_of_checkpoint(command)), composed(*RUNS[name])
    check_checkpoint(cfg)
    assert cfg.method._target_ == trained.method._target_ and cfg.model._target_ == trained.model._target_
    for setting in ("lora", "trainable", "tokens", "position", "buckets", "variant", "reduction"):
        assert cfg.method.get(setting) == trained.method.get(setting)


def test_what_the_command_says_itself_is_left_to_it(files):
    command = ["task=evaluate", "method.lora.r=2", "model=janus", "path=x", f"ckpt_path={files['lora8']}"]
    taken = with_choices_of_checkpoint(command)
    assert "method=iris_lora" in taken and not any(item.startswith(("method.lora=", "model.")) for item in taken)
    for command in (["seed=1"], ["method=iris", "task=train"], ["task=evaluate", "experiment=iris_shapes"]):
        assert with_choices_of_checkpoint([*command, "ckpt_path=x.ckpt"]) == [*command, "ckpt_path=x.ckpt"]


@pytest.mark.parametrize(
    ("name", "chosen", "words"),
    [
        ("lora8", ["method=iris"], "give method=iris_lora method.lora={r:8"),
        ("lora8", ["method=iris_lora"], "give method=iris_lora method.lora={r:8"),
        ("lora8", [*LORA8, "method.lora.lora_alpha=16"], "lora_alpha:32"),
        ("lora8", ["experiment=iris_shapes"], "give method=iris_lora"),
        ("iris", ["method=iris_lora"], "give method=iris method.lora=null"),
        ("iris", ["method.trainable=[lm_head]"], "method.trainable"),
        ("iris", ["method=irg"], "trained by GRPO, not by IRG: take method=iris"),
        ("irg", ["method=iris"], "trained by IRG, not by GRPO: take method=irg"),
        ("irg", ["method=irg_grpo"], "not by TrajectoryGRPO: take method=irg"),
        ("irg_grpo", ["method=irg"], "not by IRG: take method=irg_grpo"),
        ("softrepa", ["method=agsm", "model=sd_tiny"], "trained by SoftREPA, not by AGSM: take method=softrepa"),
        ("softrepa", ["method=softrepa", "model=sd3_tiny"], "take model=sd_tiny"),
        ("agsm", ["method=agsm", "model=sd3_tiny"], "method.position='start'"),
        ("adapters", ["method=denoising", "model=sd_tiny"], "method.lora={r:4"),
        ("lora8", ["method=noise_opt"], "reads no checkpoint"),
        ("softrepa", ["task=make_preferences", "model=sd_tiny", "task.out=x"], "reads no checkpoint"),
    ],
)
def test_a_command_that_chooses_something_else_is_refused_with_what_to_give(files, name, chosen, words):
    tasks = ["task=export"] if not any("task=" in item or "noise" in item for item in chosen) else []
    cfg = composed(*tasks, *chosen)
    cfg.ckpt_path = str(files[name])
    with pytest.raises(UserError) as refusal:
        check_checkpoint(cfg)
    assert words in str(refusal.value) and "\n" not in str(refusal.value)


@pytest.mark.parametrize("name", ["lora8", "irg", "softrepa"])
def test_training_goes_on_from_no_checkpoint_of_another_method(files, monkeypatch, tmp_path, capfd, name):
    monkeypatch.setattr("t2i_rl.models.autoregressive.janus.load_pretrained", None)
    assert call(monkeypatch, tmp_path, f"ckpt_path={files[name]}") == 2
    said = capfd.readouterr().err
    assert said.count("\n") == 1 and f"method={RUNS[name][0].removeprefix('method=')}" in said


def test_training_goes_on_from_no_weights_alone(files, tmp_path):
    held = read_checkpoint(files["iris"])
    del held["optimizer_states"]
    write_checkpoint(held, tmp_path / "best.ckpt")
    cfg = composed()
    cfg.ckpt_path = str(tmp_path / "best.ckpt")
    with pytest.raises(UserError, match="last.ckpt or step_"):
        check_checkpoint(cfg)


@pytest.mark.parametrize(
    ("held", "chosen", "words"),
    [
        ({"grpo": {}, "state_dict": {"a.lora_A.default.weight": torch.zeros(1)}}, [], "holds adapters"),
        ({"grpo": {}}, ["method=iris_lora"], "holds no adapters"),
        ({"irg": {}}, [], "take method=irg"),
        ({"something": {}}, [], "give one of this method's"),
        ({"grpo": {}, "t2i_rl": {"format": 2, "version": "9"}}, [], "written by t2i_rl 9"),
        ({"grpo": {}, "t2i_rl": "a word"}, [], "another program"),
        ({"grpo": {}}, [], None),
    ],
)
def test_a_checkpoint_older_or_newer_than_this_version_is_judged_by_what_it_holds(tmp_path, held, chosen, words):
    write_checkpoint({"state_dict": {}, "global_step": 1, **held}, tmp_path / "it.ckpt")
    cfg = composed("task=evaluate", *chosen)
    cfg.ckpt_path = str(tmp_path / "it.ckpt")
    if words is None:
        return check_checkpoint(cfg)
    with pytest.raises(UserError, match=words):
        check_checkpoint(cfg)


def grpo(folder: str, **options) -> GRPO:
    return GRPO(load_tiny_janus(folder), Random(), partial(torch.optim.SGD, lr=0.1), kl_coef=0.0, **options)


def test_only_exactly_what_learns_is_loaded(folder, tmp_path):
    """Without a KL there is no reference, and the weights that training began with are compared nonetheless."""
    whole, adapted = grpo(folder), grpo(folder, lora={"r": 4, "lora_alpha": 8})
    for name, module in (("whole", whole), ("adapted", adapted)):
        held = {"state_dict": module.state_dict(), "global_step": 5}
        module.on_save_checkpoint(held)
        write_checkpoint(held, tmp_path / name)
    with torch.no_grad():
        next(adapted.parameters()).zero_()
    assert grpo(folder).load(str(tmp_path / "whole")) == 5
    for name, options, words in (
        ("whole", {"lora": {"r": 4}}, "other weights than are trained here"),
        ("adapted", {}, r"\(30 tensors there, 21 here, 0 alike\): give its run's method.trainable and method.lora"),
        ("adapted", {"lora": {"r": 2, "lora_alpha": 4}}, "other weights than are trained here"),
        ("adapted", {"lora": {"r": 4, "lora_alpha": 4}}, "trained at another strength"),
        ("whole", {"text_loss_weight": 0.0}, "other weights than are trained here"),
    ):
        with pytest.raises(UserError, match=words):
            grpo(folder, **options).load(str(tmp_path / name))
    other = load_tiny_janus(folder)
    with torch.no_grad():
        next(other.parameters()).add_(1.0)
    with pytest.raises(UserError, match="other weights than model.path holds"):
        GRPO(other, Random(), partial(torch.optim.SGD, lr=0.1), kl_coef=0.0).load(str(tmp_path / "whole"))


def test_adapters_older_than_the_record_of_their_strength_are_loaded_with_a_line(folder, tmp_path, capsys):
    lora = {"r": 4, "lora_alpha": 8}
    held = {"state_dict": grpo(folder, lora=lora).state_dict(), "global_step": 5}
    grpo(folder, lora=lora).on_save_checkpoint(held)
    del held[ABOUT]
    write_checkpoint(held, tmp_path / "old")
    assert grpo(folder, lora=lora).load(str(tmp_path / "old")) == 5
    assert "they count 2 times, as method.lora says" in capsys.readouterr().out


def test_lightning_resumes_under_the_same_rule(folder, tmp_path):
    """Its own strict_loading is off, since a checkpoint lacks what is frozen."""
    held = {
        "state_dict": grpo(folder).state_dict(),
        "global_step": 0,
        "epoch": 0,
        "pytorch-lightning_version": L.__version__,
    }
    grpo(folder).on_save_checkpoint(held)
    held["state_dict"].popitem()
    write_checkpoint(held, tmp_path / "short.ckpt")
    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    trainer = L.Trainer(accelerator="cpu", max_steps=1, default_root_dir=tmp_path, **quiet)
    batches = torch.utils.data.DataLoader([0])
    with pytest.raises(UserError, match="other weights than are trained here"):
        trainer.fit(grpo(folder), batches, ckpt_path=tmp_path / "short.ckpt", weights_only=True)


def test_a_run_with_adapters_is_evaluated_drawn_and_exported_by_the_printed_commands(folder, tmp_path, monkeypatch):
    small = [
        "debug=fdr",
        "benchmark.samples_per_prompt=1",
        "benchmark.prompts_per_task=1",
        "data.batch_size=1",
        "trainer=cpu",
        "~callbacks.progress",
        "~callbacks.sample_grid",
    ]
    model = ["model=janus", f"path={folder}", "model.max_plan_tokens=8"]
    train = [
        *small,
        *model,
        *LORA8,
        "method.group_size=2",
        "trainer.max_steps=1",
        "evaluation.stages=[]",
        "method.optimizer.lr=0.1",
    ]
    assert call(monkeypatch, tmp_path, *train, "hydra.run.dir=run") == 0
    said = read_checkpoint(tmp_path / "run/checkpoints/last.ckpt")["t2i_rl"]
    results = json.loads((tmp_path / "run/results.json").read_text())
    assert said["method"] == "iris_lora" and said["step"] == 1 and said["model"]["path"] == folder
    assert said["settings"] == results["settings"]["method"]
    last = "ckpt_path=run/checkpoints/last.ckpt"
    assert call(monkeypatch, tmp_path, "task=export", last, "task.out=out", "trainer=cpu", "hydra.run.dir=a") == 0
    exported, base = load_file(tmp_path / "out/model.safetensors"), load_file(Path(folder) / "model.safetensors")
    assert any((exported[name] - base[name]).abs().max() > 1e-4 for name in base)
    drawing = [
        "trainer=cpu",
        "model.max_plan_tokens=8",
        "benchmark.samples_per_prompt=1",
        "benchmark.prompts_per_task=1",
    ]
    generate = ["task=generate", "prompt=a red circle", "num_images=1", last, *drawing, "hydra.run.dir=b"]
    assert call(monkeypatch, tmp_path, *generate) == 0
    evaluate = ["task=evaluate", last, *drawing, "evaluation.stages=[trained_direct]", "hydra.run.dir=c"]
    assert call(monkeypatch, tmp_path, *evaluate) == 0
    evaluated = json.loads((tmp_path / "c/results.json").read_text())
    assert evaluated["settings"]["method"]["lora"]["r"] == 8 and evaluated["steps"] == 1
    assert "Settings" in (tmp_path / "c/report.html").read_text()


@pytest.mark.parametrize(
    "value",
    [
        None,
        True,
        1,
        1e-5,
        "a",
        "it's",
        "a\\",
        "a\\'b",
        r"model\.language_model\.",
        "a,b (c) [d] {e} =:é",
        "",
        "1e3",
        "null",
        [r"lm_head\."],
        {"r": 8, "lora_alpha": 8.5, "target_modules": ["to_q", "to_out.0"]},
    ],
)
def test_any_setting_comes_through_the_command_line_as_it_was(value):
    parsed = OverridesParser.create().parse_override(f"method.lora={in_words_of_hydra(value)}")
    assert OmegaConf.create({"value": parsed.value()}).value == (OmegaConf.create({"value": value}).value)


@pytest.mark.parametrize("text", ["${seed}", r"\${seed}", r"a\\${seed}", "'${seed}'"])
def test_a_text_that_looks_like_a_reference_comes_through_as_it_was(text):
    parsed = OverridesParser.create().parse_override(f"method.start_from={in_words_of_hydra(text)}")
    assert OmegaConf.create({"value": parsed.value()}).value == text


def test_results_and_checkpoints_name_every_setting_also_those_of_signatures(folder):
    cfg = composed("model=janus", f"path={folder}", "method.group_size=2")
    with open_dict(cfg):
        del cfg.method.clip_range
    settings = settings_used(cfg)
    assert settings["method"]["clip_range"] == 0.2 and settings["method"]["group_size"] == 2
    assert settings["method"]["optimizer"]["eps"] == 1e-8
    assert json.loads(json.dumps(settings)) == settings
    assert build_method(cfg, instantiate(cfg.model), reward=Random()).resolved_settings()["clip_range"] == 0.2


@pytest.mark.parametrize("name", sorted(path.stem for path in (CONF / "method").glob("*.yaml")))
def test_the_settings_of_every_method_are_numbers_and_not_left_to_the_code(name):
    cfg = composed(
        f"method={name}",
        "variant=released",
        *(["model=sd_tiny"] if name in ("agsm", "softrepa", "denoising") else []),
        *(["data.path=x"] if name == "diffusion_dpo" else []),
    )
    settings = json.loads(json.dumps(settings_used(cfg)))["method"]
    assert "${" not in json.dumps(settings)
    if name in ("agsm", "softrepa"):
        decided = ("temperature", "tokens", "buckets", "position", "init", "times", "noise", "interpolate", "tables")
        assert all(settings[key] is not None for key in decided) and settings["init"] == "bos"
