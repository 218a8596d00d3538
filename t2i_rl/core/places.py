"""Where the package and its configs lie, in a checkout and where it is installed."""

from pathlib import Path

PACKAGE = Path(__file__).parents[1]
CONF = next(folder for folder in (PACKAGE / "conf", PACKAGE.parent / "conf") if (folder / "config.yaml").is_file())


def ships(path: str) -> bool:
    """Whether weights come with the package, here or where a checkpoint or a config was written."""
    return Path(path).parts[-3:-1] == (PACKAGE.name, "weights")
