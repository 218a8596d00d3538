"""Small denoisers and pipeline folders of the real diffusers classes, made from nothing."""

import atexit
import shutil
import tempfile
from functools import cache
from pathlib import Path

import torch
from diffusers import (
    AutoencoderDC,
    AutoencoderKL,
    DDIMScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    SanaSprintPipeline,
    SanaTransformer2DModel,
    SCMScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    Gemma2Config,
    Gemma2Model,
    GemmaTokenizer,
    T5Config,
    T5EncoderModel,
)

from t2i_rl.models.diffusion.tiny import BOS, EOS, build_tokenizer

TEXT = 7  # tokens of the texts that `inputs` makes
DENOISERS = ("sd15", "sdxl", "sd3", "sd35", "flux")


def unet(sdxl: bool = False) -> UNet2DConditionModel:
    extra = (
        {"addition_embed_type": "text_time", "addition_time_embed_dim": 8, "projection_class_embeddings_input_dim": 64}
        if sdxl
        else {}
    )
    return UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        block_out_channels=(16, 32),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D") if sdxl else ("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D") if sdxl else ("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=32 if sdxl else 16,
        attention_head_dim=2,
        norm_num_groups=4,
        **extra,
    )


def mmdit(sd35: bool = False) -> SD3Transformer2DModel:
    extra = {"qk_norm": "rms_norm", "dual_attention_layers": (0, 1)} if sd35 else {}
    return SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=3,
        attention_head_dim=8,
        num_attention_heads=4,
        joint_attention_dim=32,
        caption_projection_dim=32,
        pooled_projection_dim=32,
        pos_embed_max_size=8,
        **extra,
    )


def flux() -> FluxTransformer2DModel:
    return FluxTransformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=16,
        axes_dims_rope=(4, 6, 6),
    )


def denoiser(name: str, seed: int = 0) -> torch.nn.Module:
    """A randomly initialised denoiser whose output depends on its text: zero-initialised layers are filled."""
    torch.manual_seed(seed)
    made = {
        "sd15": unet,
        "sdxl": lambda: unet(True),
        "sd3": mmdit,
        "sd35": lambda: mmdit(True),
        "flux": flux,
    }[name]().eval()
    for parameter in made.parameters():
        if not parameter.abs().sum():
            torch.nn.init.normal_(parameter, std=0.05)
    return made


def inputs(name: str, rows: int = 2, seed: int = 1) -> dict:
    """Keyword arguments of one forward pass; every row at its own time where the class allows it."""
    draws = torch.Generator().manual_seed(seed)
    normal = lambda *shape: torch.randn(*shape, generator=draws)  # noqa: E731
    t = torch.tensor([37.0, 911.0, 500.0, 128.0])[:rows]
    if name in ("sd15", "sdxl"):
        text = normal(rows, TEXT, 16 if name == "sd15" else 32)
        made = {"sample": normal(rows, 4, 8, 8), "timestep": t, "encoder_hidden_states": text}
        if name == "sdxl":
            made["added_cond_kwargs"] = {"text_embeds": normal(rows, 16), "time_ids": torch.full((rows, 6), 8.0)}
        return made | {"return_dict": False}
    if name == "flux":
        return {
            "hidden_states": normal(rows, 16, 16),
            "timestep": t / 1000,
            "encoder_hidden_states": normal(rows, TEXT, 32),
            "pooled_projections": normal(rows, 16),
            "img_ids": torch.stack([torch.zeros(16), torch.arange(16) // 4, torch.arange(16) % 4], dim=1).float(),
            "txt_ids": torch.zeros(TEXT, 3),
            "return_dict": False,
        }
    return {
        "hidden_states": normal(rows, 4, 8, 8),
        "timestep": t,
        "encoder_hidden_states": normal(rows, TEXT, 32),
        "pooled_projections": normal(rows, 32),
        "return_dict": False,
    }


def small_vae(shift: float | None = None) -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=(8, 8, 8),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=32,
        scaling_factor=0.7,
        shift_factor=shift,
        mid_block_add_attention=False,
    )


def clip(width: int, projection: int | None = None):
    tokenizer = build_tokenizer()
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=2 * width,
        projection_dim=projection or width,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=24,
        bos_token_id=tokenizer.convert_tokens_to_ids(BOS),
        eos_token_id=tokenizer.convert_tokens_to_ids(EOS),
        pad_token_id=tokenizer.convert_tokens_to_ids(EOS),
    )
    return (CLIPTextModelWithProjection if projection else CLIPTextModel)(config)


def pipeline(kind: str, folder: Path, seed: int = 0) -> Path:
    """Make and save a small pipeline of a kind.

    The kinds are `sd15`, `sdxl`, `sd3` (no T5), `sd3_t5`, `sd35`, `flux`, `sana`; and of one step
    `sd_turbo` and `sdxl_turbo`.
    """
    shutil.copytree(_built(kind, seed), folder, dirs_exist_ok=True)
    torch.manual_seed(seed)
    return folder


@cache
def _built(kind: str, seed: int) -> Path:
    """Made once a process."""
    torch.manual_seed(seed)
    folder = Path(tempfile.mkdtemp(prefix=f"{kind}_"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    tokenizer = build_tokenizer()
    if kind == "sd15":
        pipe = StableDiffusionPipeline(
            vae=small_vae(),
            text_encoder=clip(16),
            tokenizer=tokenizer,
            unet=denoiser("sd15", seed),
            scheduler=DDIMScheduler(beta_schedule="scaled_linear", clip_sample=False, steps_offset=1),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
    elif kind == "sdxl":
        pipe = StableDiffusionXLPipeline(
            vae=small_vae(),
            text_encoder=clip(16),
            tokenizer=tokenizer,
            text_encoder_2=clip(16, projection=16),
            tokenizer_2=tokenizer,
            unet=denoiser("sdxl", seed),
            scheduler=EulerDiscreteScheduler(beta_schedule="scaled_linear", steps_offset=1),
        )
    elif kind in ("sd_turbo", "sdxl_turbo"):
        stock = {"sd_turbo": StableDiffusionPipeline, "sdxl_turbo": StableDiffusionXLPipeline}[kind]
        many_steps = _built({"sd_turbo": "sd15", "sdxl_turbo": "sdxl"}[kind], seed)
        euler = EulerDiscreteScheduler if kind == "sd_turbo" else EulerAncestralDiscreteScheduler
        scheduler = euler(beta_schedule="scaled_linear", timestep_spacing="trailing", steps_offset=1)
        pipe = stock.from_pretrained(
            many_steps, scheduler=scheduler, **({"safety_checker": None} if kind == "sd_turbo" else {})
        )
    elif kind == "flux":
        pipe = FluxPipeline(
            transformer=denoiser("flux", seed),
            scheduler=FlowMatchEulerDiscreteScheduler(shift=1.0),
            vae=small_vae(shift=0.1),
            text_encoder=clip(16),
            tokenizer=tokenizer,
            text_encoder_2=small_t5(),
            tokenizer_2=t5_tokenizer(),
        )
    elif kind == "sana":
        pipe = sana_sprint()
    else:
        t5 = tokenizer_3 = None
        if kind == "sd3_t5":
            t5, tokenizer_3 = small_t5(), t5_tokenizer()
        pipe = StableDiffusion3Pipeline(
            transformer=denoiser("sd35" if kind == "sd35" else "sd3", seed),
            scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
            vae=small_vae(shift=0.1),
            text_encoder=clip(16, projection=16),
            tokenizer=tokenizer,
            text_encoder_2=clip(16, projection=16),
            tokenizer_2=tokenizer,
            text_encoder_3=t5,
            tokenizer_3=tokenizer_3,
        )
    pipe.save_pretrained(folder)
    return folder


def small_t5() -> T5EncoderModel:
    return T5EncoderModel(
        T5Config(vocab_size=len(t5_tokenizer()), d_model=32, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
    )


def sana_sprint() -> SanaSprintPipeline:
    words = sorted(
        {word.removesuffix("</w>") for word in build_tokenizer().get_vocab() if word.isascii()}
        - {"<|startoftext|>", "<|endoftext|>"}
    )
    pieces = ["<pad>", "<eos>", "<bos>", "<unk>", "\u2581", *words, *(f"\u2581{word}" for word in words)]
    tokenizer = GemmaTokenizer(
        vocab={piece: i for i, piece in enumerate(dict.fromkeys(pieces))}, merges=[], add_bos_token=True
    )
    gemma = Gemma2Config(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=2,
    )
    transformer = SanaTransformer2DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=2,
        num_cross_attention_heads=2,
        cross_attention_head_dim=8,
        cross_attention_dim=16,
        caption_channels=32,
        mlp_ratio=2.0,
        sample_size=8,
        patch_size=1,
        guidance_embeds=True,
        guidance_embeds_scale=0.1,
        qk_norm="rms_norm_across_heads",
        timestep_scale=1000.0,
    )
    block_types = ("ResBlock", "EfficientViTBlock")
    vae = AutoencoderDC(
        in_channels=3,
        latent_channels=4,
        attention_head_dim=2,
        encoder_block_types=block_types,
        decoder_block_types=block_types,
        encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8),
        encoder_qkv_multiscales=((), (5,)),
        decoder_qkv_multiscales=((), (5,)),
        encoder_layers_per_block=(1, 1),
        decoder_layers_per_block=[1, 1],
        downsample_block_type="conv",
        upsample_block_type="interpolate",
        decoder_norm_types="rms_norm",
        decoder_act_fns="silu",
        scaling_factor=0.41407,
    )
    return SanaSprintPipeline(
        tokenizer=tokenizer, text_encoder=Gemma2Model(gemma), vae=vae, transformer=transformer, scheduler=SCMScheduler()
    )


def t5_tokenizer():
    """A T5 tokenizer over single words."""
    from transformers import T5Tokenizer

    words = [word.removesuffix("</w>") for word in build_tokenizer().get_vocab() if word.isascii()]
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *[(f"▁{word}", -1.0) for word in sorted(set(words))]]
    return T5Tokenizer(vocab=pieces, extra_ids=0)
