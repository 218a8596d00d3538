"""Which image processors rewards read pictures through: transformers takes another class where torchvision is
installed, and the two differ by up to a byte a pixel."""

from transformers.image_processing_base import ImageProcessingMixin


def image_processors(judges: dict) -> dict[str, str]:
    """The class of each judge's image processor by the judge's name, and of each part of one; what has none is left
    out."""
    classes = {}
    for name, judge in judges.items():
        for value in vars(judge).values():
            if isinstance(value, ImageProcessingMixin):
                classes[name] = type(value).__name__
        parts = vars(judge).get("parts") or {}
        classes |= image_processors({f"{name}.parts.{part}": judge for part, judge in parts.items()})
    return classes
