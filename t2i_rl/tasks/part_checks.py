"""What goes with what among prompts, judges, benchmarks and data, refused in one line before the model's weights load."""

from collections.abc import Iterable, Sequence

from hydra._internal.utils import _locate
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from hydra.utils import get_class, instantiate
from omegaconf import DictConfig

from t2i_rl.callbacks.validation import Validate
from t2i_rl.command.checks import watched
from t2i_rl.core.contract_checks import check_benchmark, check_reward
from t2i_rl.core.encoder_texts import ReadsTexts
from t2i_rl.core.errors import UserError
from t2i_rl.core.prompts import Prompt
from t2i_rl.evaluation.optimized import check_optimized
from t2i_rl.rewards.weighted_sum import WeightedSum
from t2i_rl.shapes.scene import CANVASES


def check_needs(cfg: DictConfig, prompts: Sequence[Prompt]) -> None:
    """What can be known of model and rewards before any of them is made: making a reward may load gigabytes.

    Raises:
        UserError: the model's checkpoint is not there, or a reward's class needs metadata that a prompt lacks.
    """
    get_class(cfg.model._target_).image_size(cfg.model)
    judges = {f"watch.{name}": node for name, node in watched(cfg).items() if node}
    for name, node in {"reward": cfg.reward, **judges}.items():
        for part in [node, *(part for part in (node.get("parts") or {}).values() if part)]:
            kind = _locate(part._target_)
            _check_meta(cfg, name, kind, prompts)


def _check_meta(cfg: DictConfig, name: str, kind: type, prompts: Sequence[Prompt]) -> None:
    shapes = "shapes_test" if get_class(cfg.method._target_).searches_noise else "shapes"
    for key in getattr(kind, "needs_meta", ()):
        lacking = next((prompt for prompt in prompts if key not in prompt.meta), None)
        if lacking:
            raise UserError(
                f"{name} ({kind.__name__}) judges by each prompt's {key!r}, which {lacking.text!r} lacks: {_fix(name)}, or take data={shapes if key == 'include' else 't2i_r1'}"
            )


def _fix(name: str) -> str:
    return "take another reward" if name == "reward" else f"remove it (~{name})"


def made_judge(cfg: DictConfig, prompts: Sequence[Prompt], judged_by: str | None):
    """`method.judge`, which ends trajectories and chooses pictures, once it is known that it can; None for none.

    It reads these prompts, and pictures of the size that the model draws, and is not what the benchmark `judged_by` judges with.

    Raises:
        UserError: one line that says what to change.
    """
    if not cfg.method.get("judge"):
        return None
    kind = get_class(cfg.method.judge._target_)
    if judged_by is not None and getattr(kind, "judge_of", None) == judged_by:
        raise UserError(
            f"method.judge ({kind.__name__}) is the judge of benchmark={judged_by} itself, which may not choose its own pictures: take +reward@method.judge=soft_oracle"
        )
    for key in getattr(kind, "needs_meta", ()):
        lacking = next((prompt for prompt in prompts if key not in prompt.meta), None)
        if lacking:
            raise UserError(
                f"method.judge ({kind.__name__}) judges by each prompt's {key!r}, which {lacking.text!r} lacks: take another judge, or a prompts_file with it"
            )
    judge = instantiate(cfg.method.judge)
    check_reward(judge, "method.judge")
    size = get_class(cfg.model._target_).image_size(cfg.model)
    sizes = getattr(judge, "image_sizes", None)
    if sizes and size not in sizes:
        raise UserError(
            f"method.judge ({kind.__name__}) reads images of {' or '.join(map(str, sizes))} pixels, but this model draws {size}x{size}: take another judge"
        )
    announce_rewards([judge], prompts)
    return judge


def announce_model(cfg: DictConfig, texts: Iterable[str]) -> None:
    """Say once, before any weight loads, what the model does not read of a run's texts.

    Raises:
        UserError: one of them spells a special token that cannot be read as text, or is too long.
    """
    kind = get_class(cfg.model._target_)
    reader = kind.text_reader(cfg.model) if (texts := list(texts)) else None
    if reader is not None:
        reader.announce(texts)


def announce_rewards(rewards: Iterable[object], prompts: Sequence[Prompt]) -> None:
    """The same of what rewards and judges read.

    Raises:
        UserError: see `announce_model`.
    """
    for reward in rewards:
        for part in reward.parts.values() if isinstance(reward, WeightedSum) else [reward]:
            if isinstance(part, ReadsTexts):
                part.reader.announce(text for prompt in prompts for text in part.texts_of(prompt))


def check_share(data, world_size: int) -> None:
    """Whether a batch splits over the ranks.

    Raises:
        UserError: it does not.
    """
    if data.batch_size % world_size:
        raise UserError(f"data.batch_size={data.batch_size} does not split over {world_size} ranks: take a multiple")


def check_parts(cfg: DictConfig, benchmark, prompts: Sequence[Prompt], rewards: dict[str, object]) -> None:
    """Everything that needs the benchmark, the training prompts and the rewards, but not the model's weights.

    A reward or benchmark may name `image_sizes` (pixels that it reads); a reward also `needs_plans`, `needs_meta` (keys of a
    prompt's metadata) and `refuses(prompt)` (why it cannot judge that prompt, or None). What is not named is not needed.

    Raises:
        UserError: one line that names the part, what it needs, and what to change.
    """
    if benchmark is not None:
        check_benchmark(benchmark)
    for name, reward in rewards.items():
        check_reward(reward, name)
    size = get_class(cfg.model._target_).image_size(cfg.model)
    drawn = {f"benchmark={benchmark.name}": benchmark} if benchmark is not None and cfg.evaluation.stages else {}
    for name, part in {**drawn, **rewards}.items():
        sizes = getattr(part, "image_sizes", None)
        if sizes and size not in sizes:
            fix = (
                _fix_size(cfg, size)
                if part is benchmark
                else "take another reward"
                if name == "reward"
                else "remove it"
            )
            raise UserError(
                f"{name} reads images of {' or '.join(map(str, sizes))} pixels, but this model draws {size}x{size}: {fix}"
            )
    if benchmark is not None:
        check_optimized(cfg, benchmark, optimizes())
    for name, reward in rewards.items():
        if getattr(reward, "needs_plans", False) and not cfg.method.get("plan"):
            raise UserError(f"{name} ({type(reward).__name__}) needs plans: set method.plan=true")
        _check_meta(cfg, name, type(reward), prompts)
        for prompt in prompts if hasattr(reward, "refuses") else ():
            if why := reward.refuses(prompt):
                raise UserError(f"{name} ({type(reward).__name__}) cannot judge {prompt.text!r}: {why}; {_fix(name)}")
    announce_rewards(rewards.values(), prompts)
    evaluated = [prompt for part in drawn.values() for prompt in part.prompts()]
    announce_model(cfg, [prompt.text for prompt in (*prompts, *evaluated)])


def _fix_size(cfg: DictConfig, size: int) -> str:
    """What brings a benchmark and a model together that draws another size."""
    if "size" in cfg.benchmark and size in CANVASES:
        return f"set benchmark.size={size}, or evaluation.stages=[] to measure nothing"
    return "take a model of that size, or evaluation.stages=[] to measure nothing"


def optimizes() -> bool:
    """Whether a sweeper waits for a number of this run."""
    if not HydraConfig.initialized() or HydraConfig.get().mode != RunMode.MULTIRUN:
        return False
    return not HydraConfig.get().sweeper._target_.endswith("BasicSweeper")


def check_validation(cfg: DictConfig, callbacks: dict, validation: Sequence[Prompt] = ()) -> None:
    """Whether what validates can read what the model draws.

    Raises:
        UserError: it reads pictures of another size.
    """
    size = get_class(cfg.model._target_).image_size(cfg.model)
    for name, callback in callbacks.items():
        benchmark = getattr(callback, "benchmark", None)
        judges = {f"callbacks.{name}.judges.{key}": judge for key, judge in getattr(callback, "judges", {}).items()}
        if benchmark is not None:
            check_benchmark(benchmark, f"callbacks.{name}.benchmark")
        features = getattr(callback, "features", None)
        if features is not None and not callable(getattr(features, "reference_features", None)):
            raise UserError(
                f"callbacks.{name}.fid compares with reference_features(), which {type(features).__name__} has not: "
                "set "
                f"callbacks.{name}.fid=false"
            )
        for where, judge in judges.items():
            check_reward(judge, where)
        if isinstance(callback, Validate):
            callback.check_best(f"callbacks.{name}")
        drawn = benchmark.prompts() if benchmark is not None else validation
        announce_rewards(getattr(callback, "judges", {}).values(), drawn)
        for where, part in {f"callbacks.{name}.benchmark": benchmark, **judges}.items():
            sizes = getattr(part, "image_sizes", None)
            if sizes and size not in sizes:
                raise UserError(
                    f"{where} reads images of {' or '.join(map(str, sizes))} pixels, but this model draws {size}x{size}: set {where}=null"
                )
