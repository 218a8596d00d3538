"""The memory predicted from config files alone against what autograd really keeps."""

import pytest
from hydra.errors import InstantiationException
from omegaconf import OmegaConf

from t2i_rl.models.diffusion.memory import Memory, bytes_of, counted, predict
from t2i_rl.models.diffusion.noise_to_image import noise_to_image
from tests.models.diffusion.test_noise_to_image import MODELS, noise_for
from tests.support.small_diffusers import pipeline

TARGETS = {
    "flux": {"_target_": "t2i_rl.models.diffusion.flux.Flux", "size": 32, "max_sequence_length": 16},
    "sd35": {
        "_target_": "t2i_rl.models.diffusion.sd3.SD3",
        "guidance_scale": 0.0,
        "steps": 1,
        "max_sequence_length": 16,
    },
    "sd_turbo": {
        "_target_": "t2i_rl.models.diffusion.stable_diffusion.StableDiffusion",
        "guidance_scale": 0.0,
        "steps": 1,
        "scheduler": "own",
    },
    "sdxl_turbo": {
        "_target_": "t2i_rl.models.diffusion.stable_diffusion.StableDiffusionXL",
        "guidance_scale": 0.0,
        "steps": 1,
        "scheduler": "own",
    },
    "sana": {
        "_target_": "t2i_rl.models.diffusion.sana.SanaSprint",
        "size": 32,
        "max_sequence_length": 16,
        "dtype": "float32",
    },
}


@pytest.mark.parametrize("kind", TARGETS)
def test_prediction_is_what_the_graph_keeps(kind, tmp_path):
    folder = pipeline(kind, tmp_path)
    expected = predict(OmegaConf.create(TARGETS[kind] | {"path": str(folder)}), gradients=True, checkpointing=False)
    model = MODELS[kind](folder).requires_grad_(False)
    assert expected.text_encoders == bytes_of(model.text_encoders) > 0
    assert expected.weights == bytes_of(model) - bytes_of(model.text_encoders)
    noise, text = noise_for(model, 1).requires_grad_(), model.encode_prompts([""])
    weights = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
    with counted(weights) as bytes_of_storage:
        pixels = noise_to_image(model, noise, text)
    assert pixels.requires_grad
    assert sum(bytes_of_storage.values()) == pytest.approx(
        expected.graph, rel=0.15
    )  # attention kernels keep different things


def test_no_weight_file_is_read(tmp_path):
    folder = pipeline("flux", tmp_path)
    for file in folder.rglob("*.safetensors"):
        file.unlink()
    settings = OmegaConf.create(TARGETS["flux"] | {"path": str(folder)})
    assert (
        predict(settings, gradients=True, checkpointing=False).graph
        > predict(settings, gradients=True, checkpointing=True).graph
        > 0
    )
    (folder / "transformer" / "config.json").unlink()
    with pytest.raises(InstantiationException, match="cannot load"):
        predict(settings, gradients=True, checkpointing=False)


def test_the_sentence_adds_up():
    memory = Memory(weights=24_000_000_000, text_encoders=10_000_000_000, graph=5_000_000_000)
    assert "x 2: 34.0 GB" in memory.sentence(2, freed=True)
    assert "x 2: 44.0 GB" in memory.sentence(2, freed=False)
