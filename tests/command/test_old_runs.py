"""Runs of version 0.1 go on: their configs and checkpoints name classes as they were called then."""

from pathlib import Path

import pytest
import torch
from hydra._internal.utils import _locate
from omegaconf import OmegaConf

from t2i_rl.command.checkpoint_choice import check_checkpoint, with_choices_of_checkpoint
from t2i_rl.command.resume import continue_in_place
from t2i_rl.core.errors import UserError
from t2i_rl.core.old_names import MOVED, name_now, names_now
from t2i_rl.core.places import CONF
from t2i_rl.models.diffusion import soft_tokens
from t2i_rl.models.soft_tokens import load_soft_tokens
from tests.support.commands import composed

RUNS = Path(__file__).parents[1] / "support" / "runs_of_0_1"
COMMANDS = {
    "iris": ["debug=fdr", "method.group_size=4"],
    "softrepa": ["debug=fdr", "method=softrepa", "model=sd_tiny", "variant=released"],
}
TARGETS = (  # every `_target_` of its configs whose module has moved
    *("callbacks.turns.WatchTurns", "checkpoint_io.WholeCheckpoints", "claim.ClaimFolder", "sweep.SweepTable"),
    *("data.irgl.Trajectories", "data.prompt_stream.PromptData", "fsdp.FSDP2", "rollout.engine.EngineOptions"),
    *("irg.interleave.Interleave", "irg.make.Maker", "irg.world.World", "loggers.csv_logger", "loggers.wandb_logger"),
    *("irg.teachers.DrawnPictures", "irg.teachers.GivenPictures", "irg.teachers.Teacher"),
    *("irg.writers.ChatWriter", "irg.writers.LocalWriter"),
    *("methods.agsm.AGSM", "methods.denoising.Denoising", "methods.diffusion_dpo.DiffusionDPO", "methods.grpo.GRPO"),
    *("methods.irg.IRG", "methods.langevin.Langevin", "methods.noise_opt.NoiseOptimization"),
    *("methods.noise_search.NoiseSearch", "methods.softrepa.SoftREPA", "methods.trajectory_grpo.TrajectoryGRPO"),
    *("models.flux.Flux", "models.janus.Janus", "models.sana.SanaSprint", "models.sd3.SD3"),
    *("models.stable_diffusion.StableDiffusion", "models.stable_diffusion.StableDiffusionXL"),
)


@pytest.mark.parametrize("target", TARGETS)
def test_a_class_that_has_moved_is_found(target):
    assert callable(_locate(name_now(f"t2i_rl.{target}")))


def test_the_table_holds_what_has_moved_and_nothing_else():
    assert all(any(f"{target}.".startswith(f"{name}.") for target in TARGETS) for name in MOVED)
    assert names_now({"a": ["t2i_rl.rewards.nsc", "mine.janus.Janus", None, 3]})["a"][:2] == [
        "t2i_rl.rewards.nsc",
        "mine.janus.Janus",
    ]


def left_behind(folder: Path, name: str, **changes) -> Path:
    """The folder of a run of 0.1, as far as a resume reads it."""
    run = folder / "outputs" / "train" / name
    (run / "checkpoints").mkdir(parents=True)
    torch.save({"state_dict": {}, "global_step": 1}, run / "checkpoints" / "last.ckpt")
    OmegaConf.save(OmegaConf.merge(OmegaConf.load(RUNS / f"{name}.yaml"), changes), run / "config.yaml")
    return run


@pytest.mark.parametrize("name", COMMANDS)
def test_training_goes_on_in_the_folder_of_an_old_run(tmp_path, monkeypatch, name):
    run = left_behind(tmp_path, name)
    monkeypatch.chdir(tmp_path)
    going_on = continue_in_place([*COMMANDS[name], "ckpt_path=last"], CONF)
    assert f"hydra.run.dir='{run.relative_to(tmp_path)}'" in going_on
    with pytest.raises(UserError, match="no run below"):
        continue_in_place([*COMMANDS[name], "method.max_grad_norm=0.5", "ckpt_path=last"], CONF)


def test_a_null_of_an_old_run_stands_for_what_its_variant_decided(tmp_path, monkeypatch):
    nulls = dict.fromkeys(("scale", "temperature", "denoising_weight", "layers", "position", "times", "noise"))
    left_behind(tmp_path, "softrepa", method=nulls)
    monkeypatch.chdir(tmp_path)
    assert len(continue_in_place([*COMMANDS["softrepa"], "ckpt_path=last"], CONF)) == 6
    with pytest.raises(UserError, match="no run below"):
        continue_in_place([*COMMANDS["softrepa"], "method.temperature=0.2", "ckpt_path=last"], CONF)


def test_a_checkpoint_names_its_model_as_it_was_called(tmp_path):
    model = {"name": "janus_tiny", "class": "t2i_rl.models.janus.Janus", "path": "/elsewhere/t2i_rl/weights/janus_tiny"}
    said = {"format": 1, "class": "t2i_rl.methods.grpo.GRPO", "method": "iris", "decides": {}, "model": model}
    path = tmp_path / "last.ckpt"
    torch.save({"state_dict": {}, "global_step": 1, "optimizer_states": [], "grpo": {}, "t2i_rl": said}, path)
    command = with_choices_of_checkpoint(["task=evaluate", f"ckpt_path={path}"])
    assert command[:3] == ["task=evaluate", "method=iris", "model=janus_tiny"]
    check_checkpoint(composed(*command))


def test_exported_tokens_are_loaded_as_their_file_says():
    assert load_soft_tokens is soft_tokens.load_soft_tokens
