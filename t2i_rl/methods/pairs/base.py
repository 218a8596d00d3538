"""What SoftREPA, AGSM and their denoising control share: pairs, draws, soft tokens, passes of bounded size, one optimizer step."""

import copy
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from peft import LoraConfig, inject_adapter_in_model
from torch import nn

from t2i_rl.core.errors import UserError
from t2i_rl.core.hashing import weights_sha256
from t2i_rl.core.numbers import Count, GradientNorm, Seed, Whole, check_arguments
from t2i_rl.core.seeding import derive_seed, row_normals
from t2i_rl.methods.base import Learner
from t2i_rl.methods.trainable import NonFinite, check_optimizer
from t2i_rl.models.diffusion.base import LatentDiffusion, TextEncoding, attention_for_training
from t2i_rl.models.diffusion.soft_tokens import SoftTokens, spec_for

SHARING = ("shared", "per_image")


@dataclass
class Grid:
    """`R` noised images of this rank and the `B` texts that they are compared under; `own` `(R,)` is each image's own column."""

    x_t: torch.Tensor
    t: torch.Tensor
    target: torch.Tensor
    text: TextEncoding
    own: torch.Tensor
    images: int  # of all ranks together

    def __len__(self) -> int:
        return len(self.x_t)


ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")


class PairMethod(Learner):
    """Trains a bank of soft tokens (a subclass may train adapters) on matching images and texts; the denoiser stays frozen.

    Args:
        model: an adapter of family `diffusion`.
        optimizer, scheduler: partials, `optimizer(params)` and `scheduler(optimizer)`; the scheduler steps every `schedule_every` steps.
        tokens: K, soft tokens a layer; layers: see `splice.layout_of`; buckets: rows of the time table, 0 for none; interpolate between them.
        position: `start`, `after_bos` or `end` of the text; init: `normal` (0.02) or `bos` (K copies of the empty prompt's first state, which
            stay copies for ever: attention cannot tell them apart).
        times, noise: `shared` by all images of a step (as released) or `per_image`; texts of one image always share both.
        pairs_per_pass: image-text pairs with a live graph at a time; changes memory, not the gradient.
        gather_negatives: compare under the texts of all ranks.
        on_nonfinite: `raise` or `skip` where a step's gradient is not finite, see `trainable.NonFinite`.
        seed: together with step and image it decides every random draw.

    Raises:
        UserError: an option outside its choices.
    """

    trains = frozenset({"diffusion"})
    learns_from = "pairs"
    keeps_as = "pairs"
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
        super().__init__()
        self.model = model
        self.optimizer_partial, self.scheduler_partial, self.schedule_every = optimizer, scheduler, schedule_every
        self.times, self.noise, self.pairs_per_pass = times, noise, pairs_per_pass
        self.gather_negatives, self.max_grad_norm, self.seed = gather_negatives, max_grad_norm, seed
        self.nonfinite = NonFinite(on_nonfinite)
        self.batches_done, self.settings = 0, {}
        model.requires_grad_(False)
        self.backbone_sha256 = weights_sha256(model, dtype=torch.bfloat16)  # whatever dtype it is loaded in
        if gradient_checkpointing:
            model.denoiser.enable_gradient_checkpointing()
            model.denoiser.train()  # what diffusers asks before it checkpoints; no dropout in these classes
        self.bank = None
        if tokens:
            spec = spec_for(
                model.denoiser, layers, tokens, branches=self.branches, buckets=buckets, interpolate=interpolate,
                tables=tables, position=position,
            )  # fmt: skip
            self.bank = SoftTokens(spec, generator=torch.Generator().manual_seed(derive_seed(seed, "bank")))
            if init == "bos":
                self._start_from_bos()
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

    def _start_from_bos(self) -> None:
        with torch.no_grad():
            if self.model.denoiser_name != "unet":
                raise UserError(
                    "method.init=bos is for UNets, whose blocks read the text encoder's states as they are; take init=normal"
                )
            first = self.model.encode_prompts([""]).embeds[0, 0].float().cpu()
            self.bank.tokens.copy_(first.expand_as(self.bank.tokens))

    def setup(self, stage: str) -> None:
        """From here on pictures are drawn with the tokens, also where a resumed run has nothing left to do."""
        if stage == "fit" and self.model.attached is not None:
            self.model.attached.enable()

    def training_step(self, batch, index: int) -> None:
        """One optimizer step on one batch of pairs."""
        grid = self.grid(batch)
        emitted = self.emit(self.bank, grid.t)
        tokens = None if emitted is None else emitted.detach().requires_grad_()
        with attention_for_training(self.model):
            metrics = self.accumulate(grid, tokens)
        if emitted is not None:
            self.manual_backward((emitted * tokens.grad).sum())
        learning = [parameter for parameter in self.parameters() if parameter.requires_grad]
        limit = float("inf") if self.max_grad_norm is None else self.max_grad_norm
        norm = torch.nn.utils.clip_grad_norm_(learning, limit)
        optimizer, allowed = self.optimizers(), self.nonfinite.allows(norm, self.global_step)
        if allowed:
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        self.batches_done += 1
        if allowed:
            if self.scheduler_partial is not None and self.batches_done % self.schedule_every == 0:
                self.lr_schedulers().step()
            self.after_step()
        metrics |= self.nonfinite.metrics()
        metrics |= {"train/grad_norm": float(norm), "train/lr": optimizer.param_groups[0]["lr"]}
        self.log_dict(metrics, sync_dist=dist.is_initialized(), batch_size=len(grid))
        self.log("loss", metrics["train/loss"], prog_bar=True, logger=False)

    def accumulate(self, grid: Grid, tokens: torch.Tensor | None) -> dict[str, float]:
        """Run the passes of one step backward, into `tokens.grad` (or the adapters'); returns what is logged."""
        raise NotImplementedError

    def after_step(self) -> None:
        """Nothing, unless a subclass follows its weights."""

    @torch.no_grad()
    def grid(self, batch) -> Grid:
        """Encode a batch and noise it. Image `i` of the global batch draws from (seed, step, i): rank count changes nothing."""
        with torch.autocast(self.device.type, enabled=False):
            seeds = [derive_seed(self.seed, "pair", self.batches_done, number) for number in batch.numbers]
            x0, text = batch.encode(self.model, seeds)
            shape = x0.shape[1:]
            step = derive_seed(self.seed, "step", self.batches_done)
            eps = row_normals([seed + 1 for seed in seeds] if self.noise == "per_image" else [step], shape)
            t = torch.cat(
                [torch.rand(1, generator=torch.Generator().manual_seed(seed + 2)) for seed in seeds]
                if self.times == "per_image"
                else [torch.rand(1, generator=torch.Generator().manual_seed(step + 2))]
            )
            t = (t * 1000).floor().clamp(max=999).to(self.device).expand(len(x0))
            eps = eps.to(self.device).expand_as(x0)
            own = torch.arange(len(x0), device=self.device)
            images = len(x0) * (dist.get_world_size() if dist.is_initialized() else 1)
            if self.gather_negatives and dist.is_initialized():
                own = own + dist.get_rank() * len(x0)
                text = text.map(lambda part: torch.cat(_all_gather(part)))
            if self.contrasts and len(text) < 2:
                raise UserError(
                    f"{type(self).__name__} tells texts apart, and this rank has one: raise data.batch_size, or set method.gather_negatives=true"
                )
            return Grid(self.model.add_noise(x0, eps, t), t, self.model.target(x0, eps, t), text, own, images)

    def emit(self, bank: SoftTokens | None, t: torch.Tensor) -> torch.Tensor | None:
        """All tokens of a step, `(branches, R, layers, K, D)`."""
        if bank is None:
            return None
        return torch.stack([bank(t, branch) for branch in range(self.branches)])

    def predict(
        self,
        grid: Grid,
        tokens: torch.Tensor | None,
        rows: torch.Tensor,
        texts: torch.Tensor,
        branch: torch.Tensor | int = 0,
    ) -> torch.Tensor:
        """Predictions `(P, C, h, w)` for images `rows` `(P,)` under `texts` `(P,)`."""
        noised = grid.x_t[rows], grid.t[rows], grid.text[texts]
        if tokens is None:
            return self.model.predict(*noised, empty=False)
        return self.model.predict(*noised, tokens[branch, rows])

    def passes(self, rows: torch.Tensor, texts: torch.Tensor) -> Iterator[slice]:
        """Slices of a list of pairs, each small enough for one pass."""
        for first in range(0, len(rows), self.pairs_per_pass):
            yield slice(first, first + self.pairs_per_pass)

    def backward_pass(self, loss: torch.Tensor, tokens: torch.Tensor | None, last: bool) -> None:
        """Into the tokens, which hold one step's gradients until they flow into the bank; or into adapters, whose ranks meet at the last."""
        if tokens is not None:
            loss.backward()
            return
        waits = not last and dist.is_initialized()
        with self.trainer.strategy.block_backward_sync() if waits else nullcontext():
            self.manual_backward(loss)

    def on_fit_end(self) -> None:
        """Leave the tokens as a file of their own, which any pipeline of the same architecture loads."""
        if self.bank is not None and self.trainer.is_global_zero:
            facts = {"method": type(self).__name__, "model": self.model.path, "steps": self.global_step}
            if self.model.attached.null_branch is not None:
                facts["null_branch"] = self.model.attached.null_branch
            self.bank.save(Path(self.trainer.default_root_dir) / "soft_tokens.safetensors", **facts)

    def configure_optimizers(self):
        optimizer = self.optimizer_partial([parameter for _, parameter in self.learning()])
        return optimizer if self.scheduler_partial is None else ([optimizer], [self.scheduler_partial(optimizer)])

    def kept_names(self) -> set[str]:
        """What learns, and its average where a subclass has one."""
        return super().kept_names() | {name for name, _ in self.named_parameters() if name.startswith("average.")}

    def own_state(self) -> dict:
        return {
            "batches_done": self.batches_done,
            "backbone_sha256": self.backbone_sha256,
            "learns": self._learns(),
            "null_branch": self._null_branch(),
            "skipped": self.nonfinite.skipped,
        }

    def take_own_state(self, saved: dict) -> None:
        if saved["backbone_sha256"] != self.backbone_sha256:
            raise UserError(
                "this checkpoint was trained on another model than model.path holds: give the model that its run started from "
                "(float32 and bfloat16 are one; float16 is its own)"
            )
        if saved.get("learns") != self._learns():
            raise UserError(
                "this checkpoint holds other soft tokens, or other adapters, than this run learns: give the method, variant, layers, tokens, buckets, "
                "position or lora of its own run"
            )
        if saved.get("null_branch", self._null_branch()) != self._null_branch():
            raise UserError(
                f"this checkpoint's empty prompt reads method.null_branch={saved['null_branch']}, and not "
                f"{self._null_branch()}: "
                "give the variant or null_branch of its own run"
            )
        self.batches_done = saved["batches_done"]
        self.nonfinite.skipped = saved.get("skipped", 0)

    def draw_as_trained(self) -> None:
        self.setup("fit")

    def facts(self) -> dict:
        """What the variant decided, and where soft tokens go, which the number of `layers` alone does not say."""
        return {**self.settings, **({} if self.bank is None else {"soft_tokens": asdict(self.bank.spec)})}

    def _learns(self) -> dict:
        """What must be the same where a checkpoint is loaded: the place and shape of the tokens, or where adapters sit."""
        if self.bank is not None:
            return {"soft tokens": asdict(self.bank.spec)}
        return {"adapters": sorted(f"{name} {tuple(parameter.shape)}" for name, parameter in self.learning())}

    def _null_branch(self) -> int | None:
        return None if self.model.attached is None else self.model.attached.null_branch


def check_lora(lora: Mapping | None) -> None:
    """Whether peft takes these arguments.

    Raises:
        UserError: it does not.
    """
    try:
        LoraConfig(**(lora or {}))
    except (TypeError, ValueError) as error:
        raise UserError(f"method.lora: {error}") from error


def add_adapters(denoiser: nn.Module, lora: Mapping, seed: int) -> None:
    """LoRA in a frozen denoiser, started from `seed`; it learns in float32 whatever it is added to.

    `lora` without `target_modules` adapts the projections of attention, as diffusers' own training scripts do.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(seed, "adapters"))
        inject_adapter_in_model(LoraConfig(**{"target_modules": list(ATTENTION), **lora}), denoiser)
    for parameter in denoiser.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()


def _all_gather(tensor: torch.Tensor) -> list[torch.Tensor]:
    parts = [torch.empty_like(tensor) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, tensor.contiguous())
    return parts


def mean_over(values: torch.Tensor) -> float:
    return float(values.detach().double().mean())


def all_pairs(rows: torch.Tensor, texts: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Every image of `rows` `(r,)` under every text: `(r * texts,)` each, texts fastest."""
    return rows.repeat_interleave(texts), torch.arange(texts, device=rows.device).repeat(len(rows))


def frozen_copy(bank: nn.Module) -> nn.Module:
    """A copy that follows and never learns."""
    return copy.deepcopy(bank).requires_grad_(False)
