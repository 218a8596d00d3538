"""Soft text tokens: a small trained bank that chosen blocks of a frozen denoiser read.

Both SoftREPA and AGSM train one; `splice` puts it among the text.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import nn

from t2i_rl.core.errors import UserError, first_line
from t2i_rl.core.files import write_atomic
from t2i_rl.core.finite import check_weights
from t2i_rl.models.diffusion.splice import EMPTY, POSITIONS, Splice, latents_of, layout_of, text_width

FORMAT = "t2i_rl.soft_tokens.1"
GUIDED_IN_HALVES = frozenset(
    f"StableDiffusion{version}{kind}Pipeline" for version in ("", "XL", "3") for kind in ("", "Img2Img", "Inpaint")
)


@dataclass(frozen=True)
class TokenSpec:
    """The shape of a bank, and where its tokens go.

    Args:
        architecture: class name of the denoiser.
        layout: block name -> layer of the bank that it reads.
        tokens: how many a layer has.
        dim: their width, which is that of the text that blocks read.
        branches: how many banks there are (AGSM: positive, negative).
        buckets: rows of the time table over t in [0, 1000), 0 for none.
        interpolate: between the buckets' centres.
        tables: time tables, 1 (shared by the branches, as released) or one a branch.
        position: `start`, `after_bos` or `end` of the text.

    Raises:
        UserError: numbers or names that fit no bank.
    """

    architecture: str
    layout: dict[str, int]
    tokens: int
    dim: int
    branches: int = 1
    buckets: int = 100
    interpolate: bool = False
    tables: int = 1
    position: str = "end"

    @property
    def layers(self) -> int:
        return max(self.layout.values()) + 1

    def __post_init__(self):
        if min(self.dim, self.branches, len(self.layout)) < 1 or min(self.tokens, self.buckets) < 0:
            raise UserError(
                "soft tokens need dim, branches and layers of 1 or more, tokens and buckets of 0 or more, not "
                f"{self.dim}, {self.branches}, {len(self.layout)}, {self.tokens} and {self.buckets}"
            )
        if self.position not in POSITIONS:
            raise UserError(f"soft tokens go to {', '.join(POSITIONS)}, not {self.position!r}")
        if self.tables not in (1, self.branches):
            raise UserError(f"time tables are 1 or one a branch ({self.branches}), not {self.tables}")
        if sorted(set(self.layout.values())) != list(range(self.layers)):
            raise UserError(f"soft tokens: the layers of the layout must be 0, 1, ..., not {self.layout}")


class SoftTokens(nn.Module):
    """A bank of tokens plus an offset by time, float32, at first N(0, `std`).

    tokens: `(branches, layers, K, D)`. time: `(tables, buckets, layers, D)`, or None. null_branch:
    the branch that the empty prompt reads, None for that of the prompts. facts: what a file says of
    where it comes from.
    """

    def __init__(self, spec: TokenSpec, std: float = 0.02, generator: torch.Generator | None = None):
        super().__init__()
        self.spec = spec
        self.null_branch: int | None = None
        self.facts: dict[str, str] = {}
        shape = (spec.branches, spec.layers, spec.tokens, spec.dim)
        self.tokens = nn.Parameter(torch.randn(shape, generator=generator) * std)
        table = (spec.tables, spec.buckets, spec.layers, spec.dim)
        self.time = nn.Parameter(torch.randn(table, generator=generator) * std) if spec.buckets else None

    def forward(self, t: torch.Tensor, branch: torch.Tensor | int = 0) -> torch.Tensor:
        """Tokens float32 `(B, layers, K, D)` at times `t` `(B,)` in [0, 1000].

        `branch` is one for all, or one a row.
        """
        branch = torch.as_tensor(branch, device=self.tokens.device).expand(len(t))
        tokens = self.tokens[branch]
        if self.time is None:
            return tokens
        table = self.time[branch if self.spec.tables > 1 else torch.zeros_like(branch)]
        return tokens + self._offsets(table, t.to(self.tokens.device)).unsqueeze(2)

    def _offsets(self, table: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """Rows of `table` `(B, buckets, layers, D)` for times; t = 1000 is in the last bucket."""
        rows = torch.arange(len(t), device=t.device)
        bucket = t.double() * self.spec.buckets / 1000
        last = self.spec.buckets - 1
        if not self.spec.interpolate:
            return table[rows, bucket.floor().long().clamp(0, last)]
        bucket = (bucket - 0.5).clamp(0, last)
        low = bucket.floor().long()
        share = (bucket - low).float().view(-1, 1, 1)
        return (1 - share) * table[rows, low] + share * table[rows, (low + 1).clamp(max=last)]

    def save(self, path: str | Path, **facts: str) -> Path:
        """Write a safetensors file, atomically; its metadata hold the spec and `facts`.

        Raises:
            UserError: the tokens are not finite.
        """
        check_weights(self.named_parameters(), f"what would be written to {path}")
        tensors = {name: part.detach().cpu().contiguous() for name, part in self.state_dict().items()}
        about = {"format": FORMAT, "spec": json.dumps(asdict(self.spec)), **{k: str(v) for k, v in facts.items()}}
        write_atomic(Path(path), save(tensors, about))
        return Path(path)

    @classmethod
    def load(cls, path: str | Path) -> "SoftTokens":
        """Read a file that `save` wrote.

        Raises:
            UserError: there is no such file, it is broken, it holds something else, its tokens are
                not finite, or its `null_branch` is none of its branches.
        """
        if Path(path).is_dir():
            raise UserError(f"soft tokens {path} is a folder: give the file in it, soft_tokens.safetensors")
        if not Path(path).is_file():
            raise UserError(f"soft tokens {path}: there is no such file")
        try:
            with safe_open(path, "pt") as file:
                about = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except SafetensorError as error:
            fix = "a .pth of SoftREPA's authors is read by task=import_soft_tokens"
            raise UserError(f"soft tokens {path}: not a whole safetensors file ({error}); {fix}") from error
        if about.get("format") != FORMAT:
            fix = "convert the authors' files with task=import_soft_tokens"
            raise UserError(f"soft tokens {path}: its metadata do not say {FORMAT!r}; {fix}")
        try:
            bank = cls(TokenSpec(**json.loads(about["spec"])))
            bank.load_state_dict(tensors)
        except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
            reason = f"its spec and its tensors do not fit ({first_line(error)})"
            raise UserError(f"soft tokens {path}: {reason}") from error
        check_weights(tensors.items(), f"soft tokens {path}")
        bank.facts = {key: value for key, value in about.items() if key not in ("format", "spec")}
        null_branch = bank.facts.get("null_branch")
        if null_branch is not None:
            if null_branch not in map(str, range(bank.spec.branches)):
                raise UserError(
                    f"soft tokens {path}: null_branch={null_branch} is none of its {bank.spec.branches} branches, "
                    "which count from 0"
                )
            bank.null_branch = int(null_branch)
        return bank


def spec_for(denoiser: nn.Module, layers: int | list[str] | None, tokens: int, **options: Any) -> TokenSpec:
    """The spec that fits a denoiser; `layers` as in `splice.layout_of`."""
    layout = layout_of(denoiser, layers)
    return TokenSpec(type(denoiser).__name__, layout, tokens, text_width(denoiser), **options)


class Attached:
    """A bank at work in a denoiser: every forward pass reads its tokens, whoever calls it.

    `branch` is read by all rows; with `null_branch`, rows whose text is guidance's empty prompt
    read that one instead. Which rows these are is said by the caller (`splice.EMPTY` among the
    arguments that reach the blocks), or known from the stock `pipe`: never guessed by place alone,
    since a batch of prompts looks the same.

    Raises:
        UserError: the bank is for another architecture, or has no such branch.
    """

    def __init__(
        self,
        denoiser: nn.Module,
        bank: SoftTokens,
        branch: int = 0,
        null_branch: int | None = None,
        pipe: Any = None,
    ):
        check_fits(denoiser, bank.spec)
        null_branch = bank.null_branch if null_branch is None else null_branch
        for number in (branch, null_branch or 0):
            if number not in range(bank.spec.branches):
                raise UserError(f"these soft tokens have {bank.spec.branches} branches: there is no branch {number}")
        self.bank, self.branch, self.null_branch, self.pipe = bank, branch, null_branch, pipe
        self.splice = Splice(denoiser, bank.spec.layout, bank.spec.position, self._tokens)

    def _tokens(self, t: torch.Tensor, call: dict) -> torch.Tensor:
        if not self.tells_empty_apart:
            return self.bank(t, self.branch)
        empty = self._empty(call).to(self.bank.tokens.device).expand(len(t))
        return self.bank(t, torch.where(empty, self.null_branch, self.branch))

    def _empty(self, call: dict) -> torch.Tensor:
        """Which rows of a call stand for the empty prompt: a mask `(B,)`, or one for all.

        Raises:
            UserError: nobody says so, and it is no call of a stock pipeline that tells.
        """
        empty = (call.get(self.splice.carrier) or {}).get(EMPTY)
        if empty is not None:
            return torch.as_tensor(empty)
        latents = latents_of(call)
        if type(self.pipe).__name__ in GUIDED_IN_HALVES:
            if not self.pipe.do_classifier_free_guidance or call.get("skip_layers") is not None:
                return torch.tensor(False)  # prompts alone; SD3.5's pass without some layers is one of them
            first, second = latents.chunk(2) if len(latents) % 2 == 0 else (latents, None)
            if second is not None and torch.equal(first, second):
                return torch.arange(len(latents)) < len(first)
        raise UserError(
            "these soft tokens have a branch for the empty prompt, and this call does not say which of its "
            f"{len(latents)} rows are empty prompts (they are no two halves of one guided batch of a stock pipeline): "
            f"give null_branch={self.branch}, which the prompts read, or name the rows (predict(..., empty=...))"
        )

    @property
    def tells_empty_apart(self) -> bool:
        """Whether the empty prompt reads another branch than prompts do."""
        return self.null_branch not in (None, self.branch)

    @property
    def enabled(self) -> bool:
        return self.splice.enabled

    def enable(self, on: bool = True) -> None:
        """Switch the tokens off and on; off, the denoiser computes what it did before, bit for
        bit."""
        self.splice.enabled = on

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """No tokens inside the block."""
        before = self.enabled
        self.enable(False)
        try:
            yield
        finally:
            self.enable(before)

    def remove(self) -> None:
        """Take every hook out again."""
        self.splice.remove()

    def __enter__(self) -> "Attached":
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()


def check_fits(denoiser: nn.Module, spec: TokenSpec) -> None:
    """Whether a bank was made for this architecture.

    Raises:
        UserError: another class, width or set of blocks.
    """
    if type(denoiser).__name__ != spec.architecture:
        raise UserError(f"these soft tokens are for {spec.architecture}, not for {type(denoiser).__name__}")
    width = text_width(denoiser)
    if width != spec.dim:
        raise UserError(
            f"these soft tokens are {spec.dim} wide, but the blocks of this {spec.architecture} read {width}: another "
            "base model"
        )
    names = {name for name, _ in denoiser.named_modules()}
    if missing := sorted(set(spec.layout) - names):
        raise UserError(f"these soft tokens go into {missing[0]}, which this {spec.architecture} does not have")


def load_soft_tokens(pipe: Any, path: str | Path, branch: int = 0, null_branch: int | None = None) -> Attached:
    """Put saved soft tokens into a stock diffusers pipeline; `pipe(...)` is used as before.

    Returns the handle (`enable`, `remove`).

    Args:
        null_branch: what guidance's empty prompt reads. None is what the tokens were trained to be
            drawn with (released for SDXL: the negative ones; else the same as `branch`).

    A branch of its own for the empty prompt works in the pipelines of `GUIDED_IN_HALVES`, whose
    batches are [empty, prompt] while guidance is on and prompts alone while it is off.

    Raises:
        UserError: the file is broken, or made for another architecture; while drawing, a call does
            not tell which rows are empty.
    """
    denoiser = getattr(pipe, "transformer", None) or pipe.unet  # a pipeline of anybody's has one of the two
    bank = SoftTokens.load(path).to(denoiser.device)
    return Attached(denoiser, bank.requires_grad_(False), branch, null_branch, pipe)
