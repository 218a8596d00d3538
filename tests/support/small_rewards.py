"""Small random checkpoints of the real reward classes, saved to a folder and loaded through the real path."""

import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from torch import nn
from transformers import PreTrainedTokenizerFast

WORDS = [
    "a",
    "an",
    "the",
    "of",
    "to",
    "is",
    "on",
    "and",
    "red",
    "green",
    "blue",
    "left",
    "right",
    "yes",
    "no",
    "Yes",
    "No",
    "?",
    ".",
    ",",
    ":",
    "car",
    "dog",
    "cat",
    "bench",
    "zebra",
    "teddy",
    "bear",
    "traffic",
    "light",
    "cup",
    "photo",
    "image",
    "prompt",
    "user",
    "assistant",
    "circle",
    "square",
    "cross",
    "three",
    "two",
    "computer",
    "mouse",
    "pad",
]


def tokenizer(special: dict[str, str], extra: tuple[str, ...] = (), post: str | None = None) -> PreTrainedTokenizerFast:
    """Words and single characters; `post` is how a text is framed, such as `[CLS] $A [SEP]`."""
    names = [*dict.fromkeys([*special.values(), *extra, *WORDS, *map(chr, range(33, 127)), "Ġ"])]
    vocabulary = {name: number for number, name in enumerate(names)}
    core = Tokenizer(models.WordPiece(vocabulary, unk_token=special["unk_token"], continuing_subword_prefix=""))
    core.normalizer = normalizers.Sequence([normalizers.NFC()])
    core.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    if post:
        used = [(name, vocabulary[name]) for name in special.values() if name in post]
        core.post_processor = processors.TemplateProcessing(single=post, special_tokens=used)
    return PreTrainedTokenizerFast(tokenizer_object=core, **special, additional_special_tokens=list(extra))


BERT = {"unk_token": "[UNK]", "pad_token": "[PAD]", "cls_token": "[CLS]", "sep_token": "[SEP]", "mask_token": "[MASK]"}


def spread(model, scale: float = 4.0):
    """Make the outputs of random weights differ visibly."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1 and "embed" not in name:
                parameter.mul_(scale)
    return model.eval()


class Tower(nn.Module):
    """A transformer as open_clip lays it out: joint attention projections, exact GELU, residuals."""

    def __init__(self, width: int, layers: int, heads: int, mlp: int):
        super().__init__()
        self.resblocks = nn.ModuleList()
        for _ in range(layers):
            block = nn.Module()
            block.ln_1, block.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
            block.attn = nn.MultiheadAttention(width, heads, batch_first=True)
            block.mlp = nn.Module()
            block.mlp.c_fc, block.mlp.c_proj = nn.Linear(width, mlp), nn.Linear(mlp, width)
            self.resblocks.append(block)

    def forward(self, x, mask=None):
        for block in self.resblocks:
            y = block.ln_1(x)
            x = x + block.attn(y, y, y, need_weights=False, attn_mask=mask)[0]
            x = x + block.mlp.c_proj(nn.functional.gelu(block.mlp.c_fc(block.ln_2(x))))
        return x


class OpenClip(nn.Module):
    """CLIP with open_clip's parameter names, small."""

    def __init__(self, vocabulary: int):
        super().__init__()
        self.visual = nn.Module()
        self.visual.class_embedding = nn.Parameter(torch.randn(32))
        self.visual.positional_embedding = nn.Parameter(torch.randn(5, 32))
        self.visual.proj = nn.Parameter(torch.randn(32, 24))
        self.visual.conv1 = nn.Conv2d(3, 32, 8, 8, bias=False)
        self.visual.ln_pre, self.visual.ln_post = nn.LayerNorm(32), nn.LayerNorm(32)
        self.visual.transformer, self.transformer = Tower(32, 2, 2, 48), Tower(40, 3, 4, 64)
        self.token_embedding, self.ln_final = nn.Embedding(vocabulary, 40), nn.LayerNorm(40)
        self.positional_embedding = nn.Parameter(torch.randn(24, 40))
        self.text_projection = nn.Parameter(torch.randn(40, 24))
        self.logit_scale = nn.Parameter(torch.tensor(4.6))
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=0.3)

    def cosine(self, pixels, ids, end: int) -> torch.Tensor:
        x = self.visual.conv1(pixels).flatten(2).transpose(1, 2)
        x = torch.cat([self.visual.class_embedding.expand(len(x), 1, -1), x], 1) + self.visual.positional_embedding
        image = self.visual.ln_post(self.visual.transformer(self.visual.ln_pre(x))[:, 0]) @ self.visual.proj
        y = self.token_embedding(ids) + self.positional_embedding[: ids.shape[1]]
        y = self.ln_final(self.transformer(y, torch.full((ids.shape[1],) * 2, float("-inf")).triu(1)))
        text = y[torch.arange(len(ids)), (ids == end).int().argmax(-1)] @ self.text_projection
        return nn.functional.cosine_similarity(image, text)


def save_small_hps(folder) -> str:
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel

    torch.manual_seed(0)
    words = tokenizer(
        {"unk_token": "[UNK]", "bos_token": "[BOS]", "pad_token": "[PAD]", "eos_token": "[EOS]"}, post="[BOS] $A [EOS]"
    )
    common = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "hidden_act": "gelu",
    }
    text = {
        **common,
        "vocab_size": len(words),
        "max_position_embeddings": 24,
        "bos_token_id": 1,
        "eos_token_id": words.eos_token_id,
    }
    config = CLIPConfig(
        text_config=text, vision_config={**common, "image_size": 16, "patch_size": 8}, projection_dim=24
    )
    spread(CLIPModel(config)).save_pretrained(folder)
    words.save_pretrained(folder)
    CLIPImageProcessor(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}).save_pretrained(folder)
    return str(folder)


def save_small_hps_open_clip(folder) -> str:
    """As HPS v2.1 is published: `HPS_v2.1_compressed.pt` beside CLIP's tokenizer and image processor.

    The names in the file are open_clip's.
    """
    save_small_hps(folder)
    words = PreTrainedTokenizerFast.from_pretrained(folder)
    torch.manual_seed(0)
    torch.save({"state_dict": OpenClip(len(words)).state_dict()}, f"{folder}/HPS_v2.1_compressed.pt")
    return str(folder)


def save_small_gdino(folder) -> str:
    from transformers import BertConfig, GroundingDinoConfig, GroundingDinoForObjectDetection, SwinConfig
    from transformers.models.grounding_dino.image_processing_pil_grounding_dino import GroundingDinoImageProcessorPil

    torch.manual_seed(0)
    words = tokenizer(BERT, post="[CLS] $A [SEP]")
    config = GroundingDinoConfig(
        backbone_config=SwinConfig(
            image_size=32,
            patch_size=4,
            embed_dim=8,
            depths=[1, 1, 1, 1],
            num_heads=[1, 1, 2, 2],
            window_size=2,
            out_indices=[2, 3, 4],
        ),
        text_config=BertConfig(
            vocab_size=len(words),
            hidden_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=32,
            max_position_embeddings=64,
        ),
        num_queries=12,
        encoder_layers=1,
        decoder_layers=2,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        d_model=32,
        encoder_ffn_dim=32,
        decoder_ffn_dim=32,
        num_feature_levels=4,
        max_text_len=64,
    )
    model = GroundingDinoForObjectDetection(config)
    spread(model, 1.0).save_pretrained(folder)
    words.save_pretrained(folder)
    GroundingDinoImageProcessorPil(size={"shortest_edge": 128, "longest_edge": 160}).save_pretrained(folder)
    return str(folder)


def save_small_git(folder) -> str:
    from transformers import CLIPImageProcessor, GitConfig, GitForCausalLM

    torch.manual_seed(0)
    words = tokenizer(BERT, post="[CLS] $A [SEP]")
    common = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = GitConfig(
        vision_config={**common, "image_size": 16, "patch_size": 8},
        vocab_size=len(words),
        max_position_embeddings=32,
        bos_token_id=2,
        eos_token_id=3,
        pad_token_id=1,
        **common,
    )
    spread(GitForCausalLM(config)).save_pretrained(folder)
    words.save_pretrained(folder)
    CLIPImageProcessor(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}).save_pretrained(folder)
    return str(folder)


def save_small_orm(folder) -> str:
    from transformers import (
        LlavaOnevisionConfig,
        LlavaOnevisionForConditionalGeneration,
        Qwen2Config,
        SiglipVisionConfig,
    )
    from transformers.models.llava_onevision.image_processing_pil_llava_onevision import (
        LlavaOnevisionImageProcessorPil,
    )

    torch.manual_seed(0)
    special = {"unk_token": "[UNK]", "pad_token": "[PAD]", "eos_token": "<|im_end|>"}
    words = tokenizer(special, extra=("<|im_start|>", "<image>"))
    common = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = LlavaOnevisionConfig(
        vision_config=SiglipVisionConfig(**common, image_size=16, patch_size=8, vision_use_head=False),
        text_config=Qwen2Config(**common, num_key_value_heads=1, vocab_size=len(words), max_position_embeddings=512),
        image_token_id=words.convert_tokens_to_ids("<image>"),
        image_grid_pinpoints=[[16, 16], [16, 32], [32, 16], [32, 32]],
        vision_feature_select_strategy="full",
        vision_feature_layer=-1,
        tie_word_embeddings=False,
    )
    spread(LlavaOnevisionForConditionalGeneration(config)).save_pretrained(folder)
    words.save_pretrained(folder)
    LlavaOnevisionImageProcessorPil(
        size={"height": 16, "width": 16}, image_grid_pinpoints=[[16, 16], [16, 32], [32, 16], [32, 32]]
    ).save_pretrained(folder)
    return str(folder)
