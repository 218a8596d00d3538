"""`task=export`: what was trained as a folder that transformers loads: the whole model, or its adapter alone."""

from pathlib import Path

import torch
from hydra.utils import instantiate
from peft import get_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from rich.console import Console
from safetensors.torch import save_file
from transformers import AutoProcessor

from t2i_rl.core.errors import UserError
from t2i_rl.core.files import replacing_folder
from t2i_rl.models.autoregressive.engine.weights import merged_weight
from t2i_rl.tasks.evaluate import load_trained
from t2i_rl.tasks.examine import check_method, method_of


def check(cfg) -> None:
    """Refuse what cannot be written.

    Raises:
        UserError: the folder is there already, there is no adapter to write, or it would be of another base.
    """
    out, method = folder_of(cfg), method_of(cfg)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"task.out={out} is there already and not empty: name another folder")
    if cfg.task.adapter and not (cfg.ckpt_path and cfg.method.get("lora")):
        raise UserError(
            "task.adapter=true writes what LoRA has learnt: give ckpt_path=<checkpoint> and its method.lora"
        )
    if cfg.task.adapter and method.draws_in_turns and cfg.method.get("start_from"):
        raise UserError(
            "this adapter sits on the weights of method.start_from, and its folder would name model.path: leave out "
            "task.adapter, and the whole model is written"
        )
    trains_tokens = method.learns_from in ("pairs", "preferences") and not cfg.method.get("lora")
    if (cfg.ckpt_path and trains_tokens) or cfg.model.get("soft_tokens"):
        raise UserError(
            "soft tokens are a file of their own, soft_tokens.safetensors in the run's folder: there is no pipeline to "
            "export"
        )
    if cfg.ckpt_path:
        check_method(cfg, training=False)


def folder_of(cfg) -> Path:
    """Where the model is written."""
    return Path(cfg.task.out or Path(cfg.paths.output_dir) / "export")


def run(cfg) -> dict:
    """Write `cfg.model`, with the weights of `cfg.ckpt_path` if given, into `cfg.task.out`.

    LoRA is merged unless `cfg.task.adapter`.
    """
    out = folder_of(cfg)
    model = instantiate(cfg.model)
    if cfg.ckpt_path:
        load_trained(cfg, model)
    learner = model.denoiser if model.family == "diffusion" else model.model
    with replacing_folder(out) as temporary:
        if cfg.task.adapter:
            write_adapter(learner, temporary, base=model.path)
        elif model.family == "diffusion":
            merge_adapters(learner)
            model.pipe.save_pretrained(temporary)
        else:
            write_model(model, temporary)
    kind = "LoRA adapter" if cfg.task.adapter else "model"
    Console().print(f"{kind} in {out}", soft_wrap=True)
    return {"folder": str(out)}


def write_model(janus, folder: Path) -> None:
    """Weights, with adapters merged as rollouts merge them, generation settings and processor."""
    merge_adapters(janus.model)
    janus.model.save_pretrained(folder)
    AutoProcessor.from_pretrained(janus.path, revision=janus.revision).save_pretrained(folder)


@torch.no_grad()
def merge_adapters(model: torch.nn.Module) -> None:
    """Put plain linear layers in the place of those with adapters; adapters are added in float32 and rounded once."""
    for name, module in list(model.named_modules()):
        if isinstance(module, LoraLayer):
            plain = module.get_base_layer()
            plain.weight.copy_(merged_weight(module))
            model.set_submodule(name, plain)
    model.__dict__.pop("peft_config", None)


def write_adapter(model: torch.nn.Module, folder: Path, base: str) -> None:
    """In peft's format: `PeftModel.from_pretrained(model, folder)` puts it on the model that `base` names."""
    config = model.peft_config["default"]
    config.base_model_name_or_path, config.inference_mode = base, True
    config.save_pretrained(folder)
    state = get_peft_model_state_dict(model)
    state = {f"base_model.model.{name}": value.contiguous() for name, value in state.items()}
    save_file(state, folder / "adapter_model.safetensors", metadata={"format": "pt"})
