"""bfloat16 where the processor has instructions for it, float32 where it has none; what was chosen
is said, what is given is obeyed."""

import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from t2i_rl.command import cli
from t2i_rl.core import precision

INTEL_OLD = "flags\t\t: fpu sse2 avx2 avx512f avx512bw avx512vl avx512_vnni\n"
INTEL_NEW = INTEL_OLD.replace("avx512_vnni", "avx512_vnni avx512_bf16 amx_tile")
ARM_OLD = "Features\t: fp asimd sve asimdhp\n"
ARM_NEW = "Features\t: fp asimd sve svebf16 i8mm bf16\n"


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def on(cpuinfo: str | None, monkeypatch, tmp_path) -> None:
    """A machine with this /proc/cpuinfo; None: without one."""
    file = tmp_path / "cpuinfo"
    if cpuinfo is not None:
        file.write_text(f"processor\t: 0\nmodel name\t: a CPU with bf16 in its name\n{cpuinfo}")
    monkeypatch.setattr(precision, "CPUINFO", file)


def composed(*overrides: str):
    with initialize_config_dir(str(cli.CONF), version_base="1.3"):
        return compose("config", list(overrides))


@pytest.mark.parametrize(
    "cpuinfo, chosen",
    [
        (INTEL_OLD, "32-true"),
        (INTEL_NEW, "bf16-mixed"),
        (ARM_OLD, "32-true"),
        (ARM_NEW, "bf16-mixed"),
        (None, "32-true"),
    ],
)
def test_whatever_is_made_here_asks_the_processor_first(cpuinfo, chosen, monkeypatch, tmp_path):
    on(cpuinfo, monkeypatch, tmp_path)
    recipes = composed("task=pretrain").task.recipes
    stages = [stage for recipe in recipes.values() for stage in recipe.values() if OmegaConf.is_dict(stage)]
    precisions = {stage["precision"] for stage in stages if "precision" in stage}
    assert precisions == {chosen}
    assert composed("task=make_recognizer").task.precision == chosen
    experiment = composed("experiment=alignment_shapes")
    assert experiment.trainer.precision == chosen
    assert experiment.model.dtype == ("bfloat16" if chosen == "bf16-mixed" else "float32")


@pytest.mark.parametrize("supported", [True, False])
def test_a_gpu_is_asked_itself_unless_the_cpu_trains(supported, monkeypatch, tmp_path):
    on(INTEL_OLD, monkeypatch, tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(
        torch.cuda, "is_bf16_supported", lambda including_emulation=True: supported or including_emulation
    )
    assert precision.auto_precision() == ("bf16-mixed" if supported else "32-true")
    assert precision.auto_dtype("cpu") == "float32"


def test_the_choice_is_said(monkeypatch, tmp_path):
    on(INTEL_OLD, monkeypatch, tmp_path)
    (line,) = precision.precision_lines(composed("task=pretrain", "model=sd_tiny"))
    assert line == "precision=32-true is chosen: this CPU has no bfloat16 instructions"
    on(ARM_NEW, monkeypatch, tmp_path)
    (line,) = precision.precision_lines(composed("experiment=alignment_shapes"))
    assert "precision=bf16-mixed, dtype=bfloat16 is chosen: this CPU has bfloat16" in line
    assert not precision.precision_lines(composed())


def test_what_is_given_is_obeyed_with_a_line(monkeypatch, tmp_path):
    given = ["task=pretrain", "model=sd_tiny", "task.recipes.sd_tiny.denoiser.precision=bf16-mixed"]
    on(INTEL_OLD, monkeypatch, tmp_path)
    cfg = composed(*given)
    assert cfg.task.recipes.sd_tiny.denoiser.precision == "bf16-mixed"
    chosen, asked = precision.precision_lines(cfg)
    assert "32-true is chosen" in chosen
    assert "task.recipes.sd_tiny.denoiser.precision=bf16-mixed is taken as given" in asked and "faster" in asked
    (asked,) = precision.precision_lines(composed("model.dtype=bfloat16", "trainer.precision=bf16-mixed"))
    assert "trainer.precision=bf16-mixed, model.dtype=bfloat16" in asked
    on(INTEL_NEW, monkeypatch, tmp_path)
    assert not precision.precision_lines(composed("model.dtype=bfloat16"))
