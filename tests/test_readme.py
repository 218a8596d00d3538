"""The README's example of adding a reward runs as printed; its commands and links exist."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_reward_that_the_readme_adds_runs_as_printed(tmp_path):
    section = README.split("<!-- example:begin -->")[1].split("<!-- example:end -->")[0]
    files = re.findall(r"`([\w/.]+)`\n```\w+\n(.*?)```", section, flags=re.S)
    assert len(files) == 2
    for name, content in files:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    command = re.search(r"```bash\n(.*?)\n```", section, flags=re.S)[1]
    arguments = [
        sys.executable,
        str(ROOT / "run.py"),
        *shlex.split(command)[2:],
        "benchmark.prompts_per_task=1",
        "hydra.run.dir=out",
    ]
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}:{ROOT}", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(arguments, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out" / "results.json").is_file()


def test_every_command_composes():
    from hydra import compose, initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra

    from t2i_rl.cli import CONF

    commands = [shlex.split(line.split("#")[0])[2:] for line in README.splitlines() if line.startswith("python run.py")]
    assert len(commands) >= 8
    for arguments in commands:
        plain = [argument for argument in arguments if argument not in ("-m",) and not argument.startswith("--")]
        singles = [re.sub(r"=([^\[,]+),.*", r"=\1", argument) for argument in plain if "my_conf" not in argument]
        singles = [argument for argument in singles if "distinct_codes" not in argument]
        GlobalHydra.instance().clear()
        with initialize_config_dir(str(CONF), version_base="1.3"):
            compose("config", overrides=[re.sub(r"=(.* .*)$", r"='\1'", argument) for argument in singles])


def test_every_link_leads_somewhere():
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert target.startswith("http") or (ROOT / target).exists(), target
