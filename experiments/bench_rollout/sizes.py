"""Random Janus models of four sizes.

They are the shipped tiny one, one in the middle, and the exact shapes of Janus-Pro-1B and 7B.
"""

import torch
from transformers import JanusConfig, JanusForConditionalGeneration, LlamaConfig
from transformers.models.janus.configuration_janus import JanusVisionConfig, JanusVQVAEConfig

# width, layers, heads, MLP width, vocabulary, codes, image tokens; Pro's are deepseek-community/Janus-Pro-1B's and 7B's
SIZES = {
    "tiny": (192, 6, 6, 576, 128, 512, 64),
    "mid": (512, 12, 8, 1376, 8192, 4096, 256),
    "1b": (2048, 24, 16, 5632, 102400, 16384, 576),
    "7b": (4096, 30, 32, 11008, 102400, 16384, 576),
}
SPECIAL = {"bos": 0, "eos": 1, "pad": 2, "boi": 3}


def build(size: str, dtype: torch.dtype, device: torch.device) -> JanusForConditionalGeneration:
    """A model with random weights, made on `device`.

    Only what a rollout and an update touch has its real size; the vision tower and the VQ decoder
    have not.
    """
    width, layers, heads, mlp, vocabulary, codes, tokens = SIZES[size]
    config = JanusConfig(
        text_config=LlamaConfig(
            vocab_size=vocabulary,
            hidden_size=width,
            intermediate_size=mlp,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=heads,
            max_position_embeddings=4096,
            bos_token_id=SPECIAL["bos"],
            eos_token_id=SPECIAL["eos"],
            pad_token_id=SPECIAL["pad"],
        ),
        vision_config=JanusVisionConfig(
            hidden_size=64,
            num_hidden_layers=1,
            num_attention_heads=2,
            image_size=16 * int(tokens**0.5),
            patch_size=16,
            projection_dim=width,
            num_image_tokens=tokens,
        ),
        vq_config=JanusVQVAEConfig(
            embed_dim=8,
            num_embeddings=codes,
            latent_channels=64,
            base_channels=32,
            channel_multiplier=[1, 2],
            num_res_blocks=1,
            projection_dim=width,
            image_token_embed_dim=width,
        ),
        image_token_id=4,
        tie_word_embeddings=False,
    )
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with device:
            model = JanusForConditionalGeneration(config)
    finally:
        torch.set_default_dtype(before)
    model.generation_config.update(bos_token_id=0, eos_token_id=1, pad_token_id=2)
    model.generation_config.generation_kwargs = {"boi_token_id": SPECIAL["boi"]}
    return model.eval()
