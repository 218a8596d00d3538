"""What IRG's training and GRPO over its trajectories share: a model that draws in turns and learns conversations."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch

from t2i_rl.core.contracts import Reward
from t2i_rl.core.errors import UserError
from t2i_rl.core.fsdp import mesh_of, shard
from t2i_rl.methods.base import Learner
from t2i_rl.methods.irg.evaluation import TurnsDrawer
from t2i_rl.methods.irg.rounds import Rounds
from t2i_rl.methods.ranks import most_over_ranks
from t2i_rl.methods.trainable import refuse_rounded_updates
from t2i_rl.models.autoregressive.interleaved import InterleavedJanus
from t2i_rl.models.autoregressive.janus import Janus
from t2i_rl.models.autoregressive.segments import Segment


class DrawsInTurns(Learner):
    """A method that draws in turns; a subclass sets these:

    interleaved: an adapter of family `autoregressive` over lists of segments, see `models.autoregressive.interleaved`.
    interleave: how trajectories are drawn, while training and by the tasks.
    judge: a reward that reads pictures, for `interleave.choose` and `stop_above`, or None.
    tokens_per_pass: places with a live graph at a time.
    """

    draws_in_turns = True
    mode = "turns"
    drawer = TurnsDrawer
    interleaved: InterleavedJanus
    interleave: Rounds
    judge: Reward | None
    tokens_per_pass: int

    @property
    def model(self) -> Janus:
        return self.interleaved.adapter

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """The weights that are evaluated in place of those that train: here they are the same."""
        yield

    def configure_model(self) -> None:
        """Shard where the strategy is FSDP."""
        mesh = mesh_of(self.trainer)
        if mesh is not None:
            shard(self.interleaved, mesh)

    def on_fit_start(self) -> None:
        refuse_rounded_updates(self.model)

    def packed(self, conversations: Sequence[Sequence[Segment]]) -> list[list[list[int]]]:
        """Passes of rows of conversations, by number; every rank calls it.

        Raises:
            UserError: on every rank, where one has a conversation longer than the model's positions.
        """
        lengths = self.interleaved.lengths(conversations)
        longest = most_over_ranks(max(lengths), self.device)
        if longest > self.interleaved.positions:
            longest_here = conversations[int(np.argmax(lengths))]
            prompt = next(segment.text or "" for segment in longest_here if segment.role == "prompt")
            raise UserError(
                f"a trajectory of {longest} tokens (of this process the longest is that of {prompt[:60]!r}), and the "
                f"model has {self.interleaved.positions - 1} positions: make the data with shorter texts (task.words); "
                "drawn ones: method.interleave.max_tokens, or policy=window"
            )
        return self.interleaved.passes(conversations, self.tokens_per_pass)

    def transfer_batch_to_device(self, batch: list, device: torch.device, dataloader_idx: int) -> list:
        """Pictures move where they are laid out."""
        return batch
