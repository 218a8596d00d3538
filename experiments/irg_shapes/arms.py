"""What is trained and measured in IRG's ladder: every arm is a command of run.py, or of the scripts beside this one."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from told import KINDS

from t2i_rl.study.arms import Study
from t2i_rl.study.jobs import Job

HERE, ROOT = Path(__file__).parent, Path(__file__).parents[2]
DATA = ROOT / "outputs" / "irgl"
SEEDS = (0, 1, 2)
STEPS, FIRST_STAGE, GRPO_STEPS = 1000, 500, 10
PROMPTS, MORE_PROMPTS = 4096, 32768
LONG, LONG_BATCH = 400, 64  # for a GPU, on the data of more prompts; no trajectory comes again
# of the second picture: reflection, image, prompt
SCALES = ((1.0, 1.0, 1.0), (1.0, 1.0, 2.0), (1.0, 1.0, 3.0), (2.0, 1.0, 1.0), (2.0, 2.0, 1.0), (1.5, 1.5, 2.0))
TURNS = "evaluation.stages=[trained_turns]"
JUDGE = "+reward@method.judge=soft_oracle"  # chooses between I1 and I2; the benchmark's judge is the exact oracle
IRG, GRPO = "experiment=irg_shapes", "experiment=irg_grpo_shapes"
TRAIN = [IRG, f"trainer.max_steps={STEPS}"]
GOOD = "data.weights={initial_full_learning: 1.0}"
LARGE = ["data.maker.batch_size=512", "method.tokens_per_pass=65536"]  # speed, not what comes out
START = "method.start_from={checkpoint}"  # of the arm that TAKES names, in braces here and in EVALUATE
SECOND_STAGE = [IRG, f"trainer.max_steps={STEPS - FIRST_STAGE}", "stage=2", "method.scheduler=null"]
MORE_DATA = [f"data.count={MORE_PROMPTS}", f"data.batch_size={LONG_BATCH}"]
ARMS = {  # what is trained, in order of need: a later job may start from an earlier one's checkpoint
    "good": [*TRAIN, GOOD, "method.interleave.rounds=1"],
    "stage1": [IRG, f"trainer.max_steps={FIRST_STAGE}", "evaluation.stages=[]"],
    "six": [*SECOND_STAGE, TURNS, JUDGE, START],
    "trajectories": [*TRAIN, "stage=2", TURNS, JUDGE],
    "long": [IRG, f"trainer.max_steps={LONG}", "stage=2", *MORE_DATA, *LARGE, TURNS, JUDGE],
    "grpo": [GRPO, f"trainer.max_steps={GRPO_STEPS}", START],
    "grpo_random": [GRPO, f"trainer.max_steps={GRPO_STEPS}", START, "reward=random"],
}
EVALUATE = ["task=evaluate", IRG, "ckpt_path={checkpoint}", TURNS]
SMALL = ["benchmark.split=validation", "benchmark.prompts_per_task=20", "benchmark.samples_per_prompt=1"]


def guidance(scales: Sequence[float]) -> str:
    """The name of an arm of the sweep."""
    return "guidance_" + "_".join(f"{scale:g}" for scale in scales)


def scaled(scales: Sequence[float]) -> list[str]:
    names = ("reflection", "image", "prompt")
    return [f"method.interleave.{name}_scale={scale}" for name, scale in zip(names, scales, strict=True)]


MEASURED = {"rounds": [*EVALUATE, "method.interleave.rounds=4", "method.interleave.policy=window"]}
MEASURED |= {guidance(scales): [*EVALUATE, *SMALL, *scaled(scales)] for scales in SCALES}
TOLD = {f"told_{kind}": ("six", kind) for kind in KINDS}  # what is trained, and what it is told
TOLD |= {f"long_told_{kind}": ("long", kind) for kind in ("world", "another")}
CONTEXTS = {"contexts": "six", "long_contexts": "long"}
# whose checkpoint an arm takes
TAKES = {"six": "stage1"} | dict.fromkeys(("grpo", "grpo_random", *MEASURED), "six")
TAKES |= {arm: trained for arm, (trained, _) in TOLD.items()} | CONTEXTS
SHARE_DATA = ("trajectories", "stage1")  # with `good`, which makes it: two at once would make it twice
# a quarter of an hour on an H200, its data included; hours on two cores
LONGER = ("long", "long_told_world", "long_told_another", "long_contexts")
TRAINED_LAST = ("grpo", "grpo_random")
LADDER = tuple(arm for arm in (*ARMS, *TOLD, *CONTEXTS) if arm not in (*LONGER, *TRAINED_LAST))
LADDER += (*MEASURED, *TRAINED_LAST)
study = Study(ROOT / "outputs" / "irg_shapes", ARMS | MEASURED, SEEDS, base=None, root=ROOT)


def job(arm: str, seed: int) -> Job:
    """The job of an arm and seed, with those whose checkpoint or data it takes."""
    if arm in SHARE_DATA:
        return study.job(arm, seed, needs=(job("good", seed),))
    if arm not in TAKES:
        return study.job(arm, seed)
    trained = job(TAKES[arm], seed)
    checkpoint = trained.folder / "checkpoints" / "last.ckpt"
    if arm in TOLD:
        return script(arm, seed, "told.py", (trained.folder, TOLD[arm][1]), needs=(trained,), takes=(checkpoint,))
    if arm in CONTEXTS:
        another = SEEDS[(SEEDS.index(seed) + 1) % len(SEEDS)]  # a seed whose data this one's runs have not seen
        maker, prompts = ("long", MORE_PROMPTS) if CONTEXTS[arm] == "long" else ("good", PROMPTS)
        trajectories = data(another, prompts)
        needs, takes = (trained, job(maker, another)), (checkpoint, trajectories / "manifest.json")
        return script(arm, seed, "contexts.py", (trained.folder, trajectories), needs=needs, takes=takes)
    started = study.job(arm, seed, needs=(trained,), takes=(checkpoint,))
    command = tuple(word.replace("{checkpoint}", f"'{checkpoint}'") for word in started.command)
    return replace(started, command=command)


def script(arm: str, seed: int, name: str, words: Sequence[str | Path], **how) -> Job:
    """A job of a script beside this one, which is given its folder last."""
    folder = study.run_folder(arm, seed)
    return Job(f"{arm}, seed {seed}", folder, (str(HERE / name), *map(str, words), str(folder)), root=ROOT, **how)


def data(seed: int, prompts: int) -> Path:
    """The trajectories that the arms of a seed are trained on."""
    return DATA / f"janus_tiny_{prompts}_seed{seed}"


def jobs(arms: Sequence[str]) -> list[Job]:
    """Arm by arm, those first that others need."""
    return [job(arm, seed) for arm in (*LADDER, *LONGER) if arm in arms for seed in SEEDS]


def done(*arms: str) -> bool:
    """Whether every seed of these arms has its results; what is not done is left out of the report, and named."""
    return all(job.done for job in jobs(arms))
