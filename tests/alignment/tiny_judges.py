"""Tiny judges with random weights, in the classes and the files of the real ones. They know the words of the shapes."""

from collections import OrderedDict
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import nn
from transformers import (
    BlipConfig,
    BlipForQuestionAnswering,
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPTokenizer,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

from mi_ray.shapes.model import build_tokenizer


def clip_config(tokenizer: CLIPTokenizer, positions: int = 12, size: int = 16) -> CLIPConfig:
    both = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    both |= {"projection_dim": 24, "hidden_act": "gelu", "initializer_range": 0.5}
    special = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    text = {**both, **special, "vocab_size": len(tokenizer), "max_position_embeddings": positions}
    vision = {**both, "image_size": size, "patch_size": 8}
    return CLIPConfig(text_config=text, vision_config=vision, projection_dim=24)


def save_clip(folder: Path) -> CLIPModel:
    tokenizer = build_tokenizer()
    torch.manual_seed(2)
    model = CLIPModel(clip_config(tokenizer)).eval()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model


class _Block(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = nn.MultiheadAttention(width, 4, batch_first=True)
        parts = {"c_fc": nn.Linear(width, 2 * width), "gelu": nn.GELU(), "c_proj": nn.Linear(2 * width, width)}
        self.mlp = nn.Sequential(OrderedDict(parts))

    def forward(self, x, mask=None):
        inner = self.ln_1(x)
        x = x + self.attn(inner, inner, inner, need_weights=False, attn_mask=mask)[0]
        return x + self.mlp(self.ln_2(x))


class _Tower(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.resblocks = nn.ModuleList([_Block(width) for _ in range(2)])

    def forward(self, x, mask=None):
        for block in self.resblocks:
            x = block(x, mask)
        return x


class _Vision(nn.Module):
    def __init__(self, width: int, out: int, patches: int, patch: int):
        super().__init__()
        self.class_embedding = nn.Parameter(torch.randn(width))
        self.positional_embedding = nn.Parameter(torch.randn(patches + 1, width))
        self.proj = nn.Parameter(torch.randn(width, out))
        self.conv1 = nn.Conv2d(3, width, patch, patch, bias=False)
        self.ln_pre, self.ln_post, self.transformer = nn.LayerNorm(width), nn.LayerNorm(width), _Tower(width)

    def forward(self, pixels):
        x = self.conv1(pixels).flatten(2).mT
        x = torch.cat([self.class_embedding.expand(len(x), 1, -1), x], 1) + self.positional_embedding
        return self.ln_post(self.transformer(self.ln_pre(x))[:, 0]) @ self.proj


class OpenClip(nn.Module):
    """The architecture and the names of open_clip's CLIP, with torch's own attention: the layout of HPS v2.1."""

    def __init__(self, config: CLIPConfig):
        super().__init__()
        text, vision, out = config.text_config, config.vision_config, config.projection_dim
        patches = (vision.image_size // vision.patch_size) ** 2
        self.positional_embedding = nn.Parameter(torch.randn(text.max_position_embeddings, text.hidden_size))
        self.text_projection = nn.Parameter(torch.randn(text.hidden_size, out))
        self.logit_scale = nn.Parameter(torch.tensor(2.0))
        self.visual = _Vision(vision.hidden_size, out, patches, vision.patch_size)
        self.transformer, self.ln_final = _Tower(text.hidden_size), nn.LayerNorm(text.hidden_size)
        self.token_embedding = nn.Embedding(text.vocab_size, text.hidden_size)
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=0.4)

    def cosine(self, pixels, ids):
        """The cosine of one image (1, 3, h, w) and the tokens (1, t) of a text whose last token is its end."""
        mask = torch.full((ids.shape[1],) * 2, float("-inf")).triu(1)
        x = self.token_embedding(ids) + self.positional_embedding[: ids.shape[1]]
        text = self.ln_final(self.transformer(x, mask))[:, -1] @ self.text_projection
        return float(nn.functional.cosine_similarity(self.visual(pixels), text))


# The special tokens have the order of BLIP's vocabulary: [DEC] begins an answer, [ENC] a question.
BLIP_WORDS = [
    "[PAD]",
    "[UNK]",
    "[CLS]",
    "[SEP]",
    "yes",
    "no",
    "a",
    "red",
    "blue",
    "green",
    "circle",
    "square",
    "star",
    "man",
    "old",
    "dog",
    "?",
    "[DEC]",
    "[ENC]",
]


def save_word_tokenizer(words: list[str], folder: Path) -> dict[str, int]:
    """Write a tokenizer of whole words that begin with [PAD], [UNK], [CLS], [SEP]. Returns the number of each word."""
    ids = {word: index for index, word in enumerate(words)}
    inside = Tokenizer(models.WordLevel(ids, unk_token="[UNK]"))
    inside.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    inside.post_processor = processors.TemplateProcessing("[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)])
    PreTrainedTokenizerFast(tokenizer_object=inside, pad_token="[PAD]", unk_token="[UNK]").save_pretrained(folder)
    return ids


def save_blip(folder: Path) -> Path:
    ids = save_word_tokenizer(BLIP_WORDS, folder)
    both = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    both |= {"initializer_range": 0.25}
    special = {"pad_token_id": 0, "sep_token_id": ids["[SEP]"], "bos_token_id": ids["[DEC]"]}
    text = {**both, **special, "vocab_size": len(ids), "max_position_embeddings": 40, "encoder_hidden_size": 32}
    vision = {**both, "image_size": 16, "patch_size": 8}
    torch.manual_seed(0)
    BlipForQuestionAnswering(BlipConfig(text_config=text, vision_config=vision)).save_pretrained(folder)
    return folder


CHAT_WORDS = [
    "<pad>",
    "<unk>",
    "<image>",
    "USER:",
    "ASSISTANT:",
    "Yes",
    "yes",
    "No",
    "no",
    "two",
    "2",
    "Two",
    "How",
    "many",
]


def save_chat(folder: Path) -> Path:
    """LLaVA's classes: those of Qwen3-VL need torchvision."""
    ids = {word: index for index, word in enumerate(CHAT_WORDS)}
    inside = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    inside.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inside, pad_token="<pad>", unk_token="<unk>", extra_special_tokens={"image_token": "<image>"}
    )
    template = (
        "{% for m in messages %}USER: {% for c in m['content'] %}"
        "{{ '<image> ' if c['type'] == 'image' else c['text'] }}{% endfor %}{% endfor %} ASSISTANT:"
    )
    images = CLIPImageProcessor(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    LlavaProcessor(
        images, tokenizer, patch_size=8, vision_feature_select_strategy="default", chat_template=template,
        num_additional_image_tokens=1,
    ).save_pretrained(folder)  # fmt: skip
    both = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    both |= {"initializer_range": 0.3}
    text = LlamaConfig(**both, vocab_size=len(ids), max_position_embeddings=64, num_key_value_heads=4)
    vision = CLIPVisionConfig(**both, image_size=16, patch_size=8, projection_dim=32)
    torch.manual_seed(0)
    LlavaForConditionalGeneration(
        LlavaConfig(vision_config=vision, text_config=text, image_token_index=ids["<image>"])
    ).save_pretrained(folder)
    return folder
