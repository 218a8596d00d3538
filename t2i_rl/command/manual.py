"""`python run.py --help`: a manual page made from the configs themselves."""

from pathlib import Path

from t2i_rl.core.choices import load_yaml, models_of

GROUPS = (
    "task",
    "task/teacher",
    "method",
    "method/optimizer",
    "regularizer",
    "variant",
    "model",
    "reward",
    "benchmark",
    "data",
    "trainer",
    "logger",
    "callbacks",
    "experiment",
    "debug",
    "hparams_search",
    "paths",
)
INTRODUCTION = """\
t2i_rl: post-training of text-to-image models, one command for model x method x reward x benchmark.

usage: python run.py [group=choice ...] [setting=value ...]
       python run.py -m group=a,b seed=0,1,2          a sweep: one job after another, one table at the end

common commands
  python run.py                                       IRIS on janus_tiny: evaluate, train, evaluate; CPU, minutes
  python run.py reward=oracle trainer.max_steps=100   another reward, more steps
  python run.py task=generate prompt="three red circles"
  python run.py method=irg                            think, draw, reflect, draw better: learnt from trajectories
  python run.py task=evaluate ckpt_path=<run>/checkpoints/last.ckpt
  python run.py ckpt_path=last                        go on where the newest run with these settings stopped
  python run.py debug=fdr                             two steps of everything
  python run.py --cfg job                             print the composed config and stop
  python run.py --hydra-help                          Hydra's own options

Texts (prompt, task.source, paths, names, tags) stand as they are, whatever signs they hold; the shell's quotes go.
  python run.py task=generate prompt="two cats, one (it's 1e3 years old)"
  python run.py -m task=generate prompt='a cat,it is red'            in a sweep a comma divides ...
  python run.py -m task=generate prompt='"two cats, one dog",a dog'  ... but within quotes of its own
`null` and ${...} are words in a prompt; in a path or a name null is none, and ${...} refers to another setting.

Every run has its own folder below outputs/: config.yaml, provenance.json, metrics.csv, results.json, report.html,
checkpoints/.
"""
FITS = """\
  reward=oracle           needs prompts of shapes (data=shapes) and a model that draws 32 px
  reward=length           needs method.plan=true
  method=irg              learns from data=irgl_shapes or irgl; draws in turns (task=generate, task=evaluate)
  method=irg_grpo         takes rewards that read pictures (reward=oracle, soft_oracle, ...), or reward=random
  benchmark=shapes        judges models that draw benchmark.size pixels (janus_tiny: 32)
  method/optimizer, regularizer   method=noise_opt; its reward must have a gradient (reward=soft_oracle, aesthetic, ...)
  variant                 method=iris, reward=nsc: ours, released; method=softrepa, agsm: ours, paper, released
  task=pretrain           makes model=janus_tiny, sd_tiny, sd3_tiny, flux_tiny
"""


def manual(conf: Path) -> str:
    """The whole page."""
    defaults = {
        key: value
        for item in load_yaml(conf / "config.yaml")["defaults"]
        if not isinstance(item, str)
        for key, value in item.items()
    }
    parts = [INTRODUCTION]
    for group in GROUPS:
        default = defaults.get(group)
        parts.append(f"{group}" + (f" (default: {default})" if default else ""))
        for path in sorted((conf / group).glob("*.yaml")):
            parts.append(f"  {path.stem:<24}{summary(path)}")
        parts.append("")
    return "\n".join([*parts, *_what_goes_with_what(conf)])


def summary(path: Path) -> str:
    """What a config is: its first line of comment."""
    lines = [line[1:].strip() for line in path.read_text(encoding="utf-8").splitlines() if line.startswith("#")]
    return next(line for line in lines if not line.startswith("@"))


def _what_goes_with_what(conf: Path) -> list[str]:
    lines = []
    for path in sorted((conf / "method").glob("*.yaml")):
        config = load_yaml(path)
        base = config if "trains" in config else load_yaml(path.with_name(f"{config['defaults'][0]}.yaml"))
        families = sorted(base["trains"])
        lines.append(f"  method={path.stem:<16} takes {', '.join(families)} models: {', '.join(models_of(families))}")
    return ["what goes with what", *lines, *FITS.splitlines()]
