"""Groups that hold several parts by name, of which a run may leave out any: callbacks and loggers."""

from hydra.utils import instantiate
from omegaconf import DictConfig

from t2i_rl.command.messages import choices, near
from t2i_rl.core.errors import UserError


def named_parts(cfg: DictConfig, group: str) -> dict:
    """The parts of `callbacks` or `logger` by name, each made.

    A part that is null is left out. So is one that only has settings, as when `debug=fdr` sets how often samples are
    drawn and `callbacks=none` draws none.

    Raises:
        UserError: a part names no class, and there is none of that name to leave out.
    """
    nodes = {name: node for name, node in (cfg[group] or {}).items() if node is not None}
    known = choices(group)
    for name, node in nodes.items():
        if "_target_" not in node and name not in known:
            hint = near(name, known, f"; known by name are {', '.join(known)}")
            raise UserError(f"{group}.{name} names no class (_target_){hint}")
    return {name: instantiate(node) for name, node in nodes.items() if "_target_" in node}
