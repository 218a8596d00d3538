"""What is trained and measured in IRG's ladder, and how: every arm is a command of run.py, or of the scripts beside this one."""

import hashlib
import json
import os
import shlex
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from told import KINDS

from t2i_rl.core.files import read_json, write_atomic
from t2i_rl.pretrain.card import git_commit

HERE, ROOT = Path(__file__).parent, Path(__file__).parents[2]
OUTPUTS, DATA = ROOT / "outputs" / "irg_shapes", ROOT / "outputs" / "irgl"
SEEDS = (0, 1, 2)
STEPS, FIRST_STAGE, GRPO_STEPS = 1000, 500, 10
LONG, LONG_BATCH, PROMPTS = 400, 64, 32768  # for a GPU; no trajectory comes again
# of the second picture: reflection, image, prompt
SCALES = ((1.0, 1.0, 1.0), (1.0, 1.0, 2.0), (1.0, 1.0, 3.0), (2.0, 1.0, 1.0), (2.0, 2.0, 1.0), (1.5, 1.5, 2.0))
TURNS = "evaluation.stages=[trained_turns]"
JUDGE = "+reward@method.judge=soft_oracle"  # chooses between I1 and I2; the benchmark's judge is the exact oracle
TRAIN = ["experiment=irg_shapes", f"trainer.max_steps={STEPS}"]
GOOD = "data.weights={initial_full_learning: 1.0}"


def guidance(scales: tuple[float, ...]) -> str:
    """The name of a job of the sweep."""
    return "guidance_" + "_".join(f"{scale:g}" for scale in scales)


LARGE = ["data.maker.batch_size=512", "method.tokens_per_pass=65536"]  # speed, not what comes out
ARMS = {  # what is trained, in order of need: a later job may start from an earlier one's checkpoint
    "good": [*TRAIN, GOOD, "method.interleave.rounds=1"],
    "stage1": ["experiment=irg_shapes", f"trainer.max_steps={FIRST_STAGE}", "evaluation.stages=[]"],
    "six": ["experiment=irg_shapes", f"trainer.max_steps={STEPS - FIRST_STAGE}", "stage=2", "method.scheduler=null", TURNS, JUDGE, "method.start_from={stage1}"],
    "trajectories": [*TRAIN, "stage=2", TURNS, JUDGE],
    "long": ["experiment=irg_shapes", f"trainer.max_steps={LONG}", "stage=2", f"data.count={PROMPTS}", f"data.batch_size={LONG_BATCH}", *LARGE, TURNS, JUDGE],
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
TOLD = {f"told_{kind}": ("six", kind) for kind in KINDS} | {f"long_told_{kind}": ("long", kind) for kind in ("world", "another")}  # fmt: skip
CONTEXTS = {"contexts": "six", "long_contexts": "long"}
# a quarter of an hour on an H200, its data included; hours on two cores
LONGER = ("long", "long_told_world", "long_told_another", "long_contexts")
TRAINED_LAST = ("grpo", "grpo_random")
LADDER = (*(arm for arm in (*ARMS, *TOLD, *CONTEXTS) if arm not in (*LONGER, *TRAINED_LAST)), *MEASURED, *TRAINED_LAST)


def folder(arm: str, seed: int) -> Path:
    return OUTPUTS / arm / f"seed_{seed}"


def run_job(job: tuple[str, int]) -> None:
    """One job in its own process, resumed where a killed one stopped; its output goes to job.log, what it was made by to job.json.

    Raises:
        SystemExit: it fails, or its folder holds what other settings or another checkpoint made.
    """
    arm, seed = job
    out = folder(arm, seed)
    if (out / "results.json").exists() and not has_weights(needed_by(arm, seed)):
        print(f"{arm} seed {seed}: done before, by weights that are not here any more", flush=True)
        return
    command, made_by = command_of(arm, seed), out / "job.json"
    facts = {"command": shlex.join(command).replace(f"{ROOT}/", ""), "source": source_of(arm, seed)}
    if made_by.exists() and (kept := read_json(made_by)) | facts != kept:
        raise SystemExit(
            f"{out} was made by {kept['command']} from checkpoint {kept['source']}: delete it, or bring that back"
        )
    if (out / "results.json").exists():
        print(f"{arm} seed {seed}: done before", flush=True)
        return
    out.mkdir(parents=True, exist_ok=True)
    write_atomic(made_by, json.dumps(facts | {"commit": git_commit()}, indent=1))
    if arm in ARMS and (out / "checkpoints" / "last.ckpt").exists():
        command.append("ckpt_path=last")
    with (out / "job.log").open("a") as log:
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        ended = subprocess.run([sys.executable, *command], cwd=ROOT, stdout=log, stderr=log, env=environment)
    if ended.returncode:
        raise SystemExit(f"{arm} seed {seed} failed with exit code {ended.returncode}: see {out / 'job.log'}")
    print(f"{arm} seed {seed}: done", flush=True)


def command_of(arm: str, seed: int) -> list[str]:
    """What python is given for a job that is not begun."""
    out = folder(arm, seed)
    if arm in TOLD:
        trained, kind = TOLD[arm]
        return [str(HERE / "told.py"), str(folder(trained, seed)), kind, str(out)]
    if arm in CONTEXTS:
        prompts = PROMPTS if CONTEXTS[arm] == "long" else 4096
        return [str(HERE / "contexts.py"), str(folder(CONTEXTS[arm], seed)), str(DATA / f"janus_tiny_{prompts}_seed{foreign(seed)}"), str(out)]  # fmt: skip
    places = {name: f"'{folder(name, seed) / 'checkpoints' / 'last.ckpt'}'" for name in ARMS}
    wanted = ARMS.get(arm) or MEASURED[arm]
    settings = [item.format(**places) if "_path={" in item or "_from={" in item else item for item in wanted]
    return ["run.py", *settings, f"seed={seed}", f"hydra.run.dir={out}"]


def foreign(seed: int) -> int:
    """A seed whose data this one's runs have not seen."""
    return SEEDS[(SEEDS.index(seed) + 1) % len(SEEDS)]


def needed_by(arm: str, seed: int) -> tuple[str, int] | None:
    """The job whose checkpoint this one takes, or (`good`) whose data."""
    needed = {"good": None, "long": None, "trajectories": "good", "stage1": "good", "six": "stage1"}
    needed |= {arm: trained for arm, (trained, _) in TOLD.items()} | CONTEXTS
    trained = needed.get(arm, "six")
    return None if trained is None else (trained, seed)


def has_weights(job: tuple[str, int] | None) -> bool:
    """Whether what a job takes is there."""
    return job is None or job[0] == "good" or (folder(*job) / "checkpoints" / "last.ckpt").exists()


def source_of(arm: str, seed: int) -> str | None:
    """The hash of the checkpoint that this job takes."""
    needed = needed_by(arm, seed)
    if needed is None or needed[0] == "good":
        return None
    return hashlib.sha256((folder(*needed) / "checkpoints" / "last.ckpt").read_bytes()).hexdigest()


def run_all(arms: Sequence[str], workers: int) -> None:
    """Every job, arm by arm; a job waits for those whose checkpoint or data it takes, which stand before it in the queue or are done.

    Raises:
        SystemExit: one takes what is neither.
    """
    jobs: dict[tuple[str, int], Future] = {}

    def after_what_it_needs(job: tuple[str, int]) -> None:
        for other in needed(job):
            if other in jobs:
                jobs[other].result()
        run_job(job)

    def needed(job: tuple[str, int]) -> list[tuple[str, int]]:
        arm, seed = job
        data = ("long" if CONTEXTS[arm] == "long" else "good", foreign(seed)) if arm in CONTEXTS else None
        return [other for other in (needed_by(arm, seed), data) if other]

    wanted = [(arm, seed) for arm in (*LADDER, *LONGER) if arm in arms for seed in SEEDS]
    for job in wanted:
        for other in needed(job) if not (folder(*job) / "results.json").exists() else []:
            if other not in wanted and not ((folder(*other) / "results.json").exists() and has_weights(other)):
                raise SystemExit(f"{job[0]} takes what {other[0]} makes, which is not done: add {other[0]} to --arms")
    with ThreadPoolExecutor(workers) as pool:
        for job in wanted:
            jobs[job] = pool.submit(after_what_it_needs, job)
    for job in jobs.values():
        job.result()


def done(*arms: str) -> bool:
    """Whether every seed of these arms has its results; what is not done is left out of table and figure, and named."""
    return all((folder(arm, seed) / "results.json").exists() for arm in arms for seed in SEEDS)
