"""What a run is made of beside its model: each part is made once and examined once, before any of its weights load."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import lightning as L
from hydra._internal.utils import _locate
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from hydra.utils import get_class, instantiate
from lightning.pytorch.loggers import Logger
from omegaconf import DictConfig, OmegaConf

from t2i_rl.core.choices import check_family, choices, near
from t2i_rl.core.contract_checks import check_benchmark, check_reward
from t2i_rl.core.contracts import Benchmark, ImageModel, Judging, Reward
from t2i_rl.core.errors import UserError
from t2i_rl.core.prompts import Prompt
from t2i_rl.core.readers import ReadsTexts
from t2i_rl.core.used_settings import written_out
from t2i_rl.data.base import Data, check_data
from t2i_rl.evaluation.optimized import check_optimized
from t2i_rl.evaluation.stage import Stage
from t2i_rl.methods.base import Method
from t2i_rl.shapes.scene import CANVASES
from t2i_rl.tasks.loggers import tell_wandb


@dataclass
class Parts:
    """Everything of a training but its model and its method."""

    benchmark: Benchmark
    data: Data
    reward: Reward
    watch: Mapping[str, Reward]
    callbacks: Mapping[str, L.Callback]
    trainer: L.Trainer
    judge: Reward | None


def examine(cfg: DictConfig) -> Parts:
    """Make the parts of a training.

    Raises:
        UserError: one line that names the part that does not go with the others, what it needs, and what to change.
    """
    benchmark, data = instantiate(cfg.benchmark), instantiate(cfg.data)
    check_data(data)
    check_needs(cfg, data.prompts)
    announce_model(cfg, data.texts())
    reward, watch = made_rewards(cfg)
    check_parts(cfg, benchmark, data.prompts, by_setting(reward, watch))
    data.check(image_size(cfg))
    callbacks = named_parts(cfg, "callbacks")
    check_validation(cfg, callbacks, data.validation)
    trainer = instantiate(cfg.trainer, callbacks=list(callbacks.values()), logger=made_loggers(cfg))
    check_share(data, trainer.world_size)
    judge = made_judge(cfg, benchmark.prompts(), benchmark.name)
    return Parts(benchmark, data, reward, watch, callbacks, trainer, judge)


def named_parts(cfg: DictConfig, group: str) -> dict[str, Any]:
    """The parts of `callbacks` or `logger` by name, each made.

    A part that is null is left out. So is one that only has settings, as when `debug=fdr` sets how often samples are
    drawn and `callbacks=none` draws none.

    Raises:
        UserError: a part names no class, and there is none of that name to leave out.
    """
    nodes = {name: node for name, node in (cfg[group] or {}).items() if node is not None}
    known = choices(group)
    for name, node in nodes.items():
        if "_target_" not in node and name not in known:
            hint = near(name, known, f"; known by name are {', '.join(known)}")
            raise UserError(f"{group}.{name} names no class (_target_){hint}")
    return {name: instantiate(node) for name, node in nodes.items() if "_target_" in node}


def made_loggers(cfg: DictConfig) -> list[Logger] | bool:
    """The loggers that the config names; False for none."""
    loggers = list(named_parts(cfg, "logger").values())
    tell_wandb(loggers, written_out(cfg))
    return loggers or False


def method_of(cfg: DictConfig) -> type[Method]:
    """The class of `cfg.method`."""
    return get_class(cfg.method._target_)


def model_of(cfg: DictConfig) -> type[ImageModel]:
    """The class of `cfg.model`."""
    return get_class(cfg.model._target_)


def image_size(cfg: DictConfig) -> int:
    """Side in pixels of what the model draws, known from its config files.

    Raises:
        UserError: they are not there.
    """
    return model_of(cfg).image_size(cfg.model)


def check_method(cfg: DictConfig, training: bool) -> None:
    """Whether the method takes this model, the rest of the config, and its own options; nothing is loaded.

    Args:
        training: whether the run trains, or only draws with what was trained.

    Raises:
        UserError: one line that names what does not fit, and what to take.
    """
    method, options = method_of(cfg), OmegaConf.to_container(cfg.method, resolve=True)
    check_family(method.__name__, method.trains, model_of(cfg).family)
    method.check_run(cfg, training)
    left = {name: value for name, value in options.items() if name not in ("_target_", "judge", *method.stated)}
    judge = {"judge": options["judge"]} if "judge" in options else {}  # it may load gigabytes, and is only counted here
    method.check({**instantiate(left), **judge})


def check_drawing(cfg: DictConfig) -> None:
    """Whether method and model draw in the ways that are asked for.

    Raises:
        UserError: they do not.
    """
    stages = list(cfg.evaluation.stages)
    turns = [stage for stage in stages if Stage.parse(stage).way == "turns"]
    if turns and not method_of(cfg).draws_in_turns:
        raise UserError(
            f"evaluation.stages holds {turns[0]}, and only a method that interleaves draws turns: take method=irg"
        )
    plans = [stage for stage in stages if Stage.parse(stage).way == "plan"]
    if model_of(cfg).family != "autoregressive" and (plans or cfg.mode == "plan"):
        fix = f"leave {plans[0]} out of evaluation.stages" if plans else "set mode=direct"
        raise UserError(f"a diffusion model writes no plans: {fix}")


def watched(cfg: DictConfig) -> DictConfig:
    """`cfg.watch`, the judges of what is drawn while training; none where the method is given pictures."""
    return cfg.watch if method_of(cfg).learns_from == "prompts" else OmegaConf.create()


def made_rewards(cfg: DictConfig) -> tuple[Reward, dict[str, Reward]]:
    """The reward, and by name those that are watched."""
    watch = instantiate(watched(cfg))
    return instantiate(cfg.reward), {name: judge for name, judge in watch.items() if judge is not None}


def by_setting(reward: Reward, watch: Mapping[str, Reward]) -> dict[str, Reward]:
    """The reward and what is watched, by the names of their settings."""
    return {"reward": reward, **{f"watch.{name}": judge for name, judge in watch.items()}}


def made_judge(cfg: DictConfig, prompts: Sequence[Prompt], judged_by: str | None) -> Reward | None:
    """`method.judge`, which ends trajectories and chooses pictures, once it is known that it can; None for none.

    It reads these prompts, and pictures of the size that the model draws, and is not what the benchmark `judged_by`
    judges with.

    Raises:
        UserError: one line that says what to change.
    """
    if not cfg.method.get("judge"):
        return None
    kind = get_class(cfg.method.judge._target_)
    if judged_by is not None and kind.judge_of == judged_by:
        raise UserError(
            f"method.judge ({kind.__name__}) is the judge of benchmark={judged_by} itself, which may not choose its "
            "own pictures: take +reward@method.judge=soft_oracle"
        )
    lacking = _without_meta(kind, prompts)
    if lacking:
        raise UserError(
            f"method.judge ({kind.__name__}) judges by each prompt's {lacking[0]!r}, which {lacking[1].text!r} lacks: "
            "take another judge, or a prompts_file with it"
        )
    judge = instantiate(cfg.method.judge)
    check_reward(judge, "method.judge")
    _check_size(cfg, judge, f"method.judge ({kind.__name__})", "take another judge")
    announce_rewards([judge], prompts)
    return judge


def check_needs(cfg: DictConfig, prompts: Sequence[Prompt]) -> None:
    """What can be known of model and rewards before any of them is made: making a reward may load gigabytes.

    Raises:
        UserError: the model's checkpoint is not there, or a reward's class needs metadata that a prompt lacks.
    """
    image_size(cfg)
    judges = {f"watch.{name}": node for name, node in watched(cfg).items() if node}
    for name, node in {"reward": cfg.reward, **judges}.items():
        for part in [node, *(part for part in (node.get("parts") or {}).values() if part)]:
            _check_meta(cfg, name, _locate(part._target_), prompts)


def check_parts(
    cfg: DictConfig, benchmark: Benchmark | None, prompts: Sequence[Prompt], rewards: Mapping[str, Reward]
) -> None:
    """Everything that needs the benchmark, the training prompts and the rewards, but not the model's weights.

    Raises:
        UserError: one line that names the part, what it needs, and what to change.
    """
    evaluated: list[Prompt] = []
    if benchmark is not None:
        check_benchmark(benchmark)
        if cfg.evaluation.stages:
            _check_size(cfg, benchmark, f"benchmark={benchmark.name}", _other_size(cfg))
            evaluated = list(benchmark.prompts())
        check_optimized(cfg, benchmark, optimizes())
    for name, reward in rewards.items():
        check_reward(reward, name)
        _check_size(cfg, reward, name, "take another reward" if name == "reward" else "remove it")
        if reward.needs_plans and not cfg.method.get("plan"):
            raise UserError(f"{name} ({type(reward).__name__}) needs plans: set method.plan=true")
        _check_meta(cfg, name, reward, prompts)
        for prompt in prompts:
            if why := reward.refuses(prompt):
                raise UserError(f"{name} ({type(reward).__name__}) cannot judge {prompt.text!r}: {why}; {_fix(name)}")
    announce_rewards(rewards.values(), prompts)
    announce_model(cfg, [prompt.text for prompt in (*prompts, *evaluated)])


def check_validation(cfg: DictConfig, callbacks: Mapping[str, L.Callback], validation: Sequence[Prompt] = ()) -> None:
    """Whether what validates can read what the model draws.

    Raises:
        UserError: it reads pictures of another size, or compares with features that there are not.
    """
    judging = {name: callback for name, callback in callbacks.items() if isinstance(callback, Judging)}
    for name, callback in judging.items():
        benchmark, judges = callback.benchmark, callback.judges
        by_place: dict[str, Benchmark | Reward] = {
            f"callbacks.{name}.judges.{key}": judge for key, judge in judges.items()
        }
        if benchmark is not None:
            check_benchmark(benchmark, f"callbacks.{name}.benchmark")
        for where, judge in by_place.items():
            check_reward(judge, where)
        callback.check(f"callbacks.{name}")
        announce_rewards(judges.values(), benchmark.prompts() if benchmark is not None else validation)
        if benchmark is not None:
            by_place[f"callbacks.{name}.benchmark"] = benchmark
        for where, part in by_place.items():
            _check_size(cfg, part, where, f"set {where}=null")


def check_share(data: Data, world_size: int) -> None:
    """Whether a batch splits over the ranks.

    Raises:
        UserError: it does not.
    """
    if data.batch_size % world_size:
        raise UserError(f"data.batch_size={data.batch_size} does not split over {world_size} ranks: take a multiple")


def announce_model(cfg: DictConfig, texts: Iterable[str]) -> None:
    """Say once, before any weight loads, what the model does not read of a run's texts.

    Raises:
        UserError: one of them spells a special token that cannot be read as text, or is too long.
    """
    texts = list(texts)
    reader = model_of(cfg).text_reader(cfg.model) if texts else None
    if reader is not None:
        reader.announce(texts)


def announce_rewards(rewards: Iterable[Reward], prompts: Sequence[Prompt]) -> None:
    """The same of what rewards and judges read.

    Raises:
        UserError: see `announce_model`.
    """
    for reward in rewards:
        for part in reward.parts.values() or [reward]:
            if isinstance(part, ReadsTexts):
                part.reader.announce(text for prompt in prompts for text in part.texts_of(prompt))


def optimizes() -> bool:
    """Whether a sweeper waits for a number of this run."""
    if not HydraConfig.initialized() or HydraConfig.get().mode != RunMode.MULTIRUN:
        return False
    return not HydraConfig.get().sweeper._target_.endswith("BasicSweeper")


def _check_size(cfg: DictConfig, part: Benchmark | Reward, where: str, fix: str) -> None:
    """Whether a reward or a benchmark reads pictures of the size that the model draws."""
    sizes, drawn = part.image_sizes, image_size(cfg)
    if sizes and drawn not in sizes:
        raise UserError(
            f"{where} reads images of {' or '.join(map(str, sizes))} pixels, but this model draws {drawn}x{drawn}: "
            f"{fix}"
        )


def _other_size(cfg: DictConfig) -> str:
    """What brings a benchmark and a model together that draws another size."""
    drawn = image_size(cfg)
    if "size" in cfg.benchmark and drawn in CANVASES:
        return f"set benchmark.size={drawn}, or evaluation.stages=[] to measure nothing"
    return "take a model of that size, or evaluation.stages=[] to measure nothing"


def _check_meta(cfg: DictConfig, name: str, reward: Any, prompts: Sequence[Prompt]) -> None:
    """Whether prompts have what a reward, or its class, judges by."""
    lacking = _without_meta(reward, prompts)
    if lacking:
        kind = reward if isinstance(reward, type) else type(reward)
        data = method_of(cfg).data_to_take() if lacking[0] == "include" else "data=t2i_r1"
        raise UserError(
            f"{name} ({kind.__name__}) judges by each prompt's {lacking[0]!r}, which {lacking[1].text!r} lacks: "
            f"{_fix(name)}, or take {data}"
        )


def _without_meta(reward: Any, prompts: Sequence[Prompt]) -> tuple[str, Prompt] | None:
    """What a reward judges by, and the first prompt that lacks it; None where all have it."""
    needed = reward.needs_meta
    return next(((key, prompt) for key in needed for prompt in prompts if key not in prompt.meta), None)


def _fix(name: str) -> str:
    return "take another reward" if name == "reward" else f"remove it (~{name})"
