"""Soft text tokens: a small trained bank, spliced into the text that chosen blocks of a frozen denoiser read (SoftREPA, AGSM)."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import nn

from t2i_rl.errors import UserError
from t2i_rl.evaluation.results import write_atomic
from t2i_rl.models.splice import POSITIONS, Splice, layout_of, text_width

FORMAT = "t2i_rl.soft_tokens.1"


@dataclass(frozen=True)
class TokenSpec:
    """The shape and the place of a bank.

    Args:
        architecture: class name of the denoiser; layout: block name -> layer of the bank that it reads.
        tokens, dim: tokens a layer, and their width (what the blocks read); branches: how many banks (AGSM: positive, negative).
        buckets: rows of the time table over t in [0, 1000), 0 for none; interpolate: between the buckets' centres;
        tables: time tables, 1 (shared by the branches, as released) or one a branch; position: `start`, `after_bos` or `end`.
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
        if self.position not in POSITIONS:
            raise UserError(f"soft tokens go to {', '.join(POSITIONS)}, not {self.position!r}")
        if self.tables not in (1, self.branches):
            raise UserError(f"time tables are 1 or one a branch ({self.branches}), not {self.tables}")
        if sorted(set(self.layout.values())) != list(range(self.layers)):
            raise UserError(f"soft tokens: the layers of the layout must be 0, 1, ..., not {self.layout}")


class SoftTokens(nn.Module):
    """`tokens` `(branches, layers, K, D)` plus an offset by time, `time` `(tables, buckets, layers, D)`; float32, N(0, `std`)."""

    def __init__(self, spec: TokenSpec, std: float = 0.02, generator: torch.Generator | None = None):
        super().__init__()
        self.spec, self.null_branch = spec, None
        shape = (spec.branches, spec.layers, spec.tokens, spec.dim)
        self.tokens = nn.Parameter(torch.randn(shape, generator=generator) * std)
        table = (spec.tables, spec.buckets, spec.layers, spec.dim)
        self.time = nn.Parameter(torch.randn(table, generator=generator) * std) if spec.buckets else None

    def forward(self, t: torch.Tensor, branch: torch.Tensor | int = 0) -> torch.Tensor:
        """Tokens float32 `(B, layers, K, D)` at times `t` `(B,)` in [0, 1000]; `branch` is one for all or one a row."""
        branch = torch.as_tensor(branch, device=self.tokens.device).expand(len(t))
        tokens = self.tokens[branch]
        if self.time is None:
            return tokens
        table = self.time[branch if self.spec.tables > 1 else torch.zeros_like(branch)]
        return tokens + self._offsets(table, t.to(self.tokens.device)).unsqueeze(2)

    def _offsets(self, table: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """Rows of `table` `(B, buckets, layers, D)` for times in [0, 1000]; t = 1000 falls into the last bucket."""
        rows = torch.arange(len(t), device=t.device)
        place = t.double() * self.spec.buckets / 1000
        last = self.spec.buckets - 1
        if not self.spec.interpolate:
            return table[rows, place.floor().long().clamp(0, last)]
        place = (place - 0.5).clamp(0, last)
        low = place.floor().long()
        share = (place - low).float().view(-1, 1, 1)
        return (1 - share) * table[rows, low] + share * table[rows, (low + 1).clamp(max=last)]

    def save(self, path: str | Path, **facts: str) -> Path:
        """Write a safetensors file, atomically; its metadata hold the spec and `facts` (base model, method, ...)."""
        tensors = {name: part.detach().cpu().contiguous() for name, part in self.state_dict().items()}
        about = {"format": FORMAT, "spec": json.dumps(asdict(self.spec)), **{k: str(v) for k, v in facts.items()}}
        write_atomic(Path(path), save(tensors, about))
        return Path(path)

    @classmethod
    def load(cls, path: str | Path) -> "SoftTokens":
        """Read a file that `save` wrote.

        Raises:
            UserError: there is no such file, it is broken, or it holds something else.
        """
        if not Path(path).is_file():
            raise UserError(f"soft tokens {path}: there is no such file")
        try:
            with safe_open(path, "pt") as file:
                about = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except SafetensorError as error:
            raise UserError(
                f"soft tokens {path}: not a whole safetensors file ({error}); a .pth of SoftREPA's authors is read by task=import_soft_tokens"
            ) from error
        if about.get("format") != FORMAT:
            raise UserError(
                f"soft tokens {path}: its metadata do not say {FORMAT!r}; convert the authors' files with task=import_soft_tokens"
            )
        bank = cls(TokenSpec(**json.loads(about["spec"])))
        bank.load_state_dict(tensors)
        bank.facts = {key: value for key, value in about.items() if key not in ("format", "spec")}
        bank.null_branch = int(bank.facts["null_branch"]) if "null_branch" in bank.facts else None
        return bank


def spec_for(denoiser: nn.Module, layers: int | list[str] | None, tokens: int, **options) -> TokenSpec:
    """The spec that fits a denoiser; `layers` as in `splice.layout_of`."""
    layout = layout_of(denoiser, layers)
    return TokenSpec(type(denoiser).__name__, layout, tokens, text_width(denoiser), **options)


class Attached:
    """A bank at work in a denoiser: every forward pass reads its tokens, whoever calls it.

    `branch` is read by all rows. With `null_branch`, the first half of the rows (a pipeline's unconditional half) reads that branch instead.
    """

    def __init__(self, denoiser: nn.Module, bank: SoftTokens, branch: int = 0, null_branch: int | None = None):
        check_fits(denoiser, bank.spec)
        for chosen in (branch, null_branch or 0):
            if not 0 <= chosen < bank.spec.branches:
                raise UserError(f"these soft tokens have {bank.spec.branches} branches: there is no branch {chosen}")
        self.bank, self.branch = bank, branch
        self.null_branch = bank.null_branch if null_branch is None else null_branch
        self.splice = Splice(denoiser, bank.spec.layout, bank.spec.position, self._tokens)

    def _tokens(self, t: torch.Tensor) -> torch.Tensor:
        if self.null_branch is None:
            return self.bank(t, self.branch)
        if len(t) % 2:
            raise UserError(f"null_branch splits the rows in halves, and there are {len(t)}: guidance is off")
        half = len(t) // 2
        branches = torch.tensor([self.null_branch] * half + [self.branch] * half)
        return self.bank(t, branches.to(self.bank.tokens.device))

    @property
    def enabled(self) -> bool:
        return self.splice.enabled

    def enable(self, on: bool = True) -> None:
        """Switch the tokens off and on; off, the denoiser computes what it did before, bit for bit."""
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

    def __exit__(self, *_) -> None:
        self.remove()


def check_fits(denoiser: nn.Module, spec: TokenSpec) -> None:
    """Whether a bank was made for this architecture.

    Raises:
        UserError: another class, width or set of blocks.
    """
    if type(denoiser).__name__ != spec.architecture:
        raise UserError(f"these soft tokens are for {spec.architecture}, not for {type(denoiser).__name__}")
    if text_width(denoiser) != spec.dim:
        raise UserError(
            f"these soft tokens are {spec.dim} wide, but the blocks of this {spec.architecture} read {text_width(denoiser)}: another base model"
        )
    names = {name for name, _ in denoiser.named_modules()}
    if missing := sorted(set(spec.layout) - names):
        raise UserError(f"these soft tokens go into {missing[0]}, which this {spec.architecture} does not have")


def load_soft_tokens(pipe, path: str | Path, branch: int = 0, null_branch: int | None = None) -> Attached:
    """Put saved soft tokens into a stock diffusers pipeline; `pipe(...)` is used as before. Returns the handle (`enable`, `remove`).

    `null_branch` None is what the tokens were trained to be drawn with (released for SDXL: the negative ones; else the same as `branch`).

    Raises:
        UserError: the file is broken, or made for another architecture.
    """
    denoiser = getattr(pipe, "transformer", None) or pipe.unet
    bank = SoftTokens.load(path).to(denoiser.device)
    return Attached(denoiser, bank.requires_grad_(False), branch, null_branch)
