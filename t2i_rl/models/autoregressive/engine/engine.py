"""The decoding engine: the weights packed once a rollout, and sessions that decode with them."""

from dataclasses import dataclass
from typing import Any

import torch

from t2i_rl.core.numbers import Count, Dtype, check_arguments
from t2i_rl.models.autoregressive.engine.session import Session
from t2i_rl.models.autoregressive.engine.weights import Weights, pack


@dataclass
class EngineOptions:
    """How rollouts are computed; none of these changes what is sampled, beyond rounding.

    Args:
        dtype: of weights and cache while decoding; None takes the dtype that the model computes in.
        max_rows: images (or plans) decoded together; None takes as many as the measured free memory
            holds.
        graphs: replay the decoding step as a CUDA graph, on a GPU.
        keep: keep weights, caches and recorded steps from one rollout to the next; False gives
            their memory to the update.
        compile: let torch.compile fuse the step; needs a C++ compiler or Triton.

    Raises:
        UserError: an unknown dtype.
    """

    dtype: Dtype | None = None
    max_rows: Count | None = None
    graphs: bool = True
    keep: bool = True
    compile: bool = False

    def __post_init__(self):
        check_arguments(EngineOptions, vars(self), "model.rollout")


class Engine:
    """Decodes with the weights that `load` read last. One for a model."""

    def __init__(self, options: EngineOptions | None = None):
        self.options = options or EngineOptions()
        self.weights: Weights | None = None
        self.sessions: dict[type, tuple[tuple, Session]] = {}

    @torch.inference_mode(False)  # what an evaluation makes, training may go on with
    def load(self, model: Any) -> "Engine":
        """Read the weights of a `JanusForConditionalGeneration` as they are now.

        They go into the same memory as before, so that recorded steps stay valid. Under FSDP this
        gathers them: every rank must call it.
        """
        trunk = model.model.language_model
        self.config, self._rotary = trunk.config, trunk.rotary_emb
        device = trunk.norm.weight.device
        dtype = getattr(torch, self.options.dtype) if self.options.dtype else working_dtype(model)
        if self.weights is None or (self.dtype, self.device) != (dtype, device):
            self.release()
        self.weights = pack(model, dtype, device, into=self.weights)
        return self

    @property
    def dtype(self) -> torch.dtype:
        return self.weights.norm.dtype

    @property
    def device(self) -> torch.device:
        return self.weights.norm.device

    def cache_bytes(self, tokens: int) -> int:
        """Bytes of keys and values that one row of `tokens` tokens occupies."""
        config = self.config
        width = config.num_key_value_heads * config.head_dim
        return 2 * config.num_hidden_layers * width * tokens * self.dtype.itemsize

    def rotary(self, length: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosines and sines `(length, head_dim)`."""
        cos, sin = self._rotary(self.weights.norm, torch.arange(length, device=self.device)[None])
        return cos[0], sin[0]

    @torch.inference_mode(False)
    def session(self, emitter_class: type, *shape: int, **settings: Any) -> Session:
        """A session of this shape and these sampler settings.

        The last one of each kind of emitter is kept, with its cache and its recorded steps.
        """
        key = (shape, tuple(sorted(settings.items())))
        last_key, session = self.sessions.pop(emitter_class, (None, None))
        if last_key != key:
            del session  # before the new one allocates its cache
            session = Session(self, *shape)
            session.emitter = emitter_class(self.weights, session.rows, session.new_tokens, **settings)
        self.sessions[emitter_class] = key, session
        return session

    def held_bytes(self, emitter_class: type) -> int:
        """What the kept session of this kind holds."""
        _, session = self.sessions.get(emitter_class, (None, None))
        return session.cache_bytes() if session else 0

    def rollout_done(self) -> None:
        """Between a rollout and the update: give memory back, if that is wanted."""
        if not self.options.keep:
            self.release()

    def release(self) -> None:
        """Give back the packed weights, the caches and the recorded steps."""
        self.weights, self.sessions = None, {}


def working_dtype(model: Any) -> torch.dtype:
    """The dtype that the model computes in: autocast's where that is on, else its weights'."""
    weight = model.lm_head.weight
    kind = weight.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weight.dtype
