"""`janus_tiny` from nothing: transformers' Janus classes, small, with a word-level tokenizer."""

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import (
    GenerationConfig,
    JanusConfig,
    JanusForConditionalGeneration,
    JanusImageProcessor,
    JanusProcessor,
    JanusVisionConfig,
    JanusVQVAEConfig,
    LlamaConfig,
    PreTrainedTokenizerFast,
)

from t2i_rl.shapes.vocabulary import ASSISTANT, BOI, BOS, EOI, EOS, IMAGE, PAD, SPECIAL, USER, WORDS, vocabulary

# Content is a string, or a list of parts in transformers' form, laid out as Janus-Pro's own
# template does it: lines around an image.
CHAT_TEMPLATE = (
    "{% macro worded(content) %}"
    "{% if content is string %}{{ content.strip() }}"
    "{% else %}{% for part in content %}"
    "{% if part['type'] == 'image' %}"
    "{{ ('' if loop.first else '\n') + '<image_placeholder>' + ('' if loop.last else '\n') }}"
    "{% elif part['type'] == 'text' %}"
    "{% set text = part['text'].lstrip() if loop.first else part['text'] %}"
    "{% set text = text.rstrip() if loop.last else text %}"
    "{{ (' ' if not loop.first and loop.previtem['type'] == 'text' else '') + text }}"
    "{% else %}{{ raise_exception('a part of a message is of type text or image, not ' + part['type']) }}{% endif %}"
    "{% endfor %}{% endif %}"
    "{% endmacro %}"
    "{% for message in messages %}"
    "{% if message['role'] == 'system' %}"
    "{{ (message['content'] if message['content'] is string else worded(message['content'])) + '\n\n' }}"
    "{% elif message['role'] == 'user' %}{{ '<|User|>: ' + worded(message['content']) + '\n\n' }}"
    "{% else %}{{ '<|Assistant|>: ' + worded(message['content']) + '<｜end▁of▁sentence｜>' }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|Assistant|>:' }}{% endif %}"
)


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Word-level tokenizer: BOS in front, left padding, decoding that mends punctuation."""
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(vocabulary())}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(WORDS, behavior="removed", invert=True)
    tokenizer.decoder = decoders.WordPiece(prefix="##", cleanup=True)
    tokenizer.add_special_tokens([*SPECIAL, "<unk>"])
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", special_tokens=[(BOS, tokenizer.token_to_id(BOS))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        unk_token="<unk>",
        padding_side="left",
        model_max_length=512,
        chat_template=CHAT_TEMPLATE,
        extra_special_tokens={
            "boi_token": BOI,
            "eoi_token": EOI,
            "image_token": IMAGE,
            "user_token": USER,
            "assistant_token": ASSISTANT,
        },
    )


def build_processor(image_size: int = 32) -> JanusProcessor:
    """Processor of the real class for `image_size` pixels."""
    image_processor = JanusImageProcessor(
        size={"height": image_size, "width": image_size},
        min_size=image_size,
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
    )
    return JanusProcessor(
        image_processor, build_tokenizer(), chat_template=CHAT_TEMPLATE, num_image_tokens=(image_size // 4) ** 2
    )


def build_model(
    width: int = 192, layers: int = 6, codes: int = 512, image_size: int = 32
) -> JanusForConditionalGeneration:
    """A randomly initialised `JanusForConditionalGeneration`, every part present.

    `width` and `layers` are the dials. Images are `image_size` pixels, 4 pixels a token: 64 tokens
    at 32. The global torch generator seeds the weights.
    """
    tokenizer = build_tokenizer()
    ids = tokenizer.convert_tokens_to_ids
    config = JanusConfig(
        text_config=LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=width,
            intermediate_size=3 * width,
            num_hidden_layers=layers,
            num_attention_heads=width // 32,
            max_position_embeddings=512,
            bos_token_id=ids(BOS),
            eos_token_id=ids(EOS),
            pad_token_id=ids(PAD),
        ),
        vision_config=JanusVisionConfig(
            hidden_size=96,
            num_hidden_layers=2,
            num_attention_heads=4,
            mlp_ratio=2.0,
            image_size=image_size,
            patch_size=4,
            projection_dim=width,
            num_image_tokens=(image_size // 4) ** 2,
        ),
        vq_config=JanusVQVAEConfig(
            embed_dim=8,
            num_embeddings=codes,
            latent_channels=64,
            base_channels=32,
            channel_multiplier=[1, 2, 2],
            num_res_blocks=1,
            projection_dim=width,
            image_token_embed_dim=width,
        ),
        image_token_id=ids(IMAGE),
        tie_word_embeddings=False,
    )
    model = JanusForConditionalGeneration(config)
    model.generation_config = GenerationConfig(
        bos_token_id=ids(BOS),
        eos_token_id=ids(EOS),
        pad_token_id=ids(PAD),
        generation_kwargs={"boi_token_id": ids(BOI)},
    )
    return model
