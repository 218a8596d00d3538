"""What every search over noise shares: which prompts with which seeds, and what is measured on the way."""

import hashlib
import json
import time
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from hydra.utils import get_class
from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from rich.progress import Progress, TextColumn, TimeElapsedColumn
from torch.utils.data import DataLoader

from t2i_rl.core import stopping
from t2i_rl.core.contract_checks import checked, reward_classes
from t2i_rl.core.contracts import Drawn, Reward, RewardOutput
from t2i_rl.core.errors import UserError
from t2i_rl.core.files import read_object
from t2i_rl.core.finite import check_finite
from t2i_rl.core.numbers import Count, Seed, Share, check_arguments
from t2i_rl.core.pixels import to_bytes
from t2i_rl.core.prompts import Prompt
from t2i_rl.core.seeding import derive_seed, row_normals
from t2i_rl.gaussianity.health import measures
from t2i_rl.methods.base import Method
from t2i_rl.methods.noise.cases import Case, Track, write_case
from t2i_rl.models.diffusion.base import LatentDiffusion, TextEncoding
from t2i_rl.models.diffusion.noise_to_image import enable_checkpointing


class NoiseMethod(Method):
    """Test-time search for the noise that a frozen model draws best from: `trainer.predict` goes through the cases,
    sharded over ranks.

    Args:
        reward: the target, maximised; watch: judges by name that are measured and never followed.
        measure_every: steps between measurements of health and of the watched; image_every: between pictures kept. The
            best and the last noise have both.
        samples: pictures a prompt. batch_size: cases in one graph.
        eta: of DDIM, for models of several steps: the noise of every step is searched as well.
        last_step_noise: whether the last step adds its noise too; without it that noise is searched in vain, as DNO's
            released code does.
        free_text_encoders: drop them once all prompts are encoded.
        folder: a case's files go to `folder/<place>`; a case that is finished there is not done again.
    """

    trains = frozenset({"diffusion", "one_step"})
    learns_from = "prompts"
    plan = False
    searches_noise = True
    ends: tuple[str, ...] = ("best",)  # the noises that are measured at the end of a case, beside the first

    def __init__(
        self,
        model: LatentDiffusion,
        reward: Reward,
        watch: Mapping[str, Reward],
        folder: Path,
        samples: Count = 1,
        batch_size: Count = 8,
        measure_every: Count = 5,
        image_every: Count = 10,
        eta: Share = 0.0,
        last_step_noise: bool = True,
        gradient_checkpointing: bool = False,
        free_text_encoders: bool = False,
        seed: Seed = 0,
    ):
        super().__init__()
        self.model, self.reward, self.watch = model.requires_grad_(False).eval(), reward, dict(watch)
        self.folder, self.samples, self.batch_size = Path(folder), samples, batch_size
        self.measure_every, self.image_every = measure_every, image_every
        self.eta, self.last_step_noise = eta, last_step_noise
        self.checkpointing, self.free_text_encoders = gradient_checkpointing, free_text_encoders
        self.seed = seed
        self.prompts: list[Prompt] = []  # set before the search begins, as is what else a finished case depends on
        self.settings = ""
        self.texts: dict[str, TextEncoding] = {}
        self._bar: Progress | None = None
        self.allow_zero_length_dataloader_with_multiple_devices = True  # a rank may have nothing left to do
        if gradient_checkpointing:
            enable_checkpointing(model)

    @staticmethod
    def check(options: Mapping) -> None:
        """Refuse options that no search can work with.

        Raises:
            UserError: one line that names the option.
        """
        check_arguments(NoiseMethod, options, "method")

    @classmethod
    def data_to_take(cls) -> str:
        """See `Method.data_to_take`."""
        return "data=shapes_test"

    @classmethod
    def check_run(cls, cfg: DictConfig, training: bool) -> None:
        """See `Method.check_run`."""
        super().check_run(cfg, training)
        model = get_class(cfg.model._target_)
        if str(cfg.trainer.precision) not in ("32", "32-true"):
            raise UserError(
                f"trainer.precision={cfg.trainer.precision} would round noise and penalties: take "
                "trainer.precision=32-true, and model.dtype=bfloat16 for the model"
            )
        if OmegaConf.select(cfg, "trainer.strategy._target_"):
            raise UserError(
                "trainer=fsdp shards what trains, and nothing does here: take trainer=ddp, which shares out the prompts"
            )
        if cfg.method.eta > 0 and (
            getattr(model, "denoiser_name", "") != "unet" or cfg.model.get("scheduler") == "own"
        ):
            raise UserError(
                f"method.eta={cfg.method.eta} is DDIM's added noise, and {model.__name__} adds none: take method.eta=0"
            )
        judges = {"reward": cfg.reward, **{f"watch.{name}": judge for name, judge in cfg.watch.items()}}
        for where, judge in judges.items():
            unseeing = [kind.__name__ for kind in reward_classes(judge) if not kind.needs_images]
            if unseeing:
                fix = "take another reward" if where == "reward" else f"remove it (~{where})"
                raise UserError(
                    f"{where} ({unseeing[0]}) reads no pictures, and a search over noise has nothing else: {fix}"
                )

    def cases(self) -> list[Case]:
        """Every prompt `samples` times; a case's noise is a function of (seed, prompt, sample)."""
        work = [(prompt, sample) for prompt in self.prompts for sample in range(self.samples)]
        return [
            Case(place, prompt, sample, derive_seed(self.seed, "noise", prompt.id, sample))
            for place, (prompt, sample) in enumerate(work)
        ]

    def mine(self) -> list[Case]:
        """This rank's share: every world_size-th of the cases that rank 0 finds unfinished."""
        left = [[case.place for case in self.cases() if not self._finished(case)]]
        if not dist.is_initialized():
            return [case for case in self.cases() if case.place in left[0]]
        dist.broadcast_object_list(left)
        places = set(left[0][dist.get_rank() :: dist.get_world_size()])
        return [case for case in self.cases() if case.place in places]

    def finished(self) -> list[dict]:
        """The cases that are finished, in order, as in `case.json`, each with its `place`.

        Raises:
            UserError: one was finished with another prompt, seed, model or judge.
        """
        places = [self._place(case) for case in self.cases() if self._finished(case)]
        return [read_object(place / "case.json") | {"place": place.name} for place in places]

    def predict_dataloader(self) -> DataLoader:
        self._mine = self.mine()
        return DataLoader(self._mine, batch_size=self.batch_size, collate_fn=list)  # type: ignore[arg-type]  # a list will do

    def transfer_batch_to_device(self, batch: list, device: torch.device, dataloader_idx: int) -> list:
        """Prompts are text: there is nothing to move."""
        return batch

    @torch.no_grad()
    def on_predict_start(self) -> None:
        """Encode each prompt once, and the empty one where guidance asks for it; then the text encoders may go. Ctrl-C
        and SIGTERM end the search at once: a case's files are written when it is whole."""
        stopping.listen()
        for text in dict.fromkeys(case.prompt.text for case in self._mine):
            self.texts[text] = self.model.encode_prompts([text])
        if self.model.guided:
            self.texts[""] = self.model.empty_text(1)
        if self.free_text_encoders:
            self.model.free_text_encoders()
        self._bar = Progress(
            *Progress.get_default_columns(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[target]}"),
            disable=not self.trainer.is_global_zero or not Console().is_terminal,
        )
        self._bar.start()
        self._task = self._bar.add_task("noise", total=len(self._mine) * self.length, target="")
        self._started = time.monotonic()

    def on_predict_end(self) -> None:
        self.stop_progress()

    def stop_progress(self) -> None:
        """Leave the terminal as it was, after a search that did not reach its end."""
        if self._bar is not None:
            self._bar.stop()

    def text_of(self, cases: list[Case]) -> TextEncoding:
        return _stacked([self.texts[case.prompt.text] for case in cases])

    def empty_of(self, count: int) -> TextEncoding | None:
        return _stacked([self.texts[""]] * count) if self.model.guided else None

    def noise_shape(self) -> tuple[int, ...]:
        """Of one case: `(C, h, w)`, or one more than there are steps of these."""
        return (1 + self.model.steps, *self.model.latent_shape) if self.eta > 0 else self.model.latent_shape

    def first_noise(self, cases: list[Case]) -> torch.Tensor:
        return row_normals([case.seed for case in cases], self.noise_shape()).to(self.device)

    @torch.enable_grad()
    def predict_step(self, batch: list[Case], index: int) -> None:
        """One batch of cases from first noise to last; each case's files are written when the batch is done."""
        tracks = self.search(batch)
        self._measure_ends(tracks)
        assert self._bar is not None  # `on_predict_start` made it
        self._bar.update(self._task, completed=(index + 1) * self.batch_size * self.length)
        for track in tracks:
            write_case(self._place(track.case), track, self.fingerprint(track.case))
        if self.trainer.is_global_zero and not Console().is_terminal:
            done, seconds = min((index + 1) * self.batch_size, len(self._mine)), time.monotonic() - self._started
            first = np.mean([track.rows[0]["target"] for track in tracks])
            best = np.mean([track.best for track in tracks])
            means = f"mean target {first:.3g} at the first noise, {best:.3g} at the best"
            print(f"{done} of {len(self._mine)} cases, {seconds:.0f} s; the last {len(tracks)}: {means}", flush=True)

    def search(self, cases: list[Case]) -> list[Track]:
        """The tracks of a batch of cases."""
        raise NotImplementedError

    @property
    def length(self) -> int:
        """Pictures drawn a case."""
        raise NotImplementedError

    def target_of(self, pixels: torch.Tensor, cases: list[Case]) -> torch.Tensor:
        """The target `(B,)` of float32 pixels `(B, 3, H, W)` in [0, 1], with gradients where the reward has them.

        Raises:
            ValueError: it is not one finite number a picture.
        """
        prompts = [case.prompt for case in cases]
        if self.reward.differentiable:
            total = self.reward.score_pixels(pixels, prompts)
            checked(RewardOutput(total.detach()), len(cases), "the target")
            return total
        drawn = Drawn(prompts=prompts, seeds=[case.seed for case in cases], images=to_bytes(pixels))
        return checked(self.reward(drawn), len(cases), "the target").total.to(pixels)

    @torch.no_grad()
    def note(
        self,
        tracks: list[Track],
        step: int,
        noise: torch.Tensor,
        pixels: torch.Tensor,
        target: torch.Tensor,
        **more: torch.Tensor,
    ) -> None:
        """Write down step `step` of every track: target and `more` `(B,)`; health, the watched and pictures when due.

        Raises:
            UserError: a picture, the target or one of `more` is not finite.
        """
        columns = {"target": target, **more}
        for name, values in columns.items():
            check_finite(
                values, f"the values of {name} at step {step}", "lower method.optimizer.lr or the regulariser's weight"
            )
        images = to_bytes(pixels)
        if step % self.measure_every == 0:
            columns |= self._measured(tracks, noise, images)
        figures = {name: value.detach().double().cpu().tolist() for name, value in columns.items()}
        if self._bar is not None:
            self._bar.update(self._task, advance=len(tracks), target=f"target {float(target.mean()):.3g}")
        for row, track in enumerate(tracks):
            track.rows.append({"step": step} | {name: values[row] for name, values in figures.items()})
            noise_now = noise[row].detach().float().cpu().clone()
            track.noises.setdefault("initial", noise_now)
            track.noises["last"], track.images["last"] = noise_now, images[row]
            if "best" not in track.noises or track.rows[-1]["target"] > track.best:
                track.best_step, track.noises["best"] = len(track.rows) - 1, noise_now
                track.images["best"] = images[row]
            if step % self.image_every == 0:
                track.images[step], track.noises[f"step_{step:04d}"] = images[row], noise_now

    def _measured(self, tracks: list[Track], noise: torch.Tensor, images: np.ndarray) -> dict[str, torch.Tensor]:
        """Health of the noise, and what the watched say of the pictures, `(B,)` each."""
        measured = {f"health/{name}": value for name, value in measures(self._picture_like(noise)).items()}
        cases = [track.case for track in tracks]
        drawn = Drawn(prompts=[case.prompt for case in cases], seeds=[case.seed for case in cases], images=images)
        for name, judge in self.watch.items():
            output = checked(judge(drawn), len(drawn), name)
            measured[f"watch/{name}"] = output.total
            measured |= {f"watch/{name}/{part}": value for part, value in output.parts.items()}
        return measured

    @torch.no_grad()
    def _measure_ends(self, tracks: list[Track]) -> None:
        """Health and the watched at the best and at the last noise; the last row of the track holds them too."""
        for end in self.ends:
            noise = torch.stack([track.noises[end] for track in tracks])
            images = np.stack([track.images[end] for track in tracks])
            measured = self._measured(tracks, noise.to(self.device), images)
            for row, track in enumerate(tracks):
                reached = track.rows[track.best_step if end == "best" else -1]
                figures = {name: float(value[row]) for name, value in measured.items()}
                track.ends[end] = {name: reached[name] for name in ("step", "target")} | figures
                if end == "last":
                    reached.update(figures)  # for the curves, also where the last step was not due

    @staticmethod
    def _picture_like(noise: torch.Tensor) -> torch.Tensor:
        """`(B, C, h, w)` also where every step has noise of its own."""
        return noise.flatten(1, -3) if noise.ndim > 4 else noise

    def fingerprint(self, case: Case) -> str:
        """What a finished case depends on, hashed."""
        parts = {
            "settings": self.settings,
            "prompt": [case.prompt.id, case.prompt.text, case.prompt.meta],
            "seed": case.seed,
        }
        return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()

    def _place(self, case: Case) -> Path:
        return self.folder / f"{case.place:05d}"

    def _finished(self, case: Case) -> bool:
        done = self._place(case) / "case.json"
        if done.exists() and read_object(done, "fingerprint")["fingerprint"] != self.fingerprint(case):
            raise UserError(
                f"{done.parent} holds a case finished with another prompt, seed, model or judge: take another "
                f"hydra.run.dir, or delete {self.folder}"
            )
        return done.exists()


def _stacked(texts: list[TextEncoding]) -> TextEncoding:
    pooled = [text.pooled for text in texts if text.pooled is not None]  # one model's texts all have it, or none has
    return TextEncoding(torch.cat([text.embeds for text in texts]), torch.cat(pooled) if pooled else None)
