"""`task=optimize_noise`: look for better noise for every prompt with a frozen model; before and after, with held-out judges and the noise's health."""

import json
from pathlib import Path

import torch
import torch.distributed as dist
from hydra.utils import get_class, instantiate
from omegaconf import OmegaConf
from rich.console import Console

from t2i_rl.checks import check_needs, check_parts, watched
from t2i_rl.evaluation.noise_pictures import curves_of, hacking_figure, strip
from t2i_rl.evaluation.noise_report import write_noise_report
from t2i_rl.evaluation.noise_results import health_table, search_table, summarise
from t2i_rl.evaluation.results import headline_comparison, write_results
from t2i_rl.hashing import weights_sha256
from t2i_rl.loggers import build_loggers, log_results
from t2i_rl.models.memory import predict

STRIPS = 6
CONFIGURED = ("method", "model", "reward", "watch")  # what a finished case depends on


def run(cfg) -> dict:
    """Search for `cfg.data`'s prompts with `cfg.method`; rank 0 returns the content of results.json."""
    out, data = Path(cfg.paths.output_dir), instantiate(cfg.data, batch_size=1)
    check_needs(cfg, data.prompts)
    trainer = instantiate(cfg.trainer, inference_mode=False, enable_progress_bar=False, logger=build_loggers(cfg))
    if trainer.is_global_zero:
        memory = predict(cfg.model, cfg.method.gradient_checkpointing)
        print(memory.sentence(cfg.method.batch_size, cfg.method.free_text_encoders), flush=True)
    reward = instantiate(cfg.reward)
    watch = {name: judge for name, judge in instantiate(watched(cfg)).items() if judge is not None}
    judges = {"reward": reward, **{f"watch.{name}": judge for name, judge in watch.items()}}
    check_parts(cfg, None, data.prompts, judges)
    benchmark = judging(cfg, data.prompts)
    model = instantiate(cfg.model)
    weights = {"model": weights_sha256(model), **{name: modules_sha256(judge) for name, judge in judges.items()}}
    settings = {key: OmegaConf.to_container(cfg[key], resolve=True) for key in CONFIGURED}
    method = instantiate(cfg.method, model=model, reward=reward, watch=watch, folder=out / "noise")
    method.settings = json.dumps(settings | {"sampling": model.sampling(), "weights": weights}, sort_keys=True)
    method.prompts = data.prompts  # not through Hydra, which would make configs of them
    if trainer.is_global_zero:
        shape = " x ".join(map(str, method.noise_shape()))
        done, total = len(method.finished()), len(method.cases())
        print(f"{len(data.prompts)} prompts x {method.samples} noises of {shape}; {done} of {total} done before", flush=True)  # fmt: skip
    trainer.predict(method, return_predictions=False)
    if dist.is_initialized():
        dist.barrier()
    return report(cfg, out, trainer, method, benchmark, weights) if trainer.is_global_zero else {}


def judging(cfg, prompts):
    """The benchmark, as judge of these prompts' pictures, where it can read both; it chooses nothing."""
    benchmark = instantiate(cfg.benchmark)
    size = get_class(cfg.model._target_).image_size(cfg.model)
    return benchmark if size in benchmark.image_sizes and all("include" in prompt.meta for prompt in prompts) else None


def modules_sha256(judge) -> dict[str, str]:
    """Hashes of the networks behind a reward, and behind its parts."""
    found = {name: weights_sha256(value) for name, value in vars(judge).items() if isinstance(value, torch.nn.Module)}
    return found | {name: modules_sha256(part) for name, part in getattr(judge, "parts", {}).items()}


def report(cfg, out: Path, trainer, method, benchmark, weights: dict) -> dict:
    """results.json, curves to the loggers, strips, tables, and the page."""
    from hydra.core.hydra_config import HydraConfig

    cases, steps_of_noise = method.finished(), method.noise_shape()[:-3]
    shape = (*(length * method.noise_shape()[-3] for length in steps_of_noise), *method.noise_shape()[-2:]) if steps_of_noise else method.noise_shape()  # fmt: skip
    choices = HydraConfig.get().runtime.choices if HydraConfig.initialized() else {}
    results = {
        **{key: choices.get(key) for key in ("task", "method", "model", "reward", "regularizer")},
        "seed": cfg.seed,
        "steps": max(case["last"]["step"] for case in cases),
        "benchmark": benchmark.fingerprint() if benchmark else {"name": "none"},
        "sampling": method.model.sampling(),
        "weights_sha256": weights,
        **summarise(out, cases, shape, benchmark, {prompt.id: prompt for prompt in method.prompts}),
    }
    comparison = headline_comparison(results)
    name = "overall" if "overall" in comparison["metrics"] else "target"
    results["headline"] = {"a": comparison["a"], "b": comparison["b"], "metric": name, **comparison["metrics"][name]}
    write_results(out / "results.json", results)

    places, prompts = [out / "noise" / case["place"] for case in cases], [case["prompt_id"] for case in cases]
    files = [place / "trajectory.jsonl" for place in places]
    trajectories = [[json.loads(line) for line in file.read_text().splitlines()] for file in files]
    curves = {name: curves_of(trajectories, name, prompts) for name in trajectories[0][0] if name != "step"}
    for step in range(results["steps"] + 1):
        row = {f"noise/{name}": float(mean[steps == step][0]) for name, (steps, mean, _) in curves.items() if step in steps}  # fmt: skip
        for logger in trainer.loggers:
            logger.log_metrics(row, step=step)
    log_results(trainer.loggers, results)
    (out / "strips").mkdir(exist_ok=True)
    for case, place in list(zip(cases, places, strict=True))[:STRIPS]:
        strip(place, out / "strips" / f"{case['place']}.png")
    hacking_figure(trajectories, out / "curves.png", list(method.watch), prompts)
    console = Console()
    for table in (search_table(results), health_table(results, shape)):
        console.print(table)
    console.print(f"report: {write_noise_report(out, shape)}", soft_wrap=True)
    return results
