"""The queue: what is still to be measured on a GPU, in the order of its worth."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Item:
    """One thing to do on a GPU.

    Args:
        name: on the command line and in done.json.
        what: it is, in one line.
        target: where `run` and `table` are, see item.py.
        least: seconds below which it is not begun. most: seconds that it may take from the items behind it.
    """

    name: str
    what: str
    target: str
    least: int
    most: int


ITEMS = (
    Item(
        "rollout",
        "the rollout at Janus-Pro-1B's shape, 8 prompts x 8: plain loops, engine trick by trick, share of the roofline",
        "experiments.gpu.rollout",
        least=60,
        most=330,
    ),
    Item(
        "step",
        "one whole GRPO step at Janus-Pro-1B's shape: phases and memory",
        "experiments.gpu.step",
        least=40,
        most=150,
    ),
    Item("suite", "the tests that need a GPU: pytest -m cuda", "experiments.gpu.suite", least=30, most=150),
    Item(
        "diffusion",
        "SoftREPA's step at SD3's shape, noise optimisation's at FLUX.1's, and the regulariser's share of it",
        "experiments.gpu.diffusion",
        least=60,
        most=200,
    ),
    Item(
        "pretrain",
        "the tiny models trained on from the weights that ship",
        "experiments.gpu.pretrain",
        least=60,
        most=900,
    ),
)
