"""Which image processors rewards read images through.

Transformers takes another class where torchvision is installed, and the two differ by up to a byte
a pixel.
"""

from collections.abc import Mapping

from transformers.image_processing_base import ImageProcessingMixin

from t2i_rl.core.contracts import Reward


def image_processors(rewards: Mapping[str, Reward]) -> dict[str, str]:
    """The class of the image processor of each reward, and of each part of one, that has one."""
    classes = {}
    for name, reward in rewards.items():
        for value in vars(reward).values():
            if isinstance(value, ImageProcessingMixin):
                classes[name] = type(value).__name__
        classes |= image_processors({f"{name}.parts.{part}": inner for part, inner in reward.parts.items()})
    return classes
