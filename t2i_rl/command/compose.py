"""From what a user types to what Hydra composes."""

from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf

from t2i_rl.command.checkpoint_choice import with_choices_of_checkpoint
from t2i_rl.command.folder_names import folder_name
from t2i_rl.command.overrides import readable, split
from t2i_rl.command.resume import continue_in_place
from t2i_rl.core import words
from t2i_rl.core.places import CONF

words.register()
OmegaConf.register_new_resolver("folder_name", folder_name, replace=True)


def arguments(typed: list[str]) -> list[str]:
    """What was typed as Hydra reads it, with all that `ckpt_path` stands for.

    Raises:
        UserError: something cannot be read, or there is no such checkpoint.
    """
    for_hydra = readable(typed, CONF)
    if "ckpt_path=last" in for_hydra:
        for_hydra = continue_in_place(for_hydra, CONF)
    if any(argument.startswith("ckpt_path=") for argument in for_hydra):
        for_hydra = with_choices_of_checkpoint(for_hydra)
    return name_jobs_by_what_differs(for_hydra)


def name_jobs_by_what_differs(arguments: list[str]) -> list[str]:
    """The arguments, options first, and what is the same in every job of a sweep kept out of the names of its folders.

    Overrides come last because Lightning appends some for the processes that it launches.
    """
    options, settings = split(arguments)
    overrides = OverridesParser.create().parse_overrides(settings)
    same = [f"'{override.key_or_group}'" for override in overrides if not override.is_sweep_override()]
    excluded = f"hydra.job.config.override_dirname.exclude_keys=[{','.join(same)}]"
    return [*options, "--", *settings, excluded]
