"""Whether an installed torchvision works with torch: nothing here needs it, but transformers imports it."""

from importlib import import_module
from importlib.metadata import version
from importlib.util import find_spec

from t2i_rl.core.errors import UserError


def check_torchvision() -> None:
    """Import torchvision where there is one.

    Raises:
        UserError: it does not import, as one that was built for another torch does not; transformers would not either.
    """
    if find_spec("torchvision") is None:
        return
    try:
        import_module("torchvision")
    except Exception as error:  # compiled code that does not fit raises anything: RuntimeError, AttributeError, OSError
        torch = version("torch")
        source = " --index-url https://download.pytorch.org/whl/cpu" if torch.endswith("+cpu") else ""
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise UserError(
            f"torchvision does not fit torch {torch} ({reason}): pip uninstall torchvision (only Inception's FID needs "
            "it), "
            f"or pip install --force-reinstall --no-deps -c constraints.txt torchvision{source}"
        ) from error
