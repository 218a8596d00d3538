"""What is typed is what is meant.

Texts stay as they stand, null is an empty group, and dashes are told from settings.
"""

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf

from t2i_rl.command.overrides import LISTS, SENTENCES, TEXTS, readable
from t2i_rl.core.choices import choices
from t2i_rl.core.errors import UserError
from t2i_rl.core.places import CONF
from tests.support.commands import composed

SENTENCES_TYPED = (
    *("1e3", "true", "null", "1_000", "1.50", "-5", "[a cat]", "{a: b}", "a cat (sitting)", "it's red", "三个红色的圆"),
    *("two cats, one dog", "a cat; a dog", 'a sign that says "hi"', "a = b", "#1 & 50% off!", "${seed} cats", "${"),
    *(" spaces at both ends ", "back\\slash", "at its end\\", "\\${seed}", "'a', 'b'", "choice(a,b)", "glob(*)", "~x"),
    *('"a" and "b"', "two\nlines", "$HOME @ 5:00?", "é|ü", "<b>*</b>", "", "a,", "str(1)", "++x=1", "--help"),
)


def given(*arguments: str) -> list[str]:
    """The settings as Hydra gets them."""
    arranged = readable(list(arguments), CONF)
    return arranged[arranged.index("--") + 1 :]


def read(override: str):
    """The value of a setting as a task reads it."""
    value = OverridesParser.create().parse_override(override).value()
    return OmegaConf.create({"seed": 7, "paths": {"root_dir": "here"}, "value": value}).value


@pytest.mark.parametrize("text", SENTENCES_TYPED)
@pytest.mark.parametrize("key", ["prompt", "+prompt", "++prompt", "task.source"])
def test_a_prompt_is_what_was_typed(key, text):
    (override,) = given(f"{key}={text}")
    assert override.startswith(f"{key}=") and read(override) == text
    assert given(override) == [override]  # a process that DDP launches reads it again


@pytest.mark.parametrize(
    "key", ["ckpt_path", "model.path", "hydra.run.dir", "image", "model.chat.system", "logger.wandb.name", "task.out"]
)
@pytest.mark.parametrize("text", ["/a/b=c,d/e", "it's", "1e3", "007", "[x]", "{y}", "red (1)", "名前", "true", "a b"])
def test_paths_and_names_are_what_was_typed(key, text):
    assert read(given(f"{key}={text}")[0]) == text


def test_a_path_may_be_none_or_refer_to_another_setting():
    assert read(given("ckpt_path=null")[0]) is None
    assert read(given("ckpt_path=${paths.root_dir}/it's")[0]) == "here/it's"


@pytest.mark.parametrize("value", ["'a, b'", '"a, b"'])
def test_quotes_for_hydra_go_on_working(value):
    assert given(f"prompt={value}") == [f"prompt={value}"] and read(f"prompt={value}") == "a, b"


def test_texts_in_a_list_are_what_was_typed():
    assert list(read(given("tags=[it's, 1e3, 'a, b', red (2)]")[0])) == ["it's", "1e3", "a, b", "red (2)"]
    assert list(read(given("callbacks.sample_grid.prompts=[${seed} cats, null]")[0])) == ["${seed} cats", "null"]
    assert given("tags=[]") == ["tags=[]"]


def test_numbers_lists_and_dicts_mean_what_they_did():
    typed = ["method.optimizer.lr=1e-5", "data.tasks=[a,b]", "method.lora={r: 4}", "method.plan=false", "seed=007"]
    assert given(*typed) == typed
    with pytest.raises(UserError, match="a list is written"):
        given("data.tasks=[a,b")


def test_what_only_a_text_can_be_is_a_text_wherever_it_stands():
    assert read(given("mine.caption=it's (new)")[0]) == "it's (new)"


def test_in_a_sweep_a_comma_divides_unless_it_is_quoted():
    def jobs(typed: str) -> list:
        override = OverridesParser.create().parse_override(given("-m", typed)[0])
        elements = override.sweep_string_iterator() if override.is_sweep_override() else [given("-m", typed)[0][7:]]
        return [read(f"prompt={element}") for element in elements]

    assert jobs("prompt=a cat,it's red, 1e3") == ["a cat", "it's red", "1e3"]
    assert jobs('prompt="two cats, one dog",a [big] dog') == ["two cats, one dog", "a [big] dog"]
    assert jobs("prompt=choice(a,b)") == ["a", "b"] and jobs("prompt=it's one") == ["it's one"]


def test_a_path_out_of_a_sweep_stays_one_path_in_a_sweep(tmp_path):
    job = tmp_path / "reward=oracle,seed=0"
    job.mkdir()
    assert given("-m", f"ckpt_path={job}") == [f'ckpt_path="{job}"']
    assert given("-m", "hydra.sweep.dir=/a=b,c") == ['hydra.sweep.dir="/a=b,c"']


def test_every_setting_of_a_text_is_among_the_texts():
    """A setting that conf/ gives as a text is taken as one, or is one of a list of words.

    The class of such a setting refuses every word that is not in its list.
    """
    words = {
        *("accelerator", "precision", "strategy", "dtype", "device", "mode", "variant", "method.logprob", "policy"),
        *("loss_reduction", "reward_on", "aggregation", "divergence", "distribution", "compat", "kind", "normalize"),
        *("split", "best", "optimized_metric", "scheduler", "attn_implementation", "convention", "algorithm", "layout"),
        *(
            "init",
            "average_init",
            "noise",
            "on_nonfinite",
            "position",
            "times",
            "pipeline",
            "negatives",
            "reduction",
            "held_out",
            "bins",
        ),
        *("about", "permutation", "stat", "profiler", "times", "_convert_", "guidance_scale", "line_search_fn"),
        *("family", "constant"),
    }
    known = {*SENTENCES, *TEXTS, *words}

    def unknown(node: dict, where: str):
        for key, value in node.items():
            name = f"{where}.{key}"
            if isinstance(value, dict):
                yield from unknown(value, name)
            elif isinstance(value, str) and "${" not in value and value != "???" and key != "_target_":
                yield from [] if any(f".{name}".endswith(f".{text}") for text in known) else [name]

    left_over = set()
    for path in sorted(CONF.glob("*/**/*.yaml")):
        content = OmegaConf.to_container(OmegaConf.load(path), resolve=False)
        content.pop("defaults", None), content.pop("hydra", None)
        group = path.parent.relative_to(CONF).as_posix().replace("/", ".")
        whole = "@package _global_" in path.read_text() or group in ("callbacks", "logger")
        left_over |= set(unknown(content, "" if whole else group))
    assert not left_over


def test_lists_of_texts_are_texts():
    assert set(LISTS) <= {*SENTENCES, *TEXTS}


@pytest.mark.parametrize(
    "group", ["experiment", "debug", "hparams_search", "logger", "callbacks", "reward", "regularizer"]
)
def test_a_group_may_be_null(group):
    assert given(f"{group}=null") == [f"{group}=none"]
    assert given("-m", f"{group}=null,none") == [f"{group}=none,none"] and "none" in choices(group)


def test_no_experiment_is_the_settings_of_the_groups():
    named = composed("experiment=none", "debug=none", "hparams_search=none")
    plain = composed()
    assert [named[key] for key in named if key != "hydra"] == [plain[key] for key in plain if key != "hydra"]


@pytest.mark.parametrize(
    "group", ["model", "method", "task", "data", "benchmark", "trainer", "paths", "method/optimizer"]
)
def test_a_group_that_a_run_needs_is_not_null(group):
    with pytest.raises(UserError, match=f"^{group}=null is no choice.*choose from"):
        given(f"{group}=null")


@pytest.mark.parametrize(
    ("typed", "right"),
    [
        (["--seed=1"], "seed=1 instead"),
        (["--method", "iris"], "method=iris instead"),
        (["-seed", "1"], "seed=1 instead"),
        (["-prompt", "a cat"], "prompt=a cat instead"),
        (["--max-steps", "10"], "trainer.max_steps=10 instead"),
        (["--lr=1e-4"], "method.optimizer.lr=1e-4 instead"),
        (["iris"], "such as method=iris"),
        (["seed", "=", "1"], "without spaces"),
        (["--cfg", "job", "-m"], "do not go together"),
        (["--resolve"], "--cfg job"),
        (["--config-dir"], "expected one argument"),
        (["model.=1"], "name=value"),
    ],
)
def test_what_is_no_setting_is_told_how_it_is_written(typed, right):
    with pytest.raises(UserError, match=right) as error:
        readable(typed, CONF)
    assert "\n" not in str(error.value)


def test_hydras_options_may_stand_anywhere():
    typed = ["seed=0,1", "--config-dir", "mine", "-m", "model=sd_tiny"]
    assert readable(typed, CONF) == ["--config-dir", "mine", "-m", "--", "seed=0,1", "model=sd_tiny"]
    assert readable(["--multi", "prompt=a,b"], CONF) == ["--multi", "--", "prompt=a,b"]
