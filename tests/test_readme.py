"""The README's example of adding a reward runs as printed; its commands and links exist."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
ADDING = (ROOT / "docs" / "adding.md").read_text(encoding="utf-8")


def write_files(text: str, folder: Path) -> int:
    """Write every file that a page shows (its name in backticks above a code block); returns how many."""
    files = re.findall(r"`([\w/.]+)`\n```(?:python|yaml)\n(.*?)```", text, flags=re.S)
    for name, content in files:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    return len(files)


def run_as_printed(text: str, folder: Path, *more: str) -> list[dict]:
    """Run every command that a page shows in a bash block; returns their results.json."""
    environment = {**os.environ, "PYTHONPATH": f"{folder}:{ROOT}", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    results = []
    for number, command in enumerate(re.findall(r"```bash\n(.*?)\n```", text, flags=re.S)):
        arguments = [
            sys.executable,
            str(ROOT / "run.py"),
            *shlex.split(command)[2:],
            *more,
            f"hydra.run.dir=out{number}",
        ]
        done = subprocess.run(arguments, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        results.append(json.loads((folder / f"out{number}" / "results.json").read_text()))
    return results


def test_the_reward_that_the_readme_adds_runs_as_printed(tmp_path):
    section = README.split("<!-- example:begin -->")[1].split("<!-- example:end -->")[0]
    assert write_files(section, tmp_path) == 2
    (results,) = run_as_printed(section, tmp_path, "benchmark.prompts_per_task=1")
    assert results["reward"] == "distinct_codes" and results["steps"] == 2


@pytest.mark.slow
def test_the_method_the_benchmark_and_the_model_that_the_docs_add_run_as_printed(tmp_path):
    assert write_files(ADDING, tmp_path) == 10
    paired, trained, blind = run_as_printed(ADDING, tmp_path)
    assert (paired["method"], paired["steps"]) == ("pseudo_huber", 2)
    assert trained["method"] == "best_of_group" and trained["headline"]["tasks"] == ["color"]
    assert blind["model"] == "blind" and blind["stages"]["base_direct"]["metrics"]["overall"]["mean"] < 0.3


OWN = ("method=best_of_group", "method=pseudo_huber", "benchmark=color_only", "model=blind")  # what docs/adding.md adds


def test_every_command_composes():
    from hydra import compose, initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra

    from t2i_rl.core.places import CONF

    pages = [README, *(page.read_text(encoding="utf-8") for page in sorted((ROOT / "docs").glob("*.md")))]
    lines = [line for page in pages for line in page.splitlines() if line.startswith("python run.py")]
    commands = [shlex.split(re.sub("[<>]", "", line.split("#")[0]))[2:] for line in lines]
    assert len(commands) >= 20
    for arguments in commands:
        plain = [argument for argument in arguments if argument not in ("-m",) and not argument.startswith("--")]
        singles = [
            re.sub(r"=([^\[,]+),.*", r"=\1", argument)
            for argument in plain
            if "my_conf" not in argument and argument not in OWN
        ]
        singles = [argument for argument in singles if "distinct_codes" not in argument]
        GlobalHydra.instance().clear()
        with initialize_config_dir(str(CONF), version_base="1.3"):
            compose("config", overrides=[re.sub(r"=(.* .*)$", r"='\1'", argument) for argument in singles])


def test_every_link_leads_somewhere():
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert target.startswith("http") or (ROOT / target).exists(), target
