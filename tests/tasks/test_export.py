"""What is exported draws, through transformers alone, what we draw: token for token."""

from functools import partial

import pytest
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf
from peft import PeftModel
from transformers import AutoProcessor, JanusForConditionalGeneration

from t2i_rl.core.errors import UserError
from t2i_rl.methods.policy.tokens import GRPO
from t2i_rl.models.autoregressive.janus import Janus
from t2i_rl.rewards.random import Random
from t2i_rl.tasks import export
from tests.support.commands import composed
from tests.support.tiny import CHAT, save_tiny_janus

TEXTS = ["a red circle", "a drawing of a green cross left of a black triangle", "three blue squares"]
LORA = {"r": 4, "lora_alpha": 8}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
    return save_tiny_janus(tmp_path_factory.mktemp("janus"))


def settings(folder: str, tmp_path, lora=None, adapter=False, dtype="float32"):
    return OmegaConf.create(
        {
            "model": {
                "_target_": "t2i_rl.models.autoregressive.janus.Janus",
                "path": folder,
                "chat": CHAT,
                "guidance_scale": 3.0,
                "temperature": 0.0,
                "dtype": dtype,
            },
            "method": {
                "_target_": "t2i_rl.methods.policy.tokens.GRPO",
                "lora": lora,
                "optimizer": {"_target_": "torch.optim.AdamW", "_partial_": True, "lr": 1e-3},
                "trainable": [r"model\.language_model\.", r"lm_head\."],
            },
            "reward": {"_target_": "t2i_rl.rewards.random.Random"},
            "ckpt_path": str(tmp_path / "trained.ckpt"),
            "task": {"out": str(tmp_path / "out"), "adapter": adapter},
            "paths": {"output_dir": str(tmp_path)},
        }
    )


def train(cfg, tmp_path) -> GRPO:
    """A checkpoint as training leaves it, with weights that differ from the base's."""
    optimizer = partial(torch.optim.AdamW, lr=1e-3)
    lora = cfg.method.lora and dict(cfg.method.lora)
    module = GRPO(instantiate(cfg.model), Random(), optimizer, lora=lora)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn_like(parameter))
    checkpoint = {"state_dict": module.state_dict(), "global_step": 1}
    module.on_save_checkpoint(checkpoint)
    torch.save(checkpoint, tmp_path / "trained.ckpt")
    return module


def ours(janus: Janus) -> torch.Tensor:
    janus.prepare()
    return janus.draw_images(TEXTS, [""] * 3, [0] * 3)[1].tokens


def theirs(model, processor) -> torch.Tensor:
    chats = [[{"role": "user", "content": text}] for text in TEXTS]
    texts = [processor.apply_chat_template(chat, add_generation_prompt=True) for chat in chats]
    inputs = processor(text=texts, generation_mode="image", return_tensors="pt", padding=True)
    with torch.no_grad():
        return model.generate(**inputs, generation_mode="image", do_sample=False, guidance_scale=3.0, use_cache=True)


@pytest.mark.parametrize("lora", [None, LORA])
def test_the_exported_model_draws_the_same_tokens(folder, tmp_path, lora):
    cfg = settings(folder, tmp_path, lora)
    trained = ours(train(cfg, tmp_path).model)
    out = export.run(cfg)["folder"]
    model = JanusForConditionalGeneration.from_pretrained(out).eval()
    assert torch.equal(theirs(model, AutoProcessor.from_pretrained(out)), trained)
    assert not torch.equal(ours(instantiate(cfg.model)), trained) and trained.unique().numel() > 5
    assert torch.equal(ours(instantiate(cfg.model, path=out)), trained)
    assert not list(tmp_path.glob("*.part")) and not any("lora" in name for name in model.state_dict())


def test_the_exported_adapter_draws_the_same_tokens_on_its_base(folder, tmp_path):
    cfg = settings(folder, tmp_path, LORA, adapter=True)
    trained = ours(train(cfg, tmp_path).model)
    out = export.run(cfg)["folder"]
    base = JanusForConditionalGeneration.from_pretrained(folder)
    model = PeftModel.from_pretrained(base, out).eval()
    assert torch.equal(theirs(model, AutoProcessor.from_pretrained(folder)), trained)


def test_a_half_precision_export_is_what_its_rollouts_were(folder, tmp_path):
    """In bfloat16 adapters are merged as they are for drawing: once, in float32, then rounded."""
    cfg = settings(folder, tmp_path, LORA, dtype="bfloat16")
    module = train(cfg, tmp_path)
    module.model.prepare()
    out = export.run(cfg)["folder"]
    again = instantiate(cfg.model, path=out)
    again.prepare()
    pairs = zip(module.model.engine.weights.tensors(), again.engine.weights.tensors(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_what_cannot_be_exported_is_refused(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "something").touch()
    arguments = ["task=export", "ckpt_path=trained.ckpt", "method.lora=null"]
    with pytest.raises(UserError, match="name another folder"):
        export.check(composed(*arguments, f"task.out={tmp_path / 'out'}"))
    with pytest.raises(UserError, match="method.lora"):
        export.check(composed(*arguments, f"task.out={tmp_path / 'new'}", "task.adapter=true"))
