"""Running a decoding step: plainly, compiled, or as a CUDA graph recorded once for each length."""

from collections.abc import Callable

import torch

_compiled: dict[Callable, Callable] = {}


class Recorder:
    """Runs `step(length)`.

    On a GPU each length is recorded the first time it comes and replayed from then on.
    """

    def __init__(self, device: torch.device, options):
        self.records = options.graphs and device.type == "cuda"
        self.compiles = options.compile
        self._graphs: dict[int, torch.cuda.CUDAGraph] = {}
        self._pool = torch.cuda.graph_pool_handle() if self.records else None

    def fused(self, function: Callable) -> Callable:
        """`function`, compiled where that is asked for."""
        if not self.compiles:
            return function
        if function not in _compiled:
            _compiled[function] = torch.compile(function, dynamic=False)
        return _compiled[function]

    def run(self, step: Callable[[int], None], length: int, state: Callable[[], list[torch.Tensor]]) -> None:
        """One step.

        Recording runs the step for warm-up, so `state()`, every tensor that it changes for good, is
        put back first.
        """
        if not self.records:
            return step(length)
        if length not in self._graphs:
            self._graphs[length] = self._record(step, length, state())
        self._graphs[length].replay()
        return None

    def _record(self, step: Callable[[int], None], length: int, state: list[torch.Tensor]) -> torch.cuda.CUDAGraph:
        former_values = [tensor.clone() for tensor in state]
        aside = torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            for _ in range(2):
                step(length)
        torch.cuda.current_stream().wait_stream(aside)
        for tensor, value in zip(state, former_values):
            tensor.copy_(value)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            step(length)
        return graph
