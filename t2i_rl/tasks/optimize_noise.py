"""`task=optimize_noise`: look for better noise for every prompt with a frozen model, measured before and after."""

import hashlib
import json
import math
import shutil
from pathlib import Path

import torch.distributed as dist
from hydra.utils import instantiate
from rich.console import Console

from t2i_rl.core import stopping
from t2i_rl.core.contract_checks import check_benchmark
from t2i_rl.core.errors import UserError
from t2i_rl.core.files import read_json_lines, read_object, write_atomic
from t2i_rl.core.hashing import modules_sha256, weights_sha256
from t2i_rl.core.old_names import names_now
from t2i_rl.core.used_settings import config_names, own_settings, settings_used, with_defaults
from t2i_rl.data.base import check_data
from t2i_rl.evaluation.records import write_results
from t2i_rl.methods.noise.pictures import curves_of, hacking_figure, strip
from t2i_rl.methods.noise.report import write_noise_report
from t2i_rl.methods.noise.results import check_optimized, health_table, search_table, summarise
from t2i_rl.models.diffusion.memory import predict
from t2i_rl.rewards.processors import image_processors
from t2i_rl.tasks.examine import (
    by_setting,
    check_method,
    check_needs,
    check_parts,
    image_size,
    made_loggers,
    made_rewards,
    method_of,
)
from t2i_rl.tasks.loggers import log_results

STRIPS = 6
OF_ITS_PROMPTS = ("split", "tasks", "n_prompts", "samples_per_prompt", "prompts_sha256")  # and not of a judge
CONFIGURED = ("method", "model", "reward", "watch")  # what a finished case depends on,
OF_NO_CONSEQUENCE = (  # save these
    *("method.batch_size", "method.image_every", "method.gradient_checkpointing", "method.free_text_encoders"),
    "model.device",
)


def check(cfg) -> None:
    """Refuse what cannot be searched with.

    Raises:
        UserError: one line that says what to change.
    """
    if not method_of(cfg).searches_noise:
        raise UserError(
            f"task=optimize_noise and {method_of(cfg).__name__} do not go together: take method=noise_opt or "
            "noise_search"
        )
    check_method(cfg, training=True)


def run(cfg) -> dict:
    """Search for `cfg.data`'s prompts with `cfg.method`; rank 0 returns the content of results.json."""
    out, data = Path(cfg.paths.output_dir), instantiate(cfg.data, batch_size=1)
    settings = settings_of(cfg)
    check_folder(out / "noise", settings)
    check_data(data)
    check_needs(cfg, data.prompts)
    benchmark = judging(cfg, data.prompts)
    check_optimized(cfg, benchmark)
    trainer = instantiate(cfg.trainer, inference_mode=False, enable_progress_bar=False, logger=made_loggers(cfg))
    if trainer.is_global_zero:
        if benchmark is None:
            unread = f"benchmark={config_names().get('benchmark')} cannot judge these prompts at this size"
            print(f"{unread}: the target and what is watched are measured, and nothing else", flush=True)
        write_atomic(out / "noise" / "settings.json", json.dumps(settings, indent=1))
        memory = predict(cfg.model, method_of(cfg).needs_gradients, cfg.method.gradient_checkpointing)
        print(memory.sentence(cfg.method.batch_size, cfg.method.free_text_encoders), flush=True)
    reward, watch = made_rewards(cfg)
    judges = by_setting(reward, watch)
    check_parts(cfg, None, data.prompts, judges)
    model = instantiate(cfg.model)
    weights = {"model": weights_sha256(model), **{name: modules_sha256(judge) for name, judge in judges.items()}}
    method = instantiate(cfg.method, model=model, reward=reward, watch=watch, folder=out / "noise")
    method.settings = json.dumps({"sampling": model.sampling(), "weights": weights}, sort_keys=True)
    method.prompts = data.prompts  # not through Hydra, which would make configs of them
    done, total = len(method.finished()), len(method.cases())
    if trainer.is_global_zero:
        shape = " x ".join(map(str, method.noise_shape()))
        noises = f"{method.samples} {'noise' if method.samples == 1 else 'noises'} of {shape}"
        print(f"{len(data.prompts)} prompts x {noises}; {done} of {total} done before", flush=True)
    try:
        trainer.predict(method, return_predictions=False)
    except SystemExit:
        method.stop_progress()
        finished = f"{len(method.finished())} of {total} cases are finished"
        stopping.say(f"{finished}; the same command with hydra.run.dir={out} goes on from there")
        raise
    if dist.is_initialized():
        dist.barrier()
    return report(cfg, out, trainer, method, benchmark, weights) if trainer.is_global_zero else {}


def settings_of(cfg) -> dict:
    """Dotted names and values of the settings that a finished case depends on."""
    settings = {}
    for group in CONFIGURED:
        settings |= _dotted(own_settings(cfg, group), group)
    return {key: value for key, value in settings.items() if key not in OF_NO_CONSEQUENCE}


def _dotted(node: dict, where: str) -> dict:
    settings = {}
    for key, value in node.items():
        settings |= _dotted(value, f"{where}.{key}") if isinstance(value, dict) else {f"{where}.{key}": value}
    return settings


def check_folder(folder: Path, settings: dict) -> None:
    """Refuse to go on in a folder of finished cases under other settings: they would be lost.

    Raises:
        UserError: one line that names the settings.
    """
    done = len(list(folder.glob("*/case.json")))
    before = names_now(read_object(folder / "settings.json")) if done else settings
    before = {key: _default(settings, key) for key in settings if key not in before} | before
    differing = [key for key in before if before[key] != settings.get(key)]
    if differing:
        named = ", ".join(f"{key}={before.get(key)} there and {settings.get(key)} here" for key in differing)
        raise UserError(
            f"{folder} holds {done} cases finished under other settings ({named}): take another hydra.run.dir, or "
            "delete that folder"
        )


def _default(settings: dict, key: str) -> object:
    """What a setting was in a run that did not name it, as one that came later: its class's default."""
    part, _, name = key.rpartition(".")
    target = settings.get(f"{part}._target_")
    return with_defaults({"_target_": target}).get(name) if target else None


def judging(cfg, prompts):
    """The benchmark, as judge of these prompts' pictures, where it can read both; it chooses nothing."""
    benchmark, own = instantiate(cfg.benchmark), {}
    check_benchmark(benchmark)
    size, sizes = image_size(cfg), benchmark.image_sizes
    needs = benchmark.needs_meta
    if needs is None:
        own = {prompt.id: prompt for prompt in benchmark.prompts()}
    readable = all(
        set(needs) <= set(prompt.meta) if needs is not None else own.get(prompt.id) == prompt for prompt in prompts
    )
    return benchmark if readable and (not sizes or size in sizes) else None


def prompts_fingerprint(benchmark, prompts, samples: int) -> dict:
    """What the numbers depend on: these prompts, and the judge where there is one."""
    rows = [[prompt.id, prompt.text, prompt.meta] for prompt in prompts]
    facts = benchmark.fingerprint() if benchmark else {"name": "none"}
    judge = {key: value for key, value in facts.items() if key not in OF_ITS_PROMPTS}
    digest = hashlib.sha256(json.dumps(rows, sort_keys=True).encode()).hexdigest()
    return judge | {"n_prompts": len(rows), "samples_per_prompt": samples, "prompts_sha256": digest}


def report(cfg, out: Path, trainer, method, benchmark, weights: dict) -> dict:
    """results.json, curves to the loggers, strips, tables, and the page."""
    cases, (*steps_of_noise, channels, height, width) = method.finished(), method.noise_shape()
    shape = (math.prod(steps_of_noise) * channels, height, width)  # the noises of all steps as one, of many channels
    choices = config_names()
    places, prompts = [out / "noise" / case["place"] for case in cases], [case["prompt_id"] for case in cases]
    files = [place / "trajectory.jsonl" for place in places]
    trajectories = [[row.value for row in read_json_lines(file)] for file in files]
    results = {
        **{key: choices.get(key) for key in ("task", "method", "model", "reward", "regularizer")},
        "seed": cfg.seed,
        "steps": max(rows[-1]["step"] for rows in trajectories),
        "benchmark": prompts_fingerprint(benchmark, method.prompts, method.samples),
        "sampling": method.model.sampling(),
        "settings": settings_used(cfg),
        "weights_sha256": weights,
        "image_processors": image_processors(
            {"reward": method.reward, **{f"watch.{n}": j for n, j in method.watch.items()}}
        ),
        **summarise(out, cases, shape, benchmark, {prompt.id: prompt for prompt in method.prompts}),
    }
    write_results(out / "results.json", results)

    curves = {name: curves_of(trajectories, name, prompts) for name in trajectories[0][0] if name != "step"}
    for step in range(results["steps"] + 1):
        measured = {name: mean[steps == step] for name, (steps, mean, _) in curves.items() if step in steps}
        row = {f"noise/{name}": float(mean[0]) for name, mean in measured.items()}
        for logger in trainer.loggers:
            logger.log_metrics(row, step=step)
    log_results(trainer.loggers, results)
    shutil.rmtree(out / "strips", ignore_errors=True)
    (out / "strips").mkdir()
    for case, place in list(zip(cases, places, strict=True))[:STRIPS]:
        strip(place, out / "strips" / f"{case['place']}.png")
    hacking_figure(trajectories, out / "curves.png", list(method.watch), prompts)
    console = Console()
    for table in (search_table(results), health_table(results, shape)):
        console.print(table)
    console.print(f"report: {write_noise_report(out, shape)}", soft_wrap=True)
    return results
