"""What is trained and measured in IRG's ladder, and how: every arm is a command of run.py, or of the scripts beside this one."""

import os
import subprocess
import sys
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from told import KINDS

HERE, ROOT = Path(__file__).parent, Path(__file__).parents[2]
OUTPUTS, DATA = ROOT / "outputs" / "irg_shapes", ROOT / "outputs" / "irgl"
SEEDS = (0, 1, 2)
STEPS, FIRST_STAGE, LONG, GRPO_STEPS = 1000, 500, 2000, 10
PROMPTS = 16384  # of the long arm: no trajectory comes again
# of the second picture: reflection, image, prompt
SCALES = ((1.0, 1.0, 1.0), (1.0, 1.0, 2.0), (1.0, 1.0, 3.0), (2.0, 1.0, 1.0), (2.0, 2.0, 1.0), (1.5, 1.5, 2.0))
TURNS = "evaluation.stages=[trained_turns]"
JUDGE = "+reward@method.judge=soft_oracle"  # chooses between I1 and I2; the benchmark's judge is the exact oracle
TRAIN = ["experiment=irg_shapes", f"trainer.max_steps={STEPS}"]
GOOD = "data.weights={initial_full_learning: 1.0}"


def guidance(scales: tuple[float, ...]) -> str:
    """The name of a job of the sweep."""
    return "guidance_" + "_".join(f"{scale:g}" for scale in scales)


ARMS = {  # what is trained, in order of need: a later job may start from an earlier one's checkpoint
    "good": [*TRAIN, GOOD, "method.interleave.rounds=1"],
    "stage1": ["experiment=irg_shapes", f"trainer.max_steps={FIRST_STAGE}", "evaluation.stages=[]"],
    "six": ["experiment=irg_shapes", f"trainer.max_steps={STEPS - FIRST_STAGE}", "stage=2", "method.scheduler=null", TURNS, JUDGE, "method.start_from={stage1}"],
    "trajectories": [*TRAIN, "stage=2", TURNS, JUDGE],
    "long": ["experiment=irg_shapes", f"trainer.max_steps={LONG}", "stage=2", f"data.count={PROMPTS}", TURNS, JUDGE],
    "grpo": ["experiment=irg_grpo_shapes", f"trainer.max_steps={GRPO_STEPS}", "method.start_from={six}"],
    "grpo_random": ["experiment=irg_grpo_shapes", f"trainer.max_steps={GRPO_STEPS}", "method.start_from={six}", "reward=random"],
}  # fmt: skip
EVALUATE = ["task=evaluate", "experiment=irg_shapes", "ckpt_path={six}", TURNS]
ROUNDS = [*EVALUATE, "method.interleave.rounds=4", "method.interleave.policy=window"]
SWEEP = [*EVALUATE, "benchmark.split=validation", "benchmark.prompts_per_task=20", "benchmark.samples_per_prompt=1"]  # fmt: skip
MEASURED = {"rounds": ROUNDS} | {
    guidance(scales): [*SWEEP, *(f"method.interleave.{name}_scale={scale}" for name, scale in zip(("reflection", "image", "prompt"), scales, strict=True))]
    for scales in SCALES
}  # fmt: skip
TOLD = {f"told_{kind}": kind for kind in KINDS}
CONTEXTS = "contexts"


def folder(arm: str, seed: int) -> Path:
    return OUTPUTS / arm / f"seed_{seed}"


def run_job(job: tuple[str, int]) -> None:
    """One job in its own process, resumed where a killed one stopped; its output goes to job.log."""
    arm, seed = job
    out = folder(arm, seed)
    if (out / "results.json").exists():
        print(f"{arm} seed {seed}: done before", flush=True)
        return
    out.mkdir(parents=True, exist_ok=True)
    if arm in TOLD:
        command = [sys.executable, str(HERE / "told.py"), str(folder("six", seed)), TOLD[arm], str(out)]
    elif arm == CONTEXTS:
        foreign = SEEDS[(SEEDS.index(seed) + 1) % len(SEEDS)]
        data = DATA / f"janus_tiny_4096_seed{foreign}"
        command = [sys.executable, str(HERE / "contexts.py"), str(folder("six", seed)), str(data), str(out)]
    else:
        command = train_or_evaluate(arm, seed)
    with (out / "job.log").open("a") as log:
        ended = subprocess.run(command, cwd=ROOT, stdout=log, stderr=log, env={**os.environ, "OMP_NUM_THREADS": "1"})
    if ended.returncode:
        raise SystemExit(f"{arm} seed {seed} failed with exit code {ended.returncode}: see {out / 'job.log'}")
    print(f"{arm} seed {seed}: done", flush=True)


def train_or_evaluate(arm: str, seed: int) -> list[str]:
    """The command of a job of run.py; what was begun is gone on with."""
    out = folder(arm, seed)
    places = {name: f"'{folder(name, seed) / 'checkpoints' / 'last.ckpt'}'" for name in ARMS}
    wanted = ARMS.get(arm) or MEASURED[arm]
    settings = [item.format(**places) if "_path={" in item or "_from={" in item else item for item in wanted]
    command = [sys.executable, "run.py", *settings, f"seed={seed}", f"hydra.run.dir={out}"]
    if arm in ARMS and (out / "checkpoints" / "last.ckpt").exists():
        command.append("ckpt_path=last")
    return command


def run_all(workers: int) -> None:
    """Every job, arm by arm; a job waits for the one whose checkpoint or data it takes, which stands before it in the queue."""
    jobs: dict[tuple[str, int], Future] = {}
    needs = {"good": None, "long": None, "trajectories": "good", "stage1": "good", "six": "stage1"}

    def after_what_it_needs(job: tuple[str, int]) -> None:
        needed = needs.get(job[0], "six")
        if needed is not None:
            jobs[needed, job[1]].result()
        run_job(job)

    with ThreadPoolExecutor(workers) as pool:
        last = ("long", *MEASURED, "grpo", "grpo_random")
        for arm in (*(name for name in (*ARMS, *TOLD, CONTEXTS) if name not in last), *last):
            for seed in SEEDS:
                jobs[arm, seed] = pool.submit(after_what_it_needs, (arm, seed))
    for job in jobs.values():
        job.result()


def done(*arms: str) -> bool:
    """Whether every seed of these arms has its results; what is not done is left out of table and figure, and named."""
    return all((folder(arm, seed) / "results.json").exists() for arm in arms for seed in SEEDS)
