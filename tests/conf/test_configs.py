"""Every shipped YAML says what it is and how to use it.

It composes, resolves, and names classes that exist.
"""

import re
from pathlib import Path

import pytest
from hydra.utils import get_class, get_object
from omegaconf import OmegaConf

from t2i_rl.command.checks import check_config
from t2i_rl.command.manual import GROUPS, summary
from t2i_rl.command.messages import one_line
from t2i_rl.command.settings import check_root, check_settings
from t2i_rl.core.errors import UserError
from t2i_rl.core.places import CONF
from t2i_rl.core.stated import STATED
from t2i_rl.core.used_settings import TABLES, written_out
from t2i_rl.tasks import export
from t2i_rl.tasks.examine import made_judge
from tests.support.commands import composed

FILES = sorted(path for path in CONF.rglob("*.yaml") if path.name != "config.yaml")
GIVEN = {  # what has no default
    "data/prompts": ["data.path=prompts.jsonl"],
    "data/t2i_r1": ["data.path=prompts.jsonl"],
    "reward/orm": ["reward.path=orm"],
    "reward/t2i_r1": ["reward.parts.orm.path=orm"],
    "experiment/t2i_r1_janus_pro_7b": ["data.path=prompts.jsonl", "reward.parts.orm.path=orm"],
    "model/janus": ["path=somewhere"],
    "variant/paper": ["method=agsm", "model=sd_tiny"],
    "data/coco": ["data.path=coco"],
    "data/preferences": ["data.path=preferences"],
    "method/diffusion_dpo": ["data.path=preferences"],
    "task/make_preferences": ["task.out=preferences"],
    "data/image_text": ["data.path=pairs"],
    **{f"method/optimizer/{name}": ["method=noise_opt"] for name in ("adam", "langevin", "lbfgs", "nesterov")},
    **{
        f"experiment/{name}": ["data.path=prompts.txt"]
        for name in ("mpgr_flux_aesthetic", "mpgr_flux_pickscore", "reno_sdxl_turbo", "dno_sd15", "gper_flux")
    },
    "task/encode": ["task.out=encodings"],
    "experiment/irg_janus_pro_7b": ["data.path=irgl"],
    "experiment/irg_janus_pro_7b_stage2": ["data.path=irgl", "method.start_from=last.ckpt"],
    "data/irgl": ["method=irg", "data.path=irgl"],
    "task/make_irgl": ["task.out=irgl"],
    "task/teacher/world": ["task=make_irgl", "task.out=irgl"],
    "task/teacher/chat": [
        "task=make_irgl",
        "task.out=irgl",
        "task.teacher.pictures.path=good",
        "task.teacher.writer.url=http://localhost:8000/v1",
        "task.teacher.writer.model=m",
    ],
    "task/teacher/local": [
        "task=make_irgl",
        "task.out=irgl",
        "task.teacher.pictures.path=good",
        "task.teacher.writer.path=vlm",
    ],
    "task/import_soft_tokens": ["task.tokens=dc_tokens.pth"],
    **{
        f"experiment/{method}_{model}": ["data.path=coco"]
        for method in ("softrepa", "agsm")
        for model in ("sd15", "sdxl", "sd3")
    },
}
NEEDS_AN_EXTRA = {"hparams_search/iris_optuna"}


def group_of(path: Path) -> str:
    return str(path.parent.relative_to(CONF))


def targets(node) -> list[str]:
    if isinstance(node, dict):
        own = [node["_target_"]] if "_target_" in node else []
        return own + [name for value in node.values() for name in targets(value)]
    return [name for value in node for name in targets(value)] if isinstance(node, list) else []


@pytest.mark.parametrize("path", FILES, ids=lambda path: f"{group_of(path)}/{path.stem}")
def test_a_config_opens_with_what_it_is_and_how_to_use_it(path):
    header = [line for line in path.read_text().splitlines() if line.startswith("#") and "@package" not in line]
    assert len(header) >= 2 and summary(path)[0].isalpha(), path
    assert summary(path).endswith((".", ")", "]")), (
        f"{path}: --help shows its first line alone, which ends in mid-sentence"
    )
    assert any(re.search(r"python (run\.py|experiments)", line) for line in header), f"{path}: no command in its header"


@pytest.mark.parametrize("path", FILES, ids=lambda path: f"{group_of(path)}/{path.stem}")
def test_a_config_composes_resolves_and_names_what_exists(path):
    name = f"{group_of(path)}/{path.stem}"
    if name in NEEDS_AN_EXTRA:
        pytest.importorskip("hydra_plugins.hydra_optuna_sweeper")
    extra = GIVEN.get(
        name, ["data.path=prompts.jsonl"] if "janus_pro" in path.read_text() and name.startswith("experiment") else []
    )
    config = composed(f"{group_of(path)}={path.stem}", *extra)
    own = {key: value for key, value in config.items() if key != "hydra"}
    container = OmegaConf.to_container(OmegaConf.create(OmegaConf.to_container(config, resolve=True)), resolve=True)
    for target in targets({key: container[key] for key in own}):
        get_object(target)
    check_root(config)
    check_settings(config, list(own))


def test_the_root_is_what_the_issue_asks_for():
    config = composed()
    choices = config.hydra.runtime.choices
    assert {
        group: choices[group] for group in ("task", "method", "model", "reward", "benchmark", "trainer", "logger")
    } == {
        "task": "train",
        "method": "iris",
        "model": "janus_tiny",
        "reward": "nsc",
        "benchmark": "shapes",
        "trainer": "auto",
        "logger": "csv",
    }
    assert set(GROUPS) == {group_of(path) for path in FILES}


@pytest.mark.parametrize("override", ["method.nonsense=1", "nonsense=1", "reward=nonsense", "trainer.max_step=3"])
def test_unknown_keys_and_choices_fail_in_one_line(override):
    with pytest.raises(Exception) as error:
        composed(override)
    assert "\n" not in one_line(error.value)


def own_settings(*overrides: str):
    """A config as a job gets it, without Hydra's part."""
    config = composed("trainer=cpu", *overrides)
    return OmegaConf.masked_copy(config, [key for key in config if key != "hydra"])


def test_a_variant_that_is_none_is_refused_in_plain_words():
    with pytest.raises(Exception) as error:
        composed("variant=published")
    assert one_line(error.value) == "there is no variant=published; choose from ours, paper, released"
    with pytest.raises(
        UserError, match="^variant must be one of ours, released with this method and reward, not 'paper'"
    ):
        check_config(own_settings("variant=paper"))


def test_a_variant_is_a_choice_and_no_value():
    config = own_settings("method=agsm", "model=sd_tiny")
    check_config(config)
    config.variant = "released"
    with pytest.raises(UserError, match="variant=released is a choice of a group.*`- override /variant: released`"):
        check_config(config)


@pytest.mark.parametrize(
    ("overrides", "numbers"),
    [
        (["method=softrepa", "model=sd_tiny"], {"method.temperature": 0.07, "method.times": "per_image"}),
        (["method=softrepa", "model=sd_tiny", "variant=released"], {"method.denoising_weight": 10.0}),
        (["method=softrepa", "model=sdxl", "variant=released", "data=coco", "data.path=x"], {"method.buckets": 0}),
        (["method=agsm", "model=sd_tiny"], {"method.gamma_negative": 1.0, "method.temperature": 0.1}),
        (["method=agsm", "model=sd3_tiny", "variant=paper"], {"method.position": "start", "method.reduction": "sum"}),
        (["method=agsm", "model=flux_tiny", "variant=released"], {"method.average_init": "independent"}),
        (["method=agsm", "model=sd_tiny", "method.temperature=0.2"], {"method.temperature": 0.2}),
        (["method=iris_lora", "variant=released"], {"method.loss_reduction": "prompt", "reward.constant": "kept"}),
        ([], {"trainer.max_steps": 40, "mode": "plan", "model.chat.final_stop": "strip"}),
        (["model=sd_tiny"], {"trainer.max_steps": 200, "mode": "direct"}),
        (["method=irg"], {"trainer.max_steps": 1200, "mode": "turns"}),
        (["method=irg_grpo", "trainer.max_steps=3"], {"trainer.max_steps": 3, "mode": "turns"}),
    ],
)
def test_a_config_that_is_written_down_holds_its_numbers_and_no_table(overrides, numbers, tmp_path):
    config = OmegaConf.create(written_out(own_settings(*overrides)))
    assert {key: OmegaConf.select(config, key) for key in numbers} == numbers
    assert not set(TABLES) & set(config) and "${" not in OmegaConf.to_yaml(config)


@pytest.mark.parametrize("group", STATED)
def test_what_a_config_says_of_its_class_the_class_says_too(group):
    for path in (CONF / group).glob("*.yaml"):
        given = GIVEN.get(f"{group}/{path.stem}", [])
        config = own_settings(f"{group}={path.stem}", *given)
        kind = get_class(config[group]._target_)
        for name in STATED[group]:
            own = getattr(kind, name)
            own = sorted(own) if isinstance(own, (frozenset, tuple)) else own or None
            said = config[group].get(name)
            assert (sorted(said) if OmegaConf.is_list(said) else said) == own, f"{path}: {name}"


class Mine:
    """Stands for classes of a user's own, whose configs say nothing of them."""

    family, mode, steps, stages, trains = "autoregressive", "turns", 7, ("base_turns",), frozenset({"diffusion"})


def test_a_class_of_the_users_own_speaks_for_itself():
    config = composed(f"model._target_={__name__}.Mine", "~model.family", f"method._target_={__name__}.Mine")
    assert (config.family, config.mode, config.trainer.max_steps) == ("autoregressive", "turns", 7)
    assert list(config.evaluation.stages) == ["base_turns"]
    config = composed("model=sd_tiny", "model._target_=nowhere.Mine", "~model.family", "~model.kind", "method=agsm")
    assert config.family == "autoregressive" and config.method.gamma_negative == 0.1  # refused where classes are


def test_the_oracle_is_watched_where_the_benchmark_is_its_own(tmp_path):
    assert composed().watch == {"oracle": {"_target_": "t2i_rl.rewards.oracle.Oracle", "kind": "strict"}}
    assert composed("~watch.oracle").watch == {}
    assert set(composed("~watch.oracle", "+reward@watch.nsc=nsc").watch) == {"nsc"}
    assert set(composed("+reward@watch.nsc=nsc").watch) == {"oracle", "nsc"}
    (tmp_path / "benchmark").mkdir()
    (tmp_path / "benchmark" / "mine.yaml").write_text("_target_: mine.Benchmark\n")
    assert composed(f"hydra.searchpath=[file://{tmp_path}]", "benchmark=mine").watch == {}


def test_removing_and_adding_works_as_typed():
    config = composed("~callbacks.sample_grid", "++trainer.limit_test_batches=1", "+method.extra=1", "tags=[a,b]")
    assert "sample_grid" not in config.callbacks and config.trainer.limit_test_batches == 1 and config.method.extra == 1


def test_the_conf_folder_is_the_repositorys():
    assert Path(__file__).parents[2] / "conf" == CONF


def test_a_judge_of_pictures_of_another_size_is_refused(monkeypatch):
    cfg = composed("method=irg", "+reward@method.judge=soft_oracle")
    assert (
        type(made_judge(cfg, [], None)).__name__ == "SoftOracle"
        and made_judge(composed("method=irg"), [], None) is None
    )
    monkeypatch.setattr("t2i_rl.models.autoregressive.janus.Janus.image_size", staticmethod(lambda cfg: 64))
    with pytest.raises(UserError, match="method.judge .* reads images of 32 pixels, but this model draws 64x64"):
        made_judge(cfg, [], None)


def test_an_adapter_on_other_weights_than_the_models_is_not_exported_alone(tmp_path):
    cfg = composed(
        "task=export",
        "method=irg_grpo",
        "method.lora={r: 2}",
        "task.adapter=true",
        "ckpt_path=x",
        "method.start_from=y",
        f"task.out={tmp_path / 'out'}",
    )
    with pytest.raises(UserError, match="sits on the weights of method.start_from"):
        export.check(cfg)
