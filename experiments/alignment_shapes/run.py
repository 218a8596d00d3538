"""Do soft tokens help, and what of them? The ladder from the untouched model to AGSM, on both tiny diffusion models.

    python experiments/alignment_shapes/run.py                 # what is not done yet, then table.md and the pictures
    python experiments/alignment_shapes/run.py --only-table

Arms: the base under other guidance scales (the control that costs nothing), soft tokens under the plain denoising loss,
LoRA of as many parameters under the plain loss, SoftREPA, AGSM without and with its negatives, and AGSM's tokens put
into a model that Diffusion-DPO has tuned on the judge's preferences first. Three seeds. Jobs live in
outputs/alignment_shapes/<model>/<arm>/seed_<n>; two run side by side, each on one thread.
"""

from dataclasses import replace
from functools import cache
from pathlib import Path

import matplotlib
import numpy as np
from PIL import Image

from t2i_rl.benchmarks.shapes import Shapes
from t2i_rl.core.files import read_json, write_atomic
from t2i_rl.evaluation.fid import frechet_distance
from t2i_rl.evaluation.records import image_path, read_results, read_stage
from t2i_rl.evaluation.report.grid import RIGHT, WRONG, caption_grid, first_of_each_task
from t2i_rl.evaluation.stats import aggregate, bracket, compare, seed_difference
from t2i_rl.study.arms import STUDENT, Study, differences
from t2i_rl.study.jobs import Job, commits_of, require_done
from t2i_rl.study.queue import run_jobs
from t2i_rl.study.report import in_one_line, save_figure, study_parser
from t2i_rl.study.tables import difference_cell, markdown, metric_cells, metric_names

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
EVALUATE = ["task=evaluate", "evaluation.stages=[base_direct]"]
BASE = "guidance 3.0"  # the models' own
UNTRAINED = {f"guidance {scale}": [*EVALUATE, f"model.guidance_scale={scale}"] for scale in GUIDANCE}
TUNED, TRANSFERRED = "dpo, merged", "dpo, merged + agsm tokens"
TASKS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
METRICS = (
    *("overall", STUDENT, *(f"task/{task}" for task in TASKS)),
    *("over_counted", "under_counted", "held_out", "lenient", "malformed"),
)


def trained_arms(model: str) -> dict[str, list[str]]:
    return {
        "denoising": ["method=denoising"],
        "lora": ["method=denoising", "method.tokens=0", f"method.lora={LORA[model]}", "method.optimizer.lr=1e-3"],
        "softrepa": ["method=softrepa"],
        "agsm, no negatives": ["method=agsm", "method.gamma_negative=0", "method.negatives=off_at_zero"],
        "agsm": ["method=agsm"],
        # 2000 in the table's runs, whose loss lacked a factor of a half
        "dpo": ["method=diffusion_dpo", "method.beta=4000"],
    }


def study_of(model: str) -> Study:
    return Study(
        folder=OUTPUTS / model,
        arms=UNTRAINED | trained_arms(model) | {TUNED: EVALUATE, TRANSFERRED: EVALUATE},
        seeds=SEEDS,
        shared=["experiment=alignment_shapes", f"model={model}"],
        base=None,
        root=ROOT,
    )


TRAINED = tuple(trained_arms(MODELS[0]))
ARMS = (*TRAINED, TRANSFERRED)


def jobs_of(model: str, seed: int) -> list[Job]:
    """Every job of one model and seed; the base under other guidance scales is drawn with the first seed alone."""
    study = study_of(model)
    base = study.job(BASE, seed)
    drawn = (base.folder / "evaluation" / "base_direct",)  # once a seed
    pairs = preferences(study, model, seed)
    trained = {arm: study.job(arm, seed, needs=(base,), drawn=drawn) for arm in TRAINED if arm != "dpo"}
    path, taken = f"data.path={pairs.folder / 'pairs'}", (pairs.folder / pairs.result,)
    trained["dpo"] = study.job("dpo", seed, path, needs=(base, pairs), takes=taken, drawn=drawn)
    best = trained["dpo"].folder / "checkpoints" / "best.ckpt"  # what the arm was evaluated with
    tokens = trained["agsm"].folder / "soft_tokens.safetensors"
    merged = merged_model(study, model, seed, best, trained["dpo"], pairs)
    path = f"model.path={merged.folder / 'model'}"
    tuned = study.job(TUNED, seed, path, needs=(merged,), takes=(best,))
    needs = (merged, trained["agsm"])
    transferred = study.job(TRANSFERRED, seed, path, f"model.soft_tokens={tokens}", needs=needs, takes=(best, tokens))
    others = [study.job(arm, seed) for arm in UNTRAINED if arm != BASE and seed == SEEDS[0]]
    jobs = [base, pairs, *trained.values(), merged, tuned, transferred, *others]
    return [replace(job, name=f"{model}, {job.name}") for job in jobs]


def preferences(study: Study, model: str, seed: int) -> Job:
    """Pictures of the training prompts, drawn by the base and judged."""
    folder = study.run_folder("preferences", seed)
    settings = (f"model={model}", "model.dtype=bfloat16", "task.prompts_per_task=60", f"seed={seed}")
    command = ("run.py", "task=make_preferences", *settings, f"task.out={folder / 'pairs'}", f"hydra.run.dir={folder}")
    return Job(f"preferences, seed {seed}", folder, command, result="pairs/preferences.jsonl", root=ROOT)


def merged_model(study: Study, model: str, seed: int, best: Path, dpo: Job, pairs: Job) -> Job:
    """What Diffusion-DPO has tuned, as a model of its own."""
    folder = study.run_folder("merged", seed)
    method = ("method=diffusion_dpo", f"data.path={pairs.folder / 'pairs'}", f"model={model}", f"ckpt_path={best}")
    command = ("run.py", "task=export", *method, f"task.out={folder / 'model'}", f"hydra.run.dir={folder}")
    result = "model/model_index.json"
    return Job(f"merged, seed {seed}", folder, command, result, takes=(best,), needs=(dpo,), root=ROOT)


def stage_of(arm: str) -> str:
    return "trained_direct" if arm in TRAINED else "base_direct"


def compared(model: str, arm: str, other: str = BASE) -> dict:
    """Paired differences over seeds, image by image, with the base at its own guidance or with another arm."""
    study = study_of(model)
    return differences(study.records(other, stage_of(other)), study.records(arm, stage_of(arm)))


@cache
def distances(model: str, arm: str) -> list[float]:
    """The Frechet distance of an arm's pictures to renders, seed by seed."""
    return [frechet_distance(features, renders()) for features in study_of(model).features(arm, stage_of(arm))]


@cache
def renders() -> np.ndarray:
    return Shapes().reference_features()


def fid_change(model: str, arm: str) -> dict:
    """Change of that distance against the base, with Student's interval over seeds."""
    sides = zip(distances(model, BASE), distances(model, arm), strict=True)
    return seed_difference([after - before for before, after in sides])


def guidance_table(model: str) -> list[str]:
    """The base under every guidance scale, first seed."""
    head = [f"base at guidance (seed {SEEDS[0]})", "overall", "against 3, paired", "counting", "too many", "too few"]
    folders = {scale: study_of(model).run_folder(f"guidance {scale}", SEEDS[0]) for scale in GUIDANCE}
    records = {scale: list(read_stage(folder, "base_direct").values()) for scale, folder in folders.items()}
    rows = []
    for scale in GUIDANCE:
        metrics = aggregate(records[scale])
        overall, *counting = (
            f"{100 * metrics[name]['mean']:.1f} {bracket(metrics[name], '.1f', 100)}"
            for name in ("overall", "task/counting", "over_counted", "under_counted")
        )
        change = difference_cell(compare(records[3.0], records[scale])["overall"])
        rows.append([str(scale), overall, change, *counting])
    return markdown(head, rows, names=1)


def ladder_table(model: str) -> list[str]:
    """Every arm against the base; at the end the tokens in the tuned model against that model."""
    names = ["Student" if name == STUDENT else name for name in metric_names(METRICS)]
    rows = [
        [arm, *metric_cells(compared(model, arm), METRICS), difference_cell(fid_change(model, arm), scale=1, digits=2)]
        for arm in ARMS
    ]
    transferred = metric_cells(compared(model, TRANSFERRED, TUNED), METRICS)
    return markdown(["arm", *names, "FID"], [*rows, [f"{TRANSFERRED}, against {TUNED}", *transferred, None]])


def all_jobs(models: tuple[str, ...] = MODELS) -> list[Job]:
    return [job for seed in SEEDS for model in models for job in jobs_of(model, seed)]


def write_table() -> None:
    jobs = all_jobs()
    require_done(jobs)
    first = study_of(MODELS[0]).run_folder("agsm", SEEDS[0])
    results, device = read_results(first / "results.json"), read_json(first / "provenance.json")["device"]
    lines = [
        "# Soft tokens on `shapes`, rung by rung",
        "",
        f"`python experiments/alignment_shapes/run.py` at {' and '.join(commits_of(jobs))}, {device} a job: seeds "
        f"{', '.join(map(str, SEEDS))}, {results['steps']} optimizer steps at most (the checkpoint that judged best on "
        f"the validation split), {results['benchmark']['n_prompts']} test prompts x "
        f"{results['benchmark']['samples_per_prompt']} images, strict accuracy in points.",
        "",
        "95 % intervals by a two-level bootstrap over seeds and prompts, which understates the spread over three "
        "seeds; `Student` and FID: Student's interval over seeds. Bold: excludes zero. No correction for the number of "
        "cells. FID is over the benchmark's own features, against 2000 renders.",
        "",
        "`dpo`: Diffusion-DPO at beta 4000 in the released code's units (written 2000 when these runs were made, in a "
        "loss without its factor of a half).",
        "",
    ]
    for model in MODELS:
        cost = read_json(BENCH / f"{model}_bf16_cpu.json")["drawing"]
        lines += [
            f"## {model}",
            "",
            *guidance_table(model),
            "Against the base at guidance 3, same prompts, same seeds:",
            "",
            *ladder_table(model),
            f"Drawing with soft tokens takes {cost['ratio']:.3f} [{cost['low']:.3f}, {cost['high']:.3f}] times as long "
            f"as without ([bench_softrepa](../bench_softrepa/table.md), {cost['n']} pairs of 16 pictures).",
            "",
        ]
    write_atomic(HERE / "table.md", "\n".join(lines))
    print(f"wrote {HERE / 'table.md'}")


def write_figure() -> None:
    """Change of each task's accuracy, arm by arm."""
    figure, axes = plt.subplots(1, len(MODELS), figsize=(14, 5), constrained_layout=True, sharey=True, squeeze=False)
    metrics = ("overall", *(f"task/{task}" for task in TASKS))
    for axis, model in zip(axes.flat, MODELS, strict=True):
        for number, arm in enumerate(ARMS):
            changes = compared(model, arm)
            places = np.arange(len(metrics)) + 0.11 * (number - len(ARMS) / 2)
            middle, *ends = (
                np.array([100 * changes[metric][part] for metric in metrics]) for part in ("difference", "low", "high")
            )
            axis.errorbar(places, middle, yerr=np.abs(ends - middle), fmt="o", label=arm, capsize=2)
        axis.axhline(0, color="grey", linewidth=0.8)
        axis.set_xticks(range(len(metrics)), ["overall", *TASKS], rotation=20)
        axis.set(title=model, ylabel="points against the base")
    figure.legend(*axes.flat[0].get_legend_handles_labels(), loc="outside lower center", ncols=len(ARMS))
    save_figure(figure, HERE / "figure.png")


def write_pictures() -> None:
    """The first prompts of each task under every arm of the first seed, chosen without looking; green: judged right."""
    for model in MODELS:
        images, captions, frames = [], [], []
        for arm in (BASE, *ARMS):
            stage, run = stage_of(arm), study_of(model).run_folder(arm, SEEDS[0])
            records = read_stage(run, stage)
            for key in first_of_each_task(list(records.values()), 2):
                images.append(np.asarray(Image.open(image_path(run, stage, records[key])).convert("RGB")))
                captions.append(f"{'base' if arm == BASE else arm}: {records[key]['prompt']}")
                frames.append(RIGHT if records[key]["strict"] else WRONG)
        columns = len(images) // (len(ARMS) + 1)
        caption_grid(images, captions, columns, 3, frames).save(HERE / f"{model}.png")
        print(f"wrote {HERE / f'{model}.png'}")


def main() -> None:
    parser = study_parser(__doc__)
    parser.add_argument("--models", nargs="+", default=MODELS, choices=MODELS)
    options = parser.parse_args()
    if not options.only_table:
        run_jobs(all_jobs(options.models), options.workers)
    if set(options.models) < set(MODELS) and not all(job.done for job in all_jobs()):
        print("no table yet: it takes every model")
        return
    write_table()
    write_figure()
    write_pictures()


if __name__ == "__main__":
    in_one_line(main)
