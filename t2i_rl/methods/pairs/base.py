"""What SoftREPA, AGSM and their denoising control share: pairs, draws, soft tokens, and passes of bounded size."""

import copy
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
from omegaconf import DictConfig, OmegaConf
from torch import nn

from t2i_rl.core.errors import UserError
from t2i_rl.core.hashing import weights_sha256
from t2i_rl.core.numbers import Count, GradientNorm, Seed, Whole, check_arguments
from t2i_rl.core.seeding import derive_seed, row_normals
from t2i_rl.methods.base import Learner
from t2i_rl.methods.step import NonFinite, check_optimizer
from t2i_rl.methods.trainable import add_adapters, lora_config
from t2i_rl.models.diffusion.base import LatentDiffusion, TextEncoding, attention_for_training
from t2i_rl.models.diffusion.soft_tokens import SoftTokens, spec_for

SHARING = ("shared", "per_image")
ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
OF_TOKENS = ("tokens", "layers", "buckets", "position", "init", "times", "noise")  # what a variant says of them


class PairBatch(Protocol):
    """This rank's share of a batch of matching images and texts, see `data.pairs`.

    numbers: the images' numbers in the batch of all ranks.
    """

    @property
    def numbers(self) -> list[int]: ...

    def encode(self, model: LatentDiffusion, seeds: list[int]) -> tuple[torch.Tensor, TextEncoding]:
        """Latents `(R, C, h, w)`, each sampled with its seed, and their texts."""


@dataclass
class Grid:
    """`R` noised images of this rank and the `B` texts that they are compared under.

    x_t: noised latents `(R, C, h, w)`. t: their times `(R,)`, 0 to 1000. target: what the denoiser ought to say.
    text: the texts, `B` rows. own: `(R,)`, the column of each image's own text.
    """

    x_t: torch.Tensor
    t: torch.Tensor
    target: torch.Tensor
    text: TextEncoding
    own: torch.Tensor

    def __len__(self) -> int:
        return len(self.x_t)


class PairMethod(Learner):
    """Trains a bank of soft tokens (a subclass may train adapters) on matching images and texts; the denoiser stays
    frozen.

    Args:
        model: an adapter of family `diffusion`.
        optimizer, scheduler: partials, `optimizer(params)` and `scheduler(optimizer)`; the scheduler steps every
            `schedule_every` steps.
        tokens: K, soft tokens a layer; layers: see `splice.layout_of`; buckets: rows of the time table, 0 for none;
            interpolate between them.
        position: `start`, `after_bos` or `end` of the text.
        init: `normal` (0.02) or `bos` (K copies of the empty prompt's first state, which stay copies for ever:
            attention cannot tell them apart).
        times, noise: `shared` by all images of a step (as released) or `per_image`; texts of one image always share
            both.
        pairs_per_pass: image-text pairs with a live graph at a time; changes memory, not the gradient.
        gather_negatives: compare under the texts of all ranks.
        max_grad_norm, on_nonfinite: see `Learner`.
        seed: together with step and image it decides every random draw.

    Raises:
        UserError: an option outside its choices.
    """

    trains = frozenset({"diffusion"})
    learns_from = "pairs"
    keeps_as, hash_key = "pairs", "backbone_sha256"
    weights_come_from = "the model (float32 and bfloat16 are one; float16 is its own)"
    decide_what_learns = (
        *("variant", "lora", "tokens", "layers", "buckets", "interpolate", "tables", "position", "null_branch"),
    )
    branches = 1
    contrasts = True  # an image's own text is told from others
    plan = False  # a diffusion model draws straight from the prompt

    def __init__(
        self,
        model: LatentDiffusion,
        optimizer: partial,
        scheduler: partial | None = None,
        schedule_every: Count = 1,
        tokens: Whole = 4,
        layers: Count | list[str] | None = None,
        buckets: Whole = 100,
        interpolate: bool = False,
        tables: Count = 1,
        position: str = "end",
        init: str = "normal",
        times: str = "per_image",
        noise: str = "per_image",
        pairs_per_pass: Count = 64,
        gather_negatives: bool = False,
        max_grad_norm: GradientNorm | None = 1.0,
        gradient_checkpointing: bool = False,
        on_nonfinite: str = "raise",
        seed: Seed = 0,
    ):
        super().__init__(optimizer, scheduler, max_grad_norm, on_nonfinite, schedule_every)
        self.model = model
        self.times, self.noise, self.pairs_per_pass = times, noise, pairs_per_pass
        self.gather_negatives, self.seed = gather_negatives, seed
        self.settings: dict[str, Any] = {}
        model.requires_grad_(False)
        self.start_sha256 = weights_sha256(model, dtype=torch.bfloat16)  # whatever dtype it is loaded in
        if gradient_checkpointing:
            model.denoiser.enable_gradient_checkpointing()
            model.denoiser.train()  # what diffusers asks before it checkpoints; no dropout in these classes
        self.bank: SoftTokens | None = None
        if tokens:
            spec = spec_for(
                model.denoiser,
                layers,
                tokens,
                branches=self.branches,
                buckets=buckets,
                interpolate=interpolate,
                tables=tables,
                position=position,
            )
            self.bank = SoftTokens(spec, generator=torch.Generator().manual_seed(derive_seed(seed, "bank")))
            if init == "bos":
                self._start_from_bos(self.bank)
            model.attach(self.bank).enable(False)

    @staticmethod
    def check(options: Mapping) -> None:
        """Refuse options, by name as in `__init__`, that cannot train; the command line asks before any weight loads.

        Raises:
            UserError: one line that names the option and its choices.
        """
        for name, choices in (("times", SHARING), ("noise", SHARING), ("init", ("normal", "bos"))):
            if options.get(name) not in (None, *choices):
                raise UserError(f"method.{name} must be one of {', '.join(choices)}, not {options[name]!r}")
        given = {name: value for name, value in options.items() if value is not None}  # a variant fills in the others
        check_arguments(PairMethod, given, "method")
        NonFinite.check(options.get("on_nonfinite", "raise"))
        if options.get("optimizer") is not None:
            check_optimizer(options["optimizer"], options.get("scheduler"))

    @classmethod
    def check_run(cls, cfg: DictConfig, training: bool) -> None:
        """See `Method.check_run`."""
        super().check_run(cfg, training)
        precision = str(cfg.trainer.precision)
        if OmegaConf.select(cfg, "trainer.strategy._target_"):
            raise UserError("trainer=fsdp shards what learns, and that is a few megabytes here: take trainer=ddp")
        if precision in ("16", "16-mixed") or cfg.model.get("dtype") == "float16":
            raise UserError(
                f"{cls.__name__} adds its gradients up itself, without float16's loss scaling: take "
                "trainer.precision=bf16-mixed and model.dtype=bfloat16"
            )
        if precision.endswith("-true") and precision != "32-true":
            raise UserError(
                f"trainer.precision={cfg.trainer.precision} rounds what learns: take trainer.precision=bf16-mixed (and "
                "model.dtype=bfloat16)"
            )

    def _start_from_bos(self, bank: SoftTokens) -> None:
        with torch.no_grad():
            if self.model.denoiser_name != "unet":
                raise UserError(
                    "method.init=bos is for UNets, whose blocks read the text encoder's states as they are; take "
                    "init=normal"
                )
            first_state = self.model.encode_prompts([""]).embeds[0, 0].float().cpu()
            bank.tokens.copy_(first_state.expand_as(bank.tokens))

    def setup(self, stage: str) -> None:
        """From here on pictures are drawn with the tokens, also where a resumed run has nothing left to do."""
        if stage == "fit" and self.model.attached is not None:
            self.model.attached.enable()

    def training_step(self, batch: PairBatch, index: int) -> None:
        """One optimizer step on one batch of pairs."""
        grid = self.grid(batch)
        emitted = None if self.bank is None else self.emit(self.bank, grid.t)
        # The bank is asked once for all soft tokens of a step, and its graph is cut there: each pass adds its gradient
        # to `soft_tokens.grad`, and frees its own graph. What they added up to then goes through the bank at once.
        soft_tokens = None if emitted is None else emitted.detach().requires_grad_()
        with attention_for_training(self.model):
            metrics = self.accumulate(grid, soft_tokens)
        if emitted is not None:
            assert soft_tokens is not None and soft_tokens.grad is not None  # every pass has added to it
            self.manual_backward((emitted * soft_tokens.grad).sum())
        norm = self.step()
        self.batches_done += 1
        metrics |= {"train/grad_norm": float(norm), **self.step_metrics()}
        self.log_dict(metrics, sync_dist=dist.is_initialized(), batch_size=len(grid))
        self.log("loss", metrics["train/loss"], prog_bar=True, logger=False)

    def accumulate(self, grid: Grid, soft_tokens: torch.Tensor | None) -> dict[str, float]:
        """Run the passes of one step backward, into `soft_tokens.grad` (or the adapters'); returns what is logged."""
        raise NotImplementedError(f"{type(self).__name__} must have accumulate(grid, soft_tokens)")

    @torch.no_grad()
    def grid(self, batch: PairBatch) -> Grid:
        """Encode a batch and noise it. Image `i` of the batch of all ranks draws from (seed, step, i)."""
        with torch.autocast(self.device.type, enabled=False):
            seeds = [derive_seed(self.seed, "pair", self.batches_done, number) for number in batch.numbers]
            x0, text = batch.encode(self.model, seeds)
            step = derive_seed(self.seed, "step", self.batches_done)
            noise_seeds = [seed + 1 for seed in seeds] if self.noise == "per_image" else [step]
            time_seeds = [seed + 2 for seed in seeds] if self.times == "per_image" else [step + 2]
            eps = row_normals(noise_seeds, x0.shape[1:])
            uniforms = [torch.rand(1, generator=torch.Generator().manual_seed(seed)) for seed in time_seeds]
            t = (torch.cat(uniforms) * 1000).floor().clamp(max=999).to(self.device).expand(len(x0))
            eps = eps.to(self.device).expand_as(x0)
            own = torch.arange(len(x0), device=self.device)
            if self.gather_negatives and dist.is_initialized():
                own = own + dist.get_rank() * len(x0)
                text = text.map(lambda part: torch.cat(_all_gather(part)))
            if self.contrasts and len(text) < 2:
                raise UserError(
                    f"{type(self).__name__} tells texts apart, and this rank has one: raise data.batch_size, or set "
                    "method.gather_negatives=true"
                )
            x_t, target = self.model.add_noise(x0, eps, t), self.model.target(x0, eps, t)
            return Grid(x_t, t, target, text, own)

    def emit(self, bank: SoftTokens, t: torch.Tensor) -> torch.Tensor:
        """All soft tokens of a step, `(branches, R, layers, K, D)`."""
        return torch.stack([bank(t, branch) for branch in range(self.branches)])

    def predict(
        self,
        grid: Grid,
        soft_tokens: torch.Tensor | None,
        rows: torch.Tensor,
        texts: torch.Tensor,
        branch: torch.Tensor | int = 0,
    ) -> torch.Tensor:
        """Predictions `(P, C, h, w)` for images `rows` `(P,)` under `texts` `(P,)`."""
        noised = grid.x_t[rows], grid.t[rows], grid.text[texts]
        if soft_tokens is None:
            return self.model.predict(*noised, empty=False)
        return self.model.predict(*noised, soft_tokens[branch, rows])

    def passes(self, rows: torch.Tensor, texts: torch.Tensor) -> Iterator[slice]:
        """Slices of a list of pairs, each small enough for one pass."""
        for first in range(0, len(rows), self.pairs_per_pass):
            yield slice(first, first + self.pairs_per_pass)

    def backward_pass(self, loss: torch.Tensor, soft_tokens: torch.Tensor | None, last: bool) -> None:
        """Into the soft tokens, which hold one step's gradients until they flow into the bank, where ranks meet; or
        into adapters, whose ranks meet at the last pass."""
        if soft_tokens is not None:
            loss.backward()
        else:
            self.add_gradient(loss, last)

    def on_fit_end(self) -> None:
        """Leave the tokens as a file of their own, which any pipeline of the same architecture loads."""
        if self.bank is not None and self.trainer.is_global_zero:
            facts = {"method": type(self).__name__, "model": self.model.path, "steps": str(self.global_step)}
            if (null_branch := self._null_branch()) is not None:
                facts["null_branch"] = str(null_branch)
            self.bank.save(Path(self.trainer.default_root_dir) / "soft_tokens.safetensors", **facts)

    def kept_names(self) -> set[str]:
        """What learns, and its average where a subclass has one."""
        return super().kept_names() | {name for name, _ in self.named_parameters() if name.startswith("average.")}

    def own_state(self) -> dict:
        return {**super().own_state(), "learns": self._learns(), "null_branch": self._null_branch()}

    def take_own_state(self, saved: dict) -> None:
        super().take_own_state(saved)
        if saved.get("learns") != self._learns():
            raise UserError(
                "this checkpoint holds other soft tokens, or other adapters, than this run learns: give the method, "
                "variant, layers, tokens, buckets, position or lora of its own run"
            )
        null_branch = self._null_branch()
        if saved.get("null_branch", null_branch) != null_branch:
            raise UserError(
                f"this checkpoint's empty prompt reads method.null_branch={saved['null_branch']}, and not "
                f"{null_branch}: give the variant or null_branch of its own run"
            )

    def draw_as_trained(self) -> None:
        self.setup("fit")

    def facts(self) -> dict:
        """What the variant decided, and where soft tokens go, which the number of `layers` alone does not say."""
        return {**self.settings, **({} if self.bank is None else {"soft_tokens": asdict(self.bank.spec)})}

    def _learns(self) -> dict:
        """What must be the same where a checkpoint is loaded: place and shape of the tokens, or of adapters."""
        if self.bank is not None:
            return {"soft tokens": asdict(self.bank.spec)}
        return {"adapters": sorted(f"{name} {tuple(parameter.shape)}" for name, parameter in self.learning())}

    def _null_branch(self) -> int | None:
        return None if self.model.attached is None else self.model.attached.null_branch


def check_lora(lora: Mapping | None) -> None:
    """Whether peft takes these arguments: adapters in a denoiser are drawn with as they are, so any kind will do.

    Raises:
        UserError: it does not.
    """
    lora_config(lora)


def adapt(denoiser: nn.Module, lora: Mapping, seed: int) -> None:
    """LoRA in a frozen denoiser, started from `seed`.

    `lora` without `target_modules` adapts the projections of attention, as diffusers' own training scripts do.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(seed, "adapters"))
        add_adapters(denoiser, lora_config({"target_modules": list(ATTENTION), **lora}))


def _all_gather(tensor: torch.Tensor) -> list[torch.Tensor]:
    parts = [torch.empty_like(tensor) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, tensor.contiguous())
    return parts


def mean_over(values: torch.Tensor) -> float:
    return float(values.detach().double().mean())


def all_pairs(rows: torch.Tensor, texts: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Every image of `rows` `(r,)` under every text: `(r * texts,)` each, texts fastest."""
    return rows.repeat_interleave(texts), torch.arange(texts, device=rows.device).repeat(len(rows))


def frozen_copy(bank: SoftTokens) -> SoftTokens:
    """A copy that follows and never learns."""
    return copy.deepcopy(bank).requires_grad_(False)
