"""From a hidden state to the next token: sampling, guidance and statistics, on the device."""

import torch
import torch.nn.functional as F

from t2i_rl.models.autoregressive.engine.rows import guided
from t2i_rl.models.autoregressive.engine.stats import sample_tokens, self_certainty
from t2i_rl.models.autoregressive.engine.weights import Weights


class ImageEmitter:
    """Image tokens `(B, N)` under guidance, with log-probs and self-certainties `(B, N)`.

    `guidance` has one scale for each negative branch; rows are `[conditional; first negative;
    second negative; ...]`.
    """

    def __init__(self, weights: Weights, rows: int, count: int, guidance: tuple[float, ...], temperature: float):
        self.weights, self.guidance, self.temperature = weights, guidance, temperature
        images = rows // (1 + len(guidance))
        device = weights.norm.device
        self.uniforms = torch.zeros(images, count, dtype=torch.float64, device=device)
        self.tokens = torch.zeros(images, count, dtype=torch.long, device=device)
        self.logprobs, self.conditional, self.guided = (torch.zeros(images, count, device=device) for _ in range(3))

    def start(self, uniforms: torch.Tensor) -> None:
        """Take the random numbers `(B, N)` of a new batch."""
        self.uniforms.copy_(uniforms)

    def state(self) -> list[torch.Tensor]:
        """Tensors that a step changes and later steps read."""
        return []

    def __call__(self, hidden: torch.Tensor, slot: torch.Tensor) -> torch.Tensor:
        first_linear, second_linear = self.weights.image_head
        activated = self.weights.image_activation(F.linear(hidden, *first_linear))
        raw = F.linear(activated, *second_linear).float()
        logits = guided(raw, self.guidance)
        token = sample_tokens(logits, self.uniforms.index_select(1, slot).squeeze(1), self.temperature)
        scaled = logits / (self.temperature or 1.0)
        logprob = scaled.gather(-1, token.unsqueeze(-1)) - scaled.logsumexp(-1, keepdim=True)
        self.tokens.index_copy_(1, slot, token.unsqueeze(1))
        self.logprobs.index_copy_(1, slot, logprob)
        self.conditional.index_copy_(1, slot, self_certainty(raw[: len(token)]).unsqueeze(1))
        self.guided.index_copy_(1, slot, self_certainty(logits).unsqueeze(1))
        return torch.cat([self.weights.image_embed[token]] * (1 + len(self.guidance)))


class TextEmitter:
    """Plan tokens `(B, T)`, EOS after a row has ended.

    `lengths` `(B,)` counts a row's tokens up to and including its first EOS.
    """

    def __init__(self, weights: Weights, rows: int, count: int, eos: int, temperature: float):
        self.weights, self.eos, self.temperature = weights, eos, temperature
        device = weights.norm.device
        self.uniforms = torch.zeros(rows, count, dtype=torch.float64, device=device)
        self.tokens = torch.zeros(rows, count, dtype=torch.long, device=device)
        self.ended = torch.zeros(rows, dtype=torch.bool, device=device)
        self.lengths = torch.zeros(rows, dtype=torch.long, device=device)
        self.finite = torch.ones(rows, dtype=torch.bool, device=device)  # whether all logits up to a row's end were

    def start(self, uniforms: torch.Tensor) -> None:
        """Take the random numbers `(B, T)` of a new batch."""
        self.uniforms.copy_(uniforms)
        self.ended.zero_()
        self.lengths.zero_()
        self.finite.fill_(True)

    def state(self) -> list[torch.Tensor]:
        """Tensors that a step changes and later steps read."""
        return [self.ended, self.lengths, self.finite]

    def __call__(self, hidden: torch.Tensor, slot: torch.Tensor) -> torch.Tensor:
        logits = F.linear(hidden, self.weights.text_head).float()
        self.finite &= logits.amax(-1).isfinite() | self.ended
        token = sample_tokens(logits, self.uniforms.index_select(1, slot).squeeze(1), self.temperature)
        token = torch.where(self.ended, self.eos, token)
        self.tokens.index_copy_(1, slot, token.unsqueeze(1))
        self.lengths += ~self.ended
        self.ended |= token == self.eos
        return self.weights.text_embed[token]
