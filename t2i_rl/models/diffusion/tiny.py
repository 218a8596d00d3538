"""`sd_tiny`, `sd3_tiny` and `flux_tiny` from nothing: stock pipelines with small configs.

Their tokenizers have a token for each of the world's words.
"""

import json

from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5TokenizerFast,
)

from t2i_rl.shapes.vocabulary import SPECIAL, vocabulary

TEXT_LENGTH = 24  # the longest prompt of the world has 16 words
BOS, EOS = "<|startoftext|>", "<|endoftext|>"
ALPHABET = "abcdefghijklmnopqrstuvwxyz.,-"


def _words() -> list[str]:
    return [word for word in vocabulary() if word not in SPECIAL and word.isalpha()]


def build_tokenizer() -> CLIPTokenizer:
    """CLIP's byte-pair tokenizer in which every word of the world is one token.

    Other words fall apart into letters.
    """
    tokenizer = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    trainer = trainers.BpeTrainer(
        vocab_size=100_000,
        min_frequency=1,
        end_of_word_suffix="</w>",
        initial_alphabet=sorted(ALPHABET),
        show_progress=False,
    )
    tokenizer.train_from_iterator([" ".join(_words())], trainer)
    learnt = json.loads(tokenizer.to_str())["model"]
    alphabet = sorted(piece for piece in learnt["vocab"] if len(piece.removesuffix("</w>")) == 1)
    ends = {f"{piece}</w>" for piece in alphabet if not piece.endswith("</w>")}
    pieces = [BOS, EOS, *sorted({*learnt["vocab"], *ends})]
    return CLIPTokenizer(
        vocab={piece: i for i, piece in enumerate(pieces)},
        merges=[tuple(pair) for pair in learnt["merges"]],
        model_max_length=TEXT_LENGTH,
    )


def build_t5_tokenizer() -> T5TokenizerFast:
    """T5's unigram tokenizer in which every word of the world is one token.

    Other words fall apart into letters.
    """
    pieces = [(f"\u2581{word}", -1.0) for word in _words()]
    pieces += [("\u2581", -6.0), *((letter, -6.0) for letter in ALPHABET if f"\u2581{letter}" not in dict(pieces))]
    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    return T5TokenizerFast(vocab=special + pieces, extra_ids=0, model_max_length=TEXT_LENGTH)


def build_vae(channels: int, width: int = 32) -> AutoencoderKL:
    """An autoencoder that turns 4x4 pixels into one latent of `channels`."""
    return AutoencoderKL(
        block_out_channels=(width, 2 * width, 2 * width),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        layers_per_block=1,
        latent_channels=channels,
        norm_num_groups=8,
        sample_size=32,
        mid_block_add_attention=False,
    )


def _text_config(tokenizer: CLIPTokenizer, width: int, layers: int) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=4 * width,
        projection_dim=width,
        num_hidden_layers=layers,
        num_attention_heads=width // 32,
        max_position_embeddings=TEXT_LENGTH,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def build_sd(vae: AutoencoderKL, channels: tuple[int, ...], layers: int, text: dict) -> StableDiffusionPipeline:
    """Stable Diffusion's classes: a UNet that predicts the noise, one CLIP text encoder."""
    tokenizer = build_tokenizer()
    unet = UNet2DConditionModel(
        sample_size=8,
        in_channels=vae.config.latent_channels,
        out_channels=vae.config.latent_channels,
        block_out_channels=tuple(channels),
        layers_per_block=layers,
        down_block_types=("CrossAttnDownBlock2D",) * len(channels),
        up_block_types=("CrossAttnUpBlock2D",) * len(channels),
        cross_attention_dim=text["width"],
        attention_head_dim=4,  # diffusers means the number of heads
        norm_num_groups=16,
    )
    return StableDiffusionPipeline(
        vae=vae,
        text_encoder=CLIPTextModel(_text_config(tokenizer, **text)),
        tokenizer=tokenizer,
        unet=unet,
        scheduler=DDIMScheduler(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            clip_sample=False,
            set_alpha_to_one=False,
            steps_offset=1,
        ),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def build_sd3(vae: AutoencoderKL, width: int, layers: int, text: dict, shift: float) -> StableDiffusion3Pipeline:
    """Stable Diffusion 3's classes: MM-DiT trained by flow matching, two CLIP text encoders, no
    T5."""
    tokenizer = build_tokenizer()
    encoders = [CLIPTextModelWithProjection(_text_config(tokenizer, **text)) for _ in range(2)]
    transformer = SD3Transformer2DModel(
        sample_size=8,
        patch_size=1,
        in_channels=vae.config.latent_channels,
        out_channels=vae.config.latent_channels,
        num_layers=layers,
        attention_head_dim=32,
        num_attention_heads=width // 32,
        joint_attention_dim=2 * text["width"],
        caption_projection_dim=width,
        pooled_projection_dim=2 * text["width"],
        pos_embed_max_size=16,
    )
    return StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=shift),
        vae=vae,
        text_encoder=encoders[0],
        tokenizer=tokenizer,
        text_encoder_2=encoders[1],
        tokenizer_2=tokenizer,
        text_encoder_3=None,
        tokenizer_3=None,
    )


def build_flux(vae: AutoencoderKL, width: int, layers: int, single_layers: int, text: dict) -> FluxPipeline:
    """FLUX.1-schnell's classes: MM-DiT of joint and single blocks on packed latents, no embedded
    guidance, a T5 and a CLIP text encoder."""
    tokenizer, tokenizer_2 = build_tokenizer(), build_t5_tokenizer()
    heads = width // 32
    transformer = FluxTransformer2DModel(
        patch_size=1,
        in_channels=4 * vae.config.latent_channels,
        num_layers=layers,
        num_single_layers=single_layers,
        attention_head_dim=32,
        num_attention_heads=heads,
        joint_attention_dim=text["width"],
        pooled_projection_dim=text["width"],
        guidance_embeds=False,
        axes_dims_rope=(8, 12, 12),
    )
    t5 = T5Config(
        vocab_size=len(tokenizer_2),
        d_model=text["width"],
        d_kv=32,
        d_ff=4 * text["width"],
        num_layers=text["layers"],
        num_heads=text["width"] // 32,
        dropout_rate=0.0,
        feed_forward_proj="gated-gelu",
        is_encoder_decoder=False,
        use_cache=False,
    )
    return FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=1.0),
        vae=vae,
        text_encoder=CLIPTextModel(_text_config(tokenizer, **text)),
        tokenizer=tokenizer,
        text_encoder_2=T5EncoderModel(t5),
        tokenizer_2=tokenizer_2,
        transformer=transformer,
    )
