"""`task=optimize_noise`: look for better noise for every prompt with a frozen model; before and after, with held-out judges and the noise's health."""

import json
from pathlib import Path

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


def run(cfg) -> dict:
    """Search for `cfg.data`'s prompts with `cfg.method`; returns the content of results.json."""
    from hydra.core.hydra_config import HydraConfig

    out, data = Path(cfg.paths.output_dir), instantiate(cfg.data, batch_size=1)
    check_needs(cfg, data.prompts)
    reward = instantiate(cfg.reward)
    watch = {name: judge for name, judge in instantiate(watched(cfg)).items() if judge is not None}
    rewards = {"reward": reward, **{f"watch.{name}": judge for name, judge in watch.items()}}
    check_parts(cfg, None, data.prompts, rewards)
    benchmark = _judging(cfg, data.prompts)
    trainer = instantiate(cfg.trainer, inference_mode=False, enable_progress_bar=False, logger=build_loggers(cfg))
    if trainer.is_global_zero:
        print(
            predict(cfg.model, cfg.method.gradient_checkpointing).sentence(
                cfg.method.batch_size, cfg.method.free_text_encoders
            ),
            flush=True,
        )
    model = instantiate(cfg.model)
    given = {key: OmegaConf.to_container(cfg[key], resolve=True) for key in ("method", "reward", "watch")}
    settings = json.dumps(
        given | {"sampling": model.sampling(), "weights_sha256": weights_sha256(model)}, sort_keys=True
    )
    method = instantiate(
        cfg.method,
        model=model,
        reward=reward,
        watch=watch,
        folder=out / "noise",
        prompts=data.prompts,
        settings=settings,
    )
    if trainer.is_global_zero:
        print(
            f"{len(data.prompts)} prompts x {method.samples} noises of {' x '.join(map(str, method.noise_shape()))}; {len(method.finished())} of {len(method.cases())} done before",
            flush=True,
        )
    trainer.predict(method, return_predictions=False)
    if dist.is_initialized():
        dist.barrier()
    cases = method.finished()
    shape = (
        tuple(method.noise_shape())
        if method.eta == 0
        else (method.noise_shape()[0] * method.noise_shape()[1], *method.noise_shape()[2:])
    )
    prompts = {prompt.id: prompt for prompt in data.prompts}
    choices = HydraConfig.get().runtime.choices if HydraConfig.initialized() else {}
    results = {
        **{key: choices.get(key) for key in ("task", "method", "model", "reward", "regularizer")},
        "seed": cfg.seed,
        "steps": max(case["last"]["step"] for case in cases),
        "benchmark": benchmark.fingerprint() if benchmark else {"name": "none"},
        "sampling": model.sampling(),
        **summarise(out, cases, shape, benchmark, prompts),
    }
    comparison = headline_comparison(results)
    name = "overall" if "overall" in comparison["metrics"] else "target"
    results["headline"] = {"a": comparison["a"], "b": comparison["b"], "metric": name, **comparison["metrics"][name]}
    if trainer.is_global_zero:
        write_results(out / "results.json", results)
        _show(cfg, out, trainer, results, cases, shape, list(watch))
    return results


def _judging(cfg, prompts):
    """The benchmark, as judge of these prompts' pictures, where it can read both; it chooses nothing."""
    benchmark = instantiate(cfg.benchmark)
    size = get_class(cfg.model._target_).image_size(cfg.model)
    return benchmark if size in benchmark.image_sizes and all("include" in prompt.meta for prompt in prompts) else None


def _show(cfg, out: Path, trainer, results: dict, cases: list[dict], shape: tuple[int, ...], watch: list[str]) -> None:
    """Curves to the loggers, strips, tables, and the page."""
    places = [out / "noise" / case["place"] for case in cases]
    trajectories = [
        [json.loads(line) for line in (place / "trajectory.jsonl").read_text().splitlines()] for place in places
    ]
    names = [name for name in trajectories[0][0] if name not in ("step", "step_rms")]
    curves = {name: curves_of(trajectories, name) for name in names}
    for step in range(results["steps"] + 1):
        row = {
            f"noise/{name}": float(mean[steps == step][0])
            for name, (steps, mean, _) in curves.items()
            if (steps == step).any()
        }
        for logger in trainer.loggers:
            logger.log_metrics(row, step=step)
    log_results(trainer.loggers, results)
    (out / "strips").mkdir(exist_ok=True)
    for case, place in list(zip(cases, places, strict=True))[:STRIPS]:
        strip(place, out / "strips" / f"{case['place']}.png")
    hacking_figure(trajectories, out / "curves.png", watch)
    console = Console()
    for table in (search_table(results), health_table(results, shape)):
        console.print(table)
    console.print(f"report: {write_noise_report(out, shape)}", soft_wrap=True)
