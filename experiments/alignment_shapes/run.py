"""Do soft tokens help, and what of them? The ladder from the untouched model to AGSM, on both tiny diffusion models, three seeds.

    python experiments/alignment_shapes/run.py                 # everything that is not done yet, then table.md and figure.png
    python experiments/alignment_shapes/run.py --only-table

Arms: the base under other guidance scales (the control that costs nothing), soft tokens under the plain denoising loss, LoRA of as many parameters under the
plain loss, SoftREPA, AGSM without and with its negatives, and AGSM's tokens put into a model that Diffusion-DPO has tuned on the judge's preferences first.
Jobs live in outputs/alignment_shapes/<model>/<arm>/seed_<n>; two run side by side, each on one thread.
"""

import argparse
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import matplotlib
import numpy as np
from PIL import Image

from t2i_rl.core.files import read_json, write_atomic
from t2i_rl.evaluation.fid import frechet_distance
from t2i_rl.evaluation.records import image_path, read_results, read_stage
from t2i_rl.evaluation.report.grid import RIGHT, WRONG, caption_grid, first_of_each_task
from t2i_rl.evaluation.stats import aggregate, bracket, compare, compare_over_seeds, seed_interval
from t2i_rl.evaluation.tables import excludes_zero

matplotlib.use("Agg")
import matplotlib.pyplot as plt

HERE, ROOT = Path(__file__).parent, Path(__file__).parents[2]
OUTPUTS = ROOT / "outputs" / "alignment_shapes"
BENCH = ROOT / "experiments" / "bench_softrepa" / "results"
SEEDS = (0, 1, 2)
MODELS = ("sd_tiny", "sd3_tiny")
GUIDANCE = (1.0, 2.0, 3.0, 4.0, 6.0, 8.0)
# LoRA of about as many numbers as one bank has: 13,952 for 13,312 on sd_tiny, 76,800 for 83,200 on sd3_tiny
LORA = {
    "sd_tiny": "{r: 2, lora_alpha: 2, target_modules: [attn2.to_q, attn2.to_k, attn2.to_v, attn2.to_out.0]}",
    "sd3_tiny": "{r: 8, lora_alpha: 8, target_modules: [add_k_proj, add_v_proj, to_q, to_k, to_v]}",
}
TRAINED = {
    "denoising": ["method=denoising"],
    "lora": ["method=denoising", "method.tokens=0"],
    "softrepa": ["method=softrepa"],
    "agsm, no negatives": ["method=agsm", "method.gamma_negative=0", "method.negatives=off_at_zero"],
    "agsm": ["method=agsm"],
    "dpo": [
        "method=diffusion_dpo",
        "method.beta=4000",
    ],  # 2000 in the table's runs, whose loss lacked a factor of a half
}
TUNED, TRANSFERRED = "dpo, merged", "dpo, merged + agsm tokens"
ARMS = (*TRAINED, TRANSFERRED)
TASKS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
METRICS = (
    "overall",
    *(f"task/{task}" for task in TASKS),
    "over_counted",
    "under_counted",
    "held_out",
    "lenient",
    "malformed",
)


def folder(model: str, arm: str, seed: int) -> Path:
    return OUTPUTS / model / arm.replace(" ", "_").replace(",", "") / f"seed_{seed}"


def call(log: Path, *arguments: str) -> None:
    """One `run.py` on one thread, its output appended to `log`."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("a") as file:
        done = subprocess.run(
            [sys.executable, "run.py", *arguments],
            cwd=ROOT,
            stdout=file,
            stderr=file,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
    if done.returncode:
        print(f"failed: see {log}", flush=True)
        raise SystemExit(f"{' '.join(arguments)} failed with exit code {done.returncode}: see {log}")


def run_seed(job: tuple[str, int]) -> None:
    """Every arm of one model and seed, one after another, resumed where a killed run stopped."""
    model, seed = job
    evaluate(model, "guidance 3.0", seed)
    for arm, settings in TRAINED.items():
        out = folder(model, arm, seed)
        if arm == "dpo":
            settings = [*settings, f"data.path={preferences(model, seed)}"]
        if arm == "lora":
            settings = [*settings, f"method.lora={LORA[model]}", "method.optimizer.lr=1e-3"]
        train(model, out, seed, settings)
    best = folder(model, "dpo", seed) / "checkpoints" / "best.ckpt"  # what the arm was evaluated with
    tuned, tokens = folder(model, "dpo", seed) / "export", folder(model, "agsm", seed) / "soft_tokens.safetensors"
    if not done_after(tuned / "model_index.json", best):
        shutil.rmtree(tuned, ignore_errors=True)
        path = f"data.path={preferences(model, seed)}"
        call(OUTPUTS / model / "export.log", "task=export", "method=diffusion_dpo", path, f"model={model}", f"ckpt_path={best}", f"task.out={tuned}")  # fmt: skip
    evaluate(model, TUNED, seed, f"model.path={tuned}", after=[best])
    evaluate(model, TRANSFERRED, seed, f"model.path={tuned}", f"model.soft_tokens={tokens}", after=[best, tokens])


def sweep_guidance(model: str) -> None:
    """The base under every guidance scale, first seed."""
    for scale in GUIDANCE:
        evaluate(model, f"guidance {scale}", SEEDS[0], f"model.guidance_scale={scale}")


def train(model: str, out: Path, seed: int, settings: list[str]) -> None:
    if (out / "results.json").exists():
        print(f"{out.relative_to(OUTPUTS)}: done before", flush=True)
        return
    drawn = folder(model, "guidance 3.0", seed) / "evaluation" / "base_direct"
    if drawn.exists() and not out.exists():
        shutil.copytree(drawn, out / "evaluation" / "base_direct")  # the evaluator takes it over, if all is the same
    resumed = ["ckpt_path=last"] if (out / "checkpoints" / "last.ckpt").exists() else []
    call(
        out / "job.log",
        "experiment=alignment_shapes",
        f"model={model}",
        *settings,
        f"seed={seed}",
        f"hydra.run.dir={out}",
        *resumed,
    )
    print(f"{out.relative_to(OUTPUTS)}: done", flush=True)


def done_after(result: Path, *inputs: Path) -> bool:
    """Whether a result is there and none of its inputs is younger."""
    return result.exists() and all(result.stat().st_mtime > each.stat().st_mtime for each in inputs)


def evaluate(model: str, arm: str, seed: int, *settings: str, after: Sequence[Path] = ()) -> None:
    out = folder(model, arm, seed)
    if not done_after(out / "results.json", *after):
        shutil.rmtree(out, ignore_errors=True)
        call(
            out / "job.log",
            "task=evaluate",
            "experiment=alignment_shapes",
            f"model={model}",
            f"seed={seed}",
            f"hydra.run.dir={out}",
            "evaluation.stages=[base_direct]",
            *settings,
        )
        print(f"{out.relative_to(OUTPUTS)}: done", flush=True)


def preferences(model: str, seed: int) -> Path:
    out = OUTPUTS / model / "preferences" / f"seed_{seed}"
    if not (out / "preferences.jsonl").exists():
        shutil.rmtree(out, ignore_errors=True)
        call(
            OUTPUTS / model / "preferences.log",
            "task=make_preferences",
            f"model={model}",
            "model.dtype=bfloat16",
            "task.prompts_per_task=60",
            f"seed={seed}",
            f"task.out={out}",
        )
    return out


def stage_of(arm: str) -> str:
    return "trained_direct" if arm in TRAINED else "base_direct"


def records(model: str, arm: str) -> list[list[dict]]:
    return [list(read_stage(folder(model, arm, seed), stage_of(arm)).values()) for seed in SEEDS]


def compared(model: str, arm: str, with_arm: str = "guidance 3.0") -> dict:
    """Paired differences over seeds, image by image, with the base drawn at the default guidance."""
    pairs = list(zip(records(model, with_arm), records(model, arm), strict=True))
    by_seed = [compare_over_seeds([pair])["overall"]["difference"] for pair in pairs]
    over = seed_interval(by_seed)
    return {**compare_over_seeds(pairs), "Student": {"difference": over["mean"], **over}}


def fid(model: str, arm: str) -> dict:
    """Change of the Frechet distance to renders against the base, with Student's interval over seeds."""
    from t2i_rl.benchmarks.shapes import Shapes

    reference, changes = Shapes().reference_features(), []
    for seed in SEEDS:
        values = [
            frechet_distance(
                np.load(folder(model, name, seed) / "evaluation" / stage_of(name) / "features.npy"), reference
            )
            for name in ("guidance 3.0", arm)
        ]
        changes.append(values[1] - values[0])
    over = seed_interval(changes)
    return {"difference": over["mean"], **over}


def cell(values: dict, scale: float = 100, digits: int = 1) -> str:
    """`+3.1 [+1.0, +5.2]`, bold where the interval excludes zero."""
    form = f"+.{digits}f"
    text = f"{scale * values['difference']:{form}} {bracket(values, form, scale)}"
    return f"**{text}**" if excludes_zero(values) else text


def write_table() -> None:
    sample = read_results(folder(MODELS[0], "agsm", 0) / "results.json")
    run = read_json(folder(MODELS[0], "agsm", 0) / "provenance.json")
    lines = [
        "# Soft tokens on `shapes`, rung by rung", "",
        f"`python experiments/alignment_shapes/run.py` at {run['git_commit'][:7]}, {run['device']} a job: seeds {', '.join(map(str, SEEDS))}, {sample['steps']} optimizer steps at most (the "
        f"checkpoint that judged best on the validation split), {sample['benchmark']['n_prompts']} test prompts x {sample['benchmark']['samples_per_prompt']} images, strict accuracy in points.", "",
        "95 % intervals by a two-level bootstrap over seeds and prompts, which understates the spread over three seeds; `Student` and FID: Student's interval over seeds. "
        "Bold: excludes zero. No correction for the number of cells. FID is over the benchmark's own features, against 2000 renders.", "",
        "`dpo`: Diffusion-DPO at beta 4000 in the released code's units (written 2000 when these runs were made, in a loss without its factor "
        "of a half).", "",
    ]  # fmt: skip
    for model in MODELS:
        names = [
            "Student" if name == "overall, Student" else name for name in ("overall", "overall, Student", *METRICS[1:])
        ]
        lines += [
            f"## {model}",
            "",
            f"| base at guidance (seed {SEEDS[0]}) | overall | against 3, paired | counting | too many | too few |",
            "|---|--:|--:|--:|--:|--:|",
        ]
        for scale in GUIDANCE:
            drawn = read_stage(folder(model, f"guidance {scale}", SEEDS[0]), "base_direct")
            pooled = aggregate(list(drawn.values()))
            three = read_stage(folder(model, "guidance 3.0", SEEDS[0]), "base_direct")
            change = compare(list(three.values()), list(drawn.values()))["overall"]
            shown = [
                f"{100 * pooled[name]['mean']:.1f} [{100 * pooled[name]['low']:.1f}, {100 * pooled[name]['high']:.1f}]"
                for name in ("overall", "task/counting", "over_counted", "under_counted")
            ]
            lines.append(f"| {scale} | {' | '.join([shown[0], cell(change), *shown[1:]])} |")
        lines += ["", "Against the base at guidance 3, same prompts, same seeds:", ""]
        lines += [
            "| arm | " + " | ".join(name.removeprefix("task/") for name in names) + " | FID |",
            "|---" * (len(names) + 2) + "|",
        ]
        for arm in ARMS:
            found = compared(model, arm)
            lines.append(
                f"| {arm} | " + " | ".join(cell(found[name]) for name in names) + f" | {cell(fid(model, arm), 1, 2)} |"
            )
        found = compared(model, TRANSFERRED, TUNED)
        lines += [f"| {TRANSFERRED}, against {TUNED} | " + " | ".join(cell(found[name]) for name in names) + " | |", ""]
        cost = read_json(BENCH / f"{model}_bf16_cpu.json")["drawing"]
        lines += [
            f"Drawing with soft tokens takes {cost['ratio']:.3f} [{cost['low']:.3f}, {cost['high']:.3f}] times as long as without "
            f"([bench_softrepa](../bench_softrepa/table.md), {cost['n']} pairs of 16 pictures).",
            "",
        ]
    write_atomic(HERE / "table.md", "\n".join(lines))
    print(f"wrote {HERE / 'table.md'}")


def write_figure() -> None:
    """Change of each task's accuracy, arm by arm."""
    figure, axes = plt.subplots(1, len(MODELS), figsize=(14, 5), constrained_layout=True, sharey=True, squeeze=False)
    for axis, model in zip(axes.flat, MODELS, strict=True):
        for number, arm in enumerate(ARMS):
            found = compared(model, arm)
            values = [found[name] for name in ("overall", *(f"task/{task}" for task in TASKS))]
            place = np.arange(len(values)) + 0.11 * (number - len(ARMS) / 2)
            middle = np.array([100 * each["difference"] for each in values])
            spread = np.abs([[100 * each[end] for each in values] for end in ("low", "high")] - middle)
            axis.errorbar(place, middle, yerr=spread, fmt="o", label=arm, capsize=2)
        axis.axhline(0, color="grey", linewidth=0.8)
        axis.set_xticks(range(len(TASKS) + 1), ["overall", *TASKS], rotation=20)
        axis.set(title=model, ylabel="points against the base")
    figure.legend(*axes.flat[0].get_legend_handles_labels(), loc="outside lower center", ncols=len(ARMS))
    figure.savefig(HERE / "figure.png", dpi=100)
    print(f"wrote {HERE / 'figure.png'}")


def write_pictures() -> None:
    """The first prompts of each task under every arm of the first seed, chosen without looking; green where the judge agrees."""
    for model in MODELS:
        images, captions, frames = [], [], []
        for arm in ("guidance 3.0", *ARMS):
            stage, run = stage_of(arm), folder(model, arm, SEEDS[0])
            found = read_stage(run, stage)
            for key in first_of_each_task(list(found.values()), 2):
                images.append(np.asarray(Image.open(image_path(run, stage, found[key])).convert("RGB")))
                captions.append(f"{'base' if arm == 'guidance 3.0' else arm}: {found[key]['prompt']}")
                frames.append(RIGHT if found[key]["strict"] else WRONG)
        columns = len(images) // (len(ARMS) + 1)
        caption_grid(images, captions, columns, 3, frames).save(HERE / f"{model}.png")
        print(f"wrote {HERE / f'{model}.png'}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only-table", action="store_true", help="rebuild table and figure from finished jobs")
    parser.add_argument("--workers", type=int, default=2, help="seeds side by side, one thread each")
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=MODELS)
    options = parser.parse_args()
    if not options.only_table:
        with ThreadPoolExecutor(options.workers) as pool:
            jobs = [(model, seed) for seed in SEEDS for model in options.models]
            list(pool.map(run_seed, jobs))
            list(pool.map(sweep_guidance, options.models))
    write_table()
    write_figure()
    write_pictures()
