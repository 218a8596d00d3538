"""Wrong commands end in one line that names what was meant."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import CLIPImageProcessorPil

from t2i_rl.benchmarks.shapes import Shapes
from t2i_rl.command import manual
from t2i_rl.command.folder_names import LONGEST, folder_name
from t2i_rl.command.messages import one_line
from t2i_rl.core.choices import choices, near_choice, nearest_keys
from t2i_rl.core.contracts import Reward
from t2i_rl.core.errors import UserError
from t2i_rl.core.places import CONF
from t2i_rl.evaluation.optimized import check_optimized
from t2i_rl.methods.noise.results import check_optimized as check_optimized_noise
from t2i_rl.rewards.processors import image_processors
from t2i_rl.tasks.examine import named_parts
from tests.support.commands import call, composed

ROOT = Path(__file__).parents[2]
KEYS = [
    *(
        "logger",
        "logger.csv",
        "method",
        "method.group_size",
        "method.optimizer",
        "method.optimizer.lr",
        "method.kl_coef",
    ),
    *("data.batch_size", "evaluation.batch_size", "evaluation.stages", "trainer.max_steps", "seed", "reward"),
]


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("lr", ["method.optimizer.lr"]),
        ("optimizer.lr", ["method.optimizer.lr"]),
        ("learning_rate", ["method.optimizer.lr"]),
        ("method.lr", ["method.optimizer.lr"]),
        ("data.batchsize", ["data.batch_size", "evaluation.batch_size"]),
        ("max-steps", ["trainer.max_steps"]),
        ("steps", ["trainer.max_steps"]),
        ("method.groupsize", ["method.group_size"]),
        ("sed", ["seed"]),
        ("reward.foo", []),
        ("nothing_like_it", []),
    ],
)
def test_a_setting_is_known_by_its_last_part(typed, meant):
    assert nearest_keys(typed, KEYS) == meant


@pytest.mark.parametrize(
    ("group", "typed", "meant"),
    [
        ("method", "dpo", "diffusion_dpo"),
        ("method", "GRPO", "irg_grpo"),
        ("method", "soft-repa", "softrepa"),
        ("model", "sdtiny", "sd_tiny"),
        ("model", "janus-pro-1b", "janus_pro_1b"),
        ("model", "sd1.5", "sd15"),
        ("model", "flux", "flux_schnell or flux_tiny"),
        ("model", "StableDiffusionXL", "sdxl"),
        ("reward", "clip_score", "clip"),
        ("reward", "nsq", "nsc"),
        ("reward", "pick-score", "pickscore"),
        ("trainer", "gpus", "gpu"),
    ],
)
def test_a_choice_is_known_by_its_words_and_by_its_class(group, typed, meant):
    assert f"did you mean {meant}" in near_choice(group, typed)


def test_a_choice_of_another_group_is_pointed_at():
    said = one_line(Exception("Could not find 'method/reno'\n\nAvailable options in 'method':\n\tiris"))
    assert "regularizer=reno or reward=reno" in said
    assert near_choice("benchmark", "geneval") == ""


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["lr=1"], "did you mean method.optimizer.lr?"),
        (["seed=0,1"], "-m seed=0,1"),
        (["benchmark=it's"], "choose from shapes"),
        (["~nothing"], "there is no setting nothing"),
        (["reward.foo=1"], "reward has text_sign"),
        (["--config-dir", "nowhere", "seed=1"], "nowhere"),
        (["evaluation.stages=base_plan"], "evaluation.stages must be a list"),
        (["benchmark.size=48"], "set benchmark.size=32"),
        (["optimized_metric=accuracy"], "choose from headline, overall"),
    ],
)
def test_a_wrong_command_ends_in_one_line(tmp_path, monkeypatch, capfd, arguments, said):
    monkeypatch.setattr("t2i_rl.models.autoregressive.janus.load_pretrained", None)
    assert call(monkeypatch, tmp_path, *arguments) == 2
    lines = capfd.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: ") and said in lines[0]


@pytest.mark.parametrize(
    "what", [["--cfg", "job", "--resolve"], ["--cfg", "all", "--resolve"], ["--cfg", "hydra"], ["--info"]]
)
def test_what_is_composed_can_be_shown(tmp_path, monkeypatch, capsys, what):
    assert call(monkeypatch, tmp_path, *what, "prompt=it's (shown)") == 0
    shown = capsys.readouterr().out
    resolved = "- trained_plan\n  batch_size: 64" in shown  # of evaluation
    assert len(shown.splitlines()) > 40 and resolved == ("--resolve" in what)


SLOW = "print(sorted({'torch', 'lightning', 'transformers', 'diffusers', 'peft'} & set(sys.modules)))"  # takes seconds


def test_the_manual_page_comes_at_once():
    program = f"import sys; from t2i_rl.command.cli import main; sys.argv = ['run.py', '--help']; main(); {SLOW}"
    page = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, check=True).stdout
    assert page.splitlines()[-1] == "[]" and "method=diffusion_dpo" in page
    assert page.startswith(manual.manual(CONF))


@pytest.mark.parametrize(
    "arguments",
    [
        ["reward=nsq"],
        ["method.lr=1"],
        ["method=irg", "model=sd_tiny"],
        ["evaluation.stages=[trained]"],
        ["method=iris", "variant=paper"],
        ["data=prompts"],
    ],
)
def test_what_the_config_alone_tells_is_refused_at_once(tmp_path, arguments):
    program = f"""
import atexit, sys
atexit.register(lambda: {SLOW})
from t2i_rl.command.cli import main
sys.argv = ['run.py', *{arguments}]
main()
"""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert done.returncode == 2 and done.stderr.startswith("error: ") and done.stdout == "[]\n", done.stderr


def test_the_manual_page_parts_each_name_from_what_it_is():
    first_words = {line.split()[0] for line in manual.manual(CONF).splitlines() if line.startswith("  ")}
    assert {path.stem for group in manual.GROUPS for path in (CONF / group).glob("*.yaml")} <= first_words


def test_a_reader_may_leave(tmp_path):
    """`python run.py --help | head`: a pipe that is closed before anything is written."""
    reading, writing = os.pipe()
    os.close(reading)
    for arguments, code in ((["--help"], 0), (["nonsense=1"], 2)):
        command = [sys.executable, str(ROOT / "run.py"), *arguments]
        done = subprocess.run(command, stdout=writing, stderr=subprocess.PIPE, text=True, cwd=tmp_path)
        assert done.returncode == code and "Traceback" not in done.stderr and "BrokenPipe" not in done.stderr
    os.close(writing)


def test_callbacks_that_are_left_out_may_have_settings_left():
    for debug in choices("debug"):
        assert named_parts(composed("callbacks=none", f"debug={debug}"), "callbacks") == {}
    config = composed("callbacks.checkpoint=null", "debug=fdr", "logger=none", "+logger.wandb.project=mine")
    assert named_parts(config, "logger") == {}
    made = named_parts(config, "callbacks")
    assert {"sample_grid", "progress"} <= set(made) and "checkpoint" not in made and None not in made.values()
    with pytest.raises(UserError, match=r"callbacks.sample_gird names no class.*sample_grid"):
        named_parts(composed("+callbacks.sample_gird.every_n_steps=1"), "callbacks")


def test_a_folder_name_fits_a_file_system_and_tells_jobs_apart():
    texts = [
        "红" * 120,
        "红" * 119 + "蓝",
        "é" * 150,
        "x" * 300,
        'prompt="a/b"',
        "prompt=a-b",
        "prompt=a/b",
        "prompt='a-b'",
    ]
    texts += [f"prompt=a{sign}b" for sign in "<>:\\|?*#%&\0\n\t ;!${}[]"] + [
        "prompt=a.",
        "prompt=a",
        "\udce9",
        "job",
        "",
    ]
    names = [folder_name(text) for text in texts]
    assert len(set(names)) == len(texts) - 1  # an empty name is `job`
    for name in names:
        assert (
            len(name.encode()) <= LONGEST + 10
            and not set(name) & set("/<>:\"\\|?*#%&\0\n\t ;!$'")
            and name[-1] not in ". "
        )
    assert folder_name("method.kl_coef=0.01,seed=1") == "method.kl_coef=0.01,seed=1"


def test_what_a_sweeper_optimises_is_known_before_weights_load():
    config = composed()
    benchmark = Shapes(prompts_per_task=1)
    for name, stages, fits in (
        ("headline", [], True),
        (None, [], True),
        ("overall", [], False),
        ("overall", ["trained_plan"], True),
        ("task/counting", ["base_direct"], True),
        ("plan_length", ["base_plan", "trained_plan"], True),
        ("plan_length", ["base_direct", "trained_direct"], False),
        ("diversity", ["trained_plan"], True),
        ("accuracy", ["trained_plan"], False),
        (5, ["trained_plan"], False),
    ):
        config.optimized_metric, config.evaluation.stages = name, stages
        if fits:
            check_optimized(config, benchmark, optimizes=False)
            continue
        with pytest.raises(UserError, match=f"optimized_metric={name}"):
            check_optimized(config, benchmark, optimizes=False)
    config.optimized_metric = "headline"
    config.evaluation.stages = []
    with pytest.raises(UserError, match="nothing is measured"):
        check_optimized(config, benchmark, optimizes=True)
    config = composed("method=irg")
    config.evaluation.stages = ["base_plan", "trained_turns"]
    for name in ("mends", "over_counted", "plan_length"):
        config.optimized_metric = name
        check_optimized(config, benchmark, optimizes=False)
    config.evaluation.stages = ["base_turns"]
    config.optimized_metric = "breaks"
    check_optimized(config, benchmark, optimizes=False)


def test_what_a_sweeper_optimises_of_a_search_over_noise_is_known_before_weights_load():
    config, benchmark = composed("method=noise_opt"), Shapes(prompts_per_task=1)
    for name in ("target", "watch/oracle", "health/kurtosis"):
        config.optimized_metric = name
        check_optimized_noise(config, None)
    config.optimized_metric = "overall"
    check_optimized_noise(config, benchmark)
    with pytest.raises(UserError, match="watch/oracle"):
        check_optimized_noise(config, None)


@pytest.mark.parametrize(
    "broken",
    [
        "raise RuntimeError('operator torchvision::nms does not exist')",
        "raise AttributeError(\"partially initialized module 'torchvision' has no attribute 'extension'\")",
        "raise OSError('undefined symbol')",
    ],
)
def test_a_torchvision_that_does_not_fit_torch_is_one_line(tmp_path, monkeypatch, capfd, broken):
    (tmp_path / "torchvision").mkdir()
    (tmp_path / "torchvision" / "__init__.py").write_text(broken)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "torchvision", raising=False)
    assert call(monkeypatch, tmp_path, "--cfg", "job") == 2
    lines = capfd.readouterr().err.splitlines()
    assert len(lines) == 1 and "torchvision does not fit torch" in lines[0] and "-c constraints.txt" in lines[0]


def test_which_image_processor_a_reward_reads_through_is_told():
    class Judge(Reward):
        def __init__(self, pictures=None, parts=None):
            self.pictures, self.parts = pictures, parts or {}

    seeing = Judge(CLIPImageProcessorPil())
    judges = {"reward": Judge(parts={"clip": seeing, "length": Judge()}), "watch.clip": seeing, "watch.none": Judge()}
    assert image_processors(judges) == dict.fromkeys(("reward.parts.clip", "watch.clip"), "CLIPImageProcessorPil")


def test_what_is_null_already_is_not_left_out():
    with pytest.raises(Exception) as error:
        composed("~method.scheduler")
    assert one_line(error.value) == "method.scheduler is null already: there is nothing to leave out"


def test_a_dict_is_refused_by_the_key_that_is_not_there():
    with pytest.raises(Exception) as error:
        composed("callbacks.checkpoint={every: 1}")
    line = one_line(error.value)
    assert (
        line.startswith("there is no setting callbacks.checkpoint.every: did you mean ")
        and "keep_every_n_steps" in line
    )
